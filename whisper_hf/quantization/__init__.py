"""Weights of 8 or 4 bits: named recipes, a command that applies them, and what makes up for the loss.

A recipe is a config object and nothing more: `from_pretrained(..., quantization_config=recipe("nf4"))` is all that is
needed to use one, for any model. What stays in high precision is what transformers keeps: the output head (tied or
not), embeddings and norms.
"""

from .compensation import compensate
from .int8_cpu import Int8CpuConfig
from .merging import merge_adapter
from .quantized_checkpoint import quantize
from .recipes import RECIPES, disable_cpu_repacking, recipe
from .sensitivity import layer_divergences, most_sensitive

__all__ = [
    "RECIPES",
    "Int8CpuConfig",
    "compensate",
    "disable_cpu_repacking",
    "layer_divergences",
    "merge_adapter",
    "most_sensitive",
    "quantize",
    "recipe",
]
