"""Replace a model's language-modeling head during a forward pass, and record its attention outputs.

The logits of a batch are the largest tensor of training, and a loss computed from them needs several tensors of their
size. For one forward pass, this module replaces the head by a function that computes the loss from the hidden states.
The function runs inside the model's forward pass. Wrappers (DDP, FSDP, DeepSpeed, autocast, compilation) therefore see
an ordinary model, and a head whose weight is sharded is complete at that moment.

Legend: `B` rows of `T` tokens, `H` width of the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.repetition_loss import without_adapter
from ..objectives import Head

# Logits that show what a model does to the output of its head: zero, small and ordinary values, and one above any cap
PROBE = (0.0, 1e-3, 1.0, -1.0, 30.0, 1e30)
SMALL = 2.0**-20  # factor that makes a loss so small that a soft cap, `cap * tanh(loss / cap)`, leaves it unchanged


class HeadReplacement:
    """Replace the head of a causal language model during a forward pass, and find the scale and cap of its logits.

    Args:
        model (`PreTrainedModel`, perhaps wrapped by peft): the model without the wrappers of training.

    Raises:
        ValueError: a model without a head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"expected a causal language model with a head, got {type(model).__name__} without one; load it with "
                "AutoModelForCausalLM"
            )
        self.name = type(model).__name__
        self.module = module
        self._head: Head | None = None
        self._function: Callable[[Tensor], Tensor] | None = None
        self._original: Any = None

    @property
    def head(self) -> Head:
        """The head with its scale and cap, which are known after the first forward pass."""
        if self._head is None:
            raise RuntimeError(f"the scale and cap of {self.name} are unknown before a forward pass; call `run` first")
        return self._head

    def run(self, forward: Callable[[], Any], function: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        """Run a forward pass in which the head is replaced.

        Args:
            forward (`Callable`): calls the model without labels.
            function (`Callable`): takes the inputs of the head, `[B, T, H]`, and returns a scalar. It may call the
                head.

        Returns:
            the model's output, whose logits are a placeholder, and the scalar, float32 and differentiable.

        Raises:
            ValueError: a model that does more to its logits than to scale and softly cap them.
        """
        if self._head is None:
            self._head = self._probe(forward)
        with self._replaced(lambda hidden: function(hidden).view(1, 1, 1) * SMALL):
            outputs = forward()
        return outputs, outputs.logits.float().sum() / (SMALL * self.head.scale)

    @contextmanager
    def _replaced(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let the head call a function of its inputs, once, and restore the head afterwards."""
        self._original = vars(self.module).get("forward")
        self._function = function
        self.module.forward = self._call
        try:
            yield
        finally:
            self._restore()
            self._function = None

    def _restore(self) -> None:
        """Give the head its own `forward` back."""
        if self._original is not None:
            self.module.forward = self._original
        else:
            vars(self.module).pop("forward", None)

    @torch.compiler.disable
    def _call(self, hidden: Tensor) -> Tensor:
        """Stand in for the head's `forward`: restore the head, and call the function instead."""
        if self._function is None:
            raise RuntimeError(
                f"expected {self.name} to apply its head once in a forward pass, got a second call; this model cannot "
                "be distilled in chunks"
            )
        function = self._function
        self._function = None
        self._restore()  # before the call, because the function may apply the head
        return function(hidden)

    @torch.no_grad()
    def _probe(self, forward: Callable[[], Any]) -> Head:
        """Find the scale and cap of the model's logits: send known numbers through the model in place of logits."""
        with self._replaced(lambda hidden: torch.tensor(PROBE, device=hidden.device).view(1, 1, -1)):
            found = forward().logits.flatten().double().cpu()
        sent = torch.tensor(PROBE, dtype=torch.float64)
        if found.shape == sent.shape:
            scale = (found[1] / sent[1]).item()
            cap = None if found[-1].abs() > 1e20 * abs(scale) else found[-1].abs().item()
            expected = sent * scale if cap is None else (sent * scale / cap).tanh() * cap
            if torch.allclose(found, expected, rtol=1e-2, atol=1e-6):
                return Head(self.module, _rounded(scale), None if cap is None else _rounded(cap))
        raise ValueError(
            f"expected logits that are the head's output, scaled or softly capped, but {self.name} turns {list(PROBE)} "
            f"into {[round(number, 4) for number in found.tolist()]}; this model cannot be distilled in chunks"
        )


def _rounded(number: float) -> float:
    """Round a float32 number to the six digits with which it was written into a config."""
    return float(f"{number:.6g}")


@contextmanager
def attention_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the outputs of all attention layers during one forward pass.

    Args:
        model (`PreTrainedModel`, perhaps wrapped by peft): the model without the wrappers of training.

    Yields:
        a list that the forward pass fills with one `[B, T, H]` tensor per layer, in order.

    Raises:
        ValueError: a model that does not declare which of its modules are attention layers.
    """
    base = without_adapter(model)
    kind = (getattr(base, "_can_record_outputs", None) or {}).get("attentions")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"expected a model that declares its attention layers in _can_record_outputs, got {type(base).__name__}; "
            "set attention_outputs_weight=0 and match hidden states instead"
        )
    collected: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: collected.append(output[0]))
        for module in base.modules()
        if isinstance(module, kind)
    ]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
