"""Checks for objectives with one loss per token: their formula, independence of rows, memory, precision.

An objective is called with logits, targets, documents and options. Its reference computes the loss of one position from
Python lists. Each check raises an `AssertionError` where the property does not hold.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 3, 20, 7
KINDS = ["plain", "prompts", "padded", "packed"]

Ids = list[int]


def batch(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return random logits, targets with many repetitions, and documents."""
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


def log_not(logits: Tensor, token: int) -> Tensor:
    """Return `log(1 - p)` of a token, from the logits (`[V]`) of all other tokens."""
    return torch.cat([logits[:token], logits[token + 1 :]]).logsumexp(0) - logits.logsumexp(0)


def check_formula(objective: Callable, reference: Callable, options: dict[str, Any], kind: str) -> None:
    """Check that values and gradients of all positions equal the reference, which follows the formula."""
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
    assert (expected != 0).sum() > ROWS  # enough positions have a loss
    weights = torch.rand(
        ROWS, LENGTH, dtype=torch.float64
    )  # different weights, so that each position's gradient is checked
    gradients = [torch.autograd.grad((value * weights).sum(), logits)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients)


def check_rows_do_not_influence_one_another(objective: Callable, options: dict[str, Any], kind: str) -> None:
    """Check that each row of a batch has the same losses as alone."""
    logits, targets, documents = batch(kind)
    together = objective(logits, targets, documents, **options)
    for b in range(ROWS):
        row = slice(b, b + 1)
        alone = objective(logits[row], targets[row], None if documents is None else documents[row], **options)
        torch.testing.assert_close(together[row], alone)


def check_documents_are_like_rows(objective: Callable, options: dict[str, Any]) -> None:
    """Check that packed documents have the same losses as in separate rows."""
    logits, targets, documents = batch("packed")
    together = objective(logits, targets, documents, **options)
    for b, document in ((0, 0), (0, 1), (1, 2), (1, 4), (2, 0)):
        own = documents[b] == document
        alone = objective(logits[b, own][None], targets[b, own][None], **options)
        torch.testing.assert_close(together[b, own], alone[0])


def check_prompts_and_padding_have_no_influence(objective: Callable, options: dict[str, Any]) -> None:
    """Check that padding, and the logits of positions without target, change neither values nor gradients."""
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


def losses_of_single_tokens(objective: Callable, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Check a row without any target; return the logits and the loss of a row whose only token is 2."""
    logits = torch.randn(2, 1, VOCABULARY, requires_grad=True)
    value = objective(logits, torch.tensor([[-100], [2]]), **options)
    assert value.shape == (2, 1)
    assert value[0] == 0
    assert torch.autograd.grad(value.sum(), logits, retain_graph=True)[0].isfinite().all()
    return logits[1], value[1]


def check_impossible_tokens(objective: Callable) -> None:
    """Check that values and gradients are finite where tokens have the logit `-inf`."""
    logits, targets, _ = batch("plain", torch.float32)
    logits[..., 3:5] = -torch.inf
    targets[0, 0], targets[:, -2] = 1, 2
    logits.requires_grad_()
    value = objective(logits, targets)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def large_allocations(profile: torch.profiler.profile, size: int) -> int:
    """Count the operations that allocated at least `size` bytes."""
    return sum(event.self_cpu_memory_usage >= size for event in profile.events())


def check_memory(objective: Callable, options: dict[str, Any]) -> None:
    """Check that at most one temporary tensor and the gradient are as large as the logits."""
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


def check_half_precision(objective: Callable, options: dict[str, Any]) -> None:
    """Check that the loss of bfloat16 logits under autocast is as exact as that loss from float32 logits."""
    logits, targets, documents = batch("packed", torch.bfloat16)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(logits, targets, documents, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, objective(logits.float(), targets, documents, **options))
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()
