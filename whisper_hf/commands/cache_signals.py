"""Store a teacher's predictions for a data set, to distil any number of students from them.

The data set is a folder made by `datasets.Dataset.save_to_disk`, a text file (one document), a JSON-lines file (one
document a line), or a Hub id. If it has no column `input_ids`, its texts are tokenized, cut into pieces of --max-length
tokens, and written to FOLDER/data, which is then the data set to train on. An interrupted run resumes where it stopped.

example:
  whisper-hf cache-signals --teacher MODEL --dataset novel.txt --output signals --top-k 64
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoint_io import UNTRUSTED, load_causal_lm
from ..distillation.signal_writer import write_signals

if TYPE_CHECKING:
    import datasets

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--teacher", required=True, metavar="MODEL", help="folder or Hub id of a causal language model")
    add("--dataset", required=True, metavar="DATA", help="folder, text or JSON-lines file, or Hub id")
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    add("--top-k", type=int, default=64, metavar="N", help="likeliest tokens to store (default: %(default)s)")
    add("--samples", type=int, metavar="N", help="store N drawn tokens instead; 12 or more")
    add("--temperature", type=float, default=1.0, metavar="X", help="temperature of the softmax (default: %(default)s)")
    add("--tokenizer", metavar="MODEL", help="folder or Hub id (default: the teacher's)")
    add("--split", default="train", metavar="NAME", help="split of the data set (default: %(default)s)")
    add(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column of the texts, if not tokenized (default: %(default)s)",
    )
    add("--max-length", type=positive, default=1024, metavar="N", help="tokens per piece (default: %(default)s)")
    add("--batch-size", type=positive, default=8, metavar="N", help="examples at once (default: %(default)s)")
    add("--dtype", default="auto", choices=DTYPES, help="dtype of the teacher's weights (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the drawn tokens (default: %(default)s)")


def positive(text: str) -> int:
    """Read a positive integer."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def read_dataset(name: str, split: str) -> "datasets.Dataset":
    """Read a folder, a file or a data set of the Hub.

    Raises:
        ValueError: a folder with several splits but not this one, or a file that is empty or cannot be read.
    """
    import datasets

    path = Path(name)
    if path.is_dir():
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict) and split not in found:
            raise ValueError(f"{name} has no split {split!r}; expected one of {', '.join(found)}")
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    if path.is_file():
        is_json = path.suffix in (".json", ".jsonl")
        kind, options = ("json", {}) if is_json else ("text", {"sample_by": "document"})
        if not path.stat().st_size:
            raise ValueError(f"{name} must hold text, got an empty file")
        try:
            return datasets.load_dataset(kind, data_files=name, split="train", **options)
        except datasets.exceptions.DatasetGenerationError as error:
            expected = "a JSON object on each line" if is_json else "text in UTF-8"
            raise ValueError(f"{name} must hold {expected}, got: {error.__cause__}; see --dataset") from error
    return datasets.load_dataset(name, split=split)


def tokenize(
    dataset: "datasets.Dataset", tokenizer: PreTrainedTokenizerBase, column: str, max_length: int
) -> "datasets.Dataset":
    """Tokenize texts, join them (with the end-of-text token between), and cut them into pieces of equal length.

    Raises:
        ValueError: the data set does not have the column.
    """
    if column not in dataset.column_names:
        raise ValueError(f"expected a column 'input_ids' or {column!r}, got {dataset.column_names}; see --text-column")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pieces(batch: dict[str, list]) -> dict[str, list]:
        rows = tokenizer(batch[column], add_special_tokens=False)["input_ids"]
        tokens = [token for row in rows if row for token in (*row, *end)]
        cut = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)]
        return {"input_ids": cut}

    return dataset.map(pieces, batched=True, remove_columns=dataset.column_names, desc="tokenizing")


def run(options: argparse.Namespace) -> int:
    """Write the signals, and return the exit status.

    Raises:
        ValueError: a teacher, a data set or a number that is refused, or an output with other signals.
        OSError: the teacher or the data set does not exist, or the output cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.teacher, **UNTRUSTED)
    dataset = read_dataset(options.dataset, options.split)
    if "input_ids" not in dataset.column_names:
        dataset = tokenize(dataset, tokenizer, options.text_column, options.max_length)
        if not (options.output / "data").exists():
            unfinished = options.output / "unfinished-data"
            dataset.save_to_disk(str(unfinished))
            unfinished.rename(options.output / "data")
        print(f"the data set to train on is {options.output / 'data'}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_causal_lm(options.teacher, dtype=options.dtype).to(device)
    kind, count = ("top", options.top_k) if options.samples is None else ("samples", options.samples)
    choices: dict[str, Any] = {"temperature": options.temperature, "batch_size": options.batch_size}
    manifest = write_signals(
        teacher, dataset, options.output, kind=kind, count=count, tokenizer=tokenizer, seed=options.seed, **choices
    )
    print(
        f"{manifest.examples} examples, {manifest.tokens} tokens, about {manifest.bytes / 1e6:.1f} MB: {options.output}"
    )
    return 0
