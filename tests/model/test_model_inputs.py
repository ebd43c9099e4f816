"""Batches that are empty, too long, hold NaN or tokens that do not exist: an error or the right work."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    pipeline,
)

from whisper_hf import (
    DistillationConfig,
    DistillationTrainer,
    FiniteGradientsCallback,
    WhisperLMForCausalLM,
    convert_checkpoint,
)
from whisper_hf.model.pretrained_base import ATTENTION_IMPLEMENTATIONS
from whisper_hf.quantization import quantize

from ..conftest import LENGTH, SIZES, VOCABULARY, tiny_model, tokens
from ..helpers.warm_processes import run_two_processes

EVERY_ATTENTION = pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
PADDING = {"left": slice(0, 30), "right": slice(130, LENGTH)}


def attending(attention: str) -> WhisperLMForCausalLM:
    """Return a tiny model with an attention implementation."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("shape", [(0, LENGTH), (2, 0), (0, 0)])
def test_empty_batches_are_refused(model, shape) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    for enter in (
        lambda: model(ids),
        lambda: model(ids, labels=ids, attention_mask=torch.ones(shape)),
        lambda: model(inputs_embeds=torch.zeros(*shape, 32)),
    ):
        with pytest.raises(ValueError, match=rf"at least one row and one token, got shape \({shape[0]}, {shape[1]}\)"):
            enter()


@pytest.mark.parametrize(
    "diversity", [None, {"contrast_weight": 0.5}, {"gem_beta": 0.7}], ids=["plain", "contrast", "gem"]
)
def test_without_labels_that_count_loss_and_gradient_are_zero(diversity, input_ids) -> None:
    model = tiny_model(diversity=diversity).train()
    masked, single = torch.full_like(input_ids, -100), input_ids[:, :1]
    for ids, labels, count in (
        (input_ids, masked, None),
        (input_ids, masked, torch.tensor(0)),
        (input_ids, masked, 0),
        (single, single, None),
    ):
        model.zero_grad()
        loss = model(ids, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        assert loss == 0
        assert not any(parameter.grad.any() for parameter in model.parameters())


def test_a_loss_is_the_mean_over_labels_that_count(model, input_ids) -> None:
    labels = input_ids.clone()
    labels[0, 40:] = -100
    output = model(input_ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=7).loss * 7 / (39 + 159), expected)


@EVERY_ATTENTION
def test_hidden_rows_and_batches_are_finite_and_change_nothing(attention, input_ids) -> None:
    model = attending(attention)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1] = 0
    logits = model(input_ids, attention_mask=attention_mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1], model(input_ids[:1]).logits)
    assert model(input_ids, attention_mask=torch.zeros_like(input_ids)).logits.isfinite().all()


@EVERY_ATTENTION
def test_nan_in_a_row_stays_there_and_in_padding_does_nothing(attention, input_ids) -> None:
    model = attending(attention)
    embeddings = model.model.embed_tokens(input_ids).detach()
    spoilt = embeddings.clone()
    spoilt[1] = torch.nan
    logits = model(inputs_embeds=spoilt).logits
    assert torch.equal(logits[0], model(inputs_embeds=embeddings).logits[0])
    assert logits[1].isnan().all()
    for side, where in PADDING.items():
        shown = torch.ones_like(input_ids)
        shown[1, where] = 0
        expected = model(inputs_embeds=embeddings, attention_mask=shown).logits[shown == 1]
        torch.testing.assert_close(model(input_ids, attention_mask=shown).logits[shown == 1], expected)
        for number in (torch.nan, torch.inf):
            spoilt = embeddings.clone()
            spoilt[1, where] = number
            logits = model(inputs_embeds=spoilt, attention_mask=shown).logits[shown == 1]
            assert torch.equal(logits, expected), (side, number)


@pytest.mark.parametrize(("index", "words"), [(VOCABULARY, "got 3 to 120"), (-1, "got -1 to 119")])
def test_tokens_outside_the_vocabulary_are_named(model, input_ids, index, words) -> None:
    input_ids = input_ids.clone()
    input_ids[1, 7], input_ids[0, :2] = index, torch.tensor([3, 119])
    for enter in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"below vocab_size \(120\), {words}.*tokenizer"):
            enter(input_ids)


