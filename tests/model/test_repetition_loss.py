"""The objective against repetition: which tokens it discourages, by how much, and in whose training."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers import default_data_collator as collate
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.logging import warning_once

from examples.benchmarks.published import gem
from whisper_hf import DiversityConfig, WhisperLMForCausalLM, use_diversity
from whisper_hf.objectives import chunked_distillation_loss, contrast_loss, repeating_tokens

from ..conftest import SIZES, tiny_config, tiny_model

TEXT = torch.randint(0, 4, (3, 90), generator=torch.Generator().manual_seed(0))  # few tokens, much repetition


def repeating_tokens_reference(ids: list, targets: list, documents: list, window: int, most: int) -> list[list[int]]:
    """State the rule again for one row: what followed the last two tokens when they came before."""
    rows = []
    for t in range(len(ids)):
        found: list[int] = []
        for s in range(t - 1, 0, -1):
            same = ids[s - 1 : s + 1] == ids[t - 1 : t + 1] and t > 0
            if len({documents[i] for i in (s - 1, s, t - 1, t)}) > 1 or not same or t - s > window:
                continue
            found.append(targets[s])
        recent = found[:most]
        kept = [c for i, c in enumerate(recent) if c >= 0 and c != targets[t] and c not in recent[:i]]
        rows.append(sorted(kept))
    return rows


@pytest.mark.parametrize("window", [10, 500])
@pytest.mark.parametrize("kind", ["plain", "prompt", "packed"])
def test_candidates_are_those_of_the_rule(kind: str, window: int) -> None:
    targets = nn.functional.pad(TEXT[:, 1:], (0, 1), value=-100)
    documents = None
    if kind == "prompt":
        targets[:, :40] = -100
    if kind == "packed":
        documents = (torch.arange(90) // 30).expand(3, -1)
        targets[:, 29::30] = -100
    found = repeating_tokens(TEXT, targets, documents, window=window, most=4)
    assert found.shape == (3, 90, 4)
    for row in range(3):
        owner = [0] * 90 if documents is None else documents[row].tolist()
        expected = repeating_tokens_reference(TEXT[row].tolist(), targets[row].tolist(), owner, window, 4)
        assert [sorted(c for c in candidates if c >= 0) for candidates in found[row].tolist()] == expected
    assert (found >= 0).any()


def test_text_without_repetition_has_no_candidates() -> None:
    ids = torch.arange(50)[None]
    assert (repeating_tokens(ids, nn.functional.pad(ids[:, 1:], (0, 1), value=-100)) == -1).all()
    repeated = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])  # people who repeat themselves are left alone
    assert (repeating_tokens(repeated, torch.tensor([[2, 3, 1, 2, 3, 1, 2, 3]])) == -1).all()


def test_short_rows_have_no_candidates() -> None:
    assert repeating_tokens(torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)).shape == (2, 1, 8)


def test_contrast_and_its_derivative() -> None:
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (6,))
    candidates = torch.tensor([[4, 5, -1], [6, -1, -1], [-1, -1, -1], [7, 8, 9], [-1, 10, -1], [-1, -1, -1]])
    weights = (candidates >= 0).double()
    gaps = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    expected = (1 + (gaps.exp() * weights).sum(1)).log()
    value, at_candidates, at_label = contrast_loss(logits.detach(), labels, candidates)
    torch.testing.assert_close(value, expected.detach())
    gradient = torch.zeros_like(logits).scatter_add_(1, candidates.clamp(min=0), at_candidates)
    gradient = gradient.detach().scatter_add_(1, labels[:, None], at_label[:, None])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])
    assert (value[[2, 5]] == 0).all()


@pytest.mark.parametrize("gap", [-500.0, 15.0, 500.0])
def test_contrast_is_finite_and_still_pushes_at_any_gap(gap: float) -> None:
    value, at_candidates, at_label = contrast_loss(torch.tensor([[0.0, gap]]), torch.tensor([0]), torch.tensor([[1]]))
    assert value.item() == pytest.approx(max(gap, 0.0), abs=1e-5)
    assert at_candidates.item() == pytest.approx(float(gap > 0), abs=1e-5)
    assert at_label.item() == -at_candidates.item()


def test_chunked_loss_with_contrast_is_the_sum_of_its_parts() -> None:
    head, hidden = nn.Linear(8, 30), torch.randn(25, 8, requires_grad=True)
    labels, candidates = (
        torch.randint(0, 10, (25,)),
        torch.randint(10, 30, (25, 1)).masked_fill(torch.rand(25, 1) < 0.5, -1),
    )
    losses = chunked_distillation_loss(
        hidden,
        head,
        labels,
        None,
        cross_entropy_weight=0.5,
        diversity_weight=2.0,
        candidates=candidates,
        chunk_tokens=4,
    )
    logits = head(hidden)
    gap = logits.gather(1, candidates.clamp(min=0)) - logits.gather(1, labels[:, None])
    contrast = nn.functional.softplus(gap)[:, 0] * (candidates[:, 0] >= 0)
    expected = 0.5 * nn.functional.cross_entropy(logits, labels, reduction="sum") + 2 * contrast.sum()
    torch.testing.assert_close(losses.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.diversity, contrast.detach())
    wanted = [hidden, head.weight, head.bias]
    for got, gradient in zip(
        torch.autograd.grad(losses.loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-5)


# --- in training -----------------------------------------------------------------------------------------------------

STRONG = {"contrast_weight": 2.0, "window": 60}


def expected_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy and contrast per labelled token, one row and position at a time."""
    logits = model(ids).logits.float()
    total, count = logits.new_zeros(()), 0
    for row, words in enumerate(labels.tolist()):
        targets = [*words[1:], -100]
        stretch = [sum(1 for w in words[: t + 1] if w == -100) if w != -100 else -1 - t for t, w in enumerate(words)]
        candidates = repeating_tokens_reference(words, targets, stretch, STRONG["window"], 8)
        for t, target in enumerate(targets):
            if target >= 0:
                count += 1
                total = total - logits[row, t].log_softmax(-1)[target]
                gaps = [logits[row, t, c] - logits[row, t, target] for c in candidates[t]]
                total = total + 2.0 * (1 + sum(gap.exp() for gap in gaps)).log() if gaps else total
    return total / count


