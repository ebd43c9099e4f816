"""Data of the two tasks, made from a novel by rule: the same items everywhere, and nothing to download.

The novel is *Northanger Abbey*, on which nothing in this repository is trained.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

NOVEL = Path(__file__).resolve().parents[1] / "data" / "northanger_abbey.txt"
CHOICES = 4


def paragraphs() -> list[str]:
    """Return the paragraphs of the novel; headings of chapters are some of them."""
    return NOVEL.read_text(encoding="utf-8").splitlines()


def chapters(**_: Any) -> dict[str, Dataset]:
    """Return the chapters, whose perplexity is measured: 31 texts of about 14,000 characters.

    Returns:
        `{"test": rows}`, where each row has a `text` and its number, `chapter`.
    """
    texts: list[list[str]] = []
    for paragraph in paragraphs():
        if paragraph.startswith("CHAPTER "):
            texts.append([])
        elif texts:  # what comes before the first chapter is left out
            texts[-1].append(paragraph)
    rows = [{"chapter": number, "text": "\n".join(text)} for number, text in enumerate(texts, start=1)]
    return {"test": Dataset.from_list(rows)}


def continuations(context_characters: int = 4000, items: int = 100, **_: Any) -> dict[str, Dataset]:
    """Return questions: how does the text go on?

    Item `i` of `n` is about one of the long paragraphs (of 25 words and more, with enough text before them): number
    `i * L // n` of these `L`. It begins with the whole paragraphs before it, as many as needed to fill
    `context_characters`. The right choice is the paragraph's first 20 words; the wrong ones are those of the long
    paragraphs `L // 4`, `L // 2` and `3 * L // 4` further on, around the end. The right one stands at place `i % 4`.

    Args:
        context_characters: least length of the text before the choices, from 1 to 50,000.
        items: number of questions, from 1 to 100.

    Returns:
        `{"test": rows}`, where each row has `context`, `choices` and `answer`, the index of the right one.

    Raises:
        ValueError: a number out of these bounds; with a longer text before them, wrong choices would stand in it.
    """
    if not (0 < context_characters <= 50_000 and 0 < items <= 100):
        raise ValueError(
            "novel_continuation takes context_characters from 1 to 50,000 and items from 1 to 100, got "
            f"{context_characters} and {items}"
        )
    lines = paragraphs()
    ends, length = [], 0
    for line in lines:  # the number of characters up to each line
        ends.append(length)
        length += len(line) + 1
    long = [i for i, line in enumerate(lines) if len(line.split()) >= 25 and ends[i] >= context_characters]
    rows = []
    for item in range(items):
        place = item * len(long) // items
        first = line = long[place]
        while ends[line] - ends[first] < context_characters:
            first -= 1
        others = [long[(place + quarter * len(long) // CHOICES) % len(long)] for quarter in range(CHOICES)]
        texts = [" ".join(lines[other].split()[:20]) for other in others]
        answer = item % CHOICES
        choices = texts[1 : answer + 1] + texts[:1] + texts[answer + 1 :]
        rows.append({"context": "\n".join(lines[first:line]), "choices": choices, "answer": answer})
    return {"test": Dataset.from_list(rows)}
