"""Read pairs of texts in two languages for `translate.py`, hold some out, and join them to passages."""

import gzip
from pathlib import Path

import datasets

Pair = tuple[str, str]  # source and target
VERSES = Path(__file__).parents[1] / "data" / "verses_en_es.tsv.gz"
PARAGRAPH = "¶ "  # the sign with which some verses of the King James Version begin; it is removed
LAST = "200"  # number of last pairs that are held out by default, if the data are not the verses
# books that share no passages with other books, unlike gospels and chronicles -> their first words, and the first words
# of the book after them
BOOKS = {
    "Ruth": ("Now it came to pass in the days when the judges ruled", "Now there was a certain man of Ramathaim"),
    "Esther": ("Now it came to pass in the days of Ahasuerus", "There was a man in the land of Uz"),
    "Jonah": ("Now the word of the LORD came unto Jonah", "The word of the LORD that came to Micah"),
    "James": ("James, a servant of God", "Peter, an apostle of Jesus Christ, to the strangers"),
}


def read_pairs(name: str | None, config: str | None, split: str, columns: list[str]) -> list[Pair]:
    """Return all pairs, in order.

    Args:
        name: a file of tab-separated pairs, or the path or Hub id of a data set; `None` for the verses.
        config: configuration of a data set that has several.
        split: split of a data set.
        columns: the two columns of a data set with the source and the target.

    Raises:
        ValueError: a line without a tab, columns that do not exist, or no pair.
    """
    path = VERSES if name is None else Path(name)
    pairs = read_file(path) if path.is_file() else read_data_set(str(name), config, split, columns)
    if not pairs:
        raise ValueError(f"--pairs must hold pairs of texts, got none in {path}; name another file")
    return pairs


def read_file(path: Path) -> list[Pair]:
    """Return the pairs in a file: the first two tab-separated columns of each line, unless one is blank."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [line.rstrip("\r\n").removeprefix(PARAGRAPH).split("\t") for line in file]
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise ValueError(
                f"{path} must have source, tab, target on each line, got {row[0]!r} on line {number}; fix it"
            )
    return [(row[0], row[1]) for row in rows if row[0].strip() and row[1].strip()]


def read_data_set(name: str, config: str | None, split: str, columns: list[str]) -> list[Pair]:
    """Return the pairs in two columns of a data set, with spaces in place of line breaks.

    A passage has one line per pair, so a text must not have several.
    """
    rows = datasets.load_dataset(name, config, split=split).flatten()
    if len(columns) != 2 or not {*columns} <= {*rows.column_names}:
        raise ValueError(f"--columns must be two of {rows.column_names}, got {columns}; name two of these")
    sources, targets = ([" ".join((text or "").split()) for text in rows[column]] for column in columns)
    return [pair for pair in zip(sources, targets, strict=True) if all(pair)]


def split_pairs(
    pairs: list[Pair], held_out: list[str] | None, is_verses: bool
) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """Split pairs into runs of consecutive pairs to train on and runs to evaluate on, which share no text.

    Args:
        pairs: all pairs, in order.
        held_out: what to evaluate on: names of books (for the verses), or one number of last pairs, or one file. By
            default all of `BOOKS`, or the last `LAST` pairs of other data.
        is_verses: whether the pairs are the verses.

    Raises:
        ValueError: the pairs to hold out do not exist, or no pair is left to train on.
    """
    held_out = held_out or ([*BOOKS] if is_verses else [LAST])
    single = held_out[0] if len(held_out) == 1 else ""
    places: list[range] = []  # of the held-out pairs, unless they are in a file
    if Path(single).is_file():
        evaluation = [read_file(Path(single))]
    else:
        places = [last(pairs, int(single))] if single.isdecimal() else [book(pairs, name) for name in held_out]
        evaluation = [pairs[place.start : place.stop] for place in places]
    train = unseen_runs(pairs, {i for place in places for i in place}, evaluation)
    if not train or not any(evaluation):
        raise ValueError(
            f"--held_out must be some of the {len(pairs)} pairs, not all, got {' '.join(held_out)}; hold out fewer"
        )
    return train, evaluation


def unseen_runs(pairs: list[Pair], taken: set[int], evaluation: list[list[Pair]]) -> list[list[Pair]]:
    """Return runs of consecutive pairs whose index is not `taken`, and which share no text with `evaluation`."""
    hidden = {plain(text) for run in evaluation for pair in run for text in pair}
    runs: list[list[Pair]] = [[]]
    for i, pair in enumerate(pairs):
        if i in taken or not hidden.isdisjoint(map(plain, pair)):
            runs.append([])  # a passage must not extend across a gap
        else:
            runs[-1].append(pair)
    return [run for run in runs if run]


def last(pairs: list[Pair], count: int) -> range:
    """Return the indices of the last `count` pairs."""
    return range(max(len(pairs) - count, 0), len(pairs))


def book(pairs: list[Pair], name: str) -> range:
    """Return the indices of a book's verses, found by its first words and the first words of the next book."""
    if name not in BOOKS:
        raise ValueError(
            f"--held_out must be books among {', '.join(BOOKS)}, a number or a file, got {name!r}; name one of these"
        )
    ends = []
    for words in BOOKS[name]:
        found = [i for i, (english, _) in enumerate(pairs) if english.startswith(words)]
        if len(found) != 1:
            raise ValueError(f"{name} needs one verse that begins with {words!r}, got {len(found)}; is the file whole?")
        ends += found
    return range(*ends)


def plain(text: str) -> str:
    """Return only the letters and digits of a text, in one case, to find texts that are equal but for the rest."""
    return "".join(filter(str.isalnum, text.casefold()))


def passages(runs: list[list[Pair]], size: int, reverse: bool = False) -> list[Pair]:
    """Join every `size` consecutive pairs to a passage with one line per pair; the last of a run may be shorter.

    Args:
        runs: runs of consecutive pairs.
        size: pairs per passage.
        reverse: swap source and target.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"--verses_per_example must be at least 1, got {size}; the default is 4")
    cut = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
    joined = [("\n".join(source), "\n".join(target)) for source, target in (zip(*part, strict=True) for part in cut)]
    return [(target, source) for source, target in joined] if reverse else joined


def spread(items: list, count: int) -> list:
    """Return `count` evenly spaced items of a list, or all of them if `count` is 0 or larger than the list."""
    count = min(count, len(items)) if count else len(items)
    return [items[i * len(items) // count] for i in range(count)]
