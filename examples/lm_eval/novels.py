"""The data of the two evaluation tasks, which are derived from a novel by fixed rules, without any download.

The novel is *Northanger Abbey*, on which no model in this repository is trained.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

NOVEL = Path(__file__).resolve().parents[1] / "data" / "northanger_abbey.txt"
CHOICES = 4


def paragraphs() -> list[str]:
    """Return the paragraphs of the novel, including the headings of chapters."""
    return NOVEL.read_text(encoding="utf-8").splitlines()


def chapters(**_: Any) -> dict[str, Dataset]:
    """Return the 31 chapters of the novel, whose perplexity is measured; each has about 14,000 characters.

    Returns:
        `{"test": rows}`, where each row has a `text` and its number, `chapter`.
    """
    texts: list[list[str]] = []
    for paragraph in paragraphs():
        if paragraph.startswith("CHAPTER "):
            texts.append([])
        elif texts:  # lines before the first chapter are left out
            texts[-1].append(paragraph)
    rows = [{"chapter": number, "text": "\n".join(text)} for number, text in enumerate(texts, start=1)]
    return {"test": Dataset.from_list(rows)}


def continuations(context_characters: int = 4000, items: int = 100, **_: Any) -> dict[str, Dataset]:
    """Return multiple-choice questions, each of which asks how the text continues.

    Let `L` be the number of long paragraphs, which have at least 25 words and enough text before them. Item `i` of `n`
    is about the long paragraph number `i * L // n`. Its context consists of as many whole paragraphs before it as
    needed to fill `context_characters`. The right choice is the first 20 words of the paragraph. The wrong choices are
    the first 20 words of the long paragraphs `L // 4`, `L // 2` and `3 * L // 4` further on, modulo `L`. The right
    choice has the index `i % 4`.

    Args:
        context_characters: smallest length of the context, from 1 to 50,000.
        items: number of questions, from 1 to 100.

    Returns:
        `{"test": rows}`, where each row has `context`, `choices` and `answer`, the index of the right one.

    Raises:
        ValueError: a number out of these bounds. A longer context could contain the wrong choices.
    """
    if not (0 < context_characters <= 50_000 and 0 < items <= 100):
        raise ValueError(
            "novel_continuation takes context_characters from 1 to 50,000 and items from 1 to 100, got "
            f"{context_characters} and {items}; change them in the task's yaml file"
        )
    lines = paragraphs()
    starts = []  # the number of characters before each line
    length = 0
    for line in lines:
        starts.append(length)
        length += len(line) + 1
    long = [i for i, line in enumerate(lines) if len(line.split()) >= 25 and starts[i] >= context_characters]
    rows = []
    for item in range(items):
        place = item * len(long) // items
        first = line = long[place]
        while starts[line] - starts[first] < context_characters:
            first -= 1
        chosen = [long[(place + quarter * len(long) // CHOICES) % len(long)] for quarter in range(CHOICES)]
        texts = [" ".join(lines[number].split()[:20]) for number in chosen]  # the right one first
        answer = item % CHOICES
        choices = texts[1 : answer + 1] + texts[:1] + texts[answer + 1 :]
        rows.append({"context": "\n".join(lines[first:line]), "choices": choices, "answer": answer})
    return {"test": Dataset.from_list(rows)}
