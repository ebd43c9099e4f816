"""The penalty on the model's own loops: its gradient, its brake, and what it leaves alone in any training."""

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers import default_data_collator as collate
from transformers.utils.logging import warning_once

from whisper_hf import DistillationConfig, DistillationTrainer, SequenceUnlikelihoodCallback, use_diversity
from whisper_hf.repetition.metrics import sequence_repetition
from whisper_hf.repetition.unlikelihood_callback import documents_of, places

from ..conftest import SIZES, tiny_model
from ..helpers.warm_processes import run_two_processes

PREFIX, NEW = 70, 30  # a row is one place, and longer than the sparse budget of 48
SETTINGS = {"every": 2, "rows": 4, "prefix_tokens": PREFIX, "new_tokens": NEW, "weight": 3.0}


def rows(count: int = 16, length: int = PREFIX + NEW) -> Tensor:
    """Return random text, `[count, length]`."""
    return torch.randint(3, 120, (count, length), generator=torch.Generator().manual_seed(5))


def train(
    folder: Path, callback: SequenceUnlikelihoodCallback | None, model: nn.Module | None = None, **options
) -> Trainer:
    """Train with the stock Trainer, unchanged."""
    kind, resume = options.pop("kind", Trainer), options.pop("resume", None)
    text, extra = options.pop("text", rows()), options.pop("trainer", {})
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    arguments = options.pop("arguments", TrainingArguments)(str(folder), **{**defaults, **quiet, **options})
    data = Dataset.from_dict({"input_ids": text.tolist(), "labels": text.tolist()})
    set_seed(0)
    trainer = kind(
        tiny_model() if model is None else model, args=arguments, train_dataset=data, data_collator=collate, **extra
    )
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def greedy(model: nn.Module, prefix: Tensor) -> Tensor:
    """Continue without a cache, one argmax at a time, up to and with the end of text."""
    ids = prefix
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
        if ids[-1] == 2:
            break
    return ids


def penalty_of(model: nn.Module, batch: Tensor, weight: float) -> tuple[Tensor, float, float]:
    """State the definition again, row by row: the penalty, and the repetition of the model and of people."""
    losses, own, human = [], [], []
    for row in batch:
        ids = greedy(model, row[:PREFIX])
        new = ids[PREFIX:].tolist()
        own.append(new), human.append(row[PREFIX : len(ids)].tolist())
        seen, repeated = set(), set()
        for t in range(len(new) - 3):
            gram = tuple(new[t : t + 4])
            repeated |= {*range(t, t + 4)} if gram in seen else set()
            seen.add(gram)
        probability = model(ids[None]).logits[0, PREFIX - 1 : -1].double().softmax(-1)
        losses += [-(1 - probability[t, new[t]]).log() for t in repeated]
    mine, theirs = sequence_repetition(own), sequence_repetition(human)
    return weight * (1 - theirs / mine) * torch.stack(losses).mean(), mine, theirs


