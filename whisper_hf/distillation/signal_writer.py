"""Running a teacher over a data set, and writing what it predicts; `stored_signals.py` says how it is stored."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.checksums import write_checksums
from ..objectives import Head, Probabilities
from .head_replacement import HeadReplacement
from .stored_signals import MANIFEST, Manifest, data_digest, tokenizer_digest
from .teachers import refuse_training_mode

if TYPE_CHECKING:
    import datasets

EXAMPLES_PER_PART = 256
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def write_signals(
    teacher: PreTrainedModel,
    dataset: "datasets.Dataset",
    folder: str | Path,
    *,
    kind: str = "top",
    count: int = 64,
    temperature: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Manifest:
    """Write a teacher's predictions for a data set; what an interrupted run has finished is kept.

    Args:
        teacher (`PreTrainedModel`): on its device, in evaluation mode.
        dataset (`datasets.Dataset`): with `input_ids`, and `attention_mask` and `position_ids` if the model needs them.
        folder (`str` or `Path`): may exist.
        kind (`str`): `top` or `samples`.
        count (`int`): tokens to store for each position.
        temperature (`float`): of the softmax.
        tokenizer (*optional*): the teacher's; its vocabulary is remembered, and logits beyond it left out.
        batch_size (`int`): examples at once.
        seed (`int`): of the samples.
        progress (`bool`): show a bar.

    Returns:
        the [`Manifest`].

    Raises:
        ValueError: a teacher in training mode, an unknown kind, more tokens than the teacher has, a temperature that is
            not positive, data without tokens or with tokens beyond the teacher's, or a folder with other signals.
    """
    from tqdm.auto import tqdm

    refuse_training_mode(teacher)
    replacement = HeadReplacement(teacher)
    vocabulary = Head(replacement.module).vocabulary
    if tokenizer is not None:  # what is beyond is padding
        vocabulary = min(vocabulary, len(tokenizer))
    if kind not in ("top", "samples"):
        raise ValueError(f"unknown kind of signals {kind!r}; expected top or samples")
    if not 0 < count < vocabulary:
        raise ValueError(f"expected between 1 and {vocabulary - 1} stored tokens, got {count}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    digest, examples, tokens = data_digest(dataset)
    manifest = Manifest(
        kind=kind,
        count=count,
        temperature=temperature,
        teacher=teacher.name_or_path,
        revision=getattr(teacher.config, "_commit_hash", None),
        vocabulary=vocabulary,
        tokenizer=tokenizer_digest(tokenizer),
        examples=examples,
        tokens=tokens,
        data=digest,
        seed=seed,
    )
    folder = Path(folder)
    _begin(folder, manifest)
    starts = range(0, examples, EXAMPLES_PER_PART)
    for part in tqdm(starts, desc=f"signals, about {manifest.bytes / 1e6:.1f} MB", unit="part", disable=not progress):
        path = folder / f"part-{part // EXAMPLES_PER_PART:06d}"
        if not path.exists():
            rows = dataset.select(range(part, min(part + EXAMPLES_PER_PART, examples)))
            _write_part(path, _signals(replacement, teacher, rows, manifest, batch_size, seed + part), manifest)
    return manifest


def _begin(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or compare it with the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if path.exists() and json.loads(path.read_text()) != asdict(manifest):
        different = {k: (v, asdict(manifest).get(k)) for k, v in json.loads(path.read_text()).items()}
        different = {k: pair for k, pair in different.items() if pair[0] != pair[1]}
        raise ValueError(f"{folder} holds other signals (there, here): {different}; choose another folder")
    path.write_text(json.dumps(asdict(manifest), indent=2))


def _write_part(path: Path, columns: dict[str, list[np.ndarray]], manifest: Manifest) -> None:
    """Write one file of signals under another name first, so that what has the right name is whole."""
    import datasets

    id_type = "uint16" if manifest.vocabulary <= 2**16 else "int32"
    lists = {"teacher_tokens": id_type, "teacher_log_probabilities": "float16"}
    features = {
        name: datasets.List(datasets.List(datasets.Value(lists[name]), length=manifest.count))
        if name in lists
        else datasets.List(datasets.Value("float32"))
        for name in columns
    }
    unfinished = path.with_name(f"unfinished-{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(unfinished))
    write_checksums(unfinished, ("*.arrow",))
    unfinished.rename(path)


@torch.no_grad()
def _signals(
    replacement: HeadReplacement,
    teacher: PreTrainedModel,
    rows: "datasets.Dataset",
    manifest: Manifest,
    batch_size: int,
    seed: int,
) -> dict[str, list[np.ndarray]]:
    """Return the signals of some examples, column by column."""
    columns: dict[str, list[np.ndarray]] = {}
    generator = torch.Generator(teacher.device).manual_seed(seed)
    known = len(teacher.get_input_embeddings().weight)
    for batch, lengths in _batches(rows, batch_size):
        least, most = int(batch["input_ids"].min()), int(batch["input_ids"].max())
        if least < 0 or most >= known:
            raise ValueError(
                f"the data must have token ids of the teacher, from 0 to {known - 1}, got {least} to {most}; tokenize "
                "it with the teacher's tokenizer"
            )
        inputs = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        found: dict[str, Tensor] = {}

        def keep(hidden: Tensor, found: dict[str, Tensor] = found) -> Tensor:
            found.update(_describe(hidden, replacement.head, manifest, generator))
            return hidden.new_zeros(())

        def forward(inputs: dict[str, Tensor] = inputs) -> Any:
            return teacher(**inputs, use_cache=False)

        replacement.run(forward, keep)
        for name, values in found.items():
            arrays = [row[:length].cpu().numpy() for row, length in zip(values, lengths, strict=True)]
            columns.setdefault(name, []).extend(arrays)
    return columns


def _batches(rows: "datasets.Dataset", batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """Yield examples padded on the right, and their lengths."""
    names = [name for name in MODEL_INPUTS if name in rows.column_names]
    for start in range(0, len(rows), batch_size):
        examples = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        lengths = [len(example["input_ids"]) for example in examples]
        columns = {name: [np.asarray(example[name], dtype=np.int64) for example in examples] for name in names}
        batch = {name: _padded(arrays, max(lengths)) for name, arrays in columns.items()}
        if len(set(lengths)) > 1 and not batch.keys() & {"attention_mask", "position_ids"}:
            batch["attention_mask"] = _padded([np.ones(length, dtype=np.int64) for length in lengths], max(lengths))
        yield batch, lengths


def _padded(arrays: list[np.ndarray], length: int) -> Tensor:
    padded = [np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
    return torch.from_numpy(np.stack(padded))


def _describe(hidden: Tensor, head: Head, manifest: Manifest, generator: torch.Generator) -> dict[str, Tensor]:
    """Turn hidden states, `[B, T, U]`, into columns, `[B, T, ...]`, a row of the batch at a time."""
    parts: dict[str, list[Tensor]] = {}
    for row in hidden:
        p = Probabilities.from_logits(head(row)[:, : manifest.vocabulary].float() / manifest.temperature)
        if manifest.kind == "top":
            log, tokens = p.log.topk(manifest.count)
            rest = p.value.scatter(1, tokens, 0.0).sum(-1).log().clamp(min=p.log.min())
            values = {"teacher_tokens": tokens, "teacher_log_probabilities": log.half(), "teacher_log_rest": rest}
        else:
            tokens = torch.multinomial(p.value, manifest.count, replacement=True, generator=generator)
            values = {"teacher_tokens": tokens, "teacher_entropy": -torch.linalg.vecdot(p.value, p.log)}
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.stack(rows) for name, rows in parts.items()}
