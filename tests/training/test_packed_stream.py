"""Streams of packed documents: each document in its place, in every layout and after every interruption."""

import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, zip_longest
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments, default_data_collator

from whisper_hf import PackedStream, packed_rows
from whisper_hf.model.labels import IGNORED
from whisper_hf.training import packed_stream

from ..conftest import LENGTH, tiny_model

BATCH = 2
STEPS = 130  # more than two epochs
END = 2  # the tokenizer's <eos>


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]) -> Path:
    """Four files with 41 documents, from one word to several rows, some of which are empty."""
    folder = tmp_path_factory.mktemp("documents")
    texts = [f"{i} {paragraphs[i][: 17 * i * i % 500]}" if i % 10 else "" for i in range(41)]
    for i in range(4):
        rows = Dataset.from_dict({"text": texts[i::4]})
        rows.to_json(folder / f"{i}.jsonl")
        rows.to_parquet(folder / f"{i}.parquet")
        (folder / f"{i}.txt").write_text("\n".join(rows["text"]), encoding="utf-8")
    return folder


def read(files: Path, kind: str) -> IterableDataset:
    """Return a stream of the documents in files of a kind."""
    builder = {"jsonl": "json", "txt": "text"}.get(kind, kind)
    names = [str(files / f"{i}.{kind}") for i in range(4)]
    return load_dataset(builder, data_files=names, split="train", streaming=True)


def longer(batch: dict[str, list]) -> dict[str, list]:
    """Put a document after each."""
    return {"text": [text for original in batch["text"] for text in (original, original[::-1])]}


SOURCES = {
    "text": lambda files: read(files, "txt"),
    "parquet": lambda files: read(files, "parquet"),
    "mapped and filtered": lambda files: (
        read(files, "jsonl").map(longer, batched=True, batch_size=7).filter(lambda row: len(row["text"]) != 5)
    ),
    "interleaved": lambda files: interleave_datasets(
        [read(files, "txt"), read(files, "jsonl")], probabilities=[0.7, 0.3], seed=0
    ),
}


def arguments(folder: Path, **options: object) -> TrainingArguments:
    """Return the arguments of a training on a stream."""
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def stream_of(documents, tokenizer, folder: Path, shuffled: int = 6, **options: object) -> PackedStream:
    """Return a stream of short rows."""
    args = arguments(folder, **options)
    return PackedStream(documents, tokenizer, args, row_tokens=LENGTH, shuffled=shuffled)


def values(rows) -> list[list]:
    """Return all that is in some rows."""
    return [[row[name].tolist() for name in ("input_ids", "position_ids", "labels")] for row in rows]


