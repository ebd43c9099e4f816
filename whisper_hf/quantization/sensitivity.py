"""Which layers lose most when they are quantized: measured, so that they can stay in high precision."""

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
    """Measure what quantizing each linear layer alone does to a model's predictions.

    It takes one forward pass for each layer.

    Args:
        model: in full precision, on a device where the config runs. It is not changed.
        config: how to quantize; layers that it keeps are left out.
        input_ids: `[1, T]`, int64, a text to measure on; a few hundred tokens suffice.

    Returns:
        by name of the layer, the mean KL divergence of its predictions from the model's, in nats per token.

    Raises:
        ValueError: no linear layer.
    """
    skipped = kept_modules(model, config)
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, skipped)
    }
    if not layers:
        raise ValueError(f"expected nn.Linear layers to measure, got none in {type(model).__name__} outside {skipped}")
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
    """Choose the layers that lose most for each of their weights, as long as they hold no more than a share of all.

    Args:
        model: the model that was measured.
        divergences: what [`layer_divergences`] returned.
        share: of the weights in these layers, in [0, 1).

    Returns:
        names, the most sensitive first.

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
    """Refuse what is no share of the weights."""
    if not 0 <= share < 1:
        raise ValueError(f"the share of weights to keep must be at least 0 and below 1, got {share}")


def kept_modules(model: PreTrainedModel, config: QuantizationConfig) -> list[str]:
    """Return the names of modules that a config leaves as they are in this model."""
    if isinstance(config, Int8CpuConfig):
        return unconverted_modules(model, config)
    skipped = config.llm_int8_skip_modules
    return sorted(HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules))


def keep_layers(model: PreTrainedModel, config: QuantizationConfig, names: list[str]) -> None:
    """Let a config leave more layers as they are, in place."""
    if isinstance(config, Int8CpuConfig):
        config.modules_to_not_convert = [*config.modules_to_not_convert, *names]
    else:
        config.llm_int8_skip_modules = [*kept_modules(model, config), *names]
