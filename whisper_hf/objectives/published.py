"""Published objectives against repetition, one function each, written from the formulas of their papers.

Legend: `B` rows of `T` tokens, `V` vocabulary, `H` width, `C` candidates. Common arguments: `logits` (`[B, T, V]`, any
float), where `logits[:, t]` predict `targets[:, t]` (`[B, T]`, int64; -100 where no token counts: prompts, padding, the
last token of a document); `documents` (`[B, T]`, int64, *optional*), which of its row's documents a token belongs to;
`window` (`int`, *optional*), how many tokens to look back, by default all; memory grows with it. What does not count,
other documents and other rows have no part. Losses are one per token, `[B, T]`, 0 where none counts, in float32
(float64 for float64); averaging is the caller's. Of the size of the logits are at most one temporary tensor (as in
`log_softmax`) and the gradient, both in the dtype of the loss.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from ..model.labels import IGNORED
from ..model.repetition_loss import NONE, contrast
from .divergences import LOWEST_LOG, wide


def previous_tokens(
    targets: Tensor, documents: Tensor | None = None, *, window: int | None = None, keep_target: bool = False
) -> Tensor:
    """Find the distinct tokens before each one in its document: `{x_s : t - window <= s < t}`, less `x_t` unless kept.

    Only targets are sources, so neither prompts nor the first token of a row, which nothing predicts. Returned as
    `[B, T, C]`, int64, with `C` the lesser of window and T - 1, and -1 where there are fewer.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}; leave it out to look back without limit")
    size, length = targets.numel(), targets.shape[1]
    width = max(min(window or length, length - 1), 1)
    owner, place = _owners(targets, documents), torch.arange(size, device=targets.device).view_as(targets)
    key, order = _with_token(owner, targets, targets >= 0).flatten().sort(stable=True)
    later = torch.full_like(key, size)  # where the same token comes next
    later[order[:-1]] = order[1:].where(key[1:] == key[:-1], size)
    sources, later, owners = (
        nn.functional.pad(of, (width, 0), value=NONE).unfold(1, width, 1)[:, :length]
        for of in (targets, later.view_as(targets), owner)
    )
    is_last = later >= place[..., None] if keep_target else later > place[..., None]  # counts each token once
    return sources.where(is_last & (sources >= 0) & (owners == owner[..., None]) & (targets >= 0)[..., None], NONE)


def repeated_ngrams(targets: Tensor, documents: Tensor | None = None, *, n: int = 4) -> Tensor:
    """Find (`[B, T]`, bool) the tokens of n-grams, `n` tokens that count, which began in their document before."""
    if n < 1:
        raise ValueError(f"n must be at least 1 token, got {n}")
    repeated, starts = torch.zeros_like(targets, dtype=torch.bool), targets.shape[1] - n + 1
    if starts < 1:
        return repeated
    owners = _owners(targets, documents).unfold(1, n, 1)
    whole = ((targets.unfold(1, n, 1) >= 0) & (owners == owners[..., :1])).all(-1)
    key = owners[..., 0]
    for i in range(n):
        key = _with_token(key, targets[:, i : i + starts], whole)
    key, order = key.flatten().sort(stable=True)
    came_before = torch.zeros_like(key, dtype=torch.bool)
    came_before[order[1:]] = key[1:] == key[:-1]
    for i in range(n):
        repeated[:, i : i + starts] |= came_before.view_as(whole)
    return repeated


def token_unlikelihood(
    logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, window: int | None = None
) -> Tensor:
    """`-sum_c log(1 - p(c))` over the tokens `c` that came before, nats, `[B, T]`: be unlikely to repeat any.

    The simplest penalty, on people's text; add to cross-entropy. Welleck et al. 2019, https://arxiv.org/abs/1908.04319.
    """
    candidates = previous_tokens(targets, documents, window=window)
    _, log_not = _log_probabilities(logits, candidates)
    return -log_not.where(candidates >= 0, 0).sum(-1)