def batches(stream: PackedStream, processes: int, workers: int, start: int = 0) -> Iterator[dict]:
    """Yield the batches of a training in their order, as the Trainer of each process loads them from a batch on."""
    loaders = [
        prepare_data_loader(
            DataLoader(stream, BATCH, num_workers=workers, collate_fn=default_data_collator),
            num_processes=processes,
            process_index=index,
        )
        for index in range(processes)
    ]
    for step in zip_longest(*(skip_first_batches(loader, start // processes) for loader in loaders)):
        yield from step


def encoded(documents: IterableDataset, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Return the tokens of all documents that are not empty."""
    return [tuple(tokens) for tokens in packed_stream.encode(tokenizer, [row["text"] for row in documents]) if tokens]


def rows_of(loaded: Iterator[dict]) -> list[list]:
    """Return all that is in the rows of some batches."""
    rows = ({name: batch[name][i] for name in batch} for batch in loaded for i in range(BATCH))
    return values(rows)


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("source", ["text", "parquet", "mapped and filtered"])
def test_each_document_comes_once_an_epoch(source: str, lanes: int, files, tokenizer, tmp_path) -> None:
    """Three lanes share four files by documents, two by files."""
    documents = SOURCES[source](files)
    everything = Counter(encoded(documents, tokenizer))
    stream = stream_of(documents, tokenizer, tmp_path, dataloader_num_workers=lanes)
    assert stream.deal.lanes == lanes
    found: list[Counter] = [Counter(), Counter()]
    for lane in range(lanes):
        turns = range(lane * BATCH, len(stream), lanes * BATCH)
        tokens = [int(token) for i in turns for row in (stream[i], stream[i + 1]) for token in row["input_ids"]]
        ends = [i + 1 for i, token in enumerate(tokens) if token == END]
        seen = [tuple(tokens[a:b]) for a, b in pairwise([0, *ends])]
        share = split_dataset_by_node(documents, rank=lane, world_size=lanes)
        for epoch in range(2):
            share.set_epoch(epoch)
            expected = encoded(share, tokenizer)
            once, seen = seen[: len(expected)], seen[len(expected) :]
            assert once != expected  # but in another order
            assert sorted(once) == sorted(expected)
            found[epoch].update(once)
    assert found == [everything, everything]


def test_documents_in_a_row_do_not_see_each_other(files, tokenizer, tmp_path) -> None:
    """The loss is that of the pieces apart, weighted by what is predicted: the first token of none."""
    stream = stream_of(read(files, "jsonl"), tokenizer, tmp_path)
    rows = [stream[i] for i in range(6)]
    model = tiny_model()
    loss = model(**default_data_collator(rows)).loss
    total, count, pieces = 0.0, 0, 0
    for row in rows:
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        assert (row["labels"] == IGNORED).nonzero().flatten().tolist() == starts
        pieces += len(starts)
        for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            ids = row["input_ids"][start:end][None]
            assert row["position_ids"][start:end].tolist() == [*range(end - start)]
            if end - start > 1:
                total += model(ids, labels=ids).loss.item() * (end - start - 1)
                count += end - start - 1
    assert pieces > len(rows) + 3
    torch.testing.assert_close(loss.item(), total / count, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_the_same_after_an_interruption(source: str, files, tokenizer, tmp_path, monkeypatch) -> None:
    """From every row on, in three epochs, with notes and where they have been lost."""
    monkeypatch.setattr(packed_stream, "NOTE_EVERY", 4)
    stream = stream_of(SOURCES[source](files), tokenizer, tmp_path)
    expected = values(stream)
    assert len(expected) == STEPS * BATCH
    for start in range(0, len(expected), 19):
        again = stream_of(SOURCES[source](files), tokenizer, tmp_path)
        assert values(again[i] for i in range(start, min(start + 6, len(expected)))) == expected[start : start + 6]
    (tmp_path / "stream" / "lane-0.jsonl").unlink()
    assert values([stream_of(SOURCES[source](files), tokenizer, tmp_path)[77]]) == expected[77:78]


@pytest.mark.parametrize(("processes", "workers", "start"), [(1, 0, 9), (1, 2, 9), (2, 0, 10), (2, 2, 10), (3, 1, 15)])
def test_layouts_load_the_same_rows(processes, workers, start, files, tokenizer, tmp_path, monkeypatch) -> None:
    """Processes and workers load what was dealt to their number; then another layout goes on in the middle."""
    monkeypatch.setattr(packed_stream, "NOTE_EVERY", 4)
    documents = read(files, "parquet")
    options = {"max_steps": 36, "dataloader_num_workers": processes * workers or processes}  # as many lanes
    expected = values(stream_of(documents, tokenizer, tmp_path / "whole", **options))
    stream = stream_of(documents, tokenizer, tmp_path / "cut", **options)
    begun = []
    for batch in batches(stream, processes, workers):
        begun.append(batch)
        if len(begun) == start:  # workers are ahead
            break
    assert rows_of(begun) == expected[: start * BATCH]
    for layout in ((processes, workers), (1, 1), (3, 0)):
        first = start // layout[0] * layout[0]
        stream = stream_of(documents, tokenizer, tmp_path / "cut", max_steps=36)
        assert rows_of(batches(stream, *layout, first)) == expected[first * BATCH :]


def test_resuming_reads_little_again(files, tokenizer, tmp_path, count_calls) -> None:
    stream = stream_of(read(files, "jsonl"), tokenizer, tmp_path, max_steps=500)
    expected = stream[950]
    encoded = count_calls(packed_stream, "encode")
    again = stream_of(read(files, "jsonl"), tokenizer, tmp_path, max_steps=500)
    assert torch.equal(again[950]["input_ids"], expected["input_ids"])
    assert sum(map(len, encoded)) < 50  # of some 900


def test_a_worker_that_is_not_forked_loads_the_same(files, tokenizer, tmp_path) -> None:
    stream = stream_of(read(files, "jsonl"), tokenizer, tmp_path)
    expected = values([stream[3], stream[4]])
    again = pickle.loads(pickle.dumps(stream))
    assert values([again[3], again[4]]) == expected


def test_what_is_left_over_for_evaluation_is_filled_up(tokenizer, paragraphs) -> None:
    texts = [text[:200] for text in paragraphs[:5]]
    rows = packed_rows(texts, tokenizer, LENGTH)
    documents = packed_stream.encode(tokenizer, texts)
    tokens = [token for document in documents for token in document]
    assert len(tokens) % LENGTH > 0
    assert {len(row["input_ids"]) for row in rows} == {LENGTH}
    assert torch.cat([row["input_ids"] for row in rows])[: len(tokens)].tolist() == tokens
    pieces = sum((row["position_ids"] == 0).sum().item() for row in rows) - 1  # one is the filling
    assert sum((row["labels"] != IGNORED).sum().item() for row in rows) == len(tokens) - pieces
    with pytest.raises(ValueError, match="there must be text"):
        packed_rows([""], tokenizer, LENGTH)


@pytest.mark.parametrize("what", ["documents", "row_tokens", "seed", "shuffled"])
def test_other_rows_than_those_begun_are_refused(what: str, files, tokenizer, tmp_path) -> None:
    stream = stream_of(read(files, "jsonl"), tokenizer, tmp_path)
    stream[20]
    documents, args = read(files, "jsonl"), arguments(tmp_path, seed=1 if what == "seed" else 42)
    if what == "documents":
        documents = documents.map(lambda row: {"text": row["text"].replace("the", "a")})
    tokens, shuffled = (8 if what == "row_tokens" else LENGTH), (7 if what == "shuffled" else 6)
    with pytest.raises(ValueError, match="delete .* to start again" if what != "documents" else "have changed"):
        PackedStream(documents, tokenizer, args, row_tokens=tokens, shuffled=shuffled)[20]


def test_half_a_note_is_not_taken_for_one(files, tokenizer, tmp_path) -> None:
    stream = stream_of(read(files, "jsonl"), tokenizer, tmp_path)
    expected = values(stream)
    notes = tmp_path / "stream" / "lane-0.jsonl"
    lines = notes.read_text().splitlines(keepends=True)
    for part in range(0, len(lines[2]), 23):
        notes.write_text("".join(lines[:2]) + lines[2][:part])
        assert values([stream_of(read(files, "jsonl"), tokenizer, tmp_path)[40]]) == expected[40:41]


REFUSED = {
    "must be a datasets.IterableDataset, got Dataset": (lambda d: Dataset.from_dict({"text": ["a"]}), {}, {}),
    "leave out shuffle": (lambda d: d.shuffle(buffer_size=9).map(longer, batched=True), {}, {}),
    "max_steps must say": (lambda d: d, {"max_steps": -1}, {}),
    "must be 'sequential', .* got 'random'": (lambda d: d, {"train_sampling_strategy": "random"}, {}),
    "ignore_data_skip must be False": (lambda d: d, {"ignore_data_skip": True}, {}),
    "row_tokens must be at least 2, got 1": (lambda d: d, {}, {"row_tokens": 1}),
    "shuffled must be at least 1, got 0": (lambda d: d, {}, {"shuffled": 0}),
    r"must be one of \['text'\], got 'body'": (lambda d: d, {}, {"text_column": "body"}),
    "lane 0 of 1 must have text": (lambda d: d.filter(lambda row: not row["text"]), {}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_lose_samples_is_refused(message: str, files, tokenizer, tmp_path) -> None:
    change, options, more = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        PackedStream(
            change(read(files, "jsonl")), tokenizer, arguments(tmp_path, **options), **{"row_tokens": 8, **more}
        )[0]
    assert not any(tmp_path.rglob("*.jsonl"))
