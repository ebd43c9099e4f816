"""Objectives of other papers against repetition, written from their formulas: what `diversity.py` compares.

Sequence unlikelihood is in `whisper_hf/objectives/unlikelihood.py`, because the package uses it itself.

Legend: `B` rows of `T` tokens, `V` vocabulary, `H` width, `C` candidates of each position.

Arguments that several functions share:
    logits (`[B, T, V]`, any float): `logits[:, t]` predict `targets[:, t]`.
    targets (`[B, T]`, int64): token ids, or -100 where a position does not count (prompts, padding, the last token of a
        document).
    documents (`[B, T]`, int64, *optional*): the number of the document that each token belongs to. By default each row
        is one document. Tokens of other documents and rows have no influence.
    window (`int`, *optional*): how many tokens to look back, by default all. Memory grows with it.

Losses are one per token, `[B, T]`, in nats unless said otherwise, and 0 where a position does not count. Their dtype is
float32 (float64 for float64 logits). Averaging is the caller's. At most one temporary tensor and the gradient are as
large as the logits. Arguments out of range, and shapes that do not belong together, raise `ValueError`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from whisper_hf.model.labels import IGNORED
from whisper_hf.model.repetition_loss import NONE, contrast
from whisper_hf.objectives.divergences import LOWEST_LOG, wide
from whisper_hf.objectives.unlikelihood import check_shapes, log_probabilities, number_documents, number_pairs


def previous_tokens(
    targets: Tensor, documents: Tensor | None = None, *, window: int | None = None, keep_target: bool = False
) -> Tensor:
    """Find the distinct tokens that came before each one in its document.

    `candidates(t) = {x_s : t - window <= s < t}`, without `x_t` unless `keep_target`. Only targets are candidates: the
    tokens of prompts are not, nor is the first token of a row, which nothing predicts.

    Args:
        keep_target (`bool`): whether the true token may be a candidate.

    Returns:
        `[B, T, C]`, int64: `C = min(window, T - 1)`, and -1 where there are fewer.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}; leave it out to look back without limit")
    size, length = targets.numel(), targets.shape[1]
    width = max(min(window or length, length - 1), 1)
    document = number_documents(targets, documents)
    place = torch.arange(size, device=targets.device).view_as(targets)
    key, order = number_pairs(document, targets, targets >= 0).flatten().sort(stable=True)
    later = torch.full_like(key, size)  # where the same token comes next
    later[order[:-1]] = order[1:].where(key[1:] == key[:-1], size)
    sources, later, documents_before = (
        nn.functional.pad(of, (width, 0), value=NONE).unfold(1, width, 1)[:, :length]
        for of in (targets, later.view_as(targets), document)
    )
    is_last = later >= place[..., None] if keep_target else later > place[..., None]  # counts each token once
    is_candidate = is_last & (sources >= 0) & (documents_before == document[..., None])
    return sources.where(is_candidate & (targets >= 0)[..., None], NONE)


def token_unlikelihood(
    logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, window: int | None = None
) -> Tensor:
    """Penalise the tokens that came before: `-sum_c log(1 - p(c))` over `previous_tokens`.

    It is the simplest penalty on text that people wrote, added to cross-entropy. Welleck et al. 2019, Neural Text
    Generation with Unlikelihood Training, https://arxiv.org/abs/1908.04319.
    """
    candidates = previous_tokens(targets, documents, window=window)
    _, log_not = log_probabilities(logits, candidates)
    return -log_not.where(candidates >= 0, 0).sum(-1)


