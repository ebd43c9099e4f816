"""Rows for pre-training from a stream of documents, without a lost or repeated row when training resumes.

Row `i` has the same tokens at every time and in every process. The Trainer resumes by skipping the numbers of the rows
that it has trained on, so resuming is exact. This holds for any number of processes and workers, for gradient
accumulation, and if these numbers change. To resume fast, the stream keeps notes of where some rows begin ([`Place`]),
which it writes while it reads. A checksum validates each note when it is used.

Legend: `T` tokens of a row.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from .packing import Row, encode, make_row, pack

logger = logging.get_logger(__name__)

FOLDER = "stream"  # subfolder of a training's output folder
NOTE_EVERY = 16  # rows of a lane between two notes; at most so many rows are read again when training resumes
ENCODED_AT_ONCE = 64  # documents per call of the tokenizer, which may work on them in parallel


@dataclass(frozen=True)
class Place:
    """The place in the stream of documents where a row begins.

    Attributes:
        row (`int`): the number of the row in its lane.
        epoch (`int`): how often all documents have been read before.
        block (`int`): how many blocks of documents have been read before in this epoch.
        source (`dict`, *optional*): the `state_dict` of the stream of documents before the block; `None` before the
            first block of a training.
        document (`int`): how many documents of the block are used up, in the order in which they are taken.
        used (`int`): how many tokens of the next document are used up.
        checksum (`int`, *optional*): the CRC-32 of the row's tokens.
    """

    row: int = 0
    epoch: int = 0
    block: int = 0
    source: dict[str, Any] | None = None
    document: int = 0
    used: int = 0
    checksum: int | None = None


@dataclass(frozen=True)
class Deal:
    """The settings that determine which tokens are in which row.

    Attributes:
        row_tokens (`int`): `T`, the number of tokens of a row.
        shuffled (`int`): how many documents are put in random order at a time.
        seed (`int`): the seed of this order.
        lanes (`int`): number of independent streams of rows, each with its share of the documents.
        run (`int`): number of consecutive rows from one lane, before the next lane follows.
    """

    row_tokens: int
    shuffled: int
    seed: int
    lanes: int
    run: int


class PackedStream(torch.utils.data.Dataset[Row]):
    """A data set of rows that are packed from a stream of documents, with an index for the Trainer.

    A row is a dict of `input_ids`, `position_ids` and `labels`, `[T]` each, int64.

    The rows come from as many lanes as there are processes times workers. Each process or worker therefore reads and
    tokenizes only its share of the documents: whole files if there are enough files, and otherwise every n-th document.
    Each lane has its own epochs, which follow each other without a gap, so that no document is left out. A training
    that resumes with another number of processes or workers keeps its lanes. This is exact, too, but some documents may
    be read more than once.

    Use `data_collator=transformers.default_data_collator`. Collators that pad add an attention mask to a batch, and
    then documents would attend to each other.

    Args:
        documents (`datasets.IterableDataset`): a stream, such as `load_dataset(..., streaming=True)`. It may be mapped
            and filtered, but not shuffled.
        tokenizer (`PreTrainedTokenizerBase`): it adds its special tokens, and its end-of-text token ends each document.
        args (`TrainingArguments`): the arguments of the training, with `max_steps` and
            `train_sampling_strategy="sequential"`. Notes are kept in the folder `stream` of `output_dir`.
        row_tokens (`int`): `T`, the number of tokens of a row, at least 2.
        text_column (`str`, defaults to `"text"`): the column of the texts. Empty texts are skipped.
        shuffled (`int`, defaults to 1024): how many documents are read and put in random order at a time; 1 keeps their
            order. From the second epoch on, `datasets` also changes the order of files.

    Raises:
        ValueError: a stream or arguments that cannot be resumed exactly, or an output folder with notes of other rows.
    """

    def __init__(
        self,
        documents: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        args: TrainingArguments,
        *,
        row_tokens: int,
        text_column: str = "text",
        shuffled: int = 1024,
    ) -> None:
        _check(documents, args)
        for name, value, least in (("row_tokens", row_tokens, 2), ("shuffled", shuffled, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.documents = documents
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.length = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        self.folder = Path(args.output_dir, FOLDER)
        readers = args.world_size * max(1, args.dataloader_num_workers)
        seed = args.seed if args.data_seed is None else args.data_seed
        self.deal = _keep(Deal(row_tokens, shuffled, seed, readers, args.train_batch_size), self.folder)
        self._lanes: dict[int, Lane] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        """Return a row, `[T]` per tensor; this is fast if it is the next row of its lane."""
        if not 0 <= index < self.length:
            raise IndexError(f"the index of a row must lie between 0 and {self.length - 1}, got {index}")
        turn, within = divmod(index, self.deal.run)
        lane = turn % self.deal.lanes
        number = turn // self.deal.lanes * self.deal.run + within
        if self._process != os.getpid():  # a worker must not share open files with the process it was forked from
            self._lanes = {}
            self._process = os.getpid()
        if lane not in self._lanes or number < self._lanes[lane].next_row:
            self._lanes[lane] = Lane(self, lane, number)
        return self._lanes[lane].row(number)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the lanes, which hold open files."""
        return {**self.__dict__, "_lanes": {}}


