"""Measure a quantized model: the bytes of its weights, and how far its predictions are from the original's.

Shape legend: `T` tokens, `V` vocabulary.
"""

import re
from collections.abc import Iterable
from logging import LogRecord, getLogger
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from .int8_linear import Int8Linear


def _quantized_modules(model: Any) -> dict[str, Any]:
    """Return the quantized layers of a model by name, of this package and of bitsandbytes."""
    kinds: tuple[type, ...] = (Int8Linear,)
    if is_bitsandbytes_available():
        import bitsandbytes

        kinds += (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def linear_weights(model: PreTrainedModel, sensitive: Iterable[str] = ()) -> dict[str, Any]:
    """Count the weights in a model's linear layers, and their bytes before and after quantization.

    The layers counted are the quantized ones, with the tensors that are needed to dequantize them (scales, code books),
    and the sensitive ones. Biases are not counted.

    Args:
        model: a quantized model.
        sensitive: names of linear layers that were left in full precision on purpose.

    Returns:
        `layers` and `weights` (counts), `dtype_before` (the dtype of the rest of the model), `bytes_before` (in that
        dtype), `bytes_after`, and the shares of bytes `ratio` (of `bytes_before`) and `ratio_to_float32`.

    Raises:
        ValueError: no quantized layer, or a layer that could not be quantized because it shares its weights.
    """
    modules = _quantized_modules(model)
    if not modules:
        raise ValueError(
            f"the recipes quantize linear layers, got none to quantize in {type(model).__name__}; skip fewer layers"
        )
    shared = [name for name, module in modules.items() if module.weight.is_floating_point()]
    if shared:
        raise ValueError(
            f"the layers {shared} share their weights with embeddings and cannot be quantized; name them in "
            "llm_int8_skip_modules, which replaces the default list of layers to leave in full precision"
        )
    modules |= {name: model.get_submodule(name) for name in sensitive}
    weights = sum(module.in_features * module.out_features for module in modules.values())
    tensors = [entry for module in modules.values() for entry in module.state_dict().items()]
    before = weights * model.dtype.itemsize
    after = sum(tensor.nbytes for name, tensor in tensors if name != "bias")
    return {
        "layers": len(modules),
        "weights": weights,
        "dtype_before": _dtype_name(model.dtype),
        "bytes_before": before,
        "bytes_after": after,
        "ratio": after / before,
        "ratio_to_float32": after / (4 * weights),
    }


def kept(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Describe the parameters of a model that are not quantized: their number, dtype and bytes, by name.

    In the names, `*` stands for any layer number. A tied head has 0 bytes, as the embedding counts them.
    """
    quantized = _quantized_modules(model)
    described: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, own_name = name.rpartition(".")
        if module not in quantized or own_name == "bias":
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            new = {"parameters": 0, "dtype": _dtype_name(parameter.dtype), "bytes": 0}
            entry = described.setdefault(pattern, new)
            entry["parameters"] += parameter.numel()
            entry["bytes"] += 0 if id(parameter) in seen else parameter.nbytes
            seen.add(id(parameter))
    return described


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute a model's logits in evaluation mode, `[T, V]` float32 on the CPU, for `ids` `[1, T]` int64."""

    def is_wanted(record: LogRecord) -> bool:  # bitsandbytes repeats in each of hundreds of calls that int8 casts
        return "inputs will be cast" not in str(record.msg)

    bitsandbytes_logger = getLogger("bitsandbytes.autograd._functions")
    bitsandbytes_logger.addFilter(is_wanted)
    try:
        return model.eval()(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu()
    finally:
        bitsandbytes_logger.removeFilter(is_wanted)


def compare(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Compare the logits `[T, V]`, float32, of a model before and after quantization.

    Returns:
        `tokens` (T), `kl_nats_per_token` (see [`divergence`]), `max_abs_logit_difference`, and `same_likeliest_token`
        (share of tokens in [0, 1] at which both have the largest logit at the same entry).
    """
    return {
        "tokens": len(before),
        "kl_nats_per_token": divergence(before, after),
        "max_abs_logit_difference": (before - after).abs().max().item(),
        "same_likeliest_token": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
    }


def divergence(before: Tensor, after: Tensor) -> float:
    """Return the mean over tokens of `KL(softmax(before) || softmax(after))`, in nats, from logits `[T, V]`."""
    wanted, got = before.log_softmax(-1), after.log_softmax(-1)
    return kl_div(got, wanted, log_target=True, reduction="sum").item() / len(before)
