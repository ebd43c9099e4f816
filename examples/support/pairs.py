"""Texts in two languages for `translate.py`: files and data sets of pairs, what of them is held out, and passages."""

import gzip
from pathlib import Path

import datasets

Pair = tuple[str, str]  # source and target
VERSES = Path(__file__).parents[1] / "data" / "verses_en_es.tsv.gz"
PARAGRAPH = "¶ "  # begins some verses of the King James Version
LAST = "200"  # pairs held out of other data than the verses
# books without a parallel elsewhere, unlike gospels and chronicles: how they begin, and how the book after them does
BOOKS = {
    "Ruth": ("Now it came to pass in the days when the judges ruled", "Now there was a certain man of Ramathaim"),
    "Esther": ("Now it came to pass in the days of Ahasuerus", "There was a man in the land of Uz"),
    "Jonah": ("Now the word of the LORD came unto Jonah", "The word of the LORD that came to Micah"),
    "James": ("James, a servant of God", "Peter, an apostle of Jesus Christ, to the strangers"),
}


def read_pairs(name: str | None, config: str | None, split: str, columns: list[str]) -> list[Pair]:
    """Return all pairs, in order.

    Args:
        name: a file of tab-separated pairs, or the path or Hub id of a data set; the verses if left out.
        config, split, columns: of a data set.
    Raises:
        ValueError: a line without a tab, columns that do not exist, or no pair.
    """
    path = VERSES if name is None else Path(name)
    pairs = read_file(path) if path.is_file() else read_data_set(str(name), config, split, columns)
    if not pairs:
        raise ValueError(f"--pairs must hold pairs of texts, got none in {path}")
    return pairs


def read_file(path: Path) -> list[Pair]:
    """Return the first two columns of each line; there may be more. Pairs with a blank side are left out."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [line.rstrip("\r\n").removeprefix(PARAGRAPH).split("\t") for line in file]
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise ValueError(f"{path} must have source, tab, target on each line, got {row[0]!r} on line {number}")
    return [(row[0], row[1]) for row in rows if row[0].strip() and row[1].strip()]


def read_data_set(name: str, config: str | None, split: str, columns: list[str]) -> list[Pair]:
    """Return two columns of a data set; line breaks become spaces, as a passage has a line for each pair."""
    rows = datasets.load_dataset(name, config, split=split).flatten()
    if len(columns) != 2 or not {*columns} <= {*rows.column_names}:
        raise ValueError(f"--columns must be two of {rows.column_names}, got {columns}")
    sources, targets = ([" ".join((text or "").split()) for text in rows[column]] for column in columns)
    return [pair for pair in zip(sources, targets, strict=True) if all(pair)]


def split_pairs(
    pairs: list[Pair], held_out: list[str] | None, is_verses: bool
) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """Return runs of consecutive pairs to train on, and runs held out, no text of which is among the others.

    Args:
        held_out: books of the verses, or how many of the last pairs, or a file; by default all of `BOOKS`, or `LAST`.
    Raises:
        ValueError: what is held out does not exist, or nothing is left to train on.
    """
    held_out = held_out or ([*BOOKS] if is_verses else [LAST])
    single, places = held_out[0] if len(held_out) == 1 else "", []
    if Path(single).is_file():
        evaluation = [read_file(Path(single))]
    else:
        places = [last(pairs, int(single))] if single.isdecimal() else [book(pairs, name) for name in held_out]
        evaluation = [pairs[place.start : place.stop] for place in places]
    train = unseen_runs(pairs, {i for place in places for i in place}, evaluation)
    if not train or not any(evaluation):
        raise ValueError(f"--held_out must be some of the {len(pairs)} pairs, not all, got {' '.join(held_out)}")
    return train, evaluation


def unseen_runs(pairs: list[Pair], taken: set[int], evaluation: list[list[Pair]]) -> list[list[Pair]]:
    """Return runs of the pairs that are not taken and share no text with those to evaluate on."""
    hidden = {plain(text) for run in evaluation for pair in run for text in pair}
    runs: list[list[Pair]] = [[]]
    for i, pair in enumerate(pairs):
        if i in taken or not hidden.isdisjoint(map(plain, pair)):
            runs.append([])  # a passage must not go on behind a gap
        else:
            runs[-1].append(pair)
    return [run for run in runs if run]


def last(pairs: list[Pair], count: int) -> range:
    """Return where the last `count` pairs are."""
    return range(max(len(pairs) - count, 0), len(pairs))


def book(pairs: list[Pair], name: str) -> range:
    """Return where a book of the verses is: verses have no numbers, so by its first words and those of the next."""
    if name not in BOOKS:
        raise ValueError(f"--held_out must be books among {', '.join(BOOKS)}, a number or a file, got {name!r}")
    ends = []
    for words in BOOKS[name]:
        found = [i for i, (english, _) in enumerate(pairs) if english.startswith(words)]
        if len(found) != 1:
            raise ValueError(f"{name} needs one verse that begins with {words!r}, got {len(found)}; is the file whole?")
        ends += found
    return range(*ends)


def plain(text: str) -> str:
    """Return letters and digits alone, to find texts that differ in nothing else."""
    return "".join(filter(str.isalnum, text.casefold()))


def passages(runs: list[list[Pair]], size: int, reverse: bool = False) -> list[Pair]:
    """Cut runs into passages of `size` pairs, a line each; the last of a run may be shorter."""
    if size < 1:
        raise ValueError(f"--verses_per_example must be at least 1, got {size}")
    cut = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
    joined = [("\n".join(source), "\n".join(target)) for source, target in (zip(*part, strict=True) for part in cut)]
    return [(target, source) for source, target in joined] if reverse else joined


def spread(items: list, count: int) -> list:
    """Return `count` items, evenly spread, or all of them for 0."""
    count = min(count, len(items)) if count else len(items)
    return [items[i * len(items) // count] for i in range(count)]