class Lane:
    """An independent stream of rows, which starts from the last note at or before a wanted row.

    Args:
        rows ([`PackedStream`]): the data set that the lane belongs to.
        lane (`int`): the number of the lane.
        wanted (`int`): the number of the wanted row in the lane.
    """

    def __init__(self, rows: PackedStream, lane: int, wanted: int) -> None:
        self.name = lane
        self.deal = rows.deal
        self.text_column = rows.text_column
        self.tokenizer = rows.tokenizer
        # each lane splits the stream for itself, because all users of one stream object share its number of the epoch
        self.stream = split_dataset_by_node(rows.documents, rank=lane, world_size=self.deal.lanes)
        self.notes = rows.folder / f"lane-{lane}.jsonl"
        known = _read_notes(self.notes)
        self.noted = max((place.row for place in known), default=-1)
        place = max((place for place in known if place.row <= wanted), key=lambda place: place.row, default=Place())
        self.next_row = place.row
        self.at = place
        self.rows = self._rows(place)

    def row(self, number: int) -> Row:
        """Return a row whose number is at least `next_row`, and skip the rows before it."""
        while self.next_row < number:
            next(self.rows)
            self.next_row += 1
        self.next_row += 1
        return next(self.rows)

    def _rows(self, place: Place) -> Iterator[Row]:
        """Yield rows from a place on, and write notes of where some of them begin."""
        for pieces, used in pack(self._documents(place), self.deal.row_tokens, place.used):
            row = make_row(pieces)
            checksum = zlib.crc32(row["input_ids"].numpy().tobytes())
            if place.checksum not in (None, checksum):
                raise self._changed(f"row {place.row} has the checksum {place.checksum}", checksum)
            if place.row % NOTE_EVERY == 0 and place.row > self.noted:
                self._note(replace(place, checksum=checksum))
            yield row
            place = replace(self.at, row=place.row + 1, used=used)

    def _documents(self, place: Place) -> Iterator[list[int]]:
        """Yield the token ids of documents, epoch after epoch, and store the place of the last document in `at`."""
        size = self.deal.shuffled if self.deal.shuffled > 1 else ENCODED_AT_ONCE
        for epoch in count(place.epoch):
            self.stream.set_epoch(epoch)
            if place.source is not None:
                if not _alike(place.source, self.stream.state_dict()):
                    raise self._changed(f"the stream's state is {place.source}", self.stream.state_dict())
                self.stream.load_state_dict(place.source)
            found = False
            source = place.source
            for block, batch in enumerate(self.stream.iter(size), place.block):
                for document, tokens in self._encoded(batch, epoch, block, place.document):
                    self.at = Place(epoch=epoch, block=block, source=source, document=document)
                    found = found or bool(tokens)
                    yield tokens
                source = self.stream.state_dict()
                place = Place()  # later blocks are read from their start
            if not found:
                raise ValueError(
                    f"lane {self.name} of {self.deal.lanes} must have text, got no text in a whole epoch; give each of "
                    f"the {self.deal.lanes} lanes documents, or use fewer processes and workers"
                )

    def _encoded(self, batch: dict[str, list], epoch: int, block: int, first: int) -> Iterator[tuple[int, list[int]]]:
        """Yield number and token ids of each document of a block, from `first` on, in the order they are taken."""
        if self.text_column not in batch:
            raise ValueError(f"text_column must be one of {list(batch)}, got {self.text_column!r}")
        texts = batch[self.text_column]
        if self.deal.shuffled > 1:
            order = np.random.default_rng([self.deal.seed, self.name, epoch, block]).permutation(len(texts))
            texts = [texts[i] for i in order]
        for start in range(first, len(texts), ENCODED_AT_ONCE):
            yield from enumerate(encode(self.tokenizer, texts[start : start + ENCODED_AT_ONCE]), start)

    def _changed(self, noted: str, got: Any) -> ValueError:
        """Build the error for a note that does not fit the documents."""
        return ValueError(
            f"{self.notes} has noted that {noted}, got {got}: documents or tokenizer have changed; restore them, or "
            f"delete {self.notes.parent} to start again"
        )

    def _note(self, place: Place) -> None:
        """Append a place to the notes of the lane."""
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(place)) + "\n")
        self.noted = place.row


