"""Sequence unlikelihood: against its formula, position by position, and against known bugs."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whisper_hf.objectives.unlikelihood import repeated_ngrams, sequence_unlikelihood

from ..helpers import token_objectives
from ..helpers.token_objectives import KINDS, Ids, log_not


def is_repeated(targets: Ids, documents: Ids, t: int, n: int) -> bool:
    grams = {s: tuple(targets[s : s + n]) for s in range(len(targets) - n + 1)}
    grams = {s: g for s, g in grams.items() if min(g) >= 0 and len(set(documents[s : s + n])) == 1}
    mine = [s for s in grams if s <= t < s + n]
    return any(grams[s] == grams[e] and documents[s] == documents[e] for s in mine for e in grams if e < s)


def sequence_unlikelihood_reference(logits: Tensor, targets: Ids, documents: Ids, t: int, n: int = 4) -> Tensor:
    return -log_not(logits[t], targets[t]) if is_repeated(targets, documents, t, n) else 0 * logits.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 4])
def test_value_and_gradient_are_those_of_the_formula(n: int, kind: str) -> None:
    token_objectives.check_formula(sequence_unlikelihood, sequence_unlikelihood_reference, {"n": n}, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 4])
def test_rows_do_not_influence_one_another(n: int, kind: str) -> None:
    token_objectives.check_rows_do_not_influence_one_another(sequence_unlikelihood, {"n": n}, kind)


@pytest.mark.parametrize("n", [2, 4])
def test_documents_of_a_row_are_like_rows_of_their_own(n: int) -> None:
    token_objectives.check_documents_are_like_rows(sequence_unlikelihood, {"n": n})


@pytest.mark.parametrize("n", [2, 4])
def test_prompts_and_padding_have_no_influence(n: int) -> None:
    token_objectives.check_prompts_and_padding_have_no_influence(sequence_unlikelihood, {"n": n})


@pytest.mark.parametrize("n", [2, 4])
def test_nothing_counts_or_a_single_token_does(n: int) -> None:
    _, value = token_objectives.losses_of_single_tokens(sequence_unlikelihood, {"n": n})
    assert value == 0


def test_text_without_repetition_costs_nothing() -> None:
    assert (sequence_unlikelihood(torch.randn(2, 8, 20), torch.arange(16).view(2, 8), n=1) == 0).all()


@pytest.mark.parametrize("gap", [-500.0, 15.0, 500.0])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_any_gap_is_finite_and_a_certain_repetition_is_pushed(gap: float, offset: float) -> None:
    """Token 0 comes twice: logits[0, 1] give it a lead of `gap` over all others."""
    logits = torch.full((1, 3, 5), offset)
    logits[0, 1:, 0] += gap
    logits.requires_grad_()
    expected = math.log(math.exp(min(gap, 15)) + 4) - math.log(4) if gap < 100 else gap - math.log(4)
    value = sequence_unlikelihood(logits, torch.tensor([[0, 0, -100]]), n=1)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert value[0, 1].item() == pytest.approx(expected, abs=1e-4)
    if gap > 0:
        assert gradient[0, 1, 0] > 0.99  # its logit is pushed down at full strength


def test_impossible_tokens_are_no_trouble() -> None:
    token_objectives.check_impossible_tokens(sequence_unlikelihood)


def test_the_last_ngram_counts() -> None:
    targets = torch.tensor([[5, 1, 2, 3, 4, 6, 1, 2, 3, 4]])
    assert repeated_ngrams(targets).nonzero()[:, 1].tolist() == [6, 7, 8, 9]
    value = sequence_unlikelihood(torch.zeros(1, 10, 9), targets)
    torch.testing.assert_close(value[0, 6:], torch.full((4,), math.log(9 / 8)))
    assert repeated_ngrams(targets[:, :3]).tolist() == [[False] * 3]  # shorter than an n-gram
    loop = torch.tensor([[7, 7, 7, 7, 7]])
    assert repeated_ngrams(loop).tolist() == [[False, True, True, True, True]]  # overlapping ones too


@pytest.mark.parametrize("n", [2, 4])
def test_one_temporary_tensor_and_the_gradient_are_as_large_as_the_logits(n: int) -> None:
    token_objectives.check_memory(sequence_unlikelihood, {"n": n})


@pytest.mark.parametrize("n", [2, 4])
def test_half_precision_and_autocast_are_computed_in_float32(n: int) -> None:
    token_objectives.check_half_precision(sequence_unlikelihood, {"n": n})


LOGITS, TARGETS = torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_unlikelihood(LOGITS[:, 1:], TARGETS), r"got \[2, 3, 5\] and \[2, 4\]; .*shifted alike"),
        (
            lambda: sequence_unlikelihood(LOGITS, TARGETS, TARGETS[:1]),
            r"shape of targets, \[2, 4\], got \[1, 4\]",
        ),
        (lambda: sequence_unlikelihood(LOGITS, TARGETS, n=0), "n must be at least 1 token, got 0"),
    ],
)
def test_errors_say_what_was_wrong(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