def scalegrad(
    logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, gamma: float = 0.2, window: int | None = None
) -> Tensor:
    """Teach new tokens more strongly than repeated ones: `-log q(x_t)`, where `q` shrinks the new ones.

    `q(v) = p(v)` for tokens that came before and `gamma p(v)` for all others, normalised to a sum of 1. The loss takes
    the place of cross-entropy, which is its limit for `gamma = 1`. Lin et al. 2021, Straight to the Gradient
    (ScaleGrad), https://arxiv.org/abs/2106.07207.

    Args:
        gamma (`float`): ratio between 0 and 1, where a small one has a strong effect; the paper uses 0.2, 0.5 and 0.8.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must lie between 0 and 1, got {gamma}; for 1 use cross-entropy")
    seen = previous_tokens(targets, documents, window=window, keep_target=True)
    log_p, _ = log_probabilities(logits, torch.cat([targets[..., None], seen], -1))
    log_seen = log_p[..., 1:].masked_fill(seen == NONE, -math.inf) + math.log1p(-gamma)
    normaliser = nn.functional.pad(log_seen, (1, 0), value=math.log(gamma)).logsumexp(-1)  # gamma + (1 - gamma) p(seen)
    is_novel = (seen != targets[..., None]).all(-1)
    return (normaliser - log_p[..., 0] - math.log(gamma) * is_novel).where(targets >= 0, 0)


def simctg(hidden: Tensor, targets: Tensor, documents: Tensor | None = None, *, margin: float = 0.5) -> Tensor:
    """Turn the hidden states of a document in different directions.

    `mean_(j != t) max(0, margin - 1 + cos(h_t, h_j))`. Its mean over a document is the paper's loss, which is added to
    cross-entropy; the paper decodes by contrastive search. Su et al. 2022, A Contrastive Framework for Neural Text
    Generation (SimCTG), https://arxiv.org/abs/2202.06417.

    Args:
        hidden (`[B, T, H]`, any float): states of the last layer. Positions whose target does not count are left out.
        margin (`float`): in [-1, 1], by how much states are less similar to others than to themselves; the paper uses
            0.5.

    Returns:
        `[B, T]`, a difference of cosines. It takes memory for `[B, T, T]` similarities.
    """
    check_shapes(hidden, targets)
    if not -1 <= margin <= 1:
        raise ValueError(f"margin is a difference of cosines and must lie in [-1, 1], got {margin}")
    counts = targets >= 0
    document = number_documents(targets, documents)
    states = nn.functional.normalize(hidden.to(wide(hidden)).masked_fill(~counts[..., None], 0), dim=-1)
    pairs = (document[:, :, None] == document[:, None]) & counts[:, :, None] & counts[:, None]
    pairs &= ~torch.eye(targets.shape[1], dtype=torch.bool, device=targets.device)
    with maybe_autocast(hidden.device.type, enabled=False):
        excess = (states @ states.mT + (margin - 1)).relu().where(pairs, 0)
    return excess.sum(-1) / pairs.sum(-1).clamp(min=1)


def contrastive_token(logits: Tensor, targets: Tensor, documents: Tensor | None = None, *, window: int = 60) -> Tensor:
    """Make the true token likelier than the tokens before it: `log(1 + sum_c exp(z_c - z_y))`.

    The candidates `c` are `previous_tokens`; the logits of other tokens have no influence. The loss is added to
    cross-entropy. Jiang et al. 2022, A Simple Contrastive Learning Objective for Alleviating Neural Text Degeneration,
    https://arxiv.org/abs/2205.02517. [`contrast_loss`] of the package has fewer candidates.

    Args:
        window (`int`): how many tokens to look back; the paper advises an eighth of the sequence.
    """
    check_shapes(logits, targets)
    candidates = previous_tokens(targets, documents, window=window)
    chosen = logits.gather(-1, torch.cat([targets[..., None], candidates], -1).clamp(min=0)).to(wide(logits))
    gaps = (chosen[..., 1:] - chosen[..., :1]).masked_fill(candidates == NONE, -math.inf)
    return contrast(gaps)


def repeat_span(input_ids: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Make texts for [`ditto`]: rows in which one span, a sentence, repeats until the row is full.

    Args:
        input_ids (`[B, T]`, int64): the texts, of which each is kept up to the end of its span.
        starts, ends (`[B]`, int64): the span of each row, `0 <= start < end <= T`.

    Returns:
        input_ids and targets, both `[B, T]`, int64; targets are -100 before the span.
    """
    length = input_ids.shape[1]
    if not bool(((starts >= 0) & (starts < ends) & (ends <= length)).all()):
        raise ValueError(f"expected 0 <= start < end <= {length}, got {starts.tolist()} to {ends.tolist()}")
    starts, ends = starts[:, None], ends[:, None]
    place = torch.arange(length + 1, device=input_ids.device)
    text = input_ids.gather(1, torch.where(place < starts, place, starts + (place - starts) % (ends - starts)))
    return text[:, :-1], text[:, 1:].masked_fill(place[1:] < starts, IGNORED)


