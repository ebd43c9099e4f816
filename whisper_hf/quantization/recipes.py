"""Named recipes of standard config objects, and what they need to know of a device or a model."""

from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..model.pretrained_base import keep_4bit_arrangement
from .int8_cpu import Int8CpuConfig
from .int8_linear import METHOD, Int8Linear

QuantizationConfig: TypeAlias = BitsAndBytesConfig | Int8CpuConfig

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    METHOD: {"activation_bits": 16},
}


def recipe(name: str, compute_dtype: torch.dtype | None = None) -> QuantizationConfig:
    """Return the config object of a recipe, to be used or changed like any other.

    - `int8` is LLM.int8 (https://arxiv.org/abs/2208.07339): weights *and* activations of 8 bits, multiplied as
      integers. A weight row and a token have a scale each; columns in which any token of the batch reaches 6 are
      multiplied in float16, so rows of a batch are not quite independent. On a CPU in training mode bitsandbytes
      quantizes weights alone.
    - `nf4` (https://arxiv.org/abs/2305.14314): weights alone, 4 bits on the quantiles of a normal distribution, with a
      float32 scale for 64 of them, 4.5 bits in all; products are computed in `compute_dtype`.
    - `nf4-double`: the same with scales of 8 bits, 4.13 bits in all.
    - `int8-cpu`: weights of 8 bits, activations of 16, for inference on a CPU: see [`Int8CpuConfig`].

    Args:
        name: a key of `RECIPES`.
        compute_dtype: of the products of nf4, best the dtype of the model; bfloat16 if left out.

    Returns:
        transformers' `BitsAndBytesConfig`, or for `int8-cpu` an [`Int8CpuConfig`].

    Raises:
        ValueError: an unknown name, or a compute dtype where integers are multiplied.
        ImportError: no bitsandbytes, where it is needed.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    options = dict(RECIPES[name])
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = compute_dtype or torch.bfloat16
    elif compute_dtype is not None:
        raise ValueError(f"{name!r} multiplies integers, got compute_dtype={compute_dtype}; leave it out")
    if name == METHOD:
        return Int8CpuConfig(**options)
    if not is_bitsandbytes_available():
        raise ImportError(f"the recipe {name!r} needs a recent bitsandbytes, found none; pip install -U bitsandbytes")
    return BitsAndBytesConfig(**options)


def resolve(recipe_or_config: str | QuantizationConfig, dtype: torch.dtype | None) -> QuantizationConfig:
    """Return the config of a recipe, with products in `dtype` where it has a choice; or the config that is given."""
    if isinstance(recipe_or_config, str):
        has_choice = "load_in_4bit" in RECIPES.get(recipe_or_config, {})
        return recipe(recipe_or_config, dtype if has_choice else None)
    is_bitsandbytes = isinstance(recipe_or_config, BitsAndBytesConfig) and recipe_or_config.is_quantizable()
    if not is_bitsandbytes and not isinstance(recipe_or_config, Int8CpuConfig):
        raise ValueError(
            f"the recipe must be one of {', '.join(RECIPES)}, a BitsAndBytesConfig of 4 or 8 bits or an Int8CpuConfig, "
            f"got {recipe_or_config!r}"
        )
    return recipe_or_config


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | None:
    """Return a floating dtype given by name (as configs have it) or as such."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be 'auto' or a floating dtype such as 'bfloat16', got {value!r}")
    return dtype


def quantized_layer(linear: nn.Linear, config: QuantizationConfig) -> nn.Module:
    """Quantize one linear layer, for inference, on the device it is on; the layer itself stays as it is."""
    if isinstance(config, Int8CpuConfig):
        return Int8Linear.from_linear(linear, config.activation_bits).to(linear.weight.device)
    import bitsandbytes

    layer: nn.Module
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if config.load_in_8bit:
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=config.llm_int8_threshold)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            *sizes,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
    keep_4bit_arrangement(layer)
    layer.load_state_dict({name: value.cpu() for name, value in linear.state_dict().items()})
    return layer.requires_grad_(False).to(linear.weight.device)  # which quantizes


def usable_device(config: QuantizationConfig, device: torch.device | str | None) -> torch.device:
    """Return the device, after a product with a small layer has shown that the recipe runs there.

    Raises:
        ValueError: it does not.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not isinstance(config, Int8CpuConfig) else "cpu"
    try:
        with torch.no_grad():
            linear = nn.Linear(64, 64).to(device)
            quantized_layer(linear, config)(torch.ones(1, 64, dtype=torch.float16, device=device)).tolist()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:  # torch has no single error for it
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the recipe does not run on the device {str(device)!r} here: {reason}; name another"
        ) from error
    return torch.device(device)


def disable_cpu_repacking(model: Any) -> Any:
    """Let 4-bit weights lie as they were loaded, in place.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) rearranges them when they are first used without gradients, for a
    kernel in bfloat16: faster for a few tokens, slower for many. Rearranged weights are saved wrongly, `dequantize()`
    makes nonsense of them, and no gradient flows through them, all in silence. So call this after loading, if the model
    is to be evaluated *and then* saved, dequantized or trained on such a CPU; elsewhere it changes nothing.

    Args:
        model (`PreTrainedModel`, or wrapped by peft): before it was used.

    Returns:
        the model.

    Raises:
        ValueError: weights that are rearranged already, which cannot be undone without loss.
    """
    refuse_repacked(model)
    keep_4bit_arrangement(model)
    return model


def refuse_repacked(model: Any) -> None:
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    count = sum(hasattr(state, "original_dtype") for state in states)  # remembered from the first time on
    if count:
        raise ValueError(
            f"expected 4-bit weights as they were loaded, got {count} that bitsandbytes rearranged, with loss, when "
            "the model was evaluated; load it again and call disable_cpu_repacking(model) before use, or merge the "
            "adapter from its saved folder"
        )