def _alike(state: Any, other: Any) -> bool:
    """Return whether two states can belong to the same stream, by their keys; a part before its start may be `None`."""
    if not (isinstance(state, dict) and isinstance(other, dict)):
        return True
    return state.keys() == other.keys() and all(_alike(state[name], other[name]) for name in state)


def _read_notes(path: Path) -> list[Place]:
    """Read the notes of a lane, and skip a line that a process was killed in the middle of."""
    places = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            places.append(Place(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            logger.info(f"{path} has an incomplete line, which is skipped")
    return places


def _keep(deal: Deal, folder: Path) -> Deal:
    """Return the settings of the rows of this training, and write them to its folder when it begins.

    Args:
        deal ([`Deal`]): the settings of this run.
        folder (`Path`): the folder of the notes.

    Returns:
        the settings of the first run. `lanes` and `run` may differ from this run's.

    Raises:
        ValueError: another setting differs, so that the rows would change.
    """
    path = folder / "deal.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"deal.json.{os.getpid()}"
        draft.write_text(json.dumps(asdict(deal)), encoding="utf-8")
        draft.replace(path)
        return deal
    kept = Deal(**json.loads(path.read_text(encoding="utf-8")))
    changed = {
        name: (getattr(kept, name), value)
        for name, value in asdict(deal).items()
        if name not in ("lanes", "run") and getattr(kept, name) != value
    }
    if changed:
        differences = ", ".join(f"{name}={new} (it was {old})" for name, (old, new) in changed.items())
        raise ValueError(
            f"the rows of {folder} must not change, got {differences}; restore the settings, or delete {folder} to "
            "start again"
        )
    if kept.lanes % deal.lanes or kept.run != deal.run:
        logger.warning(
            f"this training began with {kept.lanes} lanes and batches of {kept.run}, and now has {deal.lanes} "
            f"processes and workers with batches of {deal.run}: the rows stay the same, but some documents are read "
            "more than once"
        )
    return kept


def _check(documents: IterableDataset, args: TrainingArguments) -> None:
    """Raise a `ValueError` for a stream or arguments that would silently lose or repeat rows."""
    if not isinstance(documents, IterableDataset):
        raise ValueError(
            f"documents must be a datasets.IterableDataset, got {type(documents).__name__}; load_dataset(..., "
            "streaming=True) or to_iterable_dataset() returns one"
        )
    if _has_buffer(documents._ex_iterable):
        raise ValueError(
            "documents must not be shuffled, got a stream with a shuffle buffer, whose documents would be lost when "
            "training resumes; leave out shuffle() and use PackedStream(shuffled=...)"
        )
    if args.max_steps <= 0:
        raise ValueError(f"max_steps must say how long to train on a stream, got {args.max_steps}; set it above 0")
    if args.train_sampling_strategy != "sequential":
        raise ValueError(
            "train_sampling_strategy must be 'sequential', because rows are packed one after the other, got "
            f"{args.train_sampling_strategy!r}; PackedStream(shuffled=...) puts the documents in random order"
        )
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip must be False, got True; leave it out, or the first rows would be repeated after resuming"
        )


def _has_buffer(iterable: Any) -> bool:
    """Return whether a stream has a shuffle buffer; the private classes of `datasets` are the only way to know."""
    inner = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", [])]
    shuffles = isinstance(iterable, BufferShuffledExamplesIterable) and iterable.buffer_size > 1
    return shuffles or any(_has_buffer(part) for part in inner if part is not None)
