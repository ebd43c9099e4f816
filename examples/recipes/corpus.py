"""Read rows of tokens to train on from files, folders and data sets on the Hub, and hide facts in them."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.support.long_texts import ROOM, facts, hide, pass_key

DATA = Path(__file__).resolve().parents[1] / "data"
NOVELS = [str(DATA / f"{name}.txt") for name in ("pride_and_prejudice", "sense_and_sensibility", "emma")]
PROGRAMS = str(Path(torch.nn.__file__).parent)  # the source code of torch.nn: 400,000 tokens of Python, BSD-3-Clause
SUFFIXES = (".txt", ".md", ".rst", ".py")  # of the files that are read in a folder
OTHERS = ("Farid", "Greta", "Hugo", "Irene", "Jonas", "Katya", "Louis", "Maria", "Nils", "Olga", "Paolo", "Rosa")


def read_rows(
    sources: Sequence[str], tokenizer: Tokenizer, length: int, count: int, column: str = "text", seed: int = 0
) -> list[list[int]]:
    """Return up to `count` rows of `length` token ids in random order, with an equal share from each source.

    Args:
        sources: files and folders, from which evenly spaced rows are taken (the files of a folder are joined in the
            order of their names); and Hub ids of data sets, from which the first rows are taken.
        tokenizer: the model's tokenizer.
        length: tokens of a row.
        count: largest number of rows.
        column: column of a data set that holds the text.
        seed: seed of the order.

    Raises:
        ValueError: a source with less text than a row.
    """
    rows = []
    for number, source in enumerate(sources):
        wanted = len(range(number, count, len(sources)))
        found = cut(source_texts(source, column), tokenizer, length)
        if Path(source).exists():
            every = list(found)
            picked = [every[i * len(every) // wanted] for i in range(wanted)] if len(every) > wanted else every
        else:
            picked = list(itertools.islice(found, wanted))
        if wanted and not picked:
            raise ValueError(f"{source} must have {length} tokens or more, got fewer; take more text or shorter rows")
        rows += picked
    random.Random(seed).shuffle(rows)
    return rows


def source_texts(source: str, column: str) -> Iterator[str]:
    """Yield the texts of a source: a folder's files, a file, or the rows of a data set on the Hub."""
    path = Path(source)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                yield file.read_text(encoding="utf-8")
    elif path.is_file():
        yield path.read_text(encoding="utf-8")
    else:
        for row in datasets.load_dataset(source, split="train", streaming=True):
            yield row[column]


def cut(texts: Iterator[str], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Yield rows of `length` tokens from joined texts, with the end-of-text token after each; drop the rest."""
    left: list[int] = []
    for text in texts:
        left += [*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
        whole = len(left) // length * length
        yield from (left[i : i + length] for i in range(0, whole, length))
        left = left[whole:]


def with_facts(rows: list[list[int]], tokenizer: Tokenizer, seed: int = 0) -> list[list[int]]:
    """Hide four facts in each row, and ask for them towards its end; the lengths of rows do not change.

    The facts are a pass key, and the pass keys of three people.
    """
    asking = []
    for number, row in enumerate(rows):
        choice = random.Random(seed + number)
        prose = torch.tensor(row[: len(row) - ROOM])
        hidden = [pass_key(choice.random(), choice.randrange(2**31))]
        hidden += facts([choice.random() for _ in range(3)], choice.randrange(2**31), choice.sample(OTHERS, 3))
        ids, _ = hide(tokenizer, prose, sorted(hidden, key=lambda fact: fact.depth))
        asking.append((ids.tolist() + row[len(prose) :])[: len(row)])
    return asking
