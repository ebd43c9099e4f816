"""Teacher signals on disk: written once, read by many students.

A folder holds Arrow files made by `datasets`, one row per example, and `signals.json`, which says whose they are and of
which data. Two kinds: `top`, the likeliest tokens and the probability of any other; `samples`, tokens drawn from the
teacher's distribution, an unbiased estimate for forward KL at a fraction of the size (Anshumann et al. 2025,
https://arxiv.org/abs/2503.16870). Legend: `T` tokens of an example, `k` stored tokens for each.
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
ROW = "teacher_row"  # column that says which signals belong to an example


@dataclass(frozen=True)
class Manifest:
    """What a folder of signals was made from.

    Attributes:
        kind (`str`): `top` or `samples`.
        count (`int`): `k`.
        temperature (`float`): of the teacher's softmax.
        teacher (`str`), revision (`str`, *optional*): name or path, and commit on the Hub.
        vocabulary (`int`): number of leading logits of the teacher that were taken.
        tokenizer (`str`, *optional*): SHA-256 of its vocabulary.
        examples, tokens (`int`): size of the data.
        data (`str`): SHA-256 of all token ids in order.
        seed (`int`): of the samples.
        version (`int`): of this format.
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
        """Size on disk, estimated."""
        id_size = 2 if self.vocabulary <= 2**16 else 4
        per_token = self.count * (id_size + 2) + 4 if self.kind == "top" else self.count * id_size + 4
        return per_token * self.tokens


def is_signals(folder: Any) -> bool:
    """Whether something names a folder of signals."""
    return isinstance(folder, (str, Path)) and (Path(folder) / MANIFEST).is_file()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return the SHA-256 of a tokenizer's vocabulary."""
    if tokenizer is None:
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def data_digest(examples: Iterable[Mapping[str, Any]]) -> tuple[str, int, int]:
    """Return the SHA-256 of all token ids in order, and the numbers of examples and tokens."""
    digest, count, tokens = hashlib.sha256(), 0, 0
    for example in examples:
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        if not len(ids):
            raise ValueError(f"expected tokens in every example, got example {count} without tokens; filter it out")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        count, tokens = count + 1, tokens + len(ids)
    if not count:
        raise ValueError("expected at least one example, got a data set without tokens; check its path and split")
    return digest.hexdigest(), count, tokens


def _manifest(path: Path) -> Manifest:
    """Read what a folder was made from."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version = contents.get("version")
        if version == Manifest.version:
            return Manifest(**contents)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must describe stored signals, got {error!r}; make them again") from error
    raise ValueError(f"{path.parent} holds signals of version {version}, expected {Manifest.version}")


class StoredSignals:
    """Signals, read from a folder.

    Args:
        folder (`str` or `Path`): what [`write_signals`] wrote.

    Raises:
        ValueError: an unfinished or damaged folder, or one of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        import datasets

        self.folder = Path(folder)
        self.manifest = _manifest(self.folder / MANIFEST)
        parts = []
        for part in sorted(self.folder.glob("part-*")):
            remedy = f"delete {part} and run the same `cache-signals` command again"
            if (part / CHECKSUMS).is_file():  # older folders have no such file
                refuse_changed(part / CHECKSUMS, sorted(part.glob("*.arrow")), remedy)
            try:
                parts.append(datasets.load_from_disk(str(part)))
            except (ValueError, KeyError, TypeError, OSError) as error:  # pyarrow's and json's among them
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
        """Raise a `ValueError` where signals are not of this data in this order, tokenizer and temperature."""
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
                    "new ones with `whisper-hf cache-signals`, or train on the data they belong to"
                )

    def columns(self, rows: list[int]) -> dict[str, list[np.ndarray]]:
        """Return the signals of some examples: for each column a list of arrays, `[T, ...]`."""
        found = self.rows[rows]
        return {name: list(found[name]) for name in self.rows.column_names}


class SignalCollator:
    """Adds signals to the batches of another collator, wherever it puts the tokens of an example.

    Args:
        collator (`Callable`): pads on either side, or concatenates.
        signals ([`StoredSignals`]): of the examples that have a column `teacher_row`; others pass unchanged.
        label_name (`str`): key of the labels in a batch.
    """

    def __init__(
        self, collator: Callable[[list], dict[str, Any]], signals: StoredSignals, label_name: str = "labels"
    ) -> None:
        self.collator = collator
        self.signals = signals
        self.label_name = label_name

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the other collator's batch and `teacher_*` tensors, `[B, T, ...]`."""
        batch = self.collator([{k: v for k, v in example.items() if k != ROW} for example in examples])
        if not all(ROW in example for example in examples):
            return batch
        columns = self.signals.columns([int(example[ROW]) for example in examples])
        ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        if len(batch["input_ids"]) == 1:  # concatenated
            ids = [torch.cat(ids)]
            columns = {name: [np.concatenate(arrays)] for name, arrays in columns.items()}
        offsets = [_offset(row, example) for row, example in zip(batch["input_ids"], ids, strict=True)]
        length = batch["input_ids"].shape[1]
        if self.label_name in batch:  # nothing is stored about padding, which predicts the first token on its right
            batch[self.label_name] = batch[self.label_name].clone()
            batch[self.label_name][range(len(offsets)), offsets] = IGNORED
        for name, arrays in columns.items():
            batch[name] = torch.stack([_placed(array, at, length) for array, at in zip(arrays, offsets, strict=True)])
        return batch


def _offset(row: Tensor, ids: Tensor) -> int:
    """Return where an example begins in a row of the batch."""
    for offset in (0, len(row) - len(ids)):
        if offset >= 0 and torch.equal(row[offset : offset + len(ids)], ids.to(row.dtype)):
            return offset
    raise ValueError(
        f"stored signals belong to the tokens as they are in the data set, got a batch with other ones ({len(ids)} "
        f"tokens became a row of {len(row)}); use a collator that pads or concatenates, and truncate beforehand"
    )


def _placed(array: np.ndarray, offset: int, length: int) -> Tensor:
    """Pad `[tokens, ...]` to `[length, ...]` with zeros."""
    wide = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
    edges = [(offset, length - offset - len(array))] + [(0, 0)] * (array.ndim - 1)
    return torch.from_numpy(np.pad(wide, edges))


class WithRows(torch.utils.data.Dataset):
    """A map-style data set whose examples know their row."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], ROW: index}


def with_rows(dataset: Any) -> Any:
    """Add a column `teacher_row` to a data set.

    Raises:
        ValueError: a data set that is only iterated over.
    """
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    if is_stream or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"stored signals need a data set with a length and an order, got {type(dataset).__name__}")
    if hasattr(dataset, "add_column") and dataset.format["type"] != "custom":  # a transform would drop the column
        return dataset.add_column(ROW, list(range(len(dataset))))
    return WithRows(dataset)