def sequence_unlikelihood(logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, n: int = 4) -> Tensor:
    """`-log(1 - p(x_t))` where `x_t` is part of a repeated n-gram, else 0, nats, `[B, T]`: do not loop.

    For text that the model wrote (targets of prefixes are -100), mixed with steps of another loss. Welleck et al. 2019,
    https://arxiv.org/abs/1908.04319. The formula there asks for an n-gram that ended before this one begins; the
    metric and code, and so this function, for one that began before.

    Args:
        n (`int`): tokens of an n-gram; the paper's is 4.
    """
    _, log_not = _log_probabilities(logits, targets[..., None])
    return -log_not[..., 0].where(repeated_ngrams(targets, documents, n=n), 0)


def scalegrad(
    logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, gamma: float = 0.2, window: int | None = None
) -> Tensor:
    """`-log q(x_t)`, nats, `[B, T]`, where `q` is `p` times `gamma` for tokens that did not come before, normalised.

    Novel tokens have to be learnt better than others. In place of cross-entropy, which is the limit of `gamma = 1`.
    Lin et al. 2021 (ScaleGrad), https://arxiv.org/abs/2106.07207.

    Args:
        gamma (`float`): ratio between 0 and 1, small for a strong effect; the paper's are 0.2, 0.5 and 0.8.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must lie between 0 and 1, got {gamma}; for 1 use cross-entropy")
    seen = previous_tokens(targets, documents, window=window, keep_target=True)
    log_p, _ = _log_probabilities(logits, torch.cat([targets[..., None], seen], -1))
    log_seen = log_p[..., 1:].masked_fill(seen == NONE, -math.inf) + math.log1p(-gamma)
    normaliser = nn.functional.pad(log_seen, (1, 0), value=math.log(gamma)).logsumexp(-1)  # gamma + (1 - gamma) p(seen)
    is_novel = (seen != targets[..., None]).all(-1)
    return (normaliser - log_p[..., 0] - math.log(gamma) * is_novel).where(targets >= 0, 0)


def simctg(hidden: Tensor, targets: Tensor, documents: Tensor | None = None, *, margin: float = 0.5) -> Tensor:
    """`mean_(j != t) max(0, margin - 1 + cos(h_t, h_j))`, a ratio, `[B, T]`: states of tokens point different ways.

    Its mean over a document is the paper's loss; add to cross-entropy, and decode by contrastive search. Su et al.
    2022, https://arxiv.org/abs/2202.06417. Takes memory for `[B, T, T]` similarities.

    Args:
        hidden (`[B, T, H]`, any float): the last layer's states, those that predict nothing that counts left out.
        margin (`float`): in [-1, 1], how much less similar to others than to itself; the paper's is 0.5.
    """
    _check(hidden, targets)
    if not -1 <= margin <= 1:
        raise ValueError(f"margin is a difference of cosines and must lie in [-1, 1], got {margin}")
    counts, owner = targets >= 0, _owners(targets, documents)
    states = nn.functional.normalize(_widen(hidden).masked_fill(~counts[..., None], 0), dim=-1)
    pairs = (owner[:, :, None] == owner[:, None]) & counts[:, :, None] & counts[:, None]
    pairs &= ~torch.eye(targets.shape[1], dtype=torch.bool, device=targets.device)
    with maybe_autocast(hidden.device.type, enabled=False):
        excess = (states @ states.mT + (margin - 1)).relu().where(pairs, 0)
    return excess.sum(-1) / pairs.sum(-1).clamp(min=1)


def contrastive_token(logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, window: int = 60) -> Tensor:
    """`log(1 + sum_c exp(z_c - z_y))`, nats, `[B, T]`: tokens `c` of the window before are less likely than the true.

    Leaves other tokens alone; add to cross-entropy. Jiang et al. 2022 (CT), https://arxiv.org/abs/2205.02517; they
    advise a window of an eighth of the sequence. [`contrast_loss`] is the same over fewer candidates.
    """
    _check(logits, targets)
    candidates = previous_tokens(targets, documents, window=window)
    chosen = _widen(logits.gather(-1, torch.cat([targets[..., None], candidates], -1).clamp(min=0)))
    gaps = (chosen[..., 1:] - chosen[..., :1]).masked_fill(candidates == NONE, -math.inf)
    return contrast(gaps)


def repeat_span(input_ids: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Make data for [`ditto`]: each row up to the end of a span (a sentence), which then repeats until the row is full.

    Args:
        input_ids (`[B, T]`, int64); starts, ends (`[B]`, int64): the span of each row.

    Returns:
        input_ids and targets (`[B, T]`, int64), -100 before the span.
    """
    length = input_ids.shape[1]
    if not bool(((starts >= 0) & (starts < ends) & (ends <= length)).all()):
        raise ValueError(f"expected 0 <= start < end <= {length}, got {starts.tolist()} to {ends.tolist()}")
    starts, place = starts[:, None], torch.arange(length + 1, device=input_ids.device)
    text = input_ids.gather(1, torch.where(place < starts, place, starts + (place - starts) % (ends[:, None] - starts)))
    return text[:, :-1], text[:, 1:].masked_fill(place[1:] < starts, IGNORED)


