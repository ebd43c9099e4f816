"""Write a teacher's predictions for a data set, for any number of students.

    python -m whisper_hf.distillation cache --teacher MODEL --dataset DATA --output SIGNALS --top-k 64

An interrupted run goes on where it stopped. The data set is a folder made by `datasets.Dataset.save_to_disk`, a text
file (one document), a JSON-lines file (one document a line), or a Hub id; without a column `input_ids` its texts are
tokenized, cut into pieces of `--max-length` tokens, and written to `SIGNALS/data`, which is then the data set to train
on.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoint_io import UNTRUSTED, load_causal_lm
from .signal_writer import write_signals

if TYPE_CHECKING:
    import datasets


def read_dataset(name: str, split: str) -> "datasets.Dataset":
    """Read a folder, a file or a data set of the Hub.

    Raises:
        ValueError: a folder with several splits, none of which is the one asked for.
    """
    import datasets

    path = Path(name)
    if path.is_dir():
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict) and split not in found:
            raise ValueError(f"{name} has no split {split!r}; expected one of {', '.join(found)}")
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    if path.is_file():
        if path.suffix in (".json", ".jsonl"):
            return datasets.load_dataset("json", data_files=name, split="train")
        return datasets.load_dataset("text", data_files=name, split="train", sample_by="document")
    return datasets.load_dataset(name, split=split)


def tokenize(
    dataset: "datasets.Dataset", tokenizer: PreTrainedTokenizerBase, column: str, max_length: int
) -> "datasets.Dataset":
    """Tokenize texts, join them (with the end-of-text token between), and cut them into pieces of equal length.

    Raises:
        ValueError: no such column.
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


def cache(options: argparse.Namespace) -> None:
    """Run the command."""
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
    kind, count = ("samples", options.samples) if options.samples else ("top", options.top_k)
    choices: dict[str, Any] = {"temperature": options.temperature, "batch_size": options.batch_size}
    manifest = write_signals(
        teacher, dataset, options.output, kind=kind, count=count, tokenizer=tokenizer, seed=options.seed, **choices
    )
    print(
        f"{manifest.examples} examples, {manifest.tokens} tokens, about {manifest.bytes / 1e6:.1f} MB: {options.output}"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main = argparse.ArgumentParser(prog="python -m whisper_hf.distillation", description=(__doc__ or "").split("\n")[0])
    command = main.add_subparsers(required=True).add_parser("cache", help="write a teacher's predictions")
    add = command.add_argument
    add("--teacher", required=True, help="path or Hub id")
    add("--dataset", required=True, help="folder, text or JSON-lines file, or Hub id")
    add("--output", required=True, type=Path, help="folder to write")
    add("--top-k", type=int, default=64, help="likeliest tokens to store (default: %(default)s)")
    add("--samples", type=int, help="store so many drawn tokens instead; 12 or more")
    add("--temperature", type=float, default=1.0, help="of the softmax (default: %(default)s)")
    add("--tokenizer", help="default: that of the teacher")
    add("--split", default="train", help="of the data set (default: %(default)s)")
    add("--text-column", default="text", help="where the data set is not tokenized (default: %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens per piece of text (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="examples at once (default: %(default)s)")
    add("--dtype", default="auto", help="of the teacher's weights (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    command.set_defaults(run=cache)
    return main


if __name__ == "__main__":
    arguments = parser().parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        parser().error(str(error))
