"""`DistillationTrainer`: all that the stock Trainer does, with students and teachers of several kinds."""

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereForCausalLM,
    DataCollatorWithFlattening,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from whisper_hf import DistillationConfig, DistillationTrainer
from whisper_hf.distillation import forward as forward_module

from ..conftest import SIZES, VOCABULARY, tiny_model

TERMS = {"cross_entropy_weight": 0.3, "temperature": 2.0}
DIVERSE = {"diversity_weight": 0.5, "divergence": {"forward_kl": 0.5, "reverse_kl": 0.5}}
GREEDY_ON_POLICY = {"on_policy_fraction": 1.0, "on_policy_temperature": 0.0, "on_policy_max_new_tokens": 8}
STATES = {"hidden_states_weight": 0.1, "attention_outputs_weight": 0.1}
KINDS = {"fixed": TERMS, "on-policy": GREEDY_ON_POLICY, "states": {**TERMS, **STATES}, "diverse": DIVERSE}


def student_model() -> PreTrainedModel:
    """Return a sparse student whose budget (48 tokens) is far below the longest example."""
    return tiny_model(initializer_range=0.1)


def teacher_model(kind: type = LlamaForCausalLM, seed: int = 1, **overrides: object) -> PreTrainedModel:
    """Return a dense teacher, wider and deeper than the student."""
    set_seed(seed)
    sizes = {**SIZES, "hidden_size": 48, "num_hidden_layers": 3, "pad_token_id": 0, "initializer_range": 0.1}
    return kind(kind.config_class(**{**sizes, **overrides})).eval()


def examples() -> Dataset:
    """Return 32 examples of 5 to 120 tokens, the first three of which are a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 121, (32,), generator=generator).tolist()
    rows = [torch.randint(3, 30, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]})


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Return the examples."""
    return examples()


def pad(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad a batch on the right."""
    columns = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns = {k: v for k, v in columns.items() if k in (*examples[0], "attention_mask")}
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    width = max(len(row["input_ids"]) for row in rows)
    return {
        k: torch.tensor([list(row[k]) + [fill] * (width - len(row[k])) for row in rows]) for k, fill in columns.items()
    }


def config(folder: Path | str, **options: object) -> DistillationConfig:
    """Return arguments for a few steps on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return DistillationConfig(**{**defaults, **options})


def trainer_of(
    dataset: Dataset, folder: Path, model: Any = None, teacher: Any = None, **options: Any
) -> DistillationTrainer:
    """Return a trainer of a tiny student."""
    own = {
        k: options.pop(k)
        for k in ("data_collator", "compute_metrics", "compute_loss_func", "callbacks")
        if k in options
    }
    return DistillationTrainer(
        student_model() if model is None else model,
        teacher_model() if teacher is None else teacher,
        config(folder, **options),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(7)),
        **{"data_collator": pad, **own},
    )


def train(dataset: Dataset, folder: Path, *args: Any, **options: Any) -> DistillationTrainer:
    """Train, and return the trainer."""
    trainer = trainer_of(dataset, folder, *args, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DistillationTrainer]:
    """A function that trains with a kind of loss on whole batches, once for all tests that compare with it."""

    @functools.cache
    def train_on_whole_batches(kind: str) -> DistillationTrainer:
        set_seed(0)
        return train(dataset, tmp_path_factory.mktemp(kind), **KINDS[kind])

    return train_on_whole_batches


def logged(trainer: Trainer, *names: str) -> Tensor:
    """Return what was logged in training, `[steps, names]`."""
    return torch.tensor([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])


