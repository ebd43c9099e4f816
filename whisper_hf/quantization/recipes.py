"""Named quantization recipes: their config objects, one quantized layer, and checks of devices and models."""

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
    """Return a new config object of a recipe, for `from_pretrained(..., quantization_config=...)`.

    - `int8` is LLM.int8 (https://arxiv.org/abs/2208.07339): weights *and* activations have 8 bits and are multiplied as
      integers. Each weight row and each token has a scale. Features in which any token of the batch reaches 6 are
      multiplied in float16, so the rows of a batch are not quite independent. On a CPU in training mode, bitsandbytes
      quantizes the weights only.
    - `nf4` (https://arxiv.org/abs/2305.14314): only the weights are quantized, to 4 bits at the quantiles of a normal
      distribution, with a float32 scale per 64 weights: 4.5 bits per weight. Products are computed in `compute_dtype`.
    - `nf4-double`: `nf4` with scales of 8 bits: 4.13 bits per weight.
    - `int8-cpu`: weights of 8 bits and activations of 16 bits, for inference on a CPU: see [`Int8CpuConfig`].

    Args:
        name: a key of `RECIPES`.
        compute_dtype: dtype of the products of nf4, best the dtype of the model; bfloat16 if left out.

    Returns:
        a `BitsAndBytesConfig` of transformers, or for `int8-cpu` an [`Int8CpuConfig`].

    Raises:
        ValueError: an unknown name, or a compute dtype for a recipe that multiplies integers.
        ImportError: bitsandbytes is needed and not installed.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}, or pass a config object")
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
    """Return the config of a recipe, or a config unchanged if it is one of the supported kinds.

    Args:
        recipe_or_config: a key of `RECIPES`, or a config.
        dtype: dtype of the products, for the recipes that have a choice.

    Raises:
        ValueError: an unknown name, or a config of another kind.
    """
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
    """Return the floating dtype that a name or a dtype stands for; `None` stays `None`.

    Raises:
        ValueError: an unknown name, or a dtype that is not a floating one.
    """
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype must be 'auto' or a floating dtype such as 'bfloat16', got {value!r}; leave it out for 'auto'"
        )
    return dtype


def quantized_layer(linear: nn.Linear, config: QuantizationConfig) -> nn.Module:
    """Return a quantized copy of a linear layer, for inference, on the same device; the layer does not change.

    Args:
        linear: `[..., I] -> [..., O]`, any floating dtype.
        config: how to quantize it.

    Returns:
        a layer `[..., I] -> [..., O]`.
    """
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
    return layer.requires_grad_(False).to(linear.weight.device)  # bitsandbytes quantizes in `.to()`


def usable_device(config: QuantizationConfig, device: torch.device | str | None) -> torch.device:
    """Return the device on which to quantize, after a small layer has shown that the recipe runs there.

    Args:
        config: how to quantize.
        device: the device, or `None` for the GPU, if there is one and the recipe runs on it, and else the CPU.

    Raises:
        ValueError: the recipe does not run on the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not isinstance(config, Int8CpuConfig) else "cpu"
    try:
        with torch.no_grad():
            linear = nn.Linear(64, 64).to(device)
            quantized_layer(linear, config)(torch.ones(1, 64, dtype=torch.float16, device=device)).tolist()
    except (
        RuntimeError,
        AssertionError,
        ValueError,
        NotImplementedError,
    ) as error:  # torch and bitsandbytes have no single error for this
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the recipe does not run on the device {str(device)!r} here: {reason}; choose another"
        ) from error
    return torch.device(device)


def disable_cpu_repacking(model: Any) -> Any:
    """Prevent bitsandbytes from rearranging the 4-bit weights of a model on a CPU, in place.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) rearranges 4-bit weights in the first forward pass without
    gradients, for a bfloat16 kernel that is faster for a few tokens and slower for many. Rearranged weights are saved
    wrongly, `dequantize()` returns wrong values, and no gradient flows through them, all without an error. Call this
    function after loading, if a model is to be evaluated *and then* saved, dequantized or trained on such a CPU. On
    other devices it has no effect.

    Args:
        model (`PreTrainedModel`, or a `PeftModel` around one): a model before its first forward pass.

    Returns:
        the same model.

    Raises:
        ValueError: weights that are rearranged already, which cannot be reversed without loss.
    """
    refuse_repacked(model)
    keep_4bit_arrangement(model)
    return model


def refuse_repacked(model: Any) -> None:
    """Raise a `ValueError` if bitsandbytes has rearranged 4-bit weights of the model.

    See [`disable_cpu_repacking`] for when it does so, and what goes wrong then.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    count = sum(
        hasattr(state, "original_dtype") for state in states
    )  # bitsandbytes adds this attribute when it rearranges
    if count:
        raise ValueError(
            f"expected 4-bit weights as they were loaded, got {count} that bitsandbytes rearranged, with loss, when "
            "the model was evaluated; load the model again and call disable_cpu_repacking(model) before its first "
            "forward pass, or merge the adapter from its saved folder"
        )
