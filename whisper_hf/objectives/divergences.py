"""Divergences between a teacher's and a student's distribution, each with its derivative.

Legend: `n` tokens, `m` outcomes (the vocabulary, or the stored tokens and the rest), `p` the teacher's distribution,
`q` the student's.

Each function returns one value per token, and the caller masks and averages. The derivatives are with respect to
`log q`, as if the outcomes were independent; [`logits_gradient`] turns them into gradients of the logits. They are
written out because autograd would pass over the `[n, m]` matrices far more often.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

LOWEST_LOG = -1e4  # replaces log 0 = -inf, because 0 * -inf is NaN


class Probabilities(NamedTuple):
    """A probability distribution for each token.

    Attributes:
        log (`[n, m]`, float32 or float64): logarithms of the probabilities, at least `LOWEST_LOG`.
        value (`[n, m]`, the dtype of `log`): the probabilities.
    """

    log: Tensor
    value: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor) -> "Probabilities":
        """Compute the distributions from logits, `[n, m]`, by a softmax."""
        log = logits.log_softmax(-1).clamp_(min=LOWEST_LOG)
        return cls(log, log.exp())

    @classmethod
    def from_log(cls, log: Tensor) -> "Probabilities":
        """Compute the distributions from log-probabilities, `[n, m]`; impossible outcomes may be `-inf`."""
        log = log.clamp(min=LOWEST_LOG)
        return cls(log, log.exp())


Divergence = Callable[[Probabilities, Probabilities], tuple[Tensor, Tensor]]


def forward_kl(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """Compute the forward KL, `KL(p || q) = sum p (log p - log q)`.

    The student learns to give each token the probability that the teacher gives it. This is the default. Hinton et al.
    2015, https://arxiv.org/abs/1503.02531.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    return _dot(p.value, p.log - q.log), -p.value


