"""Initialise a LoRA adapter such that it corrects the errors of a quantized model, before any training.

Legend: `O` output features, `I` input features, `r` rank of the adapter.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import calibration_batches, decoder_layers, mean_measures

if TYPE_CHECKING:
    from peft import PeftModel


def compensate(adapter: "PeftModel", original: PreTrainedModel, calibration: Iterable) -> "PeftModel":
    """Initialise a LoRA adapter on a quantized model as the best correction of its rank, in place.

    Let `W` be the weight of a layer before quantization and `Q` the weight after it, both `[O, I]`. Let `x` be the
    layer's inputs on the calibration tokens. The adapter of the layer becomes

        C = argmin mean_x |(W - Q - C) x|^2  over the matrices of rank r.

    The features of `x` are assumed to be uncorrelated. Then `C` is the truncated singular value decomposition of
    `(W - Q) diag(rms(x))`, times `diag(rms(x))^-1`, as in LQER (https://arxiv.org/abs/2402.02446) and QERA
    (https://arxiv.org/abs/2410.06040). Adapters on layers that are not quantized do not change.

    Args:
        adapter: a new LoRA adapter of peft on the quantized model; it must be the only active one.
        original: the model before quantization.
        calibration: token ids, as in [`student_from`]; a thousand tokens suffice.

    Returns:
        the same adapter.

    Raises:
        ValueError: an adapter that has been trained, is not LoRA, uses DoRA, or is on no quantized layer; an original
            whose layers have other names or shapes; or malformed calibration tokens.
    """
    decoder_layers(original)
    layers = _quantized_lora_layers(adapter)
    modules = dict(original.named_modules())
    linears = [_original_layer(modules, name, layer) for name, layer in layers.items()]
    batches = calibration_batches(calibration, original)
    squares = mean_measures(original, linears, lambda inputs, _: inputs.square(), batches, skipped=())
    for layer, linear, square in zip(layers.values(), linears, squares, strict=True):
        _correct(layer, linear.weight, square.sqrt())
    return adapter


def _quantized_lora_layers(adapter: Any) -> dict[str, Any]:
    """Return the quantized layers with a LoRA adapter, by their names in the base model."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(adapter, PeftModel) or not isinstance(adapter.active_peft_config, LoraConfig):
        raise ValueError(f"expected a LoRA adapter of peft, got {type(adapter).__name__}; make one by get_peft_model")
    if len(adapter.active_adapters) != 1 or adapter.active_peft_config.use_dora:
        raise ValueError(
            f"expected one active adapter, without DoRA, got {adapter.active_adapters} with "
            f"use_dora={adapter.active_peft_config.use_dora}; make a new one by get_peft_model"
        )
    (active,) = adapter.active_adapters
    layers: dict[str, Any] = {
        name: module
        for name, module in adapter.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and active in module.lora_A and _is_quantized(module.get_base_layer())
    }
    if not layers:
        raise ValueError("expected an adapter on quantized linear layers, got none; load the base with a recipe")
    trained = [name for name, module in layers.items() if module.lora_B[active].weight.any()]
    if trained:
        raise ValueError(
            f"expected a new adapter, whose lora_B is zero, got one that was trained in {trained[0]}; make a new one "
            "by get_peft_model"
        )
    return layers


def _is_quantized(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is stored as integers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def _original_layer(modules: dict[str, nn.Module], name: str, layer: Any) -> nn.Linear:
    """Return the full-precision linear layer from which a quantized layer was made."""
    linear = modules.get(name)
    sizes = (layer.out_features, layer.in_features)
    if not isinstance(linear, nn.Linear) or _is_quantized(linear) or linear.weight.shape != sizes:
        raise ValueError(
            f"the original must have the full-precision linear layer {name} of shape {sizes}, got {linear}; pass the "
            "model from which the quantized one was made"
        )
    return linear


@torch.no_grad()
def _correct(layer: Any, weight: Tensor, scale: Tensor) -> None:
    """Set the adapter of a quantized layer to the best correction of its weight, in place.

    Args:
        layer: the quantized layer with its LoRA adapter.
        weight: `[O, I]`, the weight before quantization.
        scale: `[I]`, float32, the root mean square of each input feature.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    (active,) = layer.active_adapters
    down = layer.lora_A[active].weight  # [r, I]
    up = layer.lora_B[active].weight  # [O, r]
    base = layer.get_base_layer()
    quantized = dequantize_bnb_weight(base.weight, getattr(base, "state", None))
    error = weight.float() - quantized.to(weight.device).float()
    scale = scale.clamp_min(
        scale.max() * 1e-4
    )  # a feature that is zero in the calibration tokens must not divide by zero
    left, values, right = torch.linalg.svd(error * scale, full_matrices=False)
    rank = min(len(down), len(values))
    roots = values[:rank].div(layer.scaling[active]).sqrt()
    down[:rank] = roots[:, None] * right[:rank] / scale
    up[:, :rank] = left[:, :rank] * roots
