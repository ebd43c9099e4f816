"""Teacher signals on disk: what is written, what is refused, and training from them as from the teacher itself."""

import copy
import functools
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
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
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from whisper_hf.distillation import (
    DistillationConfig,
    DistillationTrainer,
    Manifest,
    StoredSignals,
    signals_writing,
    write_signals,
)
from whisper_hf.distillation import __main__ as command
from whisper_hf.distillation.signals import MANIFEST

from .conftest import ROOT, SIZES, VOCABULARY, tiny_config, tiny_model

LENGTHS = (23, 61, 7, 31, 61, 12, 1, 35, 50, 9, 28, 17)  # some beyond the student's budget of 48
ALL_BUT_ONE = VOCABULARY - 1  # with the probability of the last token, these are the teacher's whole distribution
PADDING = 8  # logits of a teacher beyond its tokenizer


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """The Trainer collects garbage each time it starts: half a second among all that transformers has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def teacher_model(kind: type[PreTrainedModel] = LlamaForCausalLM, **overrides: object) -> PreTrainedModel:
    """Return a teacher, far from uniform."""
    set_seed(1)
    config = tiny_config() if kind.config_class is type(tiny_config()) else kind.config_class(**SIZES, pad_token_id=0)
    config.update(overrides)
    return kind(config).eval()


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


def columns(folder: Path) -> dict[str, list[np.ndarray]]:
    """Return all signals of a folder, example by example."""
    signals = StoredSignals(folder)
    return signals.columns(list(range(signals.manifest.examples)))


@torch.no_grad()
def expected_log(teacher: PreTrainedModel, row: list[int], temperature: float = 1.0) -> Tensor:
    """Return a teacher's predictions for an example that it sees alone, `[T, V]`."""
    logits = teacher(torch.tensor([row])).logits[0].float()
    return (logits / temperature).log_softmax(-1)


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
    """Return a trainer for a few steps; what is no argument of the config is for the trainer."""
    mine = ("model", "eval_dataset", "processing_class", "teacher_processing_class")
    kwargs = {"model": student_model(), **{name: options.pop(name) for name in mine if name in options}}
    arguments = {
        "output_dir": str(folder / "trainer"),
        "optim": "sgd",  # whose steps are as precise as the gradient
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = DistillationConfig(**{**arguments, **options})
    return DistillationTrainer(teacher=teacher, args=args, train_dataset=dataset, data_collator=collator, **kwargs)


def trained(*args: Any, **options: Any) -> DistillationTrainer:
    """Return a trainer that has trained."""
    result = trainer(*args, **options)
    result.train()
    return result


def change(trainer: DistillationTrainer) -> Tensor:
    """Return what training did to the weights."""
    before = student_model(vocab_size=trainer.model.config.vocab_size).state_dict()
    return torch.cat([(weight - before[name]).flatten() for name, weight in trainer.model.state_dict().items()])


def difference(first: DistillationTrainer, second: DistillationTrainer) -> float:
    """Return how much two trainings differ, relative to what they did."""
    return ((change(first) - change(second)).norm() / change(first).norm()).item()


ROUNDING = 1e-3  # of logarithms in float16, seen in `difference`


class TestWriting:
    """What is in the folder."""

    @pytest.mark.parametrize("kind", [LlamaForCausalLM, Gemma2ForCausalLM, type(tiny_model())])
    @pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, 5), (2.0, 1)])
    def test_top_signals_are_the_likeliest_tokens(self, kind, temperature, batch_size, dataset, tmp_path) -> None:
        teacher = teacher_model(kind)  # Gemma 2 caps its logits, the third is sparse
        manifest = write(teacher, dataset, tmp_path, temperature=temperature, batch_size=batch_size)
        assert (manifest.examples, manifest.tokens, manifest.vocabulary) == (12, sum(LENGTHS), VOCABULARY)
        found = columns(tmp_path)
        for i, row in enumerate(dataset["input_ids"]):
            log, tokens, rest = (
                torch.from_numpy(found[f"teacher_{name}"][i]) for name in ("log_probabilities", "tokens", "log_rest")
            )
            expected = expected_log(teacher, row, temperature)
            assert tokens.shape == log.shape == (len(row), 8)
            assert rest.shape == (len(row),)
            assert all(len(set(chosen)) == 8 for chosen in tokens.tolist())
            torch.testing.assert_close(log, expected.topk(8).values, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(log, expected.gather(1, tokens.long()), rtol=1e-3, atol=1e-4)
            others = expected.scatter(1, tokens.long(), -torch.inf).logsumexp(-1)
            torch.testing.assert_close(rest, others, rtol=1e-4, atol=1e-4)

    def test_samples_are_drawn_from_the_distribution(self, teacher, dataset, tmp_path) -> None:
        write(teacher, dataset, tmp_path, kind="samples", count=100)
        found, excess = columns(tmp_path), []
        for i, row in enumerate(dataset["input_ids"]):
            expected = expected_log(teacher, row)
            tokens = torch.from_numpy(found["teacher_tokens"][i]).long()
            entropy = torch.from_numpy(found["teacher_entropy"][i])
            assert tokens.shape == (len(row), 100)
            torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-4)
            share = torch.zeros_like(expected).scatter_add_(1, tokens, torch.full(tokens.shape, 1 / 100))
            square = (share - expected.exp()).square().sum(-1)  # whose mean is the variance of a share of 100
            excess.append(square / ((1 - expected.exp().square().sum(-1)) / 100))
        assert torch.cat(excess).mean().item() == pytest.approx(1, abs=0.05)

    def test_seed_and_part_decide_about_samples(self, teacher, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(signals_writing, "EXAMPLES_PER_PART", 1)
        same = Dataset.from_dict({"input_ids": random_tokens(20) * 2})
        for name, seed in (("first", 3), ("again", 3), ("other", 4)):
            write(teacher, same, tmp_path / name, kind="samples", seed=seed)
        first, again, other = (columns(tmp_path / name)["teacher_tokens"] for name in ("first", "again", "other"))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        assert not np.array_equal(first[0], first[1])

    def test_attention_mask_of_the_data_is_used(self, teacher, tmp_path) -> None:
        rows = random_tokens(10, 20)
        masks = [[0] * 5 + [1] * 10, [1] * 20]
        padded = Dataset.from_dict({"input_ids": [[7] * 5 + rows[0], rows[1]], "attention_mask": masks})
        write(teacher, padded, tmp_path)
        found = [
            log[-len(row) :] for log, row in zip(columns(tmp_path)["teacher_log_probabilities"], rows, strict=True)
        ]
        for log, row in zip(found, rows, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(log), expected_log(teacher, row).topk(8).values, rtol=1e-3, atol=1e-3
            )

    @pytest.mark.parametrize("kind", [LlamaForCausalLM, type(tiny_model())])
    @pytest.mark.parametrize("lengths", [((10, 12), (5, 17)), ((10, 12), (8, 9, 20))], ids=["equal", "ragged"])
    def test_packed_documents_do_not_see_each_other(self, kind, lengths, tmp_path) -> None:
        teacher = teacher_model(kind)
        documents = [random_tokens(*row) for row in lengths]
        packed = {
            "input_ids": [sum(row, []) for row in documents],
            "position_ids": [[i for document in row for i in range(len(document))] for row in documents],
        }
        write(teacher, Dataset.from_dict(packed), tmp_path)
        for row, log in zip(documents, columns(tmp_path)["teacher_log_probabilities"], strict=True):
            expected = torch.cat([expected_log(teacher, document).topk(8).values for document in row])
            torch.testing.assert_close(torch.from_numpy(log), expected, rtol=1e-3, atol=1e-3)

    def test_examples_without_tokens_have_no_signals(self, teacher, tmp_path) -> None:
        write(teacher, Dataset.from_dict({"input_ids": [[], *random_tokens(5, 3)]}), tmp_path)
        assert [len(rest) for rest in columns(tmp_path)["teacher_log_rest"]] == [0, 5, 3]

    @pytest.mark.parametrize("kind", ["top", "samples"])
    def test_signals_are_compact(self, kind, teacher, dataset, tmp_path) -> None:
        manifest = write(teacher, dataset, tmp_path, kind=kind, count=64)
        size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert size == pytest.approx(manifest.bytes, rel=0.1)
        features = StoredSignals(tmp_path).rows.features
        tokens = features["teacher_tokens"].feature
        assert (tokens.length, tokens.feature.dtype) == (64, "uint16")
        if kind == "top":
            log = features["teacher_log_probabilities"].feature
            assert (log.length, log.feature.dtype) == (64, "float16")
            assert features["teacher_log_rest"].feature.dtype == "float32"
        else:
            assert features["teacher_entropy"].feature.dtype == "float32"

    @pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, "uint16"), (2**16 + 1, "int32")])
    def test_the_last_token_of_a_large_vocabulary_is_stored(self, vocabulary, dtype, tmp_path) -> None:
        teacher = teacher_model(vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1)
        teacher.lm_head.weight.data[-1] = 50 * teacher.lm_head.weight.data[0]
        teacher.lm_head.weight.data[-2] = -teacher.lm_head.weight.data[-1]  # one of the two is likely
        manifest = write(teacher, Dataset.from_dict({"input_ids": random_tokens(60)}), tmp_path, count=2)
        assert StoredSignals(tmp_path).rows.features["teacher_tokens"].feature.feature.dtype == dtype
        assert columns(tmp_path)["teacher_tokens"][0].max() == vocabulary - 1
        assert manifest.bytes == 60 * (2 * (4 if dtype == "uint16" else 6) + 4)

    def test_padding_beyond_the_tokenizer_is_left_out(self, dataset, tokenizer, tmp_path, live) -> None:
        teacher = teacher_model(vocab_size=VOCABULARY + PADDING)
        teacher.lm_head.weight.data[VOCABULARY:] = 9.0  # likely tokens, if they were any
        manifest = write(teacher, dataset, tmp_path, count=ALL_BUT_ONE, tokenizer=tokenizer)
        assert manifest.vocabulary == len(tokenizer) == VOCABULARY
        found = columns(tmp_path)
        assert max(tokens.max() for tokens in found["teacher_tokens"]) < VOCABULARY
        for log, rest in zip(found["teacher_log_probabilities"], found["teacher_log_rest"], strict=True):
            np.testing.assert_allclose(np.exp(log).sum(-1) + np.exp(rest), 1, atol=1e-3)
        options = {"max_steps": 1, "processing_class": tokenizer}
        assert difference(*(trained(source, dataset, tmp_path, **options) for source in (teacher, tmp_path))) < ROUNDING

    def test_no_logits_of_a_whole_batch_exist(self, teacher, dataset, tmp_path) -> None:
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
    )
    def test_impossible_signals_are_refused(self, options, message, teacher, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match=message):
            write(teacher, dataset, tmp_path / "signals", **options)
        assert not (tmp_path / "signals").exists()

    def test_a_teacher_in_training_mode_is_refused(self, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"training mode.*teacher\.eval"):
            write(teacher_model().train(), dataset, tmp_path)


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


