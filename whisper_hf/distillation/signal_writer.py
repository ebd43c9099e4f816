"""Run a teacher over a data set and write its predictions to disk, in the format of `stored_signals.py`.

Legend: `B` examples of a batch with `T` tokens, `U` width of the teacher, `k` stored tokens of a position.
"""

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

EXAMPLES_PER_PART = 256  # an interrupted run loses the work on one part at most
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
    """Write a teacher's predictions for a data set to a folder.

    The folder is written in parts. After an interruption, the same call keeps the finished parts and writes the others.

    Args:
        teacher (`PreTrainedModel`): the teacher, on its device and in evaluation mode.
        dataset (`datasets.Dataset`): a data set with the column `input_ids`, and with `attention_mask` and
            `position_ids` if the model needs them.
        folder (`str` or `Path`): where to write; the folder may exist.
        kind (`str`): `top` stores the likeliest tokens of each position, `samples` stores drawn tokens.
        count (`int`): `k`, the number of tokens to store for each position.
        temperature (`float`): the temperature of the softmax, above 0.
        tokenizer (*optional*): the teacher's tokenizer. Logits beyond its vocabulary are padding and are left out.
        batch_size (`int`): number of examples that the teacher processes at once.
        seed (`int`): the seed of the drawn tokens.
        progress (`bool`): whether to show a progress bar.

    Returns:
        the [`Manifest`] of the folder.

    Raises:
        ValueError: a teacher in training mode, an unknown kind, a count that is not below the teacher's vocabulary, a
            temperature that is not positive and finite, an example without tokens, tokens that the teacher does not
            have, or a folder that holds other signals.
    """
    from tqdm.auto import tqdm

    refuse_training_mode(teacher)
    replacement = HeadReplacement(teacher)
    vocabulary = Head(replacement.module).vocabulary
    if tokenizer is not None:  # logits beyond the tokenizer's vocabulary are padding
        vocabulary = min(vocabulary, len(tokenizer))
    if kind not in ("top", "samples"):
        raise ValueError(f"unknown kind of signals {kind!r}; expected top or samples")
    if not 0 < count < vocabulary:
        raise ValueError(f"count must lie between 1 and {vocabulary - 1} stored tokens, got {count}")
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
    """Write the manifest of a folder, or raise a `ValueError` if the folder has another manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    ours = asdict(manifest)
    if path.exists():
        theirs = json.loads(path.read_text())
        if theirs != ours:
            different = {name: (value, ours.get(name)) for name, value in theirs.items() if value != ours.get(name)}
            raise ValueError(f"{folder} holds other signals (there, here): {different}; choose another folder")
    path.write_text(json.dumps(ours, indent=2))


def _write_part(path: Path, columns: dict[str, list[np.ndarray]], manifest: Manifest) -> None:
    """Write one part of the signals under a temporary name, and rename it when it is complete."""
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
    """Compute the signals of some examples: for each column a list of one array, `[T, ...]`, per example."""
    columns: dict[str, list[np.ndarray]] = {}
    generator = torch.Generator(teacher.device).manual_seed(seed)
    known = len(teacher.get_input_embeddings().weight)
    for batch, lengths in _batches(rows, batch_size):
        least, most = int(batch["input_ids"].min()), int(batch["input_ids"].max())
        if least < 0 or most >= known:
            raise ValueError(
                f"the data set must hold token ids of the teacher, from 0 to {known - 1}, got {least} to {most}; "
                "tokenize it with the teacher's tokenizer"
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
    """Yield batches of examples, padded on the right to `[B, T]`, and the length of each example."""
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
    """Stack arrays of different lengths into a tensor, filled on the right with zeros."""
    padded = [np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
    return torch.from_numpy(np.stack(padded))


def _describe(hidden: Tensor, head: Head, manifest: Manifest, generator: torch.Generator) -> dict[str, Tensor]:
    """Turn the inputs of the teacher's head into signals, one row of the batch at a time.

    Args:
        hidden (`[B, T, U]`): the inputs of the head.

    Returns:
        for each column `[B, T, ...]`. Kind `top`: `teacher_tokens` (`[B, T, k]`), `teacher_log_probabilities`
        (`[B, T, k]`, float16) and `teacher_log_rest` (`[B, T]`), in nats. Kind `samples`: `teacher_tokens` and
        `teacher_entropy` (`[B, T]`, nats).
    """
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