@pytest.mark.parametrize("family", ["whisper_lm", "llama"])
def test_training_loss_is_that_of_the_definition(family: str) -> None:
    model = tiny_model() if family == "whisper_lm" else LlamaForCausalLM(LlamaConfig(**SIZES))
    labels = TEXT.clone()
    labels[0, :30], labels[1, 50:54], labels[2, 70:] = -100, -100, -100  # a prompt, a gap, padding
    plain = model(TEXT, labels=labels).loss
    assert use_diversity(model, STRONG) is model
    loss = model.train()(TEXT, labels=labels).loss
    expected = expected_loss(model, TEXT, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert loss > plain + 0.01
    parameters = list(model.parameters())
    for got, gradient in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-5)


def test_off_and_evaluation_are_bit_identical_to_the_stock_loss() -> None:
    model, diverse = tiny_model(), tiny_model(diversity=STRONG)
    assert model.loss_function is ForCausalLMLoss
    for items in (None, torch.tensor(77)):
        with torch.no_grad():
            expected = model(TEXT, labels=TEXT, num_items_in_batch=items).loss
            assert torch.equal(diverse(TEXT, labels=TEXT, num_items_in_batch=items).loss, expected)
        trained = diverse.train()(TEXT, labels=TEXT, num_items_in_batch=items).loss
        assert trained > expected
        assert torch.equal(
            use_diversity(copy.deepcopy(diverse), None)(TEXT, labels=TEXT, num_items_in_batch=items).loss, expected
        )


def test_gem_has_the_gradient_of_its_definition_and_evaluates_as_cross_entropy() -> None:
    model = tiny_model(diversity={"contrast_weight": 0.0, "gem_beta": 0.6}).train()
    labels = TEXT.masked_fill(torch.rand(TEXT.shape) < 0.2, -100)
    output = model(TEXT, labels=labels)
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = gem(output.logits, targets, beta=0.6).sum() / (targets >= 0).sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(output.loss, parameters, retain_graph=True)
    for got, gradient in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(TEXT, labels=labels).loss, tiny_model()(TEXT, labels=labels).loss)


def test_shifted_labels_and_half_precision() -> None:
    model = tiny_model(diversity=STRONG).train()
    loss = model(TEXT, labels=TEXT).loss
    shifted = nn.functional.pad(TEXT[:, 1:], (0, 1), value=-100)
    again = model(TEXT, labels=TEXT, shift_labels=shifted).loss
    assert again.item() == pytest.approx(loss.item(), rel=1e-2)  # the first token of a row is then no source
    with torch.autocast("cpu", torch.bfloat16):
        half = model(TEXT, labels=TEXT).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=0.02, atol=0.02)


def test_the_config_is_saved_and_validated(tmp_path) -> None:
    tiny_model(diversity=STRONG).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.diversity == DiversityConfig(**STRONG)
    assert loaded.train()(TEXT, labels=TEXT).loss > tiny_model()(TEXT, labels=TEXT).loss
    for value, message in (
        ({"contrast_weight": -1.0}, "contrast_weight must be finite, 0 or more, got -1.0"),
        ({"window": 0}, "window must be an integer of at least 1 and at most 1048576, got 0"),
        (
            {"strength": 1.0},
            r"diversity has no field 'strength'; the fields are \['contrast_weight', 'window', 'gem_beta'\]",
        ),
        ({"gem_beta": 0.0}, "gem_beta must be finite and above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(diversity=value)
    with pytest.raises(ValueError, match="diversity must be a dict or a DiversityConfig, got float"):
        use_diversity(tiny_model(), 0.5)
    with pytest.raises(ValueError, match="transformers' ForCausalLMLoss, got Linear"):
        use_diversity(nn.Linear(2, 2))


def train(folder, model: WhisperLMForCausalLM, batch_size: int = 8, accumulation: int = 1, **options) -> Trainer:
    """Train with the stock Trainer, unchanged."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 4, (8, 90)).tolist()]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows), data_collator=collate)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["accumulation", "checkpointing", "peft"])
def test_the_stock_trainer_trains_with_it(kind: str, tmp_path) -> None:
    """One big batch equals many small ones, and nothing else changes anything, either."""
    results = []
    for changed in (False, True):
        set_seed(3)
        model = tiny_model(diversity=STRONG)
        if kind == "peft":
            from peft import LoraConfig, get_peft_model

            set_seed(3)
            lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
            model = get_peft_model(tiny_model(diversity=None if changed else STRONG), lora)
            model = use_diversity(model, STRONG) if changed else model
        options = {"batch_size": 2, "accumulation": 4} if kind == "accumulation" and changed else {}
        if kind == "checkpointing":
            options["gradient_checkpointing"] = changed
        set_seed(4)
        results.append(
            [entry["loss"] for entry in train(tmp_path, model, **options).state.log_history if "loss" in entry]
        )
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_where_the_trainer_bypasses_it_it_says_so(tmp_path, caplog) -> None:
    warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            train(tmp_path, tiny_model(diversity=STRONG), label_smoothing_factor=0.1)
    finally:
        logger.propagate = False
    assert "trains without labels, so its diversity objective does nothing" in caplog.text
