"""A model's language-modeling head: what it does to hidden states, down to the logits that the model returns."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """Hidden states `[n, H]` to logits `[n, V]`: `scale * module(hidden)`, with a cap `cap * tanh(that / cap)`.

    Attributes:
        module (`nn.Module`): linear, quantized, or wrapped by peft.
        scale (`float`), cap (`float`, *optional*): what the model does to the module's output.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits, `V`."""
        return getattr(self.module, "out_features", None) or self.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The module's, `[V, H]` where it is linear."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The module's, `[V]`."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a plain product with a weight; sharding derives its own class from `nn.Linear`."""
        is_plain = type(self.module).forward is nn.Linear.forward and "forward" not in vars(self.module)
        return is_plain and self.scale == 1 and self.cap is None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What can be trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits, `[n, V]`, in the dtype that the module computes in."""
        logits = self.module.forward(hidden)  # past hooks, which would free a sharded weight after the first call
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap
