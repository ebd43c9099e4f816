"""The unlikelihood objective against loops: make the tokens of repeated n-grams less likely.

Welleck et al. 2019, Neural Text Generation with Unlikelihood Training, https://arxiv.org/abs/1908.04319.

Legend: `B` rows of `T` tokens, `V` vocabulary, `K` tokens of each position.

Arguments that several functions share:
    logits (`[B, T, V]`, any float): `logits[:, t]` predict `targets[:, t]`.
    targets (`[B, T]`, int64): token ids, or -100 where a position does not count (prompts, padding, the last token of a
        document).
    documents (`[B, T]`, int64, *optional*): the number of the document that each token belongs to. By default each row
        is one document. Rows never share a document.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .divergences import LOWEST_LOG, wide


def repeated_ngrams(targets: Tensor, documents: Tensor | None = None, *, n: int = 4) -> Tensor:
    """Find the tokens of n-grams that have an earlier occurrence in the same document.

    An n-gram is a sequence of `n` tokens that all count. Two n-grams may overlap: of `a a a a a`, all tokens but the
    first are repeated for `n = 4`.

    Args:
        targets, documents: as at the top of this file.
        n (`int`): tokens of an n-gram, at least 1.

    Returns:
        `[B, T]`, bool: whether a token is part of a repeated n-gram.

    Raises:
        ValueError: `n` below 1, or documents of another shape than targets.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 token, got {n}; the paper uses 4")
    repeated = torch.zeros_like(targets, dtype=torch.bool)
    starts = targets.shape[1] - n + 1
    if starts < 1:
        return repeated
    numbers = number_documents(targets, documents).unfold(1, n, 1)
    is_whole = ((targets.unfold(1, n, 1) >= 0) & (numbers == numbers[..., :1])).all(-1)
    key = numbers[..., 0]
    for i in range(n):
        key = number_pairs(key, targets[:, i : i + starts], is_whole)
    key, order = key.flatten().sort(stable=True)
    came_before = torch.zeros_like(key, dtype=torch.bool)
    came_before[order[1:]] = key[1:] == key[:-1]
    for i in range(n):
        repeated[:, i : i + starts] |= came_before.view_as(is_whole)
    return repeated


def sequence_unlikelihood(logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, n: int = 4) -> Tensor:
    """Penalise the tokens of repeated n-grams: `-log(1 - p(x_t))` where `x_t` is part of one, else 0.

    It is meant for text that the model wrote, where the targets of prefixes are -100. Two readings differ: the paper's
    formula asks for an earlier n-gram that has ended before this one begins, the paper's metric and code for one that
    began before. This function follows the metric. Welleck et al. 2019, https://arxiv.org/abs/1908.04319.

    Args:
        logits, targets, documents: as at the top of this file.
        n (`int`): tokens of an n-gram, at least 1; the paper uses 4.

    Returns:
        `[B, T]`, float32 (float64 for float64 logits): nats per token, 0 where a position does not count. Averaging is
        the caller's. At most one temporary tensor and the gradient are as large as the logits.

    Raises:
        ValueError: `n` below 1, or shapes that do not belong together.
    """
    _, log_not = log_probabilities(logits, targets[..., None])
    return -log_not[..., 0].where(repeated_ngrams(targets, documents, n=n), 0)


def log_probabilities(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `log p` and `log(1 - p)` of tokens, both exact and with a steep gradient as `p` approaches 1.

    `log(1 - p) = -softplus(z - logsumexp(z of the other tokens))`. That sum is computed for the likeliest token only:
    the probability of any other token is at most 1/2, where `log1p(-p)` is accurate.

    Args:
        logits (`[B, T, V]`, any float).
        tokens (`[B, T, K]`, int64): any value where negative.

    Returns:
        `log p` and `log(1 - p)`, both `[B, T, K]`, float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_shapes(logits, tokens[..., 0])
    tokens = tokens.clamp(min=0)
    chosen, top, rest, best = _Read.apply(logits, tokens)
    log_p = chosen - torch.logaddexp(top, rest)
    log_not = torch.log1p(-log_p.masked_fill(tokens == best, -math.inf).exp())
    return log_p, torch.where(tokens == best, nn.functional.logsigmoid(rest - top), log_not)


class _Read(torch.autograd.Function):
    """Read from logits (`[B, T, V]`) what [`log_probabilities`] needs, with one temporary tensor of their size.

    Outputs: the logits of the tokens (`[B, T, K]`); and as `[B, T, 1]` each the logit of the likeliest token, the
    logsumexp of all others, and which token is the likeliest.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top, best = logits.max(-1, keepdim=True)
        others = logits.to(wide(logits), copy=True).scatter_(-1, best, -math.inf)
        second = others.amax(-1, keepdim=True).clamp_(min=LOWEST_LOG)
        rest = others.sub_(second).exp_().sum(-1, keepdim=True).log_().add_(second).clamp_(min=LOWEST_LOG)
        ctx.save_for_backward(logits, tokens, rest, best)
        return logits.gather(-1, tokens).to(rest.dtype), top.to(rest.dtype), rest, best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_chosen: Tensor, grad_top: Tensor, grad_rest: Tensor, _: Any) -> tuple[Tensor, None]:
        logits, tokens, rest, best = ctx.saved_tensors
        others = logits.to(rest.dtype, copy=True).scatter_(-1, best, -math.inf)
        gradient = others.sub_(rest).exp_().mul_(grad_rest)
        return gradient.scatter_(-1, best, grad_top).scatter_add_(-1, tokens, grad_chosen).to(logits.dtype), None


def number_documents(targets: Tensor, documents: Tensor | None) -> Tensor:
    """Number the documents of all rows, such that no two rows share a number.

    Args:
        targets, documents: as at the top of this file.

    Returns:
        `[B, T]`, int64: numbers from 0, below `B T`.

    Raises:
        ValueError: documents of another shape than targets.
    """
    if documents is not None and documents.shape != targets.shape:
        raise ValueError(
            f"documents must have the shape of targets, {list(targets.shape)}, got {list(documents.shape)}; give each "
            "token the number of its document"
        )
    row = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    return row if documents is None else number_pairs(row, documents - documents.min(), row >= 0)


def number_pairs(key: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Number the distinct pairs of a key and a token.

    A pair that does not count gets a number of its own, which no equal pair shares.

    Args:
        key, tokens (`[B, T]`, int64): keys are at least 0.
        counts (`[B, T]`, bool): which pairs count.

    Returns:
        `[B, T]`, int64: numbers from 0, below `2 B T`.
    """
    size = key.numel()
    pairs = (key * (tokens.max().clamp(min=0) + 1) + tokens.clamp(min=0)).flatten()
    ordered, order = pairs.sort()
    rank = torch.zeros_like(order)
    rank[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.where(counts, rank.view_as(key), size + torch.arange(size, device=key.device).view_as(key))


def check_shapes(values: Tensor, targets: Tensor) -> None:
    """Refuse values that are not `[B, T, ...]`, and targets that are not `[B, T]`."""
    if values.dim() != 3 or values.shape[:2] != targets.shape:
        raise ValueError(
            f"expected shapes [B, T, ...] and [B, T], got {list(values.shape)} and {list(targets.shape)}; pass values "
            "and the targets that they predict, shifted alike"
        )