def assert_same_training(first: Trainer, second: Trainer, **close: float) -> None:
    """Compare losses, gradient norms and weights."""
    close = close or {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(logged(first, "loss", "grad_norm"), logged(second, "loss", "grad_norm"), **close)
    for name, parameter in first.model.named_parameters():
        torch.testing.assert_close(parameter, second.model.get_parameter(name), **close)


# --- the loss --------------------------------------------------------------------------------------------------------


def dense_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of `TERMS`, from logits."""
    labels = batch["labels"][:, 1:]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = student(**inputs).logits[:, :-1][labels != -100]
    expected = teacher(**inputs).logits[:, :-1, : logits.shape[-1]][labels != -100].detach()
    divergence = nn.functional.kl_div((logits / 2).log_softmax(-1), (expected / 2).softmax(-1), reduction="batchmean")
    return 4 * divergence + 0.3 * nn.functional.cross_entropy(logits, labels[labels != -100])


@pytest.mark.parametrize(
    ("student_kind", "teacher_kind", "overrides"),
    [
        (LlamaForCausalLM, LlamaForCausalLM, {}),
        (Gemma2ForCausalLM, Gemma2ForCausalLM, {"final_logit_softcapping": 1.0, "head_dim": 12}),
        (CohereForCausalLM, CohereForCausalLM, {"logit_scale": 0.25}),
        (LlamaForCausalLM, Gemma2ForCausalLM, {"final_logit_softcapping": 1.0}),
    ],
)
def test_loss_and_gradient_are_those_of_logits(student_kind, teacher_kind, overrides, dataset, tmp_path) -> None:
    """Also where a model scales or caps its logits."""
    student, teacher = (
        teacher_model(kind, seed, **overrides) for seed, kind in enumerate((student_kind, teacher_kind))
    )
    batch = pad([dataset[i] for i in range(4)])
    expected = dense_loss(student, teacher, batch)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    trainer = trainer_of(dataset, tmp_path, student, teacher, **TERMS)
    loss = trainer.compute_loss(student, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for got, gradient in zip(torch.autograd.grad(loss, list(student.parameters())), gradients, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-6)


def test_a_model_that_changes_its_logits_otherwise_is_refused(dataset, tmp_path, monkeypatch) -> None:
    original = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        outputs.logits = outputs.logits + 1
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    trainer = trainer_of(dataset, tmp_path)
    with pytest.raises(ValueError, match="scaled or softly capped, but LlamaForCausalLM turns"):
        trainer.train()


def test_no_tensor_is_as_large_as_the_logits(dataset, tmp_path) -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and VOCABULARY in tensor.shape:
                    Largest.size = max(Largest.size, tensor.numel())
            return out

    trainer = trainer_of(dataset, tmp_path, chunk_tokens=16, **TERMS)
    batch = pad([dataset[i] for i in range(8)])
    trainer.compute_loss(trainer.model, batch)  # the first pass also asks what the model does to its logits
    with Largest():
        trainer.compute_loss(trainer.model, batch).backward()
    assert batch["input_ids"].numel() > 400
    weights = VOCABULARY * 48  # the teacher's head
    assert Largest.size <= max(weights, 16 * VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (1, 8)])
def test_accumulation_changes_nothing(kind, batch_size, accumulation, dataset, trained, tmp_path) -> None:
    """Although micro-batches hold from 2 to 117 tokens."""
    parts = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    results = [trained(kind), train(dataset, tmp_path, **KINDS[kind], **parts)]
    assert_same_training(*results)
    terms = [
        name
        for name in ("divergence", "cross_entropy", "hidden_states", "diversity")
        if name in results[0].state.log_history[0]
    ]
    assert terms
    assert "diversity" not in terms or logged(results[0], "diversity").min() > 0
    torch.testing.assert_close(logged(results[0], *terms), logged(results[1], *terms), rtol=1e-4, atol=1e-6)


def test_logged_terms_add_up_to_the_loss(dataset, tmp_path) -> None:
    trainer = train(dataset, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4, **TERMS, **STATES)
    loss, divergence, cross_entropy, hidden, attention = logged(
        trainer, "loss", "divergence", "cross_entropy", "hidden_states", "attention_outputs"
    ).T
    torch.testing.assert_close(
        loss, divergence + 0.3 * cross_entropy + 0.1 * (hidden + attention), rtol=1e-4, atol=1e-5
    )


def test_logging_reads_nothing_back_during_a_step(dataset, tmp_path) -> None:
    """On a GPU every number that Python asks for makes it wait."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    trainer = trainer_of(dataset, tmp_path, model=teacher_model(seed=2), **TERMS)
    batch = {k: v for k, v in pad([dataset[i] for i in range(4)]).items() if k != "attention_mask"}
    trainer.compute_loss(trainer.model, batch)
    with Reads():
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100)).backward()
    ours, Reads.count = Reads.count, 0
    with Reads():
        trainer.model(batch["input_ids"], use_cache=False), trainer.teacher(batch["input_ids"], use_cache=False)
    assert ours == Reads.count  # the models' own
    assert trainer._sums["divergence"][1] > 0


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_comparable_with_plain_training(dataset, tmp_path) -> None:
    """`eval_cross_entropy` is the stock Trainer's loss, and no figure depends on the batch size."""
    model = student_model()
    plain = Trainer(
        model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=7)
    )
    plain.data_collator = pad
    expected = plain.evaluate(dataset.select(range(7)))["eval_loss"]
    metrics = [
        trainer_of(dataset, tmp_path, model, per_device_eval_batch_size=size, **TERMS, **STATES).evaluate()
        for size in (7, 3, 1)
    ]
    for found in metrics:
        assert found["eval_cross_entropy"] == pytest.approx(expected, rel=1e-5)
        for name in ("eval_loss", "eval_divergence", "eval_hidden_states", "eval_attention_outputs"):
            assert found[name] == pytest.approx(metrics[0][name], rel=1e-5)


