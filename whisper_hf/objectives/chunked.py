"""Distillation loss without logits: the heads are applied to a few tokens at a time, forward and backward at once.

The gradient is known as soon as the loss of a chunk is, so it is computed on the way, and no tensor `[tokens, V]`
of either model ever exists. Legend: `n` tokens that count, `H` width of the student, `V` its vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model.repetition_loss import contrast_loss
from .divergences import Probabilities, logits_gradient, wide
from .lm_head import Head
from .targets import Target

CHUNK_ELEMENTS = {"cpu": 3 * 2**20}  # logits at once, per model; more take memory, fewer read the head more often
CHUNK_ELEMENTS_ACCELERATOR = 2**26
CHUNK_TOKENS_AUTOCAST = 512  # on a CPU whose half precision is fast


class TokenLosses(NamedTuple):
    """Losses in nats, float32.

    `loss` (scalar): weighted sum over all tokens, differentiable. `divergence` (`[n]`, times temperature squared),
    `cross_entropy` (`[n]`) and `diversity` (`[n]`): per token, without weight and gradient.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    diversity: Tensor


def chunked_distillation_loss(
    hidden: Tensor,
    head: Head | nn.Module,
    labels: Tensor,
    target: Target | None,
    *,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    diversity_weight: float = 0.0,
    candidates: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TokenLosses:
    """Compare a student's predictions with a teacher's and with labels.

    Per token: `divergence_weight * temperature**2 * D(p || q) + cross_entropy_weight * -log q_1[label] +
    diversity_weight * contrast`, where `p` and `q` are softmax of logits over temperature, restricted to the tokens
    that both models have, `q_1` is the student's own distribution, and the last term is [`contrast_loss`]. The factor
    keeps the gradient's size at any temperature (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Computed in
    float32 (float64 for float64 heads).

    Args:
        hidden (`[n, H]`, any float): what the student's head sees, of the tokens that count.
        head ([`Head`], or a module that maps `[m, H]` to `[m, V]`): the student's.
        labels (`[n]`, int64): the tokens to predict.
        target ([`Target`], *optional*): the teacher's predictions for the same tokens.
        divergence_weight, cross_entropy_weight, diversity_weight (`float`): of the terms.
        candidates (`[n, C]`, int64, *optional*): from [`repeating_tokens`]; without, the last term is 0.
        temperature (`float`): of the divergence, above 0.
        chunk_tokens (`int`, *optional*): tokens at once; by default what suits the vocabulary and the device.

    Returns:
        [`TokenLosses`]; may be differentiated once, so not by penalties on gradients.

    Raises:
        ValueError: a temperature that is not positive or not the target's, a chunk of less than one token, or labels
            and hidden states of different lengths.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    expected_temperature = getattr(target, "temperature", temperature)
    if expected_temperature != temperature:
        raise ValueError(f"expected the target's temperature, {expected_temperature}, got {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if len(hidden) != len(labels):
        raise ValueError(f"expected one label per hidden state, got {len(labels)} labels for {len(hidden)} states")
    head = head if isinstance(head, Head) else Head(head)
    terms = functools.partial(
        _terms,
        target=target,
        candidates=candidates,
        weights=(divergence_weight if target is not None else 0.0, cross_entropy_weight, diversity_weight),
        temperature=temperature,
    )
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(hidden, head)
    parameters = head.parameters
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    return TokenLosses(*_ChunkedLoss.apply(hidden, head, labels, terms, chunk_tokens, needs_grad, *parameters))


def _default_chunk(hidden: Tensor, head: Head) -> int:
    """Return how many tokens' logits exist at once."""
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS_ACCELERATOR)
    tokens = max(elements // head.vocabulary, 1)
    if hidden.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # adding up the head's gradient would take longer than computing it; so many logits are no larger than that is
        tokens = max(tokens, min(hidden.shape[-1], CHUNK_TOKENS_AUTOCAST))
    return tokens


class _ChunkedLoss(torch.autograd.Function):
    """Loss sums of all chunks; gradients are accumulated in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        terms: Callable,
        chunk_tokens: int,
        needs_grad: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the parts of [`TokenLosses`]."""
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grads = [torch.zeros_like(p, dtype=wide(p)) for p in parameters] if needs_grad else []
        values = hidden.new_zeros(3, len(hidden), dtype=wide(hidden))
        loss = values.new_zeros(())
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(needs_grad and not head.is_linear):
                inputs = hidden[rows].detach().requires_grad_(needs_grad)
                logits = head(inputs)
            chunk_loss, values[:, rows], grad_logits = terms(logits.detach(), labels[rows], rows, needs_grad=needs_grad)
            loss += chunk_loss
            if grad_hidden is not None:
                grad_logits = grad_logits.to(logits.dtype)
                grad_hidden[rows] = _add_gradients(head, inputs, logits, grad_logits, parameters, grads)
        ctx.grads = (grad_hidden, grads, [parameter.dtype for parameter in parameters])
        divergence, cross_entropy, diversity = values.unbind()
        ctx.mark_non_differentiable(divergence, cross_entropy, diversity)
        return loss, divergence, cross_entropy, diversity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
        """Scale what the forward pass computed; it is then given away, for it may be as large as the head."""
        if ctx.grads is None:
            raise RuntimeError("the chunked loss can be differentiated once; call it again for another backward pass")
        (grad_hidden, grads, dtypes), ctx.grads = ctx.grads, None
        scaled = [_scale(total, grad, dtype) for total, dtype in zip(grads, dtypes, strict=True)]
        return (_scale(grad_hidden, grad, grad_hidden.dtype), None, None, None, None, None, *scaled)


def _scale(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a gradient in place, or where it is in half precision, beyond which a loss scale may lie, in float32."""
    if total.dtype == wide(total):
        return total.mul_(factor.to(total.dtype)).to(dtype)
    return (total.float() * factor).to(dtype)


def _add_gradients(
    head: Head, inputs: Tensor, logits: Tensor, grad_logits: Tensor, parameters: Sequence[Tensor], grads: list[Tensor]
) -> Tensor:
    """Add a chunk's gradients to those of the head's parameters; return that of its inputs."""
    if not head.is_linear:
        found = torch.autograd.grad(logits, [inputs, *parameters], grad_logits, allow_unused=True)
        for total, grad in zip(grads, found[1:], strict=True):
            if grad is not None:
                total += grad
        return found[0]
    for total, parameter in zip(grads, parameters, strict=True):
        if parameter is head.bias:
            total += grad_logits.sum(0)
        elif total.dtype == logits.dtype == inputs.dtype:
            total.addmm_(grad_logits.T, inputs)  # without a temporary as large as the head
        else:  # under autocast
            total += grad_logits.T @ inputs.to(logits.dtype)
    return grad_logits @ head.weight.detach().to(logits.dtype)


def _terms(
    logits: Tensor,
    labels: Tensor,
    rows: slice,
    *,
    target: Target | None,
    candidates: Tensor | None,
    weights: tuple[float, float, float],
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss of a chunk, the terms of its tokens (`[3, m]`), and the logits' gradient (`[m, V]`)."""
    logits = logits.to(wide(logits))
    divergence_weight, cross_entropy_weight, diversity_weight = weights
    plain = shared = Probabilities.from_logits(logits)
    divergence, grad = logits.new_zeros(len(logits)), None
    if target is not None:
        vocabulary = min(target.vocabulary or logits.shape[1], logits.shape[1])
        if temperature != 1 or vocabulary < logits.shape[1]:
            shared = Probabilities.from_logits(logits[:, :vocabulary] / temperature)
        divergence, derivative = target.compare(shared, rows)
        divergence *= temperature**2
        if needs_grad:
            grad = logits_gradient(derivative, shared)
            if divergence_weight * temperature != 1:
                grad *= divergence_weight * temperature
            if vocabulary < logits.shape[1]:
                grad = nn.functional.pad(grad, (0, logits.shape[1] - vocabulary))
    cross_entropy = -plain.log.gather(1, labels[:, None])[:, 0]
    if needs_grad:
        grad = torch.zeros_like(logits) if grad is None else grad
        if cross_entropy_weight:
            grad.add_(plain.value, alpha=cross_entropy_weight)
            grad.scatter_add_(1, labels[:, None], grad.new_full((len(labels), 1), -cross_entropy_weight))
    diversity = logits.new_zeros(len(logits))
    if candidates is not None:
        diversity, at_candidates, at_label = contrast_loss(logits, labels, candidates[rows])
        if needs_grad and diversity_weight and grad is not None:
            # the derivative is 0 where there is no candidate
            grad.scatter_add_(1, candidates[rows].clamp(min=0), diversity_weight * at_candidates)
            grad.scatter_add_(1, labels[:, None], diversity_weight * at_label[:, None])
    terms = torch.stack([divergence, cross_entropy, diversity])
    return (terms.sum(1) * terms.new_tensor(weights)).sum(), terms, grad
