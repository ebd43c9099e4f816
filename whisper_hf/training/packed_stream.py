"""Rows for pre-training from a stream of documents, none of which is lost or repeated when training resumes.

Row `i` of a stream is the same whoever asks for it and whenever. So Trainer's own way to resume, to skip the numbers of
the rows that it has trained on, is exact: with any number of processes and workers, with accumulated gradients, and in
another layout than before. To be fast it needs no more than notes of where some rows begin ([`Place`]), which are
written while rows are read. Each is checked when it is used.
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

FOLDER = "stream"  # in a training's output folder
NOTE_EVERY = 16  # rows of a lane between two notes: what is read again when training resumes, at most
ENCODED_AT_ONCE = 64  # documents: a fast tokenizer works on them in parallel


@dataclass(frozen=True)
class Place:
    """Where a row begins.

    Attributes:
        row (`int`): its number in its lane.
        epoch (`int`): times that all documents have been read before.
        block (`int`): blocks of documents read before in this epoch.
        source (`dict`, *optional*): the `state_dict` of the documents' stream before the block; at first none.
        document (`int`): documents of the block that are used up, of those in the order they are taken.
        used (`int`): tokens of the next document that are used up.
        checksum (`int`): CRC-32 of the row's tokens.
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
    """What decides which tokens are in which row.

    Attributes:
        row_tokens (`int`): tokens of a row.
        shuffled (`int`): documents that are read and put in random order at a time.
        seed (`int`): of the order.
        lanes (`int`): independent streams of rows, each with its share of the documents.
        run (`int`): consecutive rows that come from one lane before it is the next lane's turn.
    """

    row_tokens: int
    shuffled: int
    seed: int
    lanes: int
    run: int


class PackedStream(torch.utils.data.Dataset[Row]):
    """The rows of one training, as a data set that Trainer can index.

    They are dealt to as many lanes as there are processes times workers, so that each reads and tokenizes its share
    only: whole files if their number allows, else every so many documents. Each lane has its own epochs, which follow
    each other without a gap: nothing is left over. A training that resumes with another number of processes or workers
    keeps its lanes; that is exact, too, but some documents may be read more than once.

    Use `data_collator=transformers.default_data_collator`. Collators that pad add an attention mask to a batch, and
    then documents would see each other.

    Args:
        documents (`datasets.IterableDataset`): a stream, such as `load_dataset(..., streaming=True)`, mapped or
            filtered as you like, but not shuffled.
        tokenizer (`PreTrainedTokenizerBase`): adds its special tokens; its end-of-text token ends each document.
        args (`TrainingArguments`): with `max_steps` and `train_sampling_strategy="sequential"`. Notes are kept in a
            folder `stream` of `output_dir`.
        row_tokens (`int`): tokens of a row.
        text_column (`str`, defaults to `"text"`): where the text is; empty ones are passed over.
        shuffled (`int`, defaults to 1024): documents that are read and put in random order at a time; 1 keeps their
            order. Files change places from the second epoch on, as always with `datasets`.

    Raises:
        ValueError: what cannot be resumed exactly, or an output folder with notes of other rows.
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
        self.documents, self.tokenizer, self.text_column = documents, tokenizer, text_column
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
        """Return a row; it is found fast if it is the next one of its lane."""
        if not 0 <= index < self.length:
            raise IndexError(f"there are {self.length} rows, got {index}")
        turn, within = divmod(index, self.deal.run)
        lane, number = turn % self.deal.lanes, turn // self.deal.lanes * self.deal.run + within
        if self._process != os.getpid():  # a worker must not share open files with the process it was forked from
            self._lanes, self._process = {}, os.getpid()
        if lane not in self._lanes or number < self._lanes[lane].next_row:
            self._lanes[lane] = Lane(self, lane, number)
        return self._lanes[lane].row(number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lanes": {}}


class Lane:
    """An independent stream of rows, from the last note at or before the wanted row on."""

    def __init__(self, rows: PackedStream, lane: int, wanted: int) -> None:
        self.name, self.deal, self.text_column, self.tokenizer = lane, rows.deal, rows.text_column, rows.tokenizer
        # made here, for the number of the epoch is shared by all processes that have the same object
        self.stream = split_dataset_by_node(rows.documents, rank=lane, world_size=self.deal.lanes)
        self.notes = rows.folder / f"lane-{lane}.jsonl"
        known = _read_notes(self.notes)
        self.noted = max((place.row for place in known), default=-1)
        place = max((place for place in known if place.row <= wanted), key=lambda place: place.row, default=Place())
        self.next_row, self.at = place.row, place
        self.rows = self._rows(place)

    def row(self, number: int) -> Row:
        """Return a row that has not been passed yet."""
        while self.next_row < number:
            next(self.rows)
            self.next_row += 1
        self.next_row += 1
        return next(self.rows)

    def _rows(self, place: Place) -> Iterator[Row]:
        """Yield rows from a place on, and note where some begin."""
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
        """Yield the token ids of documents without end, and keep in `at` where the last one is."""
        size = self.deal.shuffled if self.deal.shuffled > 1 else ENCODED_AT_ONCE
        for epoch in count(place.epoch):
            self.stream.set_epoch(epoch)
            if place.source is not None:
                if not _alike(place.source, self.stream.state_dict()):
                    raise self._changed(f"the stream's state is {place.source}", self.stream.state_dict())
                self.stream.load_state_dict(place.source)
            found, source = False, place.source
            for block, batch in enumerate(self.stream.iter(size), place.block):
                for document, tokens in self._encoded(batch, epoch, block, place.document):
                    self.at = Place(epoch=epoch, block=block, source=source, document=document)
                    found = found or bool(tokens)
                    yield tokens
                source, place = self.stream.state_dict(), Place()  # what follows is read from its start
            if not found:
                raise ValueError(
                    f"lane {self.name} of {self.deal.lanes} must have text, got none in a whole epoch: each of "
                    f"{self.deal.lanes} processes and workers needs documents"
                )

    def _encoded(self, batch: dict[str, list], epoch: int, block: int, first: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the documents of a block, from the first wanted on, in the order that they are taken."""
        if self.text_column not in batch:
            raise ValueError(f"text_column must be one of {list(batch)}, got {self.text_column!r}")
        texts = batch[self.text_column]
        if self.deal.shuffled > 1:
            order = np.random.default_rng([self.deal.seed, self.name, epoch, block]).permutation(len(texts))
            texts = [texts[i] for i in order]
        for start in range(first, len(texts), ENCODED_AT_ONCE):
            yield from enumerate(encode(self.tokenizer, texts[start : start + ENCODED_AT_ONCE]), start)

    def _changed(self, noted: str, got: Any) -> ValueError:
        return ValueError(
            f"{self.notes} has noted that {noted}, got {got}: documents or tokenizer have changed; bring them back, or "
            f"to begin anew delete {self.notes.parent}"
        )

    def _note(self, place: Place) -> None:
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(place)) + "\n")
        self.noted = place.row


