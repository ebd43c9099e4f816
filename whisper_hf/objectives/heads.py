"""Dense checkpoints to WhisperLM and back, without changing a bit of the weights.

    python -m whisper_hf.conversion SOURCE TARGET [--to-dense]

The four families name their weights alike, and so does WhisperLM; they differ in where they have biases and norms. That
is the whole table. RoPE, sizes and token ids carry over by name.
"""

import argparse
import copy
import os
import tempfile
from pathlib import Path

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
        return getattr(self.module, "out_features", None) or len(self.module.weight)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a plain product with a weight."""
        is_plain = type(self.module) is nn.Linear and "forward" not in vars(self.module)
        return is_plain and self.scale == 1 and self.cap is None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What can be trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits, `[n, V]`, in the dtype that the module computes in."""
        if self.is_linear:  # past hooks that gather and free a sharded weight for every call
            return nn.functional.linear(hidden, self.module.weight, self.module.bias)
        logits = self.module(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap
