"""Teacher signals on disk: what is written, what is refused, and training from them as from the teacher itself."""

import copy
import functools
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from whisper_hf import WhisperLMForCausalLM
from whisper_hf.__main__ import main
from whisper_hf.commands import cache_signals as command
from whisper_hf.distillation import DistillationTrainer, Manifest, StoredSignals, signal_writer, write_signals
from whisper_hf.distillation.stored_signals import MANIFEST

from ..conftest import SIZES, VOCABULARY, tiny_model
from .test_trainer import config

LENGTHS = (23, 61, 7, 31, 61, 12, 1, 35, 50, 9, 28, 17)  # some beyond the student's budget of 48
ALL_BUT_ONE = VOCABULARY - 1  # with the probability of the last token, these are the teacher's whole distribution
PADDED = VOCABULARY + 8  # logits of a teacher beyond its tokenizer
ROUNDING = 1e-3  # of logarithms in float16, as far as `difference` sees it


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """The Trainer collects garbage each time it starts: half a second among all that transformers has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def teacher_model(kind: type[PreTrainedModel] = LlamaForCausalLM, **overrides: object) -> PreTrainedModel:
    """Return a teacher, far from uniform."""
    if kind is WhisperLMForCausalLM:
        return tiny_model(**overrides)
    set_seed(1)
    return kind(kind.config_class(**{**SIZES, "pad_token_id": 0, **overrides})).eval()


def student_model(**overrides: object) -> PreTrainedModel:
    """Return a sparse student."""
    return tiny_model(**{"initializer_range": 0.1, **overrides})


def random_tokens(*lengths: int) -> list[list[int]]:
    """Return examples without special tokens."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """A dense teacher with as many logits as the student."""
    return teacher_model()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Examples of many lengths, in another order than in memory; their first three tokens are a prompt."""
    rows = random_tokens(*LENGTHS)
    labels = [[-100] * min(3, len(row)) + row[3:] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels}).select([5, 0, 3, 1, 2, 4, 11, 10, 9, 8, 7, 6])


@pytest.fixture(scope="module")
def stored(teacher, dataset, tmp_path_factory) -> Path:
    """Signals that hold the teacher's whole distribution."""
    folder = tmp_path_factory.mktemp("signals")
    write(teacher, dataset, folder, count=ALL_BUT_ONE, batch_size=5)
    return folder


@pytest.fixture(scope="module")
def live(teacher, dataset, tmp_path_factory) -> DistillationTrainer:
    """A student trained by the teacher itself."""
    return trained(teacher, dataset, tmp_path_factory.mktemp("live"))


def write(teacher: PreTrainedModel, dataset: Dataset, folder: Path, **options: Any) -> Manifest:
    """Write signals, few of them."""
    return write_signals(teacher, dataset, folder, **{"count": 8, "progress": False, "batch_size": 4, **options})


def columns(folder: Path) -> dict[str, list[Tensor]]:
    """Return all signals of a folder, without their prefix, example by example."""
    signals = StoredSignals(folder)
    found = signals.columns(list(range(signals.manifest.examples)))
    return {k.removeprefix("teacher_"): [torch.tensor(array) for array in arrays] for k, arrays in found.items()}


def table(folder: Path) -> Any:
    """Return all signals of a folder, to be compared with others bit by bit."""
    return StoredSignals(folder).rows.with_format("arrow")[:]


@torch.no_grad()
def expected_log(teacher: PreTrainedModel, row: list[int], temperature: float = 1.0) -> Tensor:
    """Return a teacher's predictions for an example that it sees alone, `[T, V]`."""
    return (teacher(torch.tensor([row])).logits[0].float() / temperature).log_softmax(-1)


def pad(examples: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    """Pad a batch to a multiple of eight."""
    width = -(-max(len(example["input_ids"]) for example in examples) // 8) * 8
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]

    def padded(row: list[int], fill: int) -> list[int]:
        missing = [fill] * (width - len(row))
        return [*row, *missing] if side == "right" else [*missing, *row]

    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: torch.tensor([padded(row[name], fill) for row in rows]) for name, fill in fills.items()}