class TestInterruption:
    """Parts are whole or absent."""

    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(signals_writing, "EXAMPLES_PER_PART", 4)

    @pytest.fixture
    def calls(self, teacher: PreTrainedModel) -> Iterator[list[int]]:
        """The teacher's calls so far; it fails when there are more than the first element."""
        calls = [99]

        def count(*_: object) -> None:
            calls.append(1)
            if len(calls) - 1 > calls[0]:
                raise RuntimeError("out of memory")

        handle = teacher.register_forward_pre_hook(count)
        yield calls
        handle.remove()

    @pytest.mark.parametrize("kind", ["top", "samples"])
    @pytest.mark.parametrize("cause", ["teacher", "disk"])
    def test_writing_goes_on_where_it_stopped(
        self, kind, cause, teacher, dataset, tmp_path, calls, monkeypatch
    ) -> None:
        write(teacher, dataset, tmp_path / "whole", kind=kind, batch_size=2)
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, OSError), match="out of"):
            calls[:] = [99]
            if cause == "teacher":
                calls[0] = 4  # one to learn about its head, two for the first part, one in the middle of the second
            else:
                patch.setattr(Dataset, "save_to_disk", fail_half_way(Dataset.save_to_disk, "part-000001"))
            write(teacher, dataset, tmp_path / "parts", kind=kind, batch_size=2)
        assert sorted(path.name for path in (tmp_path / "parts").glob("part-*")) == ["part-000000"]
        with pytest.raises(ValueError, match=r"holds signals of 4 examples, expected 12; run the same `cache` command"):
            StoredSignals(tmp_path / "parts")
        calls[:] = [99]
        write(teacher, dataset, tmp_path / "parts", kind=kind, batch_size=2)
        assert len(calls) - 1 == 1 + 2 * 2  # nothing is computed twice
        whole, parts = (StoredSignals(tmp_path / name) for name in ("whole", "parts"))
        assert whole.manifest == parts.manifest
        assert whole.rows.with_format("arrow")[:] == parts.rows.with_format("arrow")[:]
        assert not list((tmp_path / "parts").glob("unfinished-*"))

    def test_finished_signals_are_not_computed_again(self, teacher, dataset, tmp_path, calls) -> None:
        manifest = write(teacher, dataset, tmp_path)
        calls[:] = [0]
        assert write(teacher, dataset, tmp_path) == manifest

    def test_unfinished_parts_are_not_read(self, teacher, dataset, tmp_path) -> None:
        write(teacher, dataset, tmp_path)
        shutil.copytree(tmp_path / "part-000000", tmp_path / "unfinished-part-000003")
        assert len(StoredSignals(tmp_path).rows) == len(dataset)
        shutil.rmtree(tmp_path / "part-000001")
        with pytest.raises(ValueError, match="of 8 examples, expected 12"):
            StoredSignals(tmp_path)

    @pytest.mark.parametrize(
        "options",
        [{"count": 9}, {"temperature": 2.0}, {"seed": 1}, {"kind": "samples"}, {"rows": 11}, {"with_tokenizer": True}],
        ids=str,
    )
    def test_other_signals_are_not_mixed(self, options, teacher, dataset, tokenizer, tmp_path) -> None:
        write(teacher, dataset, tmp_path)
        before = (tmp_path / MANIFEST).read_text()
        rows, with_tokenizer = options.pop("rows", 12), options.pop("with_tokenizer", False)
        with pytest.raises(ValueError, match=r"holds other signals \(there, here\).*choose another folder"):
            write(
                teacher,
                dataset.select(range(rows)),
                tmp_path,
                tokenizer=tokenizer if with_tokenizer else None,
                **options,
            )
        assert (tmp_path / MANIFEST).read_text() == before
        assert len(StoredSignals(tmp_path).rows) == len(dataset)

    def test_another_version_is_refused(self, teacher, dataset, tmp_path) -> None:
        write(teacher, dataset, tmp_path)
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 0, "other": 1}))
        with pytest.raises(ValueError, match="version 0, expected 1"):
            StoredSignals(tmp_path)


