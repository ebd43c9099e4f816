"""Divergences of a student's distribution from a teacher's, each with its derivative.

Legend: `n` tokens, `m` outcomes (the vocabulary, or stored tokens and the rest), `p` the teacher, `q` the student.
Values are one per token; masking and averaging is the caller's. Derivatives are with respect to `log q`, with the
outcomes taken for independent: [`logits_gradient`] turns them into those of the logits. They are written out because
matrices as wide as a vocabulary deserve few passes, where autograd takes many.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

LOWEST_LOG = -1e4  # stands for log 0, which times a probability of 0 would not be a number


class Probabilities(NamedTuple):
    """A distribution for each token: `log` and `value`, both `[n, m]`, float32 or float64."""

    log: Tensor
    value: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor) -> "Probabilities":
        """Normalise `[n, m]` logits."""
        log = logits.log_softmax(-1).clamp_(min=LOWEST_LOG)
        return cls(log, log.exp())

    @classmethod
    def from_log(cls, log: Tensor) -> "Probabilities":
        """Take `[n, m]` normalised logarithms, `-inf` for impossible outcomes."""
        log = log.clamp(min=LOWEST_LOG)
        return cls(log, log.exp())


Divergence = Callable[[Probabilities, Probabilities], tuple[Tensor, Tensor]]


def forward_kl(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """`KL(p || q) = sum p (log p - log q)`: the student covers all that the teacher says.

    The default: as much probability as the teacher gives, to everything. Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    return _dot(p.value, p.log - q.log), -p.value


def reverse_kl(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """`KL(q || p) = sum q (log q - log p)`: the student avoids what the teacher would not say.

    For students far smaller than the teacher, which cannot cover it all. Gu et al. 2023 (MiniLLM),
    https://arxiv.org/abs/2306.08543.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    difference = q.log - p.log
    return _dot(q.value, difference), difference.mul_(q.value)


def jensen_shannon(p: Probabilities, q: Probabilities, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`: bounded, between the two KLs.

    Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649; `0 < beta < 1`.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    log_m = _log_mixture(p, q, beta)
    value = beta * _dot(p.value, p.log - log_m)
    difference = q.log - log_m
    value += (1 - beta) * _dot(q.value, difference)
    return value, difference.mul_(q.value).mul_(1 - beta)


def skewed_kl(p: Probabilities, q: Probabilities, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """`KL(p || m)` with `m = alpha p + (1 - alpha) q`: forward KL whose gradient stays bounded where q is small.

    Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898; `0 < alpha < 1`.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    log_m = _log_mixture(p, q, alpha)
    value = _dot(p.value, p.log - log_m)
    return value, (q.log - log_m).exp_().mul_(p.value).mul_(alpha - 1)


def skewed_reverse_kl(p: Probabilities, q: Probabilities, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """`KL(q || m)` with `m = alpha q + (1 - alpha) p`: reverse KL that is finite where the teacher says never.

    Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898; `0 < alpha < 1`.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    difference = q.log - _log_mixture(q, p, alpha)
    value = _dot(q.value, difference)
    return value, difference.sub_(difference.exp().mul_(alpha)).mul_(q.value)


def total_variation(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """`sum |p - q| / 2`: the largest difference in the probability of anything; robust, but slow to learn from.

    Wen et al. 2023, https://arxiv.org/abs/2307.15190.

    Returns:
        value (`[n]`, ratio) and derivative with respect to `log q` (`[n, m]`).
    """
    difference = q.value - p.value
    value = difference.abs().sum(-1) / 2
    return value, difference.sign_().mul_(q.value).mul_(0.5)


def universal(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """`sum |p_(i) - q_(i)|` over the sorted probabilities: compares shapes, whatever tokens they belong to.

    For a teacher with another tokenizer: it knows how sure the teacher is, not of what, so combine it with
    cross-entropy. The vocabularies may differ in size. Boizard et al. 2024, https://arxiv.org/abs/2402.12030.

    Returns:
        value (`[n]`, ratio in [0, 2]) and derivative with respect to `log q` (`[n, m]`).
    """
    sorted_q, order = q.value.sort(-1, descending=True)
    sorted_p = p.value.sort(-1, descending=True).values
    missing = sorted_q.shape[-1] - sorted_p.shape[-1]
    rest = sorted_p[:, sorted_q.shape[-1] :].sum(-1)  # against probabilities of 0
    difference = sorted_q - torch.nn.functional.pad(sorted_p, (0, missing))  # a negative padding cuts off
    value = difference.abs().sum(-1) + rest
    return value, torch.empty_like(sorted_q).scatter_(-1, order, difference.sign_()).mul_(q.value)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of rows, `[n]`; autocast would round them."""
    with maybe_autocast(left.device.type, enabled=False):
        return torch.linalg.vecdot(left, right)


def _log_mixture(p: Probabilities, q: Probabilities, weight: float) -> Tensor:
    """Return `log(weight p + (1 - weight) q)`, exact also where both probabilities underflow."""
    return torch.logaddexp(p.log + math.log(weight), q.log + math.log1p(-weight))


def wide(states: Tensor) -> torch.dtype:
    """Return the dtype of sums: many small numbers added in half precision would be lost."""
    return torch.promote_types(states.dtype, torch.float32)


def logits_gradient(derivative: Tensor, q: Probabilities) -> Tensor:
    """Turn a derivative with respect to `log q` (`[n, m]`, overwritten) into that with respect to q's logits."""
    return derivative.addcmul_(q.value, derivative.sum(-1, keepdim=True), value=-1)


SAME_TOKENS = {
    function.__name__: function
    for function in (forward_kl, reverse_kl, jensen_shannon, skewed_kl, skewed_reverse_kl, total_variation)
}
DIVERGENCES: dict[str, Divergence] = {**SAME_TOKENS, universal.__name__: universal}


def weighted_divergence(weights: Mapping[str, float], beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """Return the weighted sum of divergences.

    Args:
        weights (mapping from a name in `DIVERGENCES` to a positive weight).
        beta (`float`): of [`jensen_shannon`], between 0 and 1.
        alpha (`float`): of [`skewed_kl`] and [`skewed_reverse_kl`], between 0 and 1.

    Raises:
        ValueError: an unknown name, a weight that is not positive, or a `beta` or `alpha` outside its range.
    """
    for name, weight in weights.items():
        if name not in DIVERGENCES:
            raise ValueError(f"unknown divergence {name!r}; expected one of {', '.join(DIVERGENCES)}")
        if not weight > 0:
            raise ValueError(f"the weight of {name} must be positive, got {weight}; leave out what is not wanted")
    for what, ratio in (("beta", beta), ("alpha", alpha)):
        if not 0 < ratio < 1:
            raise ValueError(f"{what} must lie between 0 and 1, got {ratio}; the ends are forward_kl and reverse_kl")
    if not weights:
        raise ValueError(f"no divergence given; expected one of {', '.join(DIVERGENCES)}")
    options = {"jensen_shannon": {"beta": beta}, "skewed_kl": {"alpha": alpha}, "skewed_reverse_kl": {"alpha": alpha}}
    terms = [(functools.partial(DIVERGENCES[name], **options.get(name, {})), weights[name]) for name in weights]

    def weighted_sum(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
        (first, weight), *others = terms
        value, derivative = first(p, q)
        if weight != 1:
            value, derivative = value.mul_(weight), derivative.mul_(weight)
        for term, weight in others:
            more = term(p, q)
            value, derivative = value.add_(more[0], alpha=weight), derivative.add_(more[1], alpha=weight)
        return value, derivative

    return weighted_sum