def looping_model() -> nn.Module:
    """Return a model that says six words only, and so repeats itself, but is never sure."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
        model.lm_head.weight[9:] = 0
    return model


def test_the_step_takes_the_gradient_of_the_definition(tmp_path) -> None:
    model = looping_model()
    expected = copy.deepcopy(model)
    callback = SequenceUnlikelihoodCallback(**SETTINGS)
    trainer = train(
        tmp_path, callback, model, text=rows(4), max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant"
    )
    penalty, own, human = penalty_of(expected, rows(4), SETTINGS["weight"])
    assert own > 0.05
    (expected(rows(4), labels=rows(4)).loss + penalty).backward()
    assert (callback.own, callback.human) == pytest.approx((own, human))
    assert callback.alpha == pytest.approx(SETTINGS["weight"] * (1 - human / own))
    for (name, got), parameter in zip(weights(trainer).items(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, parameter - 0.05 * parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    logged = trainer.state.log_history[0]
    assert (logged["loops_own"], logged["loops_alpha"]) == (callback.own, callback.alpha)
    assert trainer.model.training
    assert not trainer.model._forward_pre_hooks


def test_it_reduces_loops(tokenizer, paragraphs, tmp_path) -> None:
    """A model that has read very little goes round in loops; less so after the same steps with the penalty."""
    ids = torch.tensor([i for text in paragraphs for i in tokenizer(text)["input_ids"]])
    text = ids[: len(ids) // 100 * 100].view(-1, 100)
    own = []
    for weight in (1e-9, 4.0):
        callback = SequenceUnlikelihoodCallback(**{**SETTINGS, "every": 1, "rows": 8, "weight": weight, "memory": 0.8})
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.05, "num_hidden_layers": 1}))
        train(tmp_path, callback, model, text=text, max_steps=40, optim="adamw_torch", learning_rate=1e-2)
        own.append(callback.own)
    assert own[1] < 0.8 * own[0]


def test_it_stops_where_people_repeat_themselves_as_much(tmp_path) -> None:
    """Bit for bit the training without it; random states included, with dropout."""
    text = rows()
    text[:, PREFIX:] = 7
    results = []
    for callback in (None, SequenceUnlikelihoodCallback(**SETTINGS)):
        model = tiny_model(attention_dropout=0.0)
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, output: nn.functional.dropout(output, 0.2, module.training)
        )
        results.append(weights(train(tmp_path, callback, model, text=text)))
    assert callback.times == 1
    assert callback.human > 0.9
    assert callback.alpha == 0
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_brake_is_the_share_that_people_do_not_have() -> None:
    callback = SequenceUnlikelihoodCallback(weight=2.0, memory=0.5)
    loop, prose = torch.tensor([[5, 6] * 10]), torch.arange(20)[None] + 3
    half = torch.tensor([[*range(3, 13), *[5, 6] * 5]])
    assert callback.alpha == 0
    callback._measure(loop, prose)
    assert callback.alpha == 2.0
    callback._measure(loop, half)
    share = sequence_repetition(half) / 2 / callback.own
    assert callback.alpha == pytest.approx(2 * (1 - share))
    callback._measure(prose, half)  # own: the running mean; human: the mean of all
    assert callback.own == pytest.approx(sequence_repetition(loop) / 2)
    assert callback.human == pytest.approx(2 * sequence_repetition(half) / 3)
    before = callback.state()
    callback._measure(torch.full((1, 20), -100), prose)  # said nothing
    assert callback.state() == before


def test_continuations_are_compared_over_equal_lengths() -> None:
    """What people wrote after the place where the model ended its text does not count."""
    callback = SequenceUnlikelihoodCallback()
    own = torch.tensor([[3, 4, 5, 6, 7, 2, -100, -100, -100, -100, -100, -100]])
    callback._measure(own, torch.tensor([[3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9]]))
    assert (callback.own, callback.human, callback.times) == (0, 0, 1)


@pytest.mark.parametrize("kind", ["adamw", "peft"])
def test_a_resumed_training_goes_on_exactly(kind: str, tmp_path) -> None:
    def run(folder: Path, **options) -> tuple[Trainer, SequenceUnlikelihoodCallback]:
        callback = SequenceUnlikelihoodCallback(**SETTINGS)
        model = looping_model()
        if kind == "peft":
            from peft import LoraConfig, get_peft_model

            set_seed(1)
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        optimizer = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        return train(folder, callback, model, **{**optimizer, "max_steps": 5, **options}), callback

    whole, callback = run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=3, save_strategy="steps", save_steps=3)
    parts, resumed = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert callback.times == 3
    assert callback.alpha > 0
    assert resumed.state() == callback.state()
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name]), name


@pytest.mark.parametrize("kind", ["checkpointing", "accumulation", "bf16"])
def test_it_joins_any_training(kind: str, tmp_path) -> None:
    results = []
    for changed in (False, True):
        options: dict = {"gradient_checkpointing": changed} if kind == "checkpointing" else {}
        if kind == "accumulation":  # continuations are of the first part of a batch
            options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 if changed else 1}
        if kind == "bf16":
            options["bf16"] = changed
        callback = SequenceUnlikelihoodCallback(**SETTINGS)
        trainer = train(tmp_path, callback, looping_model(), **options)
        assert callback.times == 1
        assert callback.alpha > 0
        results.append((callback.own, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    if kind == "checkpointing":
        assert results[0][0] == results[1][0]
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    if kind == "accumulation":
        assert results[0][0] == results[1][0]


def test_it_joins_the_contrast_without_a_warning(tmp_path, caplog) -> None:
    """Its own forward has no labels, which otherwise means that the loss of the config is bypassed."""
    warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        callback = SequenceUnlikelihoodCallback(**SETTINGS)
        train(tmp_path, callback, use_diversity(looping_model(), {"contrast_weight": 1.0}))
    finally:
        logger.propagate = False
    assert callback.alpha > 0
    assert "trains without labels" not in caplog.text


def test_it_joins_distillation(tmp_path) -> None:
    callback = SequenceUnlikelihoodCallback(**SETTINGS)
    teacher = tiny_model()
    options = {"kind": DistillationTrainer, "arguments": DistillationConfig, "trainer": {"teacher": teacher}}
    train(tmp_path, callback, looping_model(), **options)
    assert callback.times == 1
    assert callback.own > 0


def test_settings_of_the_model_do_not_hide_its_loops(tmp_path) -> None:
    results = []
    for penalty in (None, 1.8):
        model = looping_model()
        model.generation_config.repetition_penalty = penalty
        model.generation_config.no_repeat_ngram_size = None if penalty is None else 2
        frozen = model.model.layers[0]
        callback = SequenceUnlikelihoodCallback(**SETTINGS)
        trainer = train(tmp_path, callback, model)
        assert model.generation_config.repetition_penalty == penalty
        assert frozen.training
        results.append((callback.own, weights(trainer)))
    assert results[0][0] == results[1][0] > 0
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_gradients_are_scaled_as_the_optimizer_expects() -> None:
    """Half-precision training multiplies losses, and divides gradients before the step."""
    found = []
    for scaler in (None, SimpleNamespace(scale=lambda loss: 64 * loss)):
        model, batch = looping_model(), rows(4)
        begin(SequenceUnlikelihoodCallback(**SETTINGS), model, SimpleNamespace(scaler=scaler))
        model.train()(batch, labels=batch)
        found.append(model.lm_head.weight.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], 64 * found[0])


def test_gradients_are_those_of_a_forward_pass_in_mixed_precision() -> None:
    """Autocast keeps copies of weights, and those made while writing have no gradient."""
    model, batch = looping_model(), rows(4)
    callback = SequenceUnlikelihoodCallback(**SETTINGS)
    begin(callback, model)
    with torch.autocast("cpu", torch.bfloat16):
        callback.join(model.train(), {"input_ids": batch, "labels": batch})
    assert callback.alpha > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def begin(callback: SequenceUnlikelihoodCallback, model: nn.Module, optimizer: object = None, **changed) -> None:
    """Begin training and its first step by hand."""
    defaults = {"deepspeed_plugin": None, "n_gpu": 0, "seed": 0, "process_index": 0}
    arguments = SimpleNamespace(**{**defaults, **changed})
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    callback.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
    callback.on_step_begin(arguments, state, None)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "prompt", "padded", "packed"])
def test_places_are_those_of_the_rule(kind: str) -> None:
    ids = rows(3, 40)
    labels, shown, positions = ids.clone(), torch.ones_like(ids), None
    if kind == "prompt":
        labels[0, :25], labels[1, 10:20] = -100, -100
    if kind == "padded":
        shown[0, :12], shown[1, 30:] = 0, 0
        labels = labels.masked_fill(shown == 0, -100)
    if kind == "packed":
        positions = torch.tensor([[*range(15), *range(25)], [*range(40)], [*range(7), *range(7), *range(26)]])
    row, start = places(labels, documents_of(ids, shown, positions), 6, 9)
    expected = []
    for r in range(3):
        for s in range(40 - 14):
            span = range(s, s + 15)
            restarts = positions is not None and any(positions[r, t] == 0 for t in span if t > s)
            labelled = all(labels[r, t] != -100 for t in span[6:])
            if not restarts and labelled and all(shown[r, t] for t in span):
                expected.append((r, s))
    assert list(zip(row.tolist(), start.tolist(), strict=True)) == expected
    assert 0 < len(expected) < 3 * 26 or kind == "plain"


def test_short_documents_have_short_continuations() -> None:
    model, batch = looping_model(), rows(2, 30)
    callback = SequenceUnlikelihoodCallback(prefix_tokens=32, new_tokens=40)
    begin(callback, model)
    prefixes, true = callback._choose({"input_ids": batch, "labels": batch})
    assert prefixes.shape == (16, 8)
    assert true.shape == (16, 10)


def test_a_batch_without_a_place_is_left_out(caplog) -> None:
    model, batch = looping_model(), rows(2, 6)
    callback = SequenceUnlikelihoodCallback(**SETTINGS)
    begin(callback, model)
    model.train()(batch, labels=batch)
    assert callback.times == 0
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_work_is_refused(tmp_path) -> None:
    for wrong, message in (
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"new_tokens": 4}, "new_tokens > ngram"),
        ({"weight": 0.0}, "weight > 0"),
        ({"memory": 1.0}, "memory < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SequenceUnlikelihoodCallback(**wrong)
    with pytest.raises(ValueError, match="one device, DDP or FSDP version 2, got DeepSpeed"):
        begin(SequenceUnlikelihoodCallback(), looping_model(), deepspeed_plugin=object())
    with pytest.raises(ValueError, match="got 2 devices of one process"):
        begin(SequenceUnlikelihoodCallback(), looping_model(), n_gpu=2)
    model, batch = looping_model().train(), rows(2)
    begin(SequenceUnlikelihoodCallback(**SETTINGS), model)
    with pytest.raises(ValueError, match="continues input_ids, got a batch of"):
        model(inputs_embeds=model.get_input_embeddings()(batch), labels=batch)


# --- two processes ---------------------------------------------------------------------------------------------------


def sharded(folder: str) -> dict:
    """Return the squared norm of each gradient of a model whose weights are sharded (FSDP2)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model, rank = looping_model(), torch.distributed.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")  # as the Trainer does
    callback = SequenceUnlikelihoodCallback(**{**SETTINGS, "rows": 2})
    begin(callback, model, process_index=rank)
    batch = rows(4)[2 * rank : 2 * rank + 2]
    model.train()(batch, labels=batch).loss.backward()
    squares = {name: p.grad.full_tensor().double().square().sum().item() for name, p in model.named_parameters()}
    return {"squares": squares, "own": callback.own}


