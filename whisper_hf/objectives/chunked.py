"""Compute the distillation loss and its gradient in chunks of tokens, without the logits of all tokens.

Each chunk applies both heads to a few tokens and computes the loss and its gradient at once. No tensor `[n, V]` of
either model ever exists.

Legend: `n` tokens that count, `m` tokens of a chunk, `H` width of the student, `V` its vocabulary, `C` candidates of a
token.
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

# number of logits of a chunk, per model: larger chunks take more memory, and smaller ones read the head more often
CHUNK_ELEMENTS = {"cpu": 3 * 2**20}
CHUNK_ELEMENTS_ACCELERATOR = 2**26
CHUNK_TOKENS_AUTOCAST = 512  # under autocast on a CPU, a chunk has at least `min(H, 512)` tokens


class TokenLosses(NamedTuple):
    """The total loss of some tokens and its terms per token, in nats.

    All values are float32, or float64 for float64 hidden states. The terms are not weighted and have no gradient.

    Attributes:
        loss (scalar): the weighted sum of all terms over all tokens, differentiable.
        divergence (`[n]`): `temperature**2 * D(p || q)`.
        cross_entropy (`[n]`): `-log q_1[label]`, at temperature 1.
        diversity (`[n]`): the contrast with repetitions, from [`contrast_loss`].
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
    """Compare a student's predictions with a teacher's predictions and with labels.

    The loss of a token is

        divergence_weight * temperature**2 * D(p || q) - cross_entropy_weight * log q_1[label] + diversity_weight * c

    Here `p` (teacher) and `q` (student) are `softmax(logits / temperature)` over the tokens that both models have.
    `q_1` is the student's own distribution, at temperature 1 over its whole vocabulary. `c` is [`contrast_loss`]. The
    factor `temperature**2` keeps the size of the gradient independent of the temperature (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531). The loss is computed in float32, or in float64 for a float64 head.

    Args:
        hidden (`[n, H]`, any float): the inputs of the student's head, for the tokens that count.
        head ([`Head`], or a module that maps `[m, H]` to `[m, V]`): the student's head.
        labels (`[n]`, int64): the tokens to predict.
        target ([`Target`], *optional*): the teacher's predictions for the same tokens. Without a target the divergence
            is 0.
        divergence_weight, cross_entropy_weight, diversity_weight (`float`): the weights of the terms.
        candidates (`[n, C]`, int64, *optional*): tokens from [`repeating_tokens`], -1 in unused places. Without
            candidates the contrast is 0.
        temperature (`float`): the temperature of the divergence, above 0.
        chunk_tokens (`int`, *optional*): number of tokens of a chunk, at least 1. The default suits the vocabulary and
            the device.

    Returns:
        [`TokenLosses`]. The loss can be differentiated once, so a penalty on its gradient is impossible.

    Raises:
        ValueError: a temperature that is not positive, a temperature other than the target's, a chunk of less than one
            token, or labels and hidden states of different lengths.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    expected_temperature = getattr(target, "temperature", temperature)
    if expected_temperature != temperature:
        raise ValueError(
            f"temperature must equal the target's temperature {expected_temperature}, got {temperature}; pass the same "
            "temperature to both"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if len(hidden) != len(labels):
        raise ValueError(
            f"expected one label per hidden state, got {len(labels)} labels for {len(hidden)} states; select both with "
            "the same mask"
        )
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
    """Choose the number of tokens of a chunk, for hidden states `[n, H]`."""
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS_ACCELERATOR)
    tokens = max(elements // head.vocabulary, 1)
    if hidden.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # In smaller chunks, adding up the head's gradient `[V, H]` would take longer than computing it. The logits of
        # at most `H` tokens are no larger than this gradient.
        tokens = max(tokens, min(hidden.shape[-1], CHUNK_TOKENS_AUTOCAST))
    return tokens


class _ChunkedLoss(torch.autograd.Function):
    """Autograd function of the chunked loss: its forward pass computes the gradients, its backward pass scales them."""

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
        """Compute the fields of [`TokenLosses`], and keep the gradients of `hidden` and of the head's parameters."""
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
        """Multiply the gradients from the forward pass with the gradient of the loss, a scalar.

        The context drops the gradients at once, because they may be as large as the head.
        """
        if ctx.grads is None:
            raise RuntimeError("the chunked loss can be differentiated once; call it again for another backward pass")
        grad_hidden, grads, dtypes = ctx.grads
        ctx.grads = None
        scaled = [_scale(total, grad, dtype) for total, dtype in zip(grads, dtypes, strict=True)]
        return (_scale(grad_hidden, grad, grad_hidden.dtype), None, None, None, None, None, *scaled)


def _scale(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a gradient with a scalar, in place unless it is in half precision.

    Half precision is multiplied in float32, because the factor may be a loss scale beyond the range of float16.
    """
    if total.dtype == wide(total):
        return total.mul_(factor.to(total.dtype)).to(dtype)
    return (total.float() * factor).to(dtype)


def _add_gradients(
    head: Head, inputs: Tensor, logits: Tensor, grad_logits: Tensor, parameters: Sequence[Tensor], grads: list[Tensor]
) -> Tensor:
    """Add a chunk's gradients to the gradients of the head's parameters, and return the gradient of its inputs.

    Args:
        inputs (`[m, H]`), logits, grad_logits (`[m, V]`): of the chunk.
        parameters, grads: the head's trainable parameters and their gradients, which are changed in place.
    """
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
            total.addmm_(grad_logits.T, inputs)  # needs no temporary tensor as large as the head
        else:  # the dtypes differ under autocast
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
    """Compute the loss of a chunk, its terms per token, and the gradient of its logits.

    Args:
        logits (`[m, V]`, any float), labels (`[m]`, int64): of the chunk.
        rows (`slice`): which of the `n` tokens the chunk holds.
        target, candidates, temperature: as in [`chunked_distillation_loss`].
        weights: of divergence, cross-entropy and contrast.
        needs_grad (`bool`): whether to compute the gradient.

    Returns:
        the weighted sum (scalar), the three terms (`[3, m]`), and the gradient (`[m, V]`) or `None`.
    """
    logits = logits.to(wide(logits))
    divergence_weight, cross_entropy_weight, diversity_weight = weights
    plain = Probabilities.from_logits(logits)
    shared = plain  # at the temperature, over the tokens that both models have
    divergence = logits.new_zeros(len(logits))
    grad = None
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
            # unused places of candidates hold -1; their derivative is 0, so any index serves
            grad.scatter_add_(1, candidates[rows].clamp(min=0), diversity_weight * at_candidates)
            grad.scatter_add_(1, labels[:, None], diversity_weight * at_label[:, None])
    terms = torch.stack([divergence, cross_entropy, diversity])
    return (terms.sum(1) * terms.new_tensor(weights)).sum(), terms, grad