def test_metrics_and_predictions_get_logits(dataset, tmp_path) -> None:
    seen = []
    trainer = trainer_of(dataset, tmp_path, compute_metrics=lambda found: seen.append(found) or {"size": 1.0}, **TERMS)
    loss_only = trainer_of(dataset, tmp_path, trainer.model, **TERMS).evaluate()
    metrics = trainer.evaluate()
    assert metrics["eval_size"] == 1.0
    assert metrics["eval_loss"] == pytest.approx(loss_only["eval_loss"])
    assert seen[0].predictions.shape[0] == 7
    assert seen[0].predictions.shape[-1] == VOCABULARY
    predicted = trainer.predict(dataset.select(range(3)).remove_columns("labels"))
    assert predicted.predictions.shape[-1] == VOCABULARY


# --- what the stock Trainer does -------------------------------------------------------------------------------------


def test_resuming_equals_never_stopping(dataset, tmp_path) -> None:
    """With projections (widths differ) and steps on the student's own, sampled text among the others."""
    options = {
        **STATES,
        "on_policy_fraction": 0.5,
        "on_policy_max_new_tokens": 8,
        "optim": "adamw_torch",
        "max_steps": 6,
    }
    options |= {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    whole = train(dataset, tmp_path / "whole", **options)
    history = [set(entry) for entry in whole.state.log_history if "loss" in entry]
    assert {"cross_entropy" in entry for entry in history} == {True, False}  # both kinds of steps
    resumed = trainer_of(dataset, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(logged(resumed, "loss"), logged(whole, "loss"), rtol=0, atol=0)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    for mine, other in zip(whole.matching.parameters(), resumed.matching.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_teacher_and_projections_are_no_part_of_what_is_saved(dataset, tmp_path) -> None:
    trainer = train(dataset, tmp_path, save_strategy="steps", save_steps=3, **STATES)
    before = student_model()
    loaded = type(before).from_pretrained(tmp_path / "checkpoint-3")
    assert set(loaded.state_dict()) == set(before.state_dict())
    assert (tmp_path / "checkpoint-3" / "projections.safetensors").exists()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in trainer.teacher.parameters()}
    assert {id(p) for p in trainer.matching.parameters()} <= trained
    untouched = teacher_model()
    assert all(torch.equal(p, untouched.get_parameter(name)) for name, p in trainer.teacher.named_parameters())
    assert not trainer.teacher.training
    assert not any(p.requires_grad for p in trainer.teacher.parameters())


@pytest.mark.parametrize("kind", ["fixed", "states"])
def test_gradient_checkpointing_changes_nothing(kind, dataset, trained, tmp_path) -> None:
    assert_same_training(trained(kind), train(dataset, tmp_path, gradient_checkpointing=True, **KINDS[kind]))


def test_bf16_stays_close(dataset, trained, tmp_path) -> None:
    full, half = trained("fixed"), train(dataset, tmp_path, bf16=True, **TERMS)
    torch.testing.assert_close(logged(half, "loss"), logged(full, "loss"), rtol=0.02, atol=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())


def test_compiled_student_equals_eager(dataset, tmp_path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    eager, compiled = (
        train(
            dataset,
            tmp_path,
            model=tiny_model(initializer_range=0.1, num_hidden_layers=1),
            teacher=teacher_model(num_hidden_layers=1),
            **TERMS,
            **more,
        )
        for more in ({"max_steps": 1}, options)
    )
    assert_same_training(eager, compiled)


def test_packed_documents_equal_padded_ones(dataset, trained, tmp_path) -> None:
    packed = train(dataset, tmp_path, data_collator=DataCollatorWithFlattening(), **TERMS)
    assert_same_training(trained("fixed"), packed)


def test_other_label_names_are_honoured(dataset, trained, tmp_path) -> None:
    def rename(examples: list) -> dict:
        batch = pad([{"input_ids": e["input_ids"], "labels": e["targets"]} for e in examples])
        return {("targets" if k == "labels" else k): v for k, v in batch.items()}

    expected = trained("fixed")
    renamed = dataset.rename_column("labels", "targets")
    options = {"label_names": ["targets"], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    found = train(renamed, tmp_path, data_collator=rename, **options, **TERMS)
    assert_same_training(expected, found)
    assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("target", ["layers", "lm_head", "saved head"])
def test_peft_students_learn(target: str, dataset, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    modules = {"lm_head": ["lm_head"]}.get(target, ["q_proj", "v_proj"])
    lora = LoraConfig(target_modules=modules, modules_to_save=["lm_head"] if target == "saved head" else None)
    model = get_peft_model(student_model(), lora)
    frozen = model.base_model.model.model.embed_tokens.weight.clone()
    trainer = train(dataset, tmp_path, model, learning_rate=1.0, max_steps=6, **TERMS)
    losses = logged(trainer, "divergence")[:, 0]
    assert losses[-1] < losses[0]
    assert torch.equal(frozen, model.base_model.model.model.embed_tokens.weight)
    batch = pad([dataset[i] for i in range(4)])
    torch.testing.assert_close(
        trainer.compute_loss(model.eval(), batch), dense_loss(model, trainer.teacher, batch), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_teachers_teach_with_their_quantized_heads(bits: int, dataset, tmp_path) -> None:
    from transformers import BitsAndBytesConfig

    teacher_model(hidden_size=64, intermediate_size=64, vocab_size=128).save_pretrained(tmp_path / "teacher")
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"]
    )
    init = {"quantization_config": quantization, "device_map": "cpu"}
    trainer = train(dataset, tmp_path, teacher=str(tmp_path / "teacher"), teacher_init_kwargs=init, **TERMS)
    assert type(trainer.teacher.lm_head) is not nn.Linear
    batch = pad([dataset[i] for i in range(4)])
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model.eval(), batch),
        dense_loss(trainer.model, trainer.teacher, batch),
        rtol=1e-2,
        atol=1e-3,
    )


def test_own_text_has_no_cross_entropy_and_other_labels(dataset, tmp_path, count_calls) -> None:
    written = count_calls(sys.modules[DistillationTrainer.__module__], "continue_prompts")
    trainer = train(dataset, tmp_path, cross_entropy_weight=1.0, **GREEDY_ON_POLICY)
    assert len(written) == 3
    for batch in written:
        counted = batch["labels"] != -100
        assert counted.sum(1).min() >= 1
        assert counted.sum(1).max() <= 8
        assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    assert all("cross_entropy" not in entry for entry in trainer.state.log_history if "loss" in entry)
    loss, divergence = logged(trainer, "loss", "divergence").T
    torch.testing.assert_close(loss, divergence, rtol=1e-4, atol=1e-6)


def test_padded_vocabularies_just_work(dataset, tmp_path) -> None:
    trainer = train(dataset, tmp_path, teacher=teacher_model(vocab_size=VOCABULARY + 40))
    same = train(dataset, tmp_path, teacher=cut_head(teacher_model(vocab_size=VOCABULARY + 40)))
    assert_same_training(trainer, same)


def cut_head(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the padding of a vocabulary."""
    return model.resize_token_embeddings(VOCABULARY) and model


def test_universal_loss_takes_the_teachers_own_tokens(dataset, tmp_path) -> None:
    """A teacher with another tokenizer: here every token of the student is two of the teacher's."""

    def both(examples: list) -> dict:
        theirs = [{k: [t for t in e[k] for _ in range(2)] for k in ("input_ids", "labels")} for e in examples]
        return pad(examples) | {f"teacher_{k}": v for k, v in pad(theirs).items()}

    teacher = teacher_model(vocab_size=3000)
    options = {"divergence": "universal", "cross_entropy_weight": 0.1, "max_steps": 6}
    trainer = train(dataset, tmp_path, teacher=teacher, data_collator=both, remove_unused_columns=False, **options)
    losses = logged(trainer, "divergence")
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="expected teacher_input_ids, teacher_attention_mask and teacher_labels"):
        train(dataset, tmp_path, teacher=teacher, **options)
    with pytest.raises(ValueError, match="expected none of the teacher's tokens in the batch"):
        train(dataset, tmp_path, data_collator=both, remove_unused_columns=False)


def test_partners_pair_the_tokens_that_count() -> None:
    student = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()
    teacher = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1]]).bool()
    rows, columns, has_partner = forward_module.partners(student, teacher)
    assert rows.tolist() == [0, 0, 0, 1, 1]
    assert has_partner.tolist() == [True, True, False, True, True]
    assert columns[has_partner].tolist() == [2, 3, 1, 3]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "forward"}, "unknown divergence 'forward'; expected one of forward_kl, reverse_kl"),
        ({"divergence": {"forward_kl": -1.0}}, "must be positive, got -1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"skew_alpha": 1.0}, "alpha must lie between 0 and 1, got 1.0"),
        ({"divergence_weight": 0.0}, "nothing to learn: set one of divergence_weight"),
        ({"cross_entropy_weight": -0.5}, "cross_entropy_weight must be 0 or more, got -0.5"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction must lie between 0 and 1, got 1.5"),
        ({"on_policy_max_new_tokens": 0}, "on_policy_max_new_tokens must be at least 1, got 0"),
        ({"divergence": {"universal": 0.5, "forward_kl": 0.5}}, "universal compares other tokens"),
        (
            {"on_policy_fraction": 0.5, "divergence_weight": 0.0, "cross_entropy_weight": 1.0},
            "got on_policy_fraction=0.5",
        ),
        ({"label_smoothing_factor": 0.1}, "distillation has no label smoothing, got label_smoothing_factor=0.1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_bad_teachers_are_refused(dataset, tmp_path) -> None:
    student = student_model()
    for teacher, message in (
        (teacher_model().train(), "the teacher is in training mode"),
        (student, "the student holds parameters of the teacher"),
        (teacher_model(vocab_size=5000), f"{VOCABULARY} and 5000 tokens"),
        (3, "got int"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(dataset, tmp_path, student, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(ValueError, match="a teacher is needed"):
        DistillationTrainer(student, None, config(tmp_path))
    with pytest.raises(ValueError, match="must be a DistillationConfig, got TrainingArguments"):
        DistillationTrainer(student, teacher_model(), TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(ValueError, match="teacher_init_kwargs need a teacher given by name"):
        trainer_of(dataset, tmp_path, teacher_init_kwargs={"dtype": "auto"})


def test_a_teacher_that_is_changed_later_is_refused(dataset, tmp_path) -> None:
    trainer = trainer_of(dataset, tmp_path)
    trainer.teacher.train()
    with pytest.raises(ValueError, match="the teacher is in training mode"):
        trainer.train()
    trainer = trainer_of(dataset, tmp_path)
    trainer.optimizer = torch.optim.SGD([*trainer.model.parameters(), *trainer.teacher.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds parameters of the teacher"):
        trainer.create_optimizer()


def test_other_tokenizers_are_refused(dataset, tokenizer, tmp_path) -> None:
    other = copy.deepcopy(tokenizer)
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    names = vocabulary["model"]["vocab"]
    first, second = (next(name for name, index in names.items() if index == i) for i in (40, 41))
    names[first], names[second] = names[second], names[first]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="different tokenizers: token 40 is"):
        DistillationTrainer(
            student_model(),
            teacher_model(),
            config(tmp_path),
            processing_class=tokenizer,
            teacher_processing_class=other,
        )
    DistillationTrainer(
        student_model(),
        teacher_model(),
        config(tmp_path),
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )


def test_bad_batches_are_refused(dataset, tmp_path) -> None:
    hidden = dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="all labels of a step are masked"):
        train(hidden, tmp_path)
    trainer = trainer_of(dataset, tmp_path)
    with pytest.raises(ValueError, match=r"expected 'labels' in the batch, got \['input_ids'\]"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    unmasked = dataset.map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises(ValueError, match="mask prompts with -100, or set on_policy_prompt_tokens"):
        train(unmasked, tmp_path, **GREEDY_ON_POLICY)
    train(unmasked, tmp_path, on_policy_prompt_tokens=4, **GREEDY_ON_POLICY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "universal", **STATES}, "cannot be combined with"),
        ({"divergence": "universal", **GREEDY_ON_POLICY}, "cannot be combined with"),
        ({"layer_map": [[0, 3]], **STATES}, "layer_map names teacher layer 3, expected 0 to 2"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func would replace the distillation loss"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict, message: str, dataset, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(dataset, tmp_path, **options)
