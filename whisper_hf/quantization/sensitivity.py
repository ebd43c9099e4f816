"""Measure which layers lose most when they are quantized, and leave those in full precision."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .int8_cpu import Int8CpuConfig, unconverted_modules
from .recipes import QuantizationConfig, quantized_layer
from .report import divergence, logits


def layer_divergences(model: PreTrainedModel, config: QuantizationConfig, input_ids: Tensor) -> dict[str, float]:
    """Measure how far a model's predictions change when only one linear layer is quantized, for each layer in turn.

    It takes one forward pass per layer.

    Args:
        model: a model in full precision, on a device where the config runs. It is not changed.
        config: how to quantize; layers that it leaves in full precision are not measured.
        input_ids: `[1, T]`, int64, the tokens of a text to measure on; a few hundred suffice.

    Returns:
        for each layer, by name, the mean of `KL(predictions of the model || predictions with this layer quantized)`, in
        nats per token.

    Raises:
        ValueError: the model has no linear layer to quantize.
    """
    skipped = kept_modules(model, config)
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, skipped)
    }
    if not layers:
        raise ValueError(
            f"expected nn.Linear layers to measure, got none in {type(model).__name__} outside {skipped}; skip fewer"
        )
    before = logits(model, input_ids)
    divergences = {}
    for name, linear in logging.tqdm(layers.items(), desc="measuring layers"):
        with torch.no_grad():
            model.set_submodule(name, quantized_layer(linear, config))
        try:
            divergences[name] = divergence(before, logits(model, input_ids))
        finally:
            model.set_submodule(name, linear)
    return divergences


def most_sensitive(model: PreTrainedModel, divergences: dict[str, float], share: float) -> list[str]:
    """Choose the layers with the largest divergence per weight, up to a share of all weights.

    Args:
        model: the model that was measured.
        divergences: the result of [`layer_divergences`], in nats per token.
        share: largest share of the weights of the measured layers that the chosen ones may hold, in [0, 1).

    Returns:
        the names of the chosen layers, the most sensitive first.

    Raises:
        ValueError: a share outside its range.
    """
    check_share(share)
    sizes = {name: model.get_submodule(name).weight.numel() for name in divergences}
    left = share * sum(sizes.values())
    chosen = []
    for name in sorted(sizes, key=lambda name: divergences[name] / sizes[name], reverse=True):
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return chosen


def check_share(share: float) -> None:
    """Raise a `ValueError` for a share of the weights that is not in [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"the share of weights to keep must be at least 0 and below 1, got {share}; 0.05 is 5 %")


def kept_modules(model: PreTrainedModel, config: QuantizationConfig) -> list[str]:
    """Return the names of the modules of a model that a config leaves in full precision."""
    if isinstance(config, Int8CpuConfig):
        return unconverted_modules(model, config)
    skipped = config.llm_int8_skip_modules
    return sorted(HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules))


def keep_layers(model: PreTrainedModel, config: QuantizationConfig, names: list[str]) -> None:
    """Change a config such that it leaves further layers of a model in full precision, in place."""
    if isinstance(config, Int8CpuConfig):
        config.modules_to_not_convert = [*config.modules_to_not_convert, *names]
    else:
        config.llm_int8_skip_modules = [*kept_modules(model, config), *names]
