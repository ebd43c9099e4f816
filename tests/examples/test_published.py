"""Objectives of other papers: each against its formula, position by position, and against known bugs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.benchmarks.published import (
    contrastive_token,
    ditto,
    gem,
    previous_tokens,
    repeat_span,
    scalegrad,
    simctg,
    token_unlikelihood,
)

from ..helpers import token_objectives
from ..helpers.token_objectives import KINDS, LENGTH, VOCABULARY, Ids, batch, log_not


def sources(targets: Ids, documents: Ids, t: int, window: int = LENGTH) -> set[int]:
    return {targets[s] for s in range(max(t - window, 0), t) if targets[s] >= 0 and documents[s] == documents[t]}


def token_unlikelihood_reference(logits: Tensor, targets: Ids, documents: Ids, t: int, window: int = LENGTH) -> Tensor:
    return -sum(log_not(logits[t], c) for c in sources(targets, documents, t, window) - {targets[t]})


def scalegrad_reference(logits: Tensor, targets: Ids, documents: Ids, t: int, gamma: float = 0.2) -> Tensor:
    seen = sources(targets, documents, t)
    scaled = logits[t].softmax(0) * torch.tensor([1.0 if v in seen else gamma for v in range(VOCABULARY)])
    return -(scaled[targets[t]] / scaled.sum()).log()


def simctg_reference(states: Tensor, targets: Ids, documents: Ids, t: int, margin: float = 0.5) -> Tensor:
    own = [s for s in range(len(targets)) if targets[s] >= 0 and documents[s] == documents[t] and s != t]
    cosine = functools.partial(nn.functional.cosine_similarity, dim=0)
    terms = [(margin - cosine(states[t], states[t]) + cosine(states[t], states[s])).clamp(min=0) for s in own]
    return torch.stack(terms).mean() if own else 0 * states.sum()


def contrastive_token_reference(logits: Tensor, targets: Ids, documents: Ids, t: int, window: int = 60) -> Tensor:
    negatives = sources(targets, documents, t, window) - {targets[t]}
    return sum(((logits[t, c] - logits[t, targets[t]]).exp() for c in negatives), 1 + 0 * logits.sum()).log()


def ditto_reference(
    logits: Tensor, targets: Ids, documents: Ids, t: int, ratio: float = 0.5, period: int = 2
) -> Tensor:
    s = t - period
    if s < 0 or targets[s] != targets[t] or documents[s] != documents[t]:
        return 0 * logits.sum()
    wanted = ratio * logits[s].softmax(0)[targets[t]].detach()
    return -(1 - (logits[t].softmax(0)[targets[t]] - wanted).abs()).log()


def gem_reference(logits: Tensor, targets: Ids, _: Ids, t: int, beta: float = 0.7, h: str = "linear") -> Tensor:
    function = {"linear": lambda u: u, "logsigmoid": lambda u: u.sigmoid().log()}[h]
    log_p, q = logits[t].log_softmax(0), (logits[t] / beta).softmax(0).detach()
    return -(q * function(log_p[targets[t]] - log_p)).sum()


def ditto_of_two(logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, ratio: float = 0.5) -> Tensor:
    return ditto(logits, targets, torch.full((len(logits),), 2), documents, ratio=ratio)


def gem_of_any(logits: Tensor, targets: Tensor, _: Tensor | None = None, **options: Any) -> Tensor:
    return gem(logits, targets, **options)


CASES: list[tuple[Callable, Callable, dict[str, Any]]] = [
    (token_unlikelihood, token_unlikelihood_reference, {}),
    (token_unlikelihood, token_unlikelihood_reference, {"window": 3}),
    (scalegrad, scalegrad_reference, {"gamma": 0.2}),
    (simctg, simctg_reference, {}),
    (contrastive_token, contrastive_token_reference, {}),
    (contrastive_token, contrastive_token_reference, {"window": 2}),
    (ditto_of_two, ditto_reference, {"ratio": 0.5}),
    (ditto_of_two, ditto_reference, {"ratio": 1.0}),
    (gem_of_any, gem_reference, {}),
    (gem_of_any, gem_reference, {"h": "logsigmoid", "beta": 1.3}),
]
OBJECTIVES = [pytest.param(f, options, id=f"{f.__name__}-{options}") for f, _, options in CASES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("objective", "reference", "options"), CASES)
def test_value_and_gradient_are_those_of_the_formula(objective: Callable, reference: Callable, options, kind) -> None:
    token_objectives.check_formula(objective, reference, options, kind)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_influence_one_another(objective: Callable, options: dict, kind: str) -> None:
    token_objectives.check_rows_do_not_influence_one_another(objective, options, kind)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_documents_of_a_row_are_like_rows_of_their_own(objective: Callable, options: dict) -> None:
    token_objectives.check_documents_are_like_rows(objective, options)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_prompts_and_padding_have_no_influence(objective: Callable, options: dict) -> None:
    token_objectives.check_prompts_and_padding_have_no_influence(objective, options)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_nothing_counts_or_a_single_token_does(objective: Callable, options: dict) -> None:
    logits, value = token_objectives.losses_of_single_tokens(objective, options)
    if objective is scalegrad:
        torch.testing.assert_close(value, nn.functional.cross_entropy(logits, torch.tensor([2]), reduction="none"))
    elif objective is not gem_of_any:
        assert value == 0


def test_text_without_repetition_costs_nothing() -> None:
    logits, targets = torch.randn(2, 8, 20), torch.arange(16).view(2, 8)
    assert (ditto_of_two(logits, targets) == 0).all()
    assert (contrastive_token(logits, torch.full((2, 8), 3)) == 0).all()  # only the true token came before
    assert (token_unlikelihood(logits, torch.full((2, 8), 3)) == 0).all()


@pytest.mark.parametrize("gap", [-500.0, 15.0, 500.0])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_any_gap_is_finite_and_a_certain_repetition_is_pushed(gap: float, offset: float) -> None:
    """Token 0 comes, then 1: logits[0, 1] give token 0 a lead of `gap` over all others."""
    logits = torch.full((1, 3, 5), offset)
    logits[0, 1:, 0] += gap
    logits.requires_grad_()
    expected = math.log(math.exp(min(gap, 15)) + 4) - math.log(4) if gap < 100 else gap - math.log(4)
    for objective, targets in [
        (token_unlikelihood, [0, 1, -100]),
        (ditto_of_two, [0, -100, 0]),
        (contrastive_token, [0, 1, -100]),
        (scalegrad, [0, 1, -100]),
        (gem, [0, 1, -100]),
        (functools.partial(gem, h="logsigmoid"), [0, 1, -100]),
    ]:
        value = objective(logits, torch.tensor([targets]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        if objective is token_unlikelihood:
            assert value[0, 1].item() == pytest.approx(expected, abs=1e-4)
        if objective is not ditto_of_two and gap > 0:
            assert gradient[0, 1, 0] > 0.99  # its logit is pushed down at full strength
        if objective in (token_unlikelihood, contrastive_token) and gap < 0:
            assert gradient[0].abs().max() < 1e-6


def test_ditto_pushes_a_certain_token_that_was_not_before() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, :, 0] = torch.tensor([-500.0, 500.0])
    logits.requires_grad_()
    value = ditto(logits, torch.zeros(1, 2, dtype=torch.long), torch.tensor([1]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value[0, 1].item() == pytest.approx(500 - math.log(2.25), abs=1e-3)  # 2 others, 1/2 * 1/2 wanted
    torch.testing.assert_close(gradient[0, :, 0], torch.tensor([0.0, 2 / 2.25]))


@pytest.mark.parametrize("objective", [token_unlikelihood, scalegrad, contrastive_token, gem])
def test_impossible_tokens_are_no_trouble(objective: Callable) -> None:
    token_objectives.check_impossible_tokens(objective)


def test_candidates_are_the_distinct_tokens_before() -> None:
    targets = torch.tensor([[1, 2, 1, -100, 2, 3]])
    found = previous_tokens(targets, keep_target=True)
    assert found.shape == (1, 6, 5)
    assert [sorted(c for c in row if c >= 0) for row in found[0].tolist()] == [[], [1], [1, 2], [], [1, 2], [1, 2]]
    found = previous_tokens(targets, window=2)
    assert [sorted(c for c in row if c >= 0) for row in found[0].tolist()] == [[], [1], [2], [], [1], [2]]


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_one_temporary_tensor_and_the_gradient_are_as_large_as_the_logits(objective: Callable, options: dict) -> None:
    if objective is simctg:
        pytest.skip("has no logits")
    token_objectives.check_memory(objective, options)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_half_precision_and_autocast_are_computed_in_float32(objective: Callable, options: dict) -> None:
    token_objectives.check_half_precision(objective, options)


def test_gem_at_temperature_one_has_the_gradient_of_cross_entropy() -> None:
    logits, targets, _ = batch("prompts")
    logits.requires_grad_()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    found = (gem(logits, targets, beta=1.0).sum(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in found))


def test_a_span_repeats_and_is_what_ditto_scores() -> None:
    text = torch.tensor([[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 9, 1]])
    starts, ends = torch.tensor([0, 2]), torch.tensor([3, 4])
    ids, targets = repeat_span(text, starts, ends)
    assert ids.tolist() == [[5, 6, 7, 5, 6, 7], [5, 6, 7, 8, 7, 8]]
    assert targets.tolist() == [[6, 7, 5, 6, 7, 5], [-100, 7, 8, 7, 8, 7]]
    value = ditto(torch.randn(2, 6, 10), targets, ends - starts)
    assert (value != 0).tolist() == [[False] * 3 + [True] * 3, [False] * 3 + [True] * 3]


LOGITS, TARGETS = torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_unlikelihood(LOGITS[:, 1:], TARGETS), r"got \[2, 3, 5\] and \[2, 4\]; .*shifted alike"),
        (lambda: gem(LOGITS[0], TARGETS[0]), r"got \[4, 5\] and \[4\]"),
        (lambda: token_unlikelihood(LOGITS, TARGETS, TARGETS[:1]), r"shape of targets, \[2, 4\], got \[1, 4\]"),
        (lambda: contrastive_token(LOGITS, TARGETS, window=0), "window must be at least 1 token, got 0"),
        (lambda: scalegrad(LOGITS, TARGETS, gamma=1.0), "gamma must lie between 0 and 1, got 1.0"),
        (lambda: simctg(LOGITS, TARGETS, margin=2.0), "must lie in .*, got 2.0"),
        (lambda: ditto(LOGITS, TARGETS, torch.tensor([1, 0])), r"got 0.5 and \[1, 0\]"),
        (lambda: ditto(LOGITS, TARGETS, torch.tensor([1, 1]), ratio=0.0), "got 0.0 and"),
        (lambda: gem(LOGITS, TARGETS, h="square"), "got 'square' and 0.7"),
        (lambda: gem(LOGITS, TARGETS, beta=0.0), "got 'linear' and 0.0"),
        (lambda: repeat_span(TARGETS, torch.tensor([0, 3]), torch.tensor([2, 3])), r"got \[0, 3\] to \[2, 3\]"),
    ],
)
def test_errors_say_what_was_wrong(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