def trainer(teacher: Any, dataset: Any, folder: Path, collator: Callable = pad, **options: Any) -> DistillationTrainer:
    """Return a trainer for a few steps."""
    names = ("model", "eval_dataset", "processing_class", "teacher_processing_class")  # the rest is for the config
    kwargs = {"model": student_model(), **{name: options.pop(name) for name in names if name in options}}
    args = config(folder / "trainer", **{"learning_rate": 0.3, "per_device_train_batch_size": 4, **options})
    return DistillationTrainer(teacher=teacher, args=args, train_dataset=dataset, data_collator=collator, **kwargs)


def trained(*args: Any, **options: Any) -> DistillationTrainer:
    """Return a trainer that has trained."""
    result = trainer(*args, **options)
    result.train()
    return result


def change(trainer: DistillationTrainer) -> Tensor:
    """Return what training did to the weights."""
    before = student_model().state_dict()
    return torch.cat([(weight - before[name]).flatten() for name, weight in trainer.model.state_dict().items()])


def difference(first: DistillationTrainer, second: DistillationTrainer) -> float:
    """Return how much two trainings differ, relative to what the first did."""
    return ((change(first) - change(second)).norm() / change(first).norm()).item()


class WidestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Run an operation and look at what it returns."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return results


# what is written


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LlamaForCausalLM, {}), (Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}), (WhisperLMForCausalLM, {})],
    ids=["dense", "capped", "sparse"],
)
@pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, 5), (2.0, 1)])
def test_top_signals_are_the_likeliest_tokens(kind, options, temperature, batch_size, dataset, tmp_path) -> None:
    teacher = teacher_model(kind, **options)
    manifest = write(teacher, dataset, tmp_path, temperature=temperature, batch_size=batch_size)
    assert (manifest.examples, manifest.tokens, manifest.vocabulary) == (len(LENGTHS), sum(LENGTHS), VOCABULARY)
    found = columns(tmp_path)
    for i, row in enumerate(dataset["input_ids"]):
        tokens, log, rest = (found[name][i] for name in ("tokens", "log_probabilities", "log_rest"))
        expected = expected_log(teacher, row, temperature)
        assert tokens.shape == log.shape == (len(row), 8)
        assert all(len(set(chosen)) == 8 for chosen in tokens.tolist())
        torch.testing.assert_close(log, expected.topk(8).values, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(log, expected.gather(1, tokens), rtol=1e-3, atol=1e-4)
        others = expected.scatter(1, tokens, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(rest, others, rtol=1e-4, atol=1e-4)


def test_samples_are_drawn_from_the_distribution(teacher, dataset, tmp_path) -> None:
    write(teacher, dataset, tmp_path, kind="samples", count=100)
    found, variances = columns(tmp_path), []
    for row, tokens, entropy in zip(dataset["input_ids"], found["tokens"], found["entropy"], strict=True):
        expected = expected_log(teacher, row)
        assert tokens.shape == (len(row), 100)
        torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4)
        share = torch.zeros_like(expected).scatter_add_(1, tokens, torch.full(tokens.shape, 1 / 100))
        square = (share - expected.exp()).square().sum(-1)
        variances.append(square * 100 / (1 - expected.exp().square().sum(-1)))
    assert torch.cat(variances).mean().item() == pytest.approx(1, abs=0.05)  # that of 100 independent draws


def test_seed_and_part_decide_about_samples(teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(signal_writer, "EXAMPLES_PER_PART", 1)
    same = Dataset.from_dict({"input_ids": random_tokens(20) * 2})
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write(teacher, same, tmp_path / name, kind="samples", seed=seed)
    assert table(tmp_path / "first") == table(tmp_path / "again")
    assert table(tmp_path / "first") != table(tmp_path / "other")
    first, second = columns(tmp_path / "first")["tokens"]
    assert not torch.equal(first, second)


def test_attention_mask_of_the_data_is_used(teacher, tmp_path) -> None:
    rows = random_tokens(10, 20)
    masks = [[0] * 5 + [1] * 10, [1] * 20]
    write(teacher, Dataset.from_dict({"input_ids": [[7] * 5 + rows[0], rows[1]], "attention_mask": masks}), tmp_path)
    for row, log in zip(rows, columns(tmp_path)["log_probabilities"], strict=True):
        expected = expected_log(teacher, row).topk(8).values
        torch.testing.assert_close(log[-len(row) :], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, WhisperLMForCausalLM])
@pytest.mark.parametrize("lengths", [((10, 12), (5, 17)), ((10, 12), (8, 9, 20))], ids=["equal", "ragged"])
def test_packed_documents_do_not_see_each_other(kind, lengths, tmp_path) -> None:
    teacher = teacher_model(kind)
    documents = [random_tokens(*row) for row in lengths]
    packed = {
        "input_ids": [[token for document in row for token in document] for row in documents],
        "position_ids": [[i for document in row for i in range(len(document))] for row in documents],
    }
    write(teacher, Dataset.from_dict(packed), tmp_path)
    for row, log in zip(documents, columns(tmp_path)["log_probabilities"], strict=True):
        expected = torch.cat([expected_log(teacher, document).topk(8).values for document in row])
        torch.testing.assert_close(log, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "at least one example, got an empty data set"), ([[5, 6], []], "got example 1 without tokens")],
    ids=["no examples", "an empty one"],
)
def test_data_without_tokens_are_refused(rows, message, teacher, tmp_path) -> None:
    data = Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int64"))}))
    with pytest.raises(ValueError, match=message):
        write(teacher, data, tmp_path / "signals")
    assert not (tmp_path / "signals").exists()


