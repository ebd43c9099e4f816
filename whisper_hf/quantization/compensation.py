"""LoRA adapters that start by making up for quantization, before anything is trained."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import calibration_batches, decoder_layers, mean_measures

if TYPE_CHECKING:
    from peft import PeftModel


def compensate(adapter: "PeftModel", original: PreTrainedModel, calibration: Iterable) -> "PeftModel":
    """Start an adapter on a quantized model as the best correction of its rank, in place.

    A layer's weight `W` became `Q`. Its adapter becomes the matrix `C` of rank `r` for which `(W - Q - C) x` is least
    in the mean square over calibration tokens, their features `x` taken as uncorrelated: the truncated singular value
    decomposition of `(W - Q) diag(rms(x))`, as in LQER (https://arxiv.org/abs/2402.02446) and QERA
    (https://arxiv.org/abs/2410.06040). Layers that are not quantized keep the adapter they have.

    Args:
        adapter: a new LoRA adapter of peft on the quantized model, one and active.
        original: the model before quantization.
        calibration: token ids, as in [`student_from`]; a thousand tokens suffice.

    Returns:
        the adapter.

    Raises:
        ValueError: an adapter that has been trained, is not LoRA, uses DoRA, or adapts nothing that is quantized; an
            original of other layers; or malformed calibration.
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
    """Return the layers to correct by their names in the base model."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(adapter, PeftModel) or not isinstance(adapter.active_peft_config, LoraConfig):
        raise ValueError(f"expected a LoRA adapter of peft, got {type(adapter).__name__}; see get_peft_model")
    if len(adapter.active_adapters) != 1 or adapter.active_peft_config.use_dora:
        raise ValueError(f"expected one active adapter, without DoRA, got {adapter.active_adapters}")
    (active,) = adapter.active_adapters
    layers: dict[str, Any] = {
        name: module
        for name, module in adapter.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and active in module.lora_A and _is_quantized(module.get_base_layer())
    }
    if not layers:
        raise ValueError("expected an adapter on quantized linear layers, got none; load the base in a recipe")
    trained = [name for name, module in layers.items() if module.lora_B[active].weight.any()]
    if trained:
        raise ValueError(f"expected a new adapter, which changes nothing, got one that does in {trained[0]}")
    return layers


def _is_quantized(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def _original_layer(modules: dict[str, nn.Module], name: str, layer: Any) -> nn.Linear:
    linear, sizes = modules.get(name), (layer.out_features, layer.in_features)
    if not isinstance(linear, nn.Linear) or _is_quantized(linear) or linear.weight.shape != sizes:
        raise ValueError(
            f"the original must have the full-precision linear layer {name} of shape {sizes}, got {linear}; pass the "
            "model from which the quantized one was made"
        )
    return linear


@torch.no_grad()
def _correct(layer: Any, weight: Tensor, scale: Tensor) -> None:
    """Let the adapter of a layer stand for the error of its weight, `[O, I]`; `scale`, `[I]`, float32, is the rms."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    (active,) = layer.active_adapters
    down, up = layer.lora_A[active].weight, layer.lora_B[active].weight  # [r, I], [O, r]
    base = layer.get_base_layer()
    quantized = dequantize_bnb_weight(base.weight, getattr(base, "state", None))
    error = weight.float() - quantized.to(weight.device).float()
    scale = scale.clamp_min(scale.max() * 1e-4)  # features that calibration never saw
    left, values, right = torch.linalg.svd(error * scale, full_matrices=False)
    rank = min(len(down), len(values))
    roots = values[:rank].div(layer.scaling[active]).sqrt()
    down[:rank] = roots[:, None] * right[:rank] / scale
    up[:, :rank] = left[:, :rank] * roots