def fail_half_way(save: Callable, name: str) -> Callable:
    """Return a function that saves a data set, but only half of it where the folder is called like this."""

    def save_half(dataset: Dataset, folder: str) -> None:
        save(dataset, folder)
        if Path(folder).name.endswith(name):
            (Path(folder) / "state.json").unlink()
            raise OSError("out of space")

    return save_half


LAYOUTS = {
    "right": pad,
    "left": functools.partial(pad, side="left"),
    "concatenated": DataCollatorWithFlattening(),
}
OPTIONS = {
    "at once": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


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


class TestTraining:
    """A student cannot tell stored signals from the teacher."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("options", OPTIONS)
    def test_stored_signals_teach_like_the_teacher(self, layout, options, stored, dataset, live, tmp_path) -> None:
        result = trained(stored, dataset, tmp_path, LAYOUTS[layout], **OPTIONS[options])
        assert difference(live, result) < ROUNDING
        for ours, theirs in zip(result.state.log_history[:-1], live.state.log_history[:-1], strict=True):
            for name in ("loss", "divergence", "cross_entropy"):
                assert ours[name] == pytest.approx(theirs[name], rel=ROUNDING), name

    @pytest.mark.parametrize(
        "options",
        [{"dataloader_num_workers": 1}, {"remove_unused_columns": False}],
        ids=lambda option: next(iter(option)),
    )
    def test_loading_options_change_nothing(self, options, stored, dataset, live, tmp_path) -> None:
        assert difference(live, trained(stored, dataset, tmp_path, **options)) < ROUNDING

    @pytest.mark.parametrize("remove_unused_columns", [True, False])
    @pytest.mark.parametrize("kind", [list, Rows])
    def test_other_map_style_data_sets_train(
        self, kind, remove_unused_columns, stored, dataset, live, tmp_path
    ) -> None:
        options = {"remove_unused_columns": remove_unused_columns}
        assert difference(live, trained(stored, kind(dataset), tmp_path, **options)) < ROUNDING

    @pytest.mark.parametrize(
        "formatted",
        [
            lambda data: data.with_format("torch"),
            lambda data: data.add_column("note", [""] * len(data)).with_format("torch", ["input_ids", "labels"]),
            lambda data: data.with_transform(lambda batch: {k: batch[k] for k in ("input_ids", "labels")}),
        ],
        ids=["tensors", "columns", "transform"],
    )
    def test_formatted_data_sets_train(self, formatted, stored, dataset, live, tmp_path) -> None:
        assert difference(live, trained(stored, formatted(dataset), tmp_path)) < ROUNDING

    def test_all_losses_combine(self, teacher, dataset, tmp_path) -> None:
        write(teacher, dataset, tmp_path, count=ALL_BUT_ONE, temperature=2.0)
        options = {
            "divergence": {"skewed_kl": 0.5, "reverse_kl": 0.5},
            "temperature": 2.0,
            "cross_entropy_weight": 0.5,
            "max_steps": 2,
        }
        results = [trained(source, dataset, tmp_path, **options) for source in (teacher, tmp_path)]
        assert difference(*results) < ROUNDING

    def test_samples_teach_about_the_same(self, teacher, dataset, live, tmp_path) -> None:
        write(teacher, dataset, tmp_path, kind="samples", count=100)
        result = trained(tmp_path, dataset, tmp_path)
        assert torch.cosine_similarity(change(live), change(result), dim=0) > 0.95
        assert change(result).norm() == pytest.approx(change(live).norm(), rel=0.1)

    def test_a_student_may_know_more_tokens(self, stored, dataset, tmp_path) -> None:
        larger = student_model(vocab_size=VOCABULARY + PADDING)
        before = larger.lm_head.weight[VOCABULARY:].clone()
        result = trained(stored, dataset, tmp_path, model=larger)
        assert result.state.log_history[-2]["divergence"] < result.state.log_history[0]["divergence"]
        assert torch.equal(larger.lm_head.weight[VOCABULARY:], before)

    def test_padding_teaches_nothing(self, stored, dataset, tokenizer, tmp_path) -> None:
        """The token before the first one is padding on the left, about which nothing is stored."""
        results = []
        for side in ("right", "left"):
            padding = copy.deepcopy(tokenizer)
            padding.padding_side = side
            collator = DataCollatorForLanguageModeling(padding, mlm=False)
            results.append(trained(stored, dataset.remove_columns("labels"), tmp_path / side, collator))
        assert difference(*results) < ROUNDING

    def test_no_logits_of_a_whole_batch_exist(self, teacher, dataset, tmp_path) -> None:
        write(teacher, dataset, tmp_path)
        student = trainer(tmp_path, dataset, tmp_path, max_steps=1, chunk_tokens=40)
        with WidestLogits() as widest:
            student.train()
        assert widest.rows == 40

    def test_evaluation_is_plain_cross_entropy(self, stored, dataset, tmp_path) -> None:
        rows = random_tokens(20, 33)
        held_out = Dataset.from_dict({"input_ids": rows, "labels": rows})
        student = trained(stored, dataset, tmp_path, eval_dataset=held_out, temperature=1.0)
        metrics = student.evaluate()
        with torch.no_grad():
            losses = [student.model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows]
        expected = (losses[0] * 19 + losses[1] * 32) / 51
        assert metrics["eval_loss"] == metrics["eval_cross_entropy"] == pytest.approx(expected, rel=1e-5)
        assert "eval_divergence" not in metrics

    def test_evaluation_needs_no_training_data(self, stored, dataset, live, tmp_path) -> None:
        student = trainer(stored, None, tmp_path, model=live.model, eval_dataset=dataset)
        assert student.evaluate()["eval_loss"] == pytest.approx(live.evaluate(dataset)["eval_cross_entropy"], rel=1e-5)

    def test_resuming_gives_the_weights_of_an_uninterrupted_run(self, stored, dataset, tmp_path) -> None:
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}  # three steps are an epoch
        whole = trained(stored, dataset, tmp_path / "whole", **options)
        interrupted = trainer(stored, dataset, tmp_path / "parts", **options)
        interrupted.add_callback(StopAt(2))
        interrupted.train()
        resumed = trainer(stored, dataset, tmp_path / "parts", **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 5
        assert torch.equal(change(whole), change(resumed))


class TestRefusals:
    """Signals that do not fit are never trained from."""

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
    def test_other_data_are_refused(self, other, stored, dataset, tmp_path) -> None:
        rows = other(list(dataset["input_ids"]))
        with pytest.raises(ValueError, match=r"made with another data \(token ids, in order\): expected \w+, got \w+"):
            trainer(stored, Dataset.from_dict({"input_ids": rows, "labels": rows}), tmp_path)

    def test_another_temperature_is_refused(self, stored, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"made with another temperature: expected 1\.0, got 2\.0; make new ones"):
            trainer(stored, dataset, tmp_path, temperature=2.0)

    @pytest.mark.parametrize("argument", ["processing_class", "teacher_processing_class"])
    def test_another_tokenizer_is_refused(self, argument, teacher, dataset, tokenizer, tmp_path) -> None:
        write(teacher, dataset, tmp_path, tokenizer=tokenizer)
        assert trainer(tmp_path, dataset, tmp_path, **{argument: tokenizer}).signals is not None
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
    def test_a_collator_that_changes_tokens_is_refused(self, collator, stored, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"stored signals belong to the tokens as they are.*pads or concatenates"):
            trained(stored, dataset, tmp_path, collator)

    @pytest.mark.parametrize(
        "stream", [Dataset.to_iterable_dataset, Stream, iter], ids=["datasets", "torch", "iterator"]
    )
    def test_iterable_data_sets_are_refused(self, stream, stored, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match="need a data set with a length and an order, got"):
            trainer(stored, stream(dataset), tmp_path)

    def test_training_without_signals_is_refused(self, stored, dataset, tmp_path) -> None:
        """It would be plain training, unnoticed."""
        student = trainer(stored, None, tmp_path)
        student.train_dataset = dataset
        with pytest.raises(ValueError, match="signals"):
            student.train()

    @pytest.mark.parametrize("divergence", ["reverse_kl", {"forward_kl": 0.5, "skewed_kl": 0.5}])
    def test_samples_are_for_forward_kl_alone(self, divergence, teacher, dataset, tmp_path) -> None:
        write(teacher, dataset, tmp_path, kind="samples")
        with pytest.raises(ValueError, match=r'unbiased for "forward_kl" alone, got .*--top-k'):
            trainer(tmp_path, dataset, tmp_path, divergence=divergence)

    @pytest.mark.parametrize(
        "options", [{"divergence": "universal"}, {"hidden_states_weight": 0.1}, {"on_policy_fraction": 0.5}], ids=str
    )
    def test_what_needs_the_teacher_itself_is_refused(self, options, stored, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match="stored signals cannot be combined with .*as a model"):
            trainer(stored, dataset, tmp_path, **options)

    def test_a_smaller_vocabulary_is_refused(self, stored, dataset, tmp_path) -> None:
        with pytest.raises(ValueError, match=f"about {VOCABULARY} tokens, and the student has only {ALL_BUT_ONE}"):
            trainer(stored, dataset, tmp_path, model=student_model(vocab_size=ALL_BUT_ONE))


class TestCommand:
    """`python -m whisper_hf.distillation cache`."""

    @pytest.fixture(scope="class")
    def teacher_folder(self, tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
        """A saved teacher with more logits than its tokenizer has tokens."""
        folder = tmp_path_factory.mktemp("teacher")
        teacher_model(vocab_size=VOCABULARY + PADDING).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    @pytest.fixture(autouse=True)
    def _cache_of_datasets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def texts(self, paragraphs: list[str]) -> list[str]:
        """A few short paragraphs."""
        return [paragraph[:200] for paragraph in paragraphs[:6]]

    @pytest.fixture
    def text_file(self, texts: list[str], tmp_path: Path) -> Path:
        """The paragraphs, one a line."""
        path = tmp_path / "text.txt"
        path.write_text("\n".join(texts), encoding="utf-8")
        return path

    def cache(self, teacher: Path, data: Path, output: Path, *options: object) -> StoredSignals:
        """Run the command in this process and read what it wrote."""
        arguments = ["--teacher", teacher, "--dataset", data, "--output", output, "--batch-size", 4, *options]
        parsed = command.parser().parse_args(["cache", *map(str, arguments)])
        parsed.run(parsed)
        return StoredSignals(output)

    def test_text_file_end_to_end(self, teacher_folder, text_file, texts, tokenizer, tmp_path) -> None:
        output = tmp_path / "signals"
        options = ["--dataset", text_file, "--output", output, "--max-length", "48", "--top-k", "16"]
        done = subprocess.run(
            [sys.executable, "-m", "whisper_hf.distillation", "cache", "--teacher", teacher_folder, *options],
            cwd=ROOT,
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "RuntimeWarning" not in done.stderr
        assert f"the data set to train on is {output / 'data'}" in done.stdout
        data, manifest = datasets.load_from_disk(str(output / "data")), StoredSignals(output).manifest
        assert f"{len(data)} examples, {manifest.tokens} tokens" in done.stdout
        expected = [id for text in texts for id in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
        assert [id for row in data["input_ids"] for id in row] == expected
        assert {len(row) for row in data["input_ids"][:-1]} == {48}
        assert (manifest.kind, manifest.count, manifest.vocabulary) == ("top", 16, VOCABULARY)
        result = trained(output, data, tmp_path, DataCollatorWithFlattening(), processing_class=tokenizer, max_steps=8)
        assert result.state.log_history[-2]["divergence"] < 0.9 * result.state.log_history[0]["divergence"]

    @pytest.mark.parametrize("collator", [DataCollatorForLanguageModeling, DataCollatorWithFlattening])
    def test_written_data_train_with_usual_collators(
        self, collator, teacher_folder, text_file, tokenizer, tmp_path
    ) -> None:
        self.cache(teacher_folder, text_file, tmp_path / "signals", "--max-length", 48, "--top-k", 4)
        data = datasets.load_from_disk(str(tmp_path / "signals" / "data"))
        assert len(data[-1]["input_ids"]) < 48
        collate = collator(tokenizer, mlm=False) if collator is DataCollatorForLanguageModeling else collator()
        assert trained(tmp_path / "signals", data, tmp_path, collate).state.global_step == 3

    def test_samples_of_json_lines_in_another_column(self, teacher_folder, texts, tokenizer, tmp_path) -> None:
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"content": text, "id": i}) + "\n" for i, text in enumerate(texts)))
        options = ("--samples", 12, "--text-column", "content", "--max-length", 32, "--temperature", 1.5, "--seed", 7)
        signals = self.cache(teacher_folder, path, tmp_path / "signals", *options)
        made = signals.manifest
        assert (made.kind, made.count, made.temperature, made.seed) == ("samples", 12, 1.5, 7)
        assert sorted(signals.rows.column_names) == ["teacher_entropy", "teacher_tokens"]
        data = datasets.load_from_disk(str(tmp_path / "signals" / "data"))
        result = trained(tmp_path / "signals", data, tmp_path, DataCollatorWithFlattening(), temperature=1.5)
        assert "divergence" in result.state.log_history[0]

    def test_tokenized_json_lines_are_taken_as_they_are(self, teacher_folder, dataset, tmp_path) -> None:
        dataset.to_json(tmp_path / "tokens.jsonl")
        signals = self.cache(teacher_folder, tmp_path / "tokens.jsonl", tmp_path / "signals", "--top-k", 4)
        assert not (tmp_path / "signals" / "data").exists()
        signals.refuse_other(dataset, None, 1.0)

    @pytest.mark.parametrize("split", [None, "train", "validation"])
    def test_saved_folder_with_input_ids(self, split, teacher_folder, dataset, tokenizer, tmp_path) -> None:
        saved = dataset if split is None else DatasetDict({split: dataset, "other": dataset.select([0])})
        saved.save_to_disk(str(tmp_path / "saved"))
        options = () if split is None else ("--split", split)
        self.cache(teacher_folder, tmp_path / "saved", tmp_path / "signals", "--top-k", ALL_BUT_ONE, *options)
        result = trained(tmp_path / "signals", dataset, tmp_path, DataCollatorForSeq2Seq(tokenizer), max_steps=1)
        teacher = teacher_model(vocab_size=VOCABULARY + PADDING)
        assert difference(trained(teacher, dataset, tmp_path, max_steps=1), result) < ROUNDING

    def test_another_run_goes_on(self, teacher_folder, text_file, tmp_path, monkeypatch) -> None:
        """Also where the first was interrupted while it saved the tokens."""
        options = ("--max-length", 32, "--top-k", 4)
        expected = self.cache(teacher_folder, text_file, tmp_path / "whole", *options)
        for name in ("data", "part-000000"):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="out of space"):
                patch.setattr(Dataset, "save_to_disk", fail_half_way(Dataset.save_to_disk, name))
                self.cache(teacher_folder, text_file, tmp_path / name, *options)
            found = self.cache(teacher_folder, text_file, tmp_path / name, *options)
            assert found.rows.with_format("arrow")[:] == expected.rows.with_format("arrow")[:]
            found.refuse_other(datasets.load_from_disk(str(tmp_path / name / "data")), None, 1.0)

    def test_unknown_split_and_column_are_refused(self, dataset, tokenizer, tmp_path) -> None:
        DatasetDict({"validation": dataset}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match="has no split 'train'; expected one of validation"):
            command.read_dataset(str(tmp_path / "saved"), "train")
        with pytest.raises(
            ValueError, match=r"expected a column 'input_ids' or 'text', got \['labels'\]; see --text-column"
        ):
            command.tokenize(dataset.remove_columns("input_ids"), tokenizer, "text", 16)

    def test_errors_are_messages(self, teacher_folder, text_file, tmp_path, monkeypatch, capsys) -> None:
        arguments = ["cache", "--teacher", teacher_folder, "--dataset", text_file, "--output", tmp_path / "signals"]
        monkeypatch.setattr(sys, "argv", ["distillation", *map(str, arguments), "--top-k", "500"])
        monkeypatch.delitem(sys.modules, command.__name__)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("whisper_hf.distillation", run_name="__main__")
        assert stopped.value.code == 2
        assert f"between 1 and {ALL_BUT_ONE} stored tokens, got 500" in capsys.readouterr().err