@pytest.mark.parametrize(
    ("kind", "column", "dtype"),
    [("top", "teacher_log_probabilities", "float16"), ("samples", "teacher_tokens", "uint16")],
)
def test_signals_are_compact(kind, column, dtype, teacher, dataset, tmp_path) -> None:
    manifest = write(teacher, dataset, tmp_path, kind=kind, count=64)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size == pytest.approx(manifest.bytes, rel=0.1)
    features = StoredSignals(tmp_path).rows.features
    for name, expected in ((column, dtype), ("teacher_tokens", "uint16")):
        assert (features[name].feature.length, features[name].feature.feature.dtype) == (64, expected)
    scalar = "teacher_log_rest" if kind == "top" else "teacher_entropy"
    assert features[scalar].feature.dtype == "float32"


@pytest.mark.parametrize(("vocabulary", "dtype", "size"), [(2**16, "uint16", 2), (2**16 + 1, "int32", 4)])
def test_the_last_token_of_a_large_vocabulary_is_stored(vocabulary, dtype, size, tmp_path) -> None:
    teacher = teacher_model(vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1)
    weight = teacher.lm_head.weight.data
    weight[-1], weight[-2] = 50 * weight[0], -50 * weight[0]  # one of the two is likely
    manifest = write(teacher, Dataset.from_dict({"input_ids": random_tokens(60)}), tmp_path, count=2)
    assert StoredSignals(tmp_path).rows.features["teacher_tokens"].feature.feature.dtype == dtype
    assert columns(tmp_path)["tokens"][0].max() == vocabulary - 1
    assert manifest.bytes == 60 * (2 * (size + 2) + 4)


def test_padding_beyond_the_tokenizer_is_left_out(dataset, tokenizer, tmp_path) -> None:
    teacher = teacher_model(vocab_size=PADDED)
    teacher.lm_head.weight.data[VOCABULARY:] = 9.0  # likely tokens, if they were any
    manifest = write(teacher, dataset, tmp_path, count=ALL_BUT_ONE, tokenizer=tokenizer)
    assert manifest.vocabulary == len(tokenizer) == VOCABULARY
    found = columns(tmp_path)
    assert torch.cat(found["tokens"]).max() < VOCABULARY
    total = torch.cat(found["log_probabilities"]).exp().sum(-1) + torch.cat(found["log_rest"]).exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-3, atol=0)
    options = {"max_steps": 1, "processing_class": tokenizer}
    assert difference(*(trained(source, dataset, tmp_path, **options) for source in (teacher, tmp_path))) < ROUNDING


