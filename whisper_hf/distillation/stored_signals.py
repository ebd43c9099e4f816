"""Signals on disk: a teacher's predictions for a data set, written once and read by any number of students.

A folder of signals holds Arrow files of `datasets`, with one row per example, and `signals.json`, which describes the
teacher and the data. There are two kinds of signals:

- `top`: the likeliest tokens of each position, and the probability of all other tokens together.
- `samples`: tokens drawn from the teacher's distribution. They give an unbiased estimate of the forward KL and need far
  less space (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870).

Legend: `B` rows of a batch, `T` tokens of an example or a row, `k` stored tokens of a position.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.checksums import CHECKSUMS, refuse_changed
from ..model.labels import IGNORED

MANIFEST = "signals.json"
ROW = "teacher_row"  # column with the number of the example, and so of its row of signals


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of signals: the teacher, the data, and what is stored.

    Attributes:
        kind (`str`): `top` or `samples`.
        count (`int`): `k`, the number of stored tokens of a position.
        temperature (`float`): the temperature of the teacher's softmax.
        teacher (`str`): the teacher's name or path.
        revision (`str`, *optional*): the teacher's commit on the Hub.
        vocabulary (`int`): the number of the teacher's logits that count, from token 0 on.
        tokenizer (`str`, *optional*): the SHA-256 of the tokenizer's vocabulary.
        examples, tokens (`int`): the numbers of examples and of tokens in the data.
        data (`str`): the SHA-256 of all token ids in order.
        seed (`int`): the seed of the drawn tokens.
        version (`int`): the version of this format.
    """

    kind: str
    count: int
    temperature: float
    teacher: str
    revision: str | None
    vocabulary: int
    tokenizer: str | None
    examples: int
    tokens: int
    data: str
    seed: int = 0
    version: int = 1

    @property
    def bytes(self) -> int:
        """The estimated size on disk, in bytes."""
        id_size = 2 if self.vocabulary <= 2**16 else 4
        per_token = self.count * (id_size + 2) + 4 if self.kind == "top" else self.count * id_size + 4
        return per_token * self.tokens


def is_signals(folder: Any) -> bool:
    """Return whether a value is the path of a folder of signals."""
    return isinstance(folder, (str, Path)) and (Path(folder) / MANIFEST).is_file()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return the SHA-256 of a tokenizer's vocabulary, or `None` without a tokenizer."""
    if tokenizer is None:
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def data_digest(examples: Iterable[Mapping[str, Any]]) -> tuple[str, int, int]:
    """Compute the SHA-256 of all token ids in order, and count examples and tokens.

    Args:
        examples (iterable of mappings): examples with `input_ids`, `[T]`.

    Raises:
        ValueError: an example without tokens, or no example.
    """
    digest = hashlib.sha256()
    count = 0
    tokens = 0
    for example in examples:
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        if not len(ids):
            raise ValueError(f"expected tokens in every example, got example {count} without tokens; filter it out")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        count += 1
        tokens += len(ids)
    if not count:
        raise ValueError("expected at least one example, got an empty data set; check its path and split")
    return digest.hexdigest(), count, tokens


def _manifest(path: Path) -> Manifest:
    """Read the manifest of a folder of signals, and raise a `ValueError` if it is damaged or of another version."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version = contents.get("version")
        if version == Manifest.version:
            return Manifest(**contents)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must describe stored signals, got {error!r}; write them again") from error
    raise ValueError(
        f"{path.parent} holds signals of version {version}, expected {Manifest.version}; write them again with "
        "`whisper-hf cache-signals`"
    )


class StoredSignals:
    """The signals in a folder, memory-mapped from disk.

    Args:
        folder (`str` or `Path`): a folder that [`write_signals`] wrote.

    Raises:
        ValueError: a folder that is unfinished, damaged or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        import datasets

        self.folder = Path(folder)
        self.manifest = _manifest(self.folder / MANIFEST)
        parts = []
        for part in sorted(self.folder.glob("part-*")):
            remedy = f"delete {part} and run the same `cache-signals` command again"
            if (part / CHECKSUMS).is_file():  # folders of older versions have no checksums
                refuse_changed(part / CHECKSUMS, sorted(part.glob("*.arrow")), remedy)
            try:
                parts.append(datasets.load_from_disk(str(part)))
            except (ValueError, KeyError, TypeError, OSError) as error:  # pyarrow and json derive theirs
                raise ValueError(f"{part} must be a data set of stored signals, got {error!r}; {remedy}") from error
        found = sum(len(part) for part in parts)
        if found != self.manifest.examples:
            raise ValueError(
                f"{folder} holds signals of {found} examples, expected {self.manifest.examples}; run the same "
                "`cache-signals` command again, which resumes where it stopped"
            )
        self.rows = datasets.concatenate_datasets(parts).with_format("numpy")

    def refuse_other(
        self, examples: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, temperature: float
    ) -> None:
        """Raise a `ValueError` if the signals were written for other data, another tokenizer or another temperature.

        Args:
            examples (iterable of mappings): the training data with `input_ids`, in its order.
            tokenizer (*optional*): the student's tokenizer; an unknown tokenizer is not compared.
            temperature (`float`): the temperature of the divergence.
        """
        made = self.manifest
        digest = tokenizer_digest(tokenizer)
        for what, expected, got in (
            ("tokenizer", made.tokenizer or digest, digest or made.tokenizer),
            ("temperature", made.temperature, temperature),
            ("data (token ids, in order)", made.data, data_digest(examples)[0]),
        ):
            if expected != got:
                raise ValueError(
                    f"the signals in {self.folder} were made with another {what}: expected {expected}, got {got}; make "
                    "new ones with `whisper-hf cache-signals`, or train with the data and settings they belong to"
                )

    def columns(self, rows: list[int]) -> dict[str, list[np.ndarray]]:
        """Read the signals of some examples.

        Args:
            rows (list of `int`): the numbers of the examples.

        Returns:
            for each column a list with one array, `[T, ...]`, per example.
        """
        found = self.rows[rows]
        return {name: list(found[name]) for name in self.rows.column_names}