def expected_when_shared() -> tuple[dict, float]:
    """Return the same of one process: the mean over halves, at the brake of all."""
    model, batch = looping_model(), rows(4)
    _, own, human = penalty_of(model, batch, 1.0)
    for half in batch.split(2):
        penalty, mine, theirs = penalty_of(model, half, 1.0)
        penalty = penalty / (1 - theirs / mine) * SETTINGS["weight"] * (1 - human / own)
        ((model(half, labels=half).loss + penalty) / 2).backward()
    return {name: p.grad.double().square().sum().item() for name, p in model.named_parameters()}, own


def test_two_processes(tmp_path) -> None:
    """Both agree on the brake; replicated and sharded weights get the mean gradient of both."""
    run_two_processes(work, tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    squares, own = expected_when_shared()
    assert found["sharded"]["own"] == pytest.approx(own, rel=1e-5)
    for name, square in squares.items():
        assert found["sharded"]["squares"][name] == pytest.approx(square, rel=1e-3), name
    assert found["replicated"]["times"] == 2
    assert found["replicated"]["alpha"] > 0
    assert found["replicated"]["difference"] == 0


def replicated(folder: str) -> dict:
    """Train with the Trainer (DDP), and return how far the weights of both processes are apart."""
    callback = SequenceUnlikelihoodCallback(**{**SETTINGS, "rows": 2})
    trainer = train(Path(folder), callback, looping_model(), per_device_train_batch_size=2, max_steps=3)
    flat = torch.cat([p.flatten() for p in weights(trainer).values()])
    other = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(other, flat)
    return {"times": callback.times, "alpha": callback.alpha, "difference": (other[0] - other[1]).abs().max().item()}


def work(folder: str) -> None:
    """Do both, and write what was found."""
    found = {"replicated": replicated(folder), "sharded": sharded(folder)}
    if torch.distributed.get_rank() == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))