def test_writing_makes_no_logits_of_a_whole_batch(teacher, dataset, tmp_path) -> None:
    with WidestLogits() as widest:
        write(teacher, dataset, tmp_path)
    assert 0 < widest.rows <= max(LENGTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "all"}, "unknown kind of signals 'all'; expected top or samples"),
        ({"count": 0}, f"between 1 and {ALL_BUT_ONE} stored tokens, got 0"),
        ({"count": VOCABULARY}, f"between 1 and {ALL_BUT_ONE} stored tokens, got {VOCABULARY}"),
    ],
    ids=str,
)
def test_impossible_signals_are_refused(options, message, teacher, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        write(teacher, dataset, tmp_path / "signals", **options)
    assert not (tmp_path / "signals").exists()


def test_a_teacher_in_training_mode_is_refused(dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"training mode.*teacher\.eval"):
        write(teacher_model().train(), dataset, tmp_path)


# interruptions


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make three parts of the data set."""
    monkeypatch.setattr(signal_writer, "EXAMPLES_PER_PART", 4)


@pytest.fixture
def calls(teacher: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Calls of the teacher: those made, and how many are allowed."""
    calls = {"made": 0, "allowed": 99}

    def count(*_: object) -> None:
        calls["made"] += 1
        if calls["made"] > calls["allowed"]:
            raise OSError("out of memory")

    handle = teacher.register_forward_pre_hook(count)
    yield calls
    handle.remove()


def fail_half_way(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let saving a data set to a folder of this name stop in the middle."""
    save = Dataset.save_to_disk

    def save_half(dataset: Dataset, folder: str, **kwargs: Any) -> None:
        save(dataset, folder, **kwargs)
        if Path(folder).name.endswith(name):
            (Path(folder) / "state.json").unlink()
            raise OSError("out of space")

    monkeypatch.setattr(Dataset, "save_to_disk", save_half)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["top", "samples"])
@pytest.mark.parametrize("cause", ["teacher", "disk"])
def test_writing_goes_on_where_it_stopped(kind, cause, teacher, dataset, tmp_path, calls, monkeypatch) -> None:
    options = {"kind": kind, "batch_size": 2}
    whole = write(teacher, dataset, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        if cause == "disk":
            fail_half_way(patch, "part-000001")
        else:
            calls |= {"made": 0, "allowed": 4}  # to learn about its head, two for a part, and one in the middle
        with pytest.raises(OSError, match="out of"):
            write(teacher, dataset, tmp_path / "parts", **options)
    assert [path.name for path in (tmp_path / "parts").glob("part-*")] == ["part-000000"]
    with pytest.raises(ValueError, match=r"signals of 4 examples, expected 12; run the same `cache-signals` command"):
        StoredSignals(tmp_path / "parts")
    calls |= {"made": 0, "allowed": 1 + 2 * 2}  # nothing is computed twice
    assert write(teacher, dataset, tmp_path / "parts", **options) == whole
    assert table(tmp_path / "whole") == table(tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("unfinished-*"))


def test_finished_signals_are_not_computed_again(teacher, dataset, tmp_path, calls) -> None:
    manifest = write(teacher, dataset, tmp_path)
    calls["allowed"] = 0
    assert write(teacher, dataset, tmp_path) == manifest


@pytest.mark.usefixtures("small_parts")
def test_unfinished_parts_are_not_read(teacher, dataset, tmp_path) -> None:
    write(teacher, dataset, tmp_path)
    shutil.copytree(tmp_path / "part-000000", tmp_path / "unfinished-part-000003")
    assert len(StoredSignals(tmp_path).rows) == len(dataset)
    shutil.rmtree(tmp_path / "part-000001")
    with pytest.raises(ValueError, match="of 8 examples, expected 12"):
        StoredSignals(tmp_path)


@pytest.mark.parametrize(
    "other",
    [{"count": 9}, {"temperature": 2.0}, {"seed": 1}, {"kind": "samples"}, {"examples": 11}, {"has_tokenizer": True}],
    ids=str,
)
def test_other_signals_are_not_mixed(other, teacher, dataset, tokenizer, tmp_path) -> None:
    write(teacher, dataset, tmp_path)
    before = table(tmp_path)
    options = {"tokenizer": tokenizer if "has_tokenizer" in other else None}
    options |= {name: value for name, value in other.items() if name not in ("examples", "has_tokenizer")}
    rows = dataset.select(range(other.get("examples", len(dataset))))
    with pytest.raises(ValueError, match=r"holds other signals \(there, here\).*choose another folder"):
        write(teacher, rows, tmp_path, **options)
    assert table(tmp_path) == before


def test_another_version_is_refused(teacher, dataset, tmp_path) -> None:
    write(teacher, dataset, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 0, "other": 1}))
    with pytest.raises(ValueError, match="version 0, expected 1"):
        StoredSignals(tmp_path)


# training

LAYOUTS = {
    "right": pad,
    "left": functools.partial(pad, side="left"),
    "concatenated": DataCollatorWithFlattening(),
}
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


class Rows(torch.utils.data.Dataset):
    """A data set that is nothing but a length and an order."""

    def __init__(self, dataset: Dataset) -> None:
        self.rows = list(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    """A data set that can only be iterated over."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)


class StopAt(TrainerCallback):
    """End training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask the trainer to stop."""
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, ACCUMULATED], ids=["at once", "accumulated"])
def test_stored_signals_teach_like_the_teacher(layout, options, stored, dataset, live, tmp_path) -> None:
    result = trained(stored, dataset, tmp_path, LAYOUTS[layout], **options)
    assert difference(live, result) < ROUNDING
    for ours, theirs in zip(result.state.log_history[:-1], live.state.log_history[:-1], strict=True):
        for name in ("loss", "divergence", "cross_entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=ROUNDING), name


@pytest.mark.parametrize("options", [{"dataloader_num_workers": 1}, {"remove_unused_columns": False}], ids=str)
def test_loading_options_change_nothing(options, stored, dataset, live, tmp_path) -> None:
    assert difference(live, trained(str(stored), dataset, tmp_path, **options)) < ROUNDING


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", [list, Rows])
def test_other_map_style_data_sets_train(kind, remove, stored, dataset, live, tmp_path) -> None:
    result = trained(stored, kind(dataset), tmp_path, remove_unused_columns=remove)
    assert difference(live, result) < ROUNDING


@pytest.mark.parametrize(
    "formatted",
    [
        lambda data: data.with_format("torch"),
        lambda data: data.add_column("note", [""] * len(data)).with_format("torch", ["input_ids", "labels"]),
        lambda data: data.with_transform(lambda batch: {name: batch[name] for name in ("input_ids", "labels")}),
    ],
    ids=["tensors", "columns", "transform"],
)
def test_formatted_data_sets_train(formatted, stored, dataset, live, tmp_path) -> None:
    assert difference(live, trained(stored, formatted(dataset), tmp_path)) < ROUNDING


def test_all_losses_combine(teacher, dataset, tmp_path) -> None:
    write(teacher, dataset, tmp_path, count=ALL_BUT_ONE, temperature=2.0)
    divergence = {"skewed_kl": 0.5, "reverse_kl": 0.5}
    options = {"divergence": divergence, "temperature": 2.0, "cross_entropy_weight": 0.5, "max_steps": 2}
    assert difference(*(trained(source, dataset, tmp_path, **options) for source in (teacher, tmp_path))) < ROUNDING


def test_samples_teach_about_the_same(teacher, dataset, live, tmp_path) -> None:
    write(teacher, dataset, tmp_path, kind="samples", count=100)
    result = trained(tmp_path, dataset, tmp_path)
    assert difference(live, result) < 0.5
    assert result.state.log_history[0]["loss"] == pytest.approx(live.state.log_history[0]["loss"], rel=0.05)


def test_a_student_may_have_more_tokens(stored, dataset, tmp_path) -> None:
    larger = student_model(vocab_size=PADDED)
    before = larger.lm_head.weight[VOCABULARY:].clone()
    result = trained(stored, dataset, tmp_path, model=larger, per_device_train_batch_size=len(dataset))
    assert result.state.log_history[2]["divergence"] < result.state.log_history[0]["divergence"]
    assert torch.equal(larger.lm_head.weight[VOCABULARY:], before)


def test_padding_teaches_nothing(stored, dataset, tokenizer, tmp_path) -> None:
    """On the left, the first token follows padding, about which nothing is stored."""
    results = []
    for side in ("right", "left"):
        padding = copy.deepcopy(tokenizer)
        padding.padding_side = side
        collator = DataCollatorForLanguageModeling(padding, mlm=False)
        results.append(trained(stored, dataset.remove_columns("labels"), tmp_path, collator))
    assert difference(*results) < ROUNDING


def test_training_makes_no_logits_of_a_whole_batch(teacher, dataset, tmp_path) -> None:
    write(teacher, dataset, tmp_path)
    student = trainer(tmp_path, dataset, tmp_path, max_steps=1, chunk_tokens=40)
    with WidestLogits() as widest:
        student.train()
    assert widest.rows == 40


def test_evaluation_is_plain_cross_entropy(stored, dataset, tmp_path) -> None:
    rows = random_tokens(20, 33)
    held_out = Dataset.from_dict({"input_ids": rows, "labels": rows})
    student = trained(stored, dataset, tmp_path, eval_dataset=held_out)
    metrics = student.evaluate()
    with torch.no_grad():
        losses = [student.model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows]
    expected = (losses[0] * 19 + losses[1] * 32) / 51
    assert metrics["eval_loss"] == metrics["eval_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert "eval_divergence" not in metrics


def test_evaluation_needs_no_training_data(stored, dataset, live, tmp_path) -> None:
    student = trainer(stored, None, tmp_path, model=live.model, eval_dataset=dataset)
    assert student.evaluate()["eval_loss"] == pytest.approx(live.evaluate(dataset)["eval_cross_entropy"], rel=1e-5)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(stored, dataset, tmp_path) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}  # an epoch has three
    whole = trained(stored, dataset, tmp_path / "whole", **options)
    interrupted = trainer(stored, dataset, tmp_path / "parts", **options)
    interrupted.add_callback(StopAt(2))
    interrupted.train()
    assert interrupted.state.global_step == 2
    resumed = trainer(stored, dataset, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert torch.equal(change(whole), change(resumed))


# refusals


@pytest.mark.parametrize(
    "other",
    [
        lambda rows: rows[:-1],
        lambda rows: rows[::-1],
        lambda rows: [[*rows[0][:-1], 3], *rows[1:]],
        lambda rows: [rows[0][:5], rows[0][5:] + rows[1], *rows[2:]],
    ],
    ids=["fewer", "reversed", "another token", "cut elsewhere"],
)
def test_other_data_are_refused(other, stored, dataset, tmp_path) -> None:
    rows = other(list(dataset["input_ids"]))
    with pytest.raises(ValueError, match=r"made with another data \(token ids, in order\): expected \w+, got \w+"):
        trainer(stored, Dataset.from_dict({"input_ids": rows, "labels": rows}), tmp_path)


def test_another_temperature_is_refused(stored, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"made with another temperature: expected 1\.0, got 2\.0; make new ones"):
        trainer(stored, dataset, tmp_path, temperature=2.0)


@pytest.mark.parametrize("argument", ["processing_class", "teacher_processing_class"])
def test_another_tokenizer_is_refused(argument, teacher, dataset, tokenizer, tmp_path) -> None:
    write(teacher, dataset, tmp_path, tokenizer=tokenizer)
    trainer(tmp_path, dataset, tmp_path, **{argument: tokenizer})
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["whisper"])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        trainer(tmp_path, dataset, tmp_path, **{argument: other})


@pytest.mark.parametrize(
    "collator",
    [
        lambda examples: {name: tensor[:, :16] for name, tensor in pad(examples).items()},
        lambda examples: {**pad(examples), "input_ids": pad(examples)["input_ids"].clamp(max=50)},
        lambda examples: pad(examples[::-1]),
        lambda examples: DataCollatorWithFlattening()(examples[::-1]),
    ],
    ids=["truncates", "replaces", "reorders", "concatenates in another order"],
)
def test_a_collator_that_changes_tokens_is_refused(collator, stored, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"stored signals belong to the tokens as they are.*pads or concatenates"):
        trained(stored, dataset, tmp_path, collator)


@pytest.mark.parametrize("stream", [Dataset.to_iterable_dataset, Stream, iter], ids=["datasets", "torch", "iterator"])
def test_iterable_data_sets_are_refused(stream, stored, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match="need a data set with a length and an order, got"):
        trainer(stored, stream(dataset), tmp_path)


def test_training_without_signals_is_refused(stored, dataset, tmp_path) -> None:
    """It would be plain training, and nobody would notice."""
    student = trainer(stored, None, tmp_path)
    student.train_dataset = dataset
    with pytest.raises(ValueError, match="signals"):
        student.train()


@pytest.mark.parametrize("divergence", ["reverse_kl", {"forward_kl": 0.5, "skewed_kl": 0.5}], ids=str)
def test_samples_are_for_forward_kl_alone(divergence, teacher, dataset, tmp_path) -> None:
    write(teacher, dataset, tmp_path, kind="samples")
    with pytest.raises(ValueError, match=r'unbiased for "forward_kl" alone, got .*--top-k'):
        trainer(tmp_path, dataset, tmp_path, divergence=divergence)


@pytest.mark.parametrize(
    "options", [{"divergence": "universal"}, {"hidden_states_weight": 0.1}, {"on_policy_fraction": 0.5}], ids=str
)
def test_what_needs_the_teacher_itself_is_refused(options, stored, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"stored signals cannot be combined with .* as a model"):
        trainer(stored, dataset, tmp_path, **options)


def test_a_smaller_vocabulary_is_refused(stored, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"about {VOCABULARY} tokens, and the student has only {ALL_BUT_ONE}"):
        trainer(stored, dataset, tmp_path, model=student_model(vocab_size=ALL_BUT_ONE))


# the command


@pytest.fixture(scope="module")
def teacher_folder(tokenizer, tmp_path_factory) -> Path:
    """A saved teacher with more logits than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher_model(vocab_size=PADDED).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(paragraphs: list[str]) -> list[str]:
    """A few short paragraphs."""
    return [paragraph[:200] for paragraph in paragraphs[:6]]


@pytest.fixture
def text_file(texts, tmp_path) -> Path:
    """The paragraphs, one a line."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def cache(teacher_folder, tmp_path, monkeypatch) -> Callable[..., StoredSignals]:
    """Return a function that runs the command on a data set, and reads what it wrote to a folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(data: Path, output: Path, *options: object) -> StoredSignals:
        arguments = ["cache-signals", "--teacher", teacher_folder, "--dataset", data, "--output", output, *options]
        assert main([str(argument) for argument in arguments]) == 0
        return StoredSignals(output)

    return run


def test_text_file_to_trained_student(cache, text_file, tokenizer, tmp_path, capsys) -> None:
    output = tmp_path / "signals"
    manifest = cache(text_file, output, "--max-length", 48, "--top-k", 16).manifest
    assert (manifest.kind, manifest.count, manifest.vocabulary) == ("top", 16, VOCABULARY)
    data = datasets.load_from_disk(str(output / "data"))
    printed = capsys.readouterr().out
    assert f"the data set to train on is {output / 'data'}" in printed
    assert f"{len(data)} examples, {manifest.tokens} tokens, about" in printed
    expected = [*tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"], tokenizer.eos_token_id]  # one document
    assert [token for row in data["input_ids"] for token in row] == expected
    assert {len(row) for row in data["input_ids"][:-1]} == {48}
    options = {"processing_class": tokenizer, "per_device_train_batch_size": len(data)}
    history = trained(output, data, tmp_path, DataCollatorWithFlattening(), **options).state.log_history
    assert history[2]["divergence"] < 0.98 * history[0]["divergence"]


def test_written_data_train_with_padding(cache, text_file, tokenizer, tmp_path) -> None:
    """By the collator that the trainer's own message recommends."""
    cache(text_file, tmp_path / "signals", "--max-length", 48, "--top-k", 4)
    data = datasets.load_from_disk(str(tmp_path / "signals" / "data"))
    assert len(data[-1]["input_ids"]) < 48
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert trained(tmp_path / "signals", data, tmp_path, collator, max_steps=1).state.global_step == 1


def test_samples_of_json_lines_in_another_column(cache, texts, tmp_path) -> None:
    path, output = tmp_path / "text.jsonl", tmp_path / "signals"
    path.write_text("".join(json.dumps({"content": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    options = ("--samples", 12, "--text-column", "content", "--max-length", 32, "--temperature", 1.5, "--seed", 7)
    signals = cache(path, output, *options)
    made = signals.manifest
    assert (made.kind, made.count, made.temperature, made.seed) == ("samples", 12, 1.5, 7)
    assert sorted(signals.rows.column_names) == ["teacher_entropy", "teacher_tokens"]
    data = datasets.load_from_disk(str(output / "data"))
    result = trained(output, data, tmp_path, DataCollatorWithFlattening(), temperature=1.5, max_steps=1)
    assert "divergence" in result.state.log_history[0]


def test_tokenized_json_lines_are_taken_as_they_are(cache, dataset, tmp_path) -> None:
    dataset.to_json(tmp_path / "tokens.jsonl")
    signals = cache(tmp_path / "tokens.jsonl", tmp_path / "signals", "--top-k", 4)
    assert not (tmp_path / "signals" / "data").exists()
    signals.refuse_other(dataset, None, 1.0)


@pytest.mark.parametrize("split", [None, "train", "validation"])
def test_saved_folder_with_input_ids(split, cache, dataset, tokenizer, tmp_path) -> None:
    saved = dataset if split is None else DatasetDict({split: dataset, "other": dataset.select([0])})
    saved.save_to_disk(str(tmp_path / "saved"))
    options = () if split is None else ("--split", split)
    cache(tmp_path / "saved", tmp_path / "signals", "--top-k", ALL_BUT_ONE, *options)
    result = trained(tmp_path / "signals", dataset, tmp_path, DataCollatorForSeq2Seq(tokenizer), max_steps=1)
    teacher = teacher_model(vocab_size=PADDED)
    assert difference(trained(teacher, dataset, tmp_path, max_steps=1), result) < ROUNDING


@pytest.mark.parametrize("place", ["part-000000", "data"])
def test_the_same_command_goes_on(place, cache, text_file, tmp_path, monkeypatch) -> None:
    options = ("--max-length", 32, "--top-k", 4)
    cache(text_file, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        fail_half_way(patch, place)
        with pytest.raises((OSError, SystemExit)):
            cache(text_file, tmp_path / "parts", *options)
    signals = cache(text_file, tmp_path / "parts", *options)
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    signals.refuse_other(datasets.load_from_disk(str(tmp_path / "parts" / "data")), None, 1.0)


def test_unknown_split_and_column_are_refused(dataset, tokenizer, tmp_path) -> None:
    DatasetDict({"validation": dataset}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="has no split 'train'; expected one of validation"):
        command.read_dataset(str(tmp_path / "saved"), "train")
    with pytest.raises(ValueError, match=r"column 'input_ids' or 'text', got \['labels'\]; see --text-column"):
        command.tokenize(dataset.remove_columns("input_ids"), tokenizer, "text", 16)


def test_the_command_answers_mistakes_with_a_message(cache, text_file, tmp_path, capsys) -> None:
    for name, contents in {
        "bytes.txt": b"\xff",
        "empty.jsonl": b"",
        "cut.jsonl": b'{"text": "a"}\n{"te',
        "other.jsonl": f'{{"input_ids": [5, {PADDED}]}}'.encode(),
    }.items():
        (tmp_path / name).write_bytes(contents)
    for data, options, words in (
        (text_file, ("--top-k", 500), f"between 1 and {ALL_BUT_ONE} stored tokens, got 500"),
        (text_file, ("--samples", 0), f"between 1 and {ALL_BUT_ONE} stored tokens, got 0"),
        (text_file, ("--temperature", 0), "temperature must be positive and finite, got 0.0"),
        (text_file, ("--temperature", "nan"), "temperature must be positive and finite, got nan"),
        (text_file, ("--batch-size", 0), "argument --batch-size: expected a positive integer, got 0"),
        (text_file, ("--max-length", -1), "argument --max-length: expected a positive integer, got -1"),
        (text_file, ("--dtype", "nonsense"), "argument --dtype: invalid choice: 'nonsense'"),
        (tmp_path / "bytes.txt", (), "must hold text in UTF-8, got: 'utf-8' codec can't decode byte 0xff"),
        (tmp_path / "empty.jsonl", (), "must hold text, got an empty file"),
        (tmp_path / "cut.jsonl", (), "must hold a JSON object on each line, got: JSON parse error"),
        (tmp_path / "other.jsonl", (), f"token ids of the teacher, from 0 to {PADDED - 1}, got 5 to {PADDED}"),
        (tmp_path / "missing", (), "missing"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            cache(data, tmp_path / "signals", *options)
        assert words in capsys.readouterr().err
        shutil.rmtree(tmp_path / "signals", ignore_errors=True)