class SignalCollator:
    """A collator that adds stored signals to the batches of another collator.

    Signals are aligned with the tokens of their example, wherever the other collator puts these.

    Args:
        collator (`Callable`): the other collator. It may pad on either side, or concatenate examples.
        signals ([`StoredSignals`]): the signals of examples that have a column `teacher_row`. Batches of examples
            without this column do not change.
        label_name (`str`): the key of the labels in a batch.
    """

    def __init__(
        self, collator: Callable[[list], dict[str, Any]], signals: StoredSignals, label_name: str = "labels"
    ) -> None:
        self.collator = collator
        self.signals = signals
        self.label_name = label_name

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch with `teacher_*` tensors, `[B, T, ...]`.

        Raises:
            ValueError: a batch whose tokens are not those of the examples.
        """
        batch = self.collator([{k: v for k, v in example.items() if k != ROW} for example in examples])
        if not all(ROW in example for example in examples):
            return batch
        columns = self.signals.columns([int(example[ROW]) for example in examples])
        ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        if len(batch["input_ids"]) == 1:  # the examples were concatenated, or there is one example
            ids = [torch.cat(ids)]
            columns = {name: [np.concatenate(arrays)] for name, arrays in columns.items()}
        offsets = [_offset(row, example) for row, example in zip(batch["input_ids"], ids, strict=True)]
        length = batch["input_ids"].shape[1]
        if self.label_name in batch:  # the first token is predicted from padding, for which no signal is stored
            batch[self.label_name] = batch[self.label_name].clone()
            batch[self.label_name][range(len(offsets)), offsets] = IGNORED
        for name, arrays in columns.items():
            batch[name] = torch.stack([_placed(array, at, length) for array, at in zip(arrays, offsets, strict=True)])
        return batch


def _offset(row: Tensor, ids: Tensor) -> int:
    """Find the position in a row, `[T]`, at which the tokens of an example, `ids`, begin."""
    for offset in (0, len(row) - len(ids)):
        if offset >= 0 and torch.equal(row[offset : offset + len(ids)], ids.to(row.dtype)):
            return offset
    raise ValueError(
        f"stored signals belong to the tokens as they are in the data set, got a batch with other tokens ({len(ids)} "
        f"tokens became a row of {len(row)}); use a collator that pads or concatenates, and truncate beforehand"
    )


def _placed(array: np.ndarray, offset: int, length: int) -> Tensor:
    """Pad signals, `[tokens, ...]`, with zeros to `[length, ...]`, so that they begin at an offset."""
    wide = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
    edges = [(offset, length - offset - len(array))] + [(0, 0)] * (array.ndim - 1)
    return torch.from_numpy(np.pad(wide, edges))


class WithRows(torch.utils.data.Dataset):
    """A map-style data set that adds its number, `teacher_row`, to each example."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example with its number."""
        return {**self.dataset[index], ROW: index}


def with_rows(dataset: Any) -> Any:
    """Add a column `teacher_row` with the number of each example to a data set.

    Raises:
        ValueError: a data set that can only be iterated over.
    """
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"stored signals need a data set with a length and an order, got {type(dataset).__name__}; pass a "
            "datasets.Dataset"
        )
    if hasattr(dataset, "add_column") and dataset.format["type"] != "custom":  # custom transforms drop the column
        return dataset.add_column(ROW, list(range(len(dataset))))
    return WithRows(dataset)
