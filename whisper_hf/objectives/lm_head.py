"""The language-modeling head of a model: the map from hidden states to the logits that the model returns.

Legend: `n` tokens, `H` width of the model, `V` its vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """A map from hidden states `[n, H]` to logits `[n, V]`: a module, a scale, and perhaps a soft cap.

    `logits = cap * tanh(y / cap)` with `y = scale * module(hidden)`; without a cap, `logits = y`.

    Attributes:
        module (`nn.Module`): maps `[n, H]` to `[n, V]`; it may be linear, quantized, or wrapped by peft.
        scale (`float`): the factor that the model applies to the module's output.
        cap (`float`, *optional*): the bound on the absolute value of logits.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token, `V`."""
        return getattr(self.module, "out_features", None) or self.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The weight of the module, `[V, H]` if the module is linear."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the module, `[V]`, or `None`."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def is_linear(self) -> bool:
        """Whether the logits are `weight @ hidden + bias`, without scale and cap.

        The module's class need not be `nn.Linear`, because FSDP derives its own class from it.
        """
        is_plain = type(self.module).forward is nn.Linear.forward and "forward" not in vars(self.module)
        return is_plain and self.scale == 1 and self.cap is None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the module."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute the logits, `[n, V]`, in the module's dtype, from hidden states, `[n, H]`."""
        # `forward` skips the module's hooks, which would free a sharded weight after the first call
        logits = self.module.forward(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap
