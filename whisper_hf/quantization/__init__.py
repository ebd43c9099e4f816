"""Quantize models to 8 or 4 bits by named recipes, and reduce the loss that quantization causes.

A recipe is a config object: `from_pretrained(..., quantization_config=recipe("nf4"))` applies it to any model. The
output head (tied or not), the embeddings and the norms stay in high precision, which is the default of transformers.
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
