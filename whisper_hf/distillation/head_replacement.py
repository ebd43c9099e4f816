"""Doing something else where a model would apply its language-modeling head, and seeing what its layers put out.

The logits of a batch are the largest tensor of training, and a loss computed from them costs several of that size. Here
the head is replaced for the duration of a forward pass by what computes the loss from the hidden states: inside the
model's forward, so that wrappers (DDP, FSDP, DeepSpeed, autocast, compilation) see an ordinary model, and a head
whose weight is sharded is whole at that moment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.repetition_loss import without_adapter
from ..objectives import Head

# what a head of `n` tokens returns, to learn what the model does to it: next to nothing, a little, more than any cap
PROBE = (0.0, 1e-3, 1.0, -1.0, 30.0, 1e30)
SMALL = 2.0**-20  # results pass the model's own treatment of logits where even a soft cap is linear


class HeadReplacement:
    """Replaces the head of a causal language model, and knows what the model does to its output.

    Args:
        model (`PreTrainedModel`, or wrapped by peft): the model itself, not what wraps it for training.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"expected a causal language model with a head, got {type(model).__name__}, which has none"
            )
        self.name = type(model).__name__
        self.module = module
        self._head: Head | None = None
        self._function: Callable[[Tensor], Tensor] | None = None
        self._original: Any = None

    @property
    def head(self) -> Head:
        """The head, once a forward pass has run."""
        if self._head is None:
            raise RuntimeError(f"what {self.name} does to its head's output is known after a forward pass")
        return self._head

    def run(self, forward: Callable[[], Any], function: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        """Run a forward pass in which the head is replaced.

        Args:
            forward (`Callable`): calls the model without labels.
            function (`Callable`): takes what the head would see, `[B, T, H]`, and returns a scalar. It may call the
                head.

        Returns:
            the model's output, and the scalar, differentiable.
        """
        if self._head is None:
            self._head = self._probe(forward)
        with self._replaced(lambda hidden: function(hidden).view(1, 1, 1) * SMALL):
            outputs = forward()
        return outputs, outputs.logits.float().sum() / (SMALL * self.head.scale)

    @contextmanager
    def _replaced(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        self._original, self._function = vars(self.module).get("forward"), function
        self.module.forward = self._call
        try:
            yield
        finally:
            self._restore()
            self._function = None

    def _restore(self) -> None:
        if self._original is not None:
            self.module.forward = self._original
        else:
            vars(self.module).pop("forward", None)

    @torch.compiler.disable
    def _call(self, hidden: Tensor) -> Tensor:
        if self._function is None:
            raise RuntimeError(f"the head of {self.name} was applied twice in one forward pass")
        function, self._function = self._function, None
        self._restore()  # the function may apply the head
        return function(hidden)

    @torch.no_grad()
    def _probe(self, forward: Callable[[], Any]) -> Head:
        """Find the scale and cap that the model puts on its head's output, by what becomes of known numbers."""
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
    """Remove the rounding of float32 from a number that a person has written into a config."""
    return float(f"{number:.6g}")


@contextmanager
def attention_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the output of every attention layer, `[B, T, hidden_size]`, in order, during one forward pass.

    Raises:
        ValueError: the model does not say which of its modules are attention layers.
    """
    base = without_adapter(model)
    kind = (getattr(base, "_can_record_outputs", None) or {}).get("attentions")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"cannot tell which modules of {type(base).__name__} are attention layers; match hidden states"
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