def _alike(state: Any, other: Any) -> bool:
    """Whether two states can be of the same stream: what has not begun may be none."""
    if not (isinstance(state, dict) and isinstance(other, dict)):
        return True
    return state.keys() == other.keys() and all(_alike(state[name], other[name]) for name in state)


def _read_notes(path: Path) -> list[Place]:
    """Return the notes of a lane; of a process that was killed while it wrote one, part of the line may be there."""
    places = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            places.append(Place(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            logger.info(f"{path} has a line that is not whole")
    return places


def _keep(deal: Deal, folder: Path) -> Deal:
    """Return how rows are dealt in this training: as they were at first, if it has begun already."""
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
        told = ", ".join(f"{name}={new} (it was {old})" for name, (old, new) in changed.items())
        raise ValueError(f"the rows of {folder} must stay what they were, got {told}; to begin anew delete {folder}")
    if kept.lanes % deal.lanes or kept.run != deal.run:
        logger.warning(
            f"rows are dealt to {kept.lanes} lanes, {kept.run} at a time, as at first: {deal.lanes} processes and "
            f"workers with batches of {deal.run} read some documents more than once; samples are the same"
        )
    return kept


def _check(documents: IterableDataset, args: TrainingArguments) -> None:
    """Refuse what would lose or repeat samples in silence."""
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
        raise ValueError(f"max_steps must say how long to train on a stream, got {args.max_steps}")
    if args.train_sampling_strategy != "sequential":
        raise ValueError(
            "rows are made one after the other: train_sampling_strategy must be 'sequential', got "
            f"{args.train_sampling_strategy!r}; documents are put in random order by PackedStream(shuffled=...)"
        )
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip must be False, got True: the first rows would be repeated on resuming")


def _has_buffer(iterable: Any) -> bool:
    """Whether a stream shuffles more than its files; `datasets` has no public way to ask."""
    inner = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", [])]
    shuffles = isinstance(iterable, BufferShuffledExamplesIterable) and iterable.buffer_size > 1
    return shuffles or any(_has_buffer(part) for part in inner if part is not None)