def ditto(
    logits: Tensor, targets: Tensor, periods: Tensor, documents: Tensor | None = None, *, ratio: float = 0.5
) -> Tensor:
    """`-log(1 - |p(x_t) - ratio p'|)`, nats, `[B, T]`, with `p'` (a constant) the probability one copy earlier.

    Each copy of a sentence is to be less likely than the one before. For data of [`repeat_span`], in every other step
    in place of cross-entropy. Xu et al. 2022 (DITTO), https://arxiv.org/abs/2206.02369. As the paper has it, the
    gradient vanishes where a token is certain in both copies. Tokens that differ from one period before are left alone.

    Args:
        periods (`[B]`, int64): tokens of a copy, `ends - starts` of the span.
        ratio (`float`): above 0 (unlikelihood), at most 1; the paper's lambda, 0.5 for open text, 0.9 for summaries.
    """
    if not 0 < ratio <= 1 or bool((periods < 1).any()):
        raise ValueError(f"expected 0 < ratio <= 1 and periods of a token or more, got {ratio} and {periods.tolist()}")
    source = torch.arange(targets.shape[1], device=targets.device) - periods[:, None]
    before, owner = source.clamp(min=0), _owners(targets, documents)
    repeats = (source >= 0) & (targets >= 0) & (targets.gather(1, before) == targets)
    repeats &= owner.gather(1, before) == owner
    log_p, log_not = (of[..., 0] for of in _log_probabilities(logits, targets[..., None]))
    log_wanted = log_p.detach().gather(1, before) + math.log(ratio)
    above = torch.logaddexp(log_not, log_wanted)  # log(1 - p + wanted), exact also where p rounds to 1
    below = torch.logaddexp(torch.log1p(-log_wanted.exp()), log_p)
    return -torch.where(log_p > log_wanted, above, below).where(repeats, 0)


def gem(logits: Tensor, targets: Tensor, *, beta: float = 0.7, h: str = "linear") -> Tensor:
    """`-sum_v q(v) h(log p(x_t) - log p(v))`, nats, `[B, T]`, with `q = softmax(logits / beta)` (a constant).

    For supervised fine-tuning in place of cross-entropy: keeps variety across samples. `q` answers the model at best,
    `argmax_q E_q log p + beta H(q)`, so no gradient flows through it. With linear `h(u) = u` the gradient is
    `q - onehot(x_t)`: cross-entropy's at `beta = 1`; below, it draws on strong rivals alone, and fades once the true
    token leads. With `h(u) = log sigmoid(u)` weak rivals are spared further. The value itself may be negative. Li et
    al., ICLR 2025, https://arxiv.org/abs/2408.16673 (their code's gradient is of `100 log sigmoid(u / 100)`).

    Args:
        beta (`float`): positive temperature; the paper's is 0.7.
        h (`str`): "linear" or "logsigmoid".
    """
    _check(logits, targets)
    if h not in ("linear", "logsigmoid") or not beta > 0:
        raise ValueError(f"expected h 'linear' or 'logsigmoid' and a positive beta, got {h!r} and {beta}")
    return _Gem.apply(logits, targets, beta, h == "linear").where(targets >= 0, 0)