def ditto(
    logits: Tensor, targets: Tensor, periods: Tensor, documents: Tensor | None = None, *, ratio: float = 0.5
) -> Tensor:
    """Make each copy of a sentence less likely than the one before: `-log(1 - |p(x_t) - ratio p'|)`.

    `p'` is the probability of the same token one copy earlier, a constant. The loss takes the place of cross-entropy in
    every other step, on texts of [`repeat_span`]. Tokens that differ from the one a period before have the loss 0.
    As in the paper, the gradient vanishes where a token is certain in both copies. Xu et al. 2022, Learning to Break
    the Loop (DITTO), https://arxiv.org/abs/2206.02369.

    Args:
        periods (`[B]`, int64): tokens of a copy, `ends - starts` of the span.
        ratio (`float`): above 0 and at most 1; the paper's lambda, 0.5 for open text and 0.9 for summaries.
    """
    if not 0 < ratio <= 1 or bool((periods < 1).any()):
        raise ValueError(f"expected 0 < ratio <= 1 and periods of a token or more, got {ratio} and {periods.tolist()}")
    source = torch.arange(targets.shape[1], device=targets.device) - periods[:, None]
    before = source.clamp(min=0)
    document = number_documents(targets, documents)
    repeats = (source >= 0) & (targets >= 0) & (targets.gather(1, before) == targets)
    repeats &= document.gather(1, before) == document
    log_p, log_not = (of[..., 0] for of in log_probabilities(logits, targets[..., None]))
    log_wanted = log_p.detach().gather(1, before) + math.log(ratio)
    above = torch.logaddexp(log_not, log_wanted)  # log(1 - p + wanted), exact also where p rounds to 1
    below = torch.logaddexp(torch.log1p(-log_wanted.exp()), log_p)
    return -torch.where(log_p > log_wanted, above, below).where(repeats, 0)


def gem(logits: Tensor, targets: Tensor, *, beta: float = 0.7, h: str = "linear") -> Tensor:
    """Fit the true token and keep other tokens possible: `-sum_v q(v) h(log p(x_t) - log p(v))`.

    `q = softmax(logits / beta)` maximises `E_q log p + beta H(q)`, and no gradient flows through it. With linear
    `h(u) = u` the gradient is `q - onehot(x_t)`. For `beta = 1` this is the gradient of cross-entropy. A smaller `beta`
    pushes down strong rivals only, and ever less once the true token leads. With `h(u) = log sigmoid(u)` weak rivals
    are spared further. The value may be negative.

    The loss takes the place of cross-entropy in supervised fine-tuning, where it keeps answers varied. Li et al. 2025,
    Preserving Diversity in Supervised Fine-Tuning of Large Language Models (GEM), https://arxiv.org/abs/2408.16673.
    The authors' code has the gradient of `100 log sigmoid(u / 100)`.

    Args:
        beta (`float`): temperature, above 0; the paper uses 0.7.
        h (`str`): "linear" or "logsigmoid".
    """
    check_shapes(logits, targets)
    if h not in ("linear", "logsigmoid") or not beta > 0:
        raise ValueError(f"expected h 'linear' or 'logsigmoid' and a positive beta, got {h!r} and {beta}")
    return _Gem.apply(logits, targets, beta, h == "linear").where(targets >= 0, 0)


class _Gem(torch.autograd.Function):
    """Compute [`gem`] row by row, because its temporary tensors are as large as the logits."""

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
    """Return values (`[T]`, nats) of one row, and derivatives with respect to its logits (`[T, V]`)."""
    logits = logits.to(wide(logits))
    label = targets.clamp(min=0)[:, None]
    gaps = (logits - logits.gather(1, label)).clamp_(min=LOWEST_LOG)  # log p(v) - log p(x_t)
    weights = (logits / beta).softmax(-1)
    value = (weights * (gaps if linear else -nn.functional.logsigmoid(-gaps))).sum(-1)
    if not linear:
        weights *= gaps.sigmoid_()
    return value, weights.scatter_add_(1, label, -weights.sum(-1, keepdim=True))