def reverse_kl(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """Compute the reverse KL, `KL(q || p) = sum q (log q - log p)`.

    The student learns to avoid what the teacher would not say. It suits a student that is far smaller than the teacher
    and cannot cover all that the teacher says. Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    difference = q.log - p.log
    return _dot(q.value, difference), difference.mul_(q.value)


def jensen_shannon(p: Probabilities, q: Probabilities, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Compute the generalized Jensen-Shannon divergence, which is bounded and lies between forward and reverse KL.

    `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q` and `0 < beta < 1`. Agarwal et al. 2023
    (GKD), https://arxiv.org/abs/2306.13649.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    log_m = _log_mixture(p, q, beta)
    value = beta * _dot(p.value, p.log - log_m)
    difference = q.log - log_m
    value += (1 - beta) * _dot(q.value, difference)
    return value, difference.mul_(q.value).mul_(1 - beta)


def skewed_kl(p: Probabilities, q: Probabilities, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """Compute the skewed forward KL, whose gradient stays bounded where the student's probability is small.

    `KL(p || m)` with `m = alpha p + (1 - alpha) q` and `0 < alpha < 1`. Ko et al. 2024 (DistiLLM),
    https://arxiv.org/abs/2402.03898.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    log_m = _log_mixture(p, q, alpha)
    value = _dot(p.value, p.log - log_m)
    return value, (q.log - log_m).exp_().mul_(p.value).mul_(alpha - 1)


def skewed_reverse_kl(p: Probabilities, q: Probabilities, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """Compute the skewed reverse KL, which is finite where the teacher's probability is 0.

    `KL(q || m)` with `m = alpha q + (1 - alpha) p` and `0 < alpha < 1`. Ko et al. 2024 (DistiLLM),
    https://arxiv.org/abs/2402.03898.

    Returns:
        value (`[n]`, nats) and derivative with respect to `log q` (`[n, m]`).
    """
    difference = q.log - _log_mixture(q, p, alpha)
    value = _dot(q.value, difference)
    return value, difference.sub_(difference.exp().mul_(alpha)).mul_(q.value)


def total_variation(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """Compute the total variation, `sum |p - q| / 2`: the largest difference in the probability of any event.

    It is robust, but slow to learn from. Wen et al. 2023, https://arxiv.org/abs/2307.15190.

    Returns:
        value (`[n]`, ratio in [0, 1]) and derivative with respect to `log q` (`[n, m]`).
    """
    difference = q.value - p.value
    value = difference.abs().sum(-1) / 2
    return value, difference.sign_().mul_(q.value).mul_(0.5)


def universal(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
    """Compute the distance of the sorted probabilities, `sum_i |p_(i) - q_(i)|`, which ignores the tokens' identity.

    It serves a teacher with another tokenizer, whose vocabulary may differ in size. It says how sure the teacher is,
    but not of which token, so combine it with cross-entropy. Boizard et al. 2024, https://arxiv.org/abs/2402.12030.

    Args:
        p (`[n, u]`), q (`[n, m]`): `u` and `m` may differ; the smaller one is filled with probabilities of 0.

    Returns:
        value (`[n]`, ratio in [0, 2]) and derivative with respect to `log q` (`[n, m]`).
    """
    sorted_q, order = q.value.sort(-1, descending=True)
    sorted_p = p.value.sort(-1, descending=True).values
    missing = sorted_q.shape[-1] - sorted_p.shape[-1]
    rest = sorted_p[:, sorted_q.shape[-1] :].sum(-1)  # distance of surplus outcomes of `p` from probabilities of 0
    difference = sorted_q - torch.nn.functional.pad(sorted_p, (0, missing))  # a negative padding cuts columns off
    value = difference.abs().sum(-1) + rest
    return value, torch.empty_like(sorted_q).scatter_(-1, order, difference.sign_()).mul_(q.value)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Compute the scalar product of each pair of rows, `[n]`, outside autocast, which would round it."""
    with maybe_autocast(left.device.type, enabled=False):
        return torch.linalg.vecdot(left, right)


def _log_mixture(p: Probabilities, q: Probabilities, weight: float) -> Tensor:
    """Compute `log(weight p + (1 - weight) q)`, `[n, m]`, accurate also where both probabilities underflow."""
    return torch.logaddexp(p.log + math.log(weight), q.log + math.log1p(-weight))


def wide(states: Tensor) -> torch.dtype:
    """Return the dtype for sums over a tensor: float32 at least, because half precision loses small summands."""
    return torch.promote_types(states.dtype, torch.float32)


def logits_gradient(derivative: Tensor, q: Probabilities) -> Tensor:
    """Turn a derivative with respect to `log q` into the gradient of the student's logits.

    `g_i = d_i - q_i * sum_j d_j`, for the derivative `d`.

    Args:
        derivative (`[n, m]`): it is overwritten.
        q ([`Probabilities`], `[n, m]`): the student's distributions.

    Returns:
        `[n, m]`: the gradient of the logits.
    """
    return derivative.addcmul_(q.value, derivative.sum(-1, keepdim=True), value=-1)


SAME_TOKENS = {
    function.__name__: function
    for function in (forward_kl, reverse_kl, jensen_shannon, skewed_kl, skewed_reverse_kl, total_variation)
}
DIVERGENCES: dict[str, Divergence] = {**SAME_TOKENS, universal.__name__: universal}


def weighted_divergence(weights: Mapping[str, float], beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """Build the weighted sum of one or more divergences.

    Args:
        weights (mapping from `str` to `float`): names in `DIVERGENCES`, with positive weights.
        beta (`float`): the parameter of [`jensen_shannon`], between 0 and 1.
        alpha (`float`): the parameter of [`skewed_kl`] and [`skewed_reverse_kl`], between 0 and 1.

    Returns:
        a function of `p` and `q`, like [`forward_kl`]: it returns value (`[n]`) and derivative with respect to `log q`
            (`[n, m]`).

    Raises:
        ValueError: no name, an unknown name, a weight that is not positive, or a `beta` or `alpha` outside its range.
    """
    for name, weight in weights.items():
        if name not in DIVERGENCES:
            raise ValueError(f"unknown divergence {name!r}; expected one of {', '.join(DIVERGENCES)}")
        if not weight > 0:
            raise ValueError(f"the weight of {name} must be positive, got {weight}; leave {name} out to ignore it")
    for what, ratio in (("beta", beta), ("alpha", alpha)):
        if not 0 < ratio < 1:
            raise ValueError(f"{what} must lie between 0 and 1, got {ratio}; for 0 or 1 use forward_kl or reverse_kl")
    if not weights:
        raise ValueError(f"no divergence given; expected one of {', '.join(DIVERGENCES)}")
    options = {"jensen_shannon": {"beta": beta}, "skewed_kl": {"alpha": alpha}, "skewed_reverse_kl": {"alpha": alpha}}
    terms = [(functools.partial(DIVERGENCES[name], **options.get(name, {})), weights[name]) for name in weights]

    def weighted_sum(p: Probabilities, q: Probabilities) -> tuple[Tensor, Tensor]:
        (first, weight), *others = terms
        value, derivative = first(p, q)
        if weight != 1:
            value.mul_(weight)
            derivative.mul_(weight)
        for term, weight in others:
            more_value, more_derivative = term(p, q)
            value.add_(more_value, alpha=weight)
            derivative.add_(more_derivative, alpha=weight)
        return value, derivative

    return weighted_sum