class _Gem(torch.autograd.Function):
    """[`gem`] row by row, because its temporary tensors are large."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, beta: float, linear: bool) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.options = beta, linear
        return torch.stack([_gem_row(*row, beta, linear)[0] for row in zip(logits, targets, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        gradient = torch.empty_like(ctx.saved_tensors[0])
        for out, row_grad, *row in zip(gradient, grad, *ctx.saved_tensors, strict=True):
            out.copy_(_gem_row(*row, *ctx.options)[1].mul_(row_grad[:, None]))
        return gradient, None, None, None


def _gem_row(logits: Tensor, targets: Tensor, beta: float, linear: bool) -> tuple[Tensor, Tensor]:
    """Return values (`[T]`) and derivatives (`[T, V]`) of a row."""
    logits, label = _widen(logits), targets.clamp(min=0)[:, None]
    gaps = (logits - logits.gather(1, label)).clamp_(min=LOWEST_LOG)  # log p(v) - log p(x_t)
    weights = (logits / beta).softmax(-1)
    value = (weights * (gaps if linear else -nn.functional.logsigmoid(-gaps))).sum(-1)
    if not linear:
        weights *= gaps.sigmoid_()
    return value, weights.scatter_add_(1, label, -weights.sum(-1, keepdim=True))


class _Read(torch.autograd.Function):
    """Logits of tokens (`[B, T, K]`) and of the likeliest, logsumexp of all but it, and which it is (`[B, T, 1]`)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top, best = logits.max(-1, keepdim=True)
        others = _widen(logits, copy=True).scatter_(-1, best, -math.inf)
        second = others.amax(-1, keepdim=True).clamp_(min=LOWEST_LOG)
        rest = others.sub_(second).exp_().sum(-1, keepdim=True).log_().add_(second).clamp_(min=LOWEST_LOG)
        ctx.save_for_backward(logits, tokens, rest, best)
        return _widen(logits.gather(-1, tokens)), _widen(top), rest, best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_chosen: Tensor, grad_top: Tensor, grad_rest: Tensor, _: Any) -> tuple[Tensor, None]:
        logits, tokens, rest, best = ctx.saved_tensors
        gradient = _widen(logits, copy=True).scatter_(-1, best, -math.inf).sub_(rest).exp_().mul_(grad_rest)
        return gradient.scatter_(-1, best, grad_top).scatter_add_(-1, tokens, grad_chosen).to(logits.dtype), None


def _log_probabilities(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log p` and `log(1 - p)` of tokens (`[B, T, K]`, any where negative), exact and steep however certain.

    `log(1 - p)` is `-softplus(z - logsumexp(z of others))`. Others are added up for the likeliest token alone, as no
    other's `p` can pass 1/2; below that, `log1p(-p)` is as good.
    """
    _check(logits, tokens[..., 0])
    tokens = tokens.clamp(min=0)
    chosen, top, rest, best = _Read.apply(logits, tokens)
    log_p = chosen - torch.logaddexp(top, rest)
    log_not = torch.log1p(-log_p.masked_fill(tokens == best, -math.inf).exp())
    return log_p, torch.where(tokens == best, nn.functional.logsigmoid(rest - top), log_not)


def _widen(values: Tensor, copy: bool = False) -> Tensor:
    """Return values in float32, or float64 for float64."""
    return values.to(wide(values), copy=copy)


def _owners(targets: Tensor, documents: Tensor | None) -> Tensor:
    """Number the documents of all rows, `[B, T]`."""
    if documents is not None and documents.shape != targets.shape:
        raise ValueError(f"expected documents like targets, {list(targets.shape)}, got {list(documents.shape)}")
    row = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    return row if documents is None else _with_token(row, documents - documents.min(), row >= 0)


def _with_token(key: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Number the pairs of a key (`[B, T]`, below their count) and a token; what does not count has its own number."""
    size = key.numel()
    pairs = (key * (tokens.max().clamp(min=0) + 1) + tokens.clamp(min=0)).flatten()
    ordered, order = pairs.sort()
    rank = torch.zeros_like(order)
    rank[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.where(counts, rank.view_as(key), size + torch.arange(size, device=key.device).view_as(key))


def _check(values: Tensor, targets: Tensor) -> None:
    """Refuse tensors that do not belong together."""
    if values.dim() != 3 or values.shape[:2] != targets.shape:
        raise ValueError(f"expected [B, T, ...] and [B, T], got {[*values.shape]} and {[*targets.shape]}; shift both")
