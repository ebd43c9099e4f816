"""Published objectives against repetition: each against its formula, position by position, and against known bugs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whisper_hf.objectives.published import (
    contrastive_token,
    ditto,
    gem,
    previous_tokens,
    repeat_span,
    repeated_ngrams,
    scalegrad,
    sequence_unlikelihood,
    simctg,
    token_unlikelihood,
)

ROWS, LENGTH, VOCABULARY = 3, 20, 7
KINDS = ["plain", "prompts", "padded", "packed"]


def batch(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return logits, targets that repeat often, and documents."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (ROWS, LENGTH), generator=generator)
    targets[:, 13:17] = targets[:, 7:11]
    targets[:, -1] = -100
    documents = None
    if kind == "prompts":
        targets[0, :5] = targets[1, :2] = -100
    if kind == "padded":
        targets[0, -6:] = targets[1, :3] = targets[2] = -100
    if kind == "packed":
        documents = torch.tensor([[0] * 6 + [1] * 14, [4] * 12 + [2] * 8, [0] * 20])
        targets[0, 5] = targets[1, 11] = -100
    return logits.to(dtype), targets, documents


def others(logits: Tensor, token: int) -> Tensor:
    """Return `log(1 - p)` of a token from the logits of the others."""
    return torch.cat([logits[:token], logits[token + 1 :]]).logsumexp(0) - logits.logsumexp(0)


Ids = list[int]


def sources(targets: Ids, documents: Ids, t: int, window: int = LENGTH) -> set[int]:
    return {targets[s] for s in range(max(t - window, 0), t) if targets[s] >= 0 and documents[s] == documents[t]}


def token_unlikelihood_reference(logits: Tensor, targets: Ids, documents: Ids, t: int, window: int = LENGTH) -> Tensor:
    return -sum(others(logits[t], c) for c in sources(targets, documents, t, window) - {targets[t]})


def is_repeated(targets: Ids, documents: Ids, t: int, n: int) -> bool:
    grams = {s: tuple(targets[s : s + n]) for s in range(len(targets) - n + 1)}
    grams = {s: g for s, g in grams.items() if min(g) >= 0 and len(set(documents[s : s + n])) == 1}
    mine = [s for s in grams if s <= t < s + n]
    return any(grams[s] == grams[e] and documents[s] == documents[e] for s in mine for e in grams if e < s)


def sequence_unlikelihood_reference(logits: Tensor, targets: Ids, documents: Ids, t: int, n: int = 4) -> Tensor:
    return -others(logits[t], targets[t]) if is_repeated(targets, documents, t, n) else 0 * logits.sum()


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
    (sequence_unlikelihood, sequence_unlikelihood_reference, {"n": 2}),
    (sequence_unlikelihood, sequence_unlikelihood_reference, {"n": 4}),
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
    logits, targets, documents = batch(kind)
    logits.requires_grad_()
    owners = torch.zeros_like(targets) if documents is None else documents
    expected = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for b in range(ROWS):
        row = logits[b], targets[b].tolist(), owners[b].tolist()
        for t in range(LENGTH):
            if targets[b, t] >= 0:
                expected[b, t] = reference(*row, t, **options)
    got = objective(logits, targets, documents, **options)
    torch.testing.assert_close(got, expected)
    assert (expected != 0).sum() > ROWS  # enough of it is compared
    weights = torch.rand(ROWS, LENGTH, dtype=torch.float64)  # the gradient of each position counts
    gradients = [torch.autograd.grad((value * weights).sum(), logits)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_influence_one_another(objective: Callable, options: dict, kind: str) -> None:
    logits, targets, documents = batch(kind)
    together = objective(logits, targets, documents, **options)
    for b in range(ROWS):
        row = slice(b, b + 1)
        alone = objective(logits[row], targets[row], None if documents is None else documents[row], **options)
        torch.testing.assert_close(together[row], alone)


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_documents_of_a_row_are_like_rows_of_their_own(objective: Callable, options: dict) -> None:
    logits, targets, documents = batch("packed")
    together = objective(logits, targets, documents, **options)
    for b, document in ((0, 0), (0, 1), (1, 2), (1, 4), (2, 0)):
        own = documents[b] == document
        alone = objective(logits[b, own][None], targets[b, own][None], **options)
        torch.testing.assert_close(together[b, own], alone[0])


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_prompts_and_padding_have_no_influence(objective: Callable, options: dict) -> None:
    logits, targets, _ = batch("prompts")
    targets[2, -4:] = -100
    changed = logits.where(targets[..., None] >= 0, 1e4 * torch.rand_like(logits)).requires_grad_()
    value = objective(changed, targets, **options)
    torch.testing.assert_close(value, objective(logits, targets, **options))
    assert (value[targets < 0] == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), changed)
    assert (gradient[targets < 0] == 0).all()
    padded = objective(
        nn.functional.pad(logits, (0, 0, 3, 2)), nn.functional.pad(targets, (3, 2), value=-100), **options
    )
    torch.testing.assert_close(padded[:, 3:-2], value.detach())


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_nothing_counts_or_a_single_token_does(objective: Callable, options: dict) -> None:
    logits = torch.randn(2, 1, VOCABULARY, requires_grad=True)
    value = objective(logits, torch.tensor([[-100], [2]]), **options)
    assert value.shape == (2, 1)
    assert value[0] == 0
    if objective is scalegrad:
        torch.testing.assert_close(
            value[1], nn.functional.cross_entropy(logits[1], torch.tensor([2]), reduction="none")
        )
    elif objective is not gem_of_any:
        assert value[1] == 0
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_text_without_repetition_costs_nothing() -> None:
    logits, targets = torch.randn(2, 8, 20), torch.arange(16).view(2, 8)
    assert (sequence_unlikelihood(logits, targets, n=1) == 0).all()
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
        (sequence_unlikelihood, [0, 0, -100]),
        (ditto_of_two, [0, -100, 0]),
        (contrastive_token, [0, 1, -100]),
        (scalegrad, [0, 1, -100]),
        (gem, [0, 1, -100]),
        (functools.partial(gem, h="logsigmoid"), [0, 1, -100]),
    ]:
        options = {"n": 1} if objective is sequence_unlikelihood else {}
        value = objective(logits, torch.tensor([targets]), **options)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        if objective in (token_unlikelihood, sequence_unlikelihood):
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


@pytest.mark.parametrize("objective", [token_unlikelihood, scalegrad, contrastive_token, gem, sequence_unlikelihood])
def test_impossible_tokens_are_no_trouble(objective: Callable) -> None:
    logits, targets, _ = batch("plain", torch.float32)
    logits[..., 3:5] = -math.inf
    targets[0, 0], targets[:, -2] = 1, 2
    logits.requires_grad_()
    value = objective(logits, targets)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_the_last_ngram_counts() -> None:
    targets = torch.tensor([[5, 1, 2, 3, 4, 6, 1, 2, 3, 4]])
    assert repeated_ngrams(targets).nonzero()[:, 1].tolist() == [6, 7, 8, 9]
    value = sequence_unlikelihood(torch.zeros(1, 10, 9), targets)
    torch.testing.assert_close(value[0, 6:], torch.full((4,), math.log(9 / 8)))
    assert repeated_ngrams(targets[:, :3]).tolist() == [[False] * 3]  # shorter than an n-gram
    loop = torch.tensor([[7, 7, 7, 7, 7]])
    assert repeated_ngrams(loop).tolist() == [[False, True, True, True, True]]  # overlapping ones too


def test_candidates_are_the_distinct_tokens_before() -> None:
    targets = torch.tensor([[1, 2, 1, -100, 2, 3]])
    found = previous_tokens(targets, keep_target=True)
    assert found.shape == (1, 6, 5)
    assert [sorted(c for c in row if c >= 0) for row in found[0].tolist()] == [[], [1], [1, 2], [], [1, 2], [1, 2]]
    found = previous_tokens(targets, window=2)
    assert [sorted(c for c in row if c >= 0) for row in found[0].tolist()] == [[], [1], [2], [], [1], [2]]


def large_allocations(profile: torch.profiler.profile, size: int) -> int:
    """Count the operations that allocated at least `size` bytes."""
    return sum(event.self_cpu_memory_usage >= size for event in profile.events())


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_one_temporary_tensor_and_the_gradient_are_as_large_as_the_logits(objective: Callable, options: dict) -> None:
    if objective is simctg:
        pytest.skip("has no logits")
    logits = torch.randn(ROWS, LENGTH, 2000, requires_grad=True)
    _, targets, _ = batch("prompts")
    measure = functools.partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
    with measure(profile_memory=True) as forward:
        value = objective(logits, targets, **options)
    with measure(profile_memory=True) as backward:
        value.sum().backward()
    assert large_allocations(forward, logits.nbytes) <= 1
    assert large_allocations(backward, logits.nbytes) == 1
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_half_precision_and_autocast_are_computed_in_float32(objective: Callable, options: dict) -> None:
    logits, targets, documents = batch("packed", torch.bfloat16)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(logits, targets, documents, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, objective(logits.float(), targets, documents, **options))
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


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
        (lambda: token_unlikelihood(LOGITS[:, 1:], TARGETS), r"got \[2, 3, 5\] and \[2, 4\]; shift both"),
        (lambda: gem(LOGITS[0], TARGETS[0]), r"got \[4, 5\] and \[4\]"),
        (lambda: token_unlikelihood(LOGITS, TARGETS, TARGETS[:1]), r"documents like targets, \[2, 4\], got \[1, 4\]"),
        (lambda: contrastive_token(LOGITS, TARGETS, window=0), "window must be at least 1 token, got 0"),
        (lambda: sequence_unlikelihood(LOGITS, TARGETS, n=0), "n must be at least 1 token, got 0"),
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