@pytest.fixture
def misfit(tokenizer, tmp_path):
    """Return a folder with a Llama and a tokenizer of more tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "misfit")
    tokenizer.save_pretrained(tmp_path / "misfit")
    return tmp_path / "misfit"


def test_a_tokenizer_that_does_not_fit_is_not_carried_along(misfit, tmp_path) -> None:
    for enter in (convert_checkpoint, lambda *paths: quantize(*paths, "int8-cpu")):
        with pytest.raises(ValueError, match=r"below the model's vocab_size, 120, got '<newer>' with id 121.*resize"):
            enter(misfit, tmp_path / "target")
        assert not (tmp_path / "target").exists()
    model = AutoModelForCausalLM.from_pretrained(misfit)
    model.resize_token_embeddings(122)
    model.save_pretrained(misfit)
    convert_checkpoint(misfit, tmp_path / "target")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "target")) == 122


def test_a_pipeline_with_a_tokenizer_that_does_not_fit_says_so(misfit) -> None:
    generate = pipeline("text-generation", model=tiny_model(), tokenizer=AutoTokenizer.from_pretrained(misfit))
    assert generate("It is a truth", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"below vocab_size \(120\), got \d+ to 121"):
        generate("It is a <newer> truth", max_new_tokens=2)


def test_what_is_longer_than_the_model_was_made_for_is_said_once(model, caplog) -> None:
    """`generate` says it in transformers' words."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    beyond = "is longer than max_position_embeddings=512"
    cache = model(tokens(1, 512), use_cache=True).cache
    assert beyond not in caplog.text
    assert model(tokens(1, 8), cache=cache).logits.isfinite().all()
    assert f"a sequence of 520 tokens {beyond}" in caplog.text
    model(tokens(1, 8), cache=cache)
    positions = torch.arange(300).repeat(2)[None]  # packed documents, none of them too long
    caplog.clear()
    model(tokens(1, 600), position_ids=positions)
    assert beyond not in caplog.text
    model.generate(tokens(1, 510), max_new_tokens=4)
    assert "exceeded the model's predefined maximum length (512)" in caplog.text
    logging.getLogger("transformers").removeHandler(caplog.handler)


def trainer(folder, distilled: bool, **options):
    """Return a trainer of a tiny model whose third loss is NaN."""
    rows = Dataset.from_dict({"input_ids": tokens(16).tolist(), "labels": tokens(16).tolist()})
    settings = {
        "output_dir": str(folder),
        "max_steps": 5,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    student = tiny_model()
    if distilled:
        args = DistillationConfig(**{**settings, "cross_entropy_weight": 0.5, **options})
        training = DistillationTrainer(student, tiny_model(initializer_range=0.3), args, train_dataset=rows)
    else:
        args = TrainingArguments(**{**settings, **options})
        training = Trainer(student, args, train_dataset=rows, callbacks=[FiniteGradientsCallback()])

    def spoil(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if training.state.global_step == 2 and module.training else output

    student.lm_head.register_forward_hook(spoil)
    return training


@pytest.mark.parametrize("distilled", [False, True], ids=["stock", "distillation"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"bf16": True}], ids=["", "no clipping", "bf16"])
def test_training_stops_before_a_step_that_would_spoil_the_weights(distilled, options, tmp_path) -> None:
    training = trainer(tmp_path, distilled, **options)
    with pytest.raises(ValueError, match=r"gradients of step 3 must be finite.*weights are still those of step 2"):
        training.train()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-3").exists()
    for (name, kept), saved in zip(training.model.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(kept, saved), name
        assert kept.isfinite().all(), name


def test_a_spoilt_weight_is_said_to_be_so(tmp_path) -> None:
    training = trainer(tmp_path, distilled=False)
    training.model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"gradients of step 1 must be finite.*not finite any more"):
        training.train()


def sharded_step(folder: str) -> None:
    """Take a step on weights that two processes share; then one of them finds NaN in its share."""
    distributed.init_process_group("gloo")
    process = distributed.get_rank()
    model = tiny_model().train()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    model(tokens(), labels=tokens()).loss.backward()
    optimizer, callback = torch.optim.AdamW(model.parameters()), FiniteGradientsCallback()
    event = (SimpleNamespace(fp16=False), TrainerState(global_step=7), TrainerControl())
    callback.on_pre_optimizer_step(*event, model=model, optimizer=optimizer)
    if process == 1:
        model.model.layers[1].mlp.up_proj.weight.grad.to_local()[0, 0] = torch.nan
    try:
        callback.on_pre_optimizer_step(*event, model=model, optimizer=optimizer)
    except ValueError as error:
        (Path(folder) / f"said-{process}").write_text(str(error))


def test_nan_in_the_shard_of_one_process_stops_them_all(tmp_path) -> None:
    run_two_processes(sharded_step, tmp_path)
    for process in (0, 1):
        said = (tmp_path / f"said-{process}").read_text()
        assert "gradients of step 8" in said
        assert "1 of 25 tensors, such as ['model.layers.1.mlp.up_proj.weight']; the weights are still" in said
