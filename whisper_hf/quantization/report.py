"""What a quantized model holds, and how far it is from the model it was made from."""

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
    kinds: tuple[type, ...] = (Int8Linear,)
    if is_bitsandbytes_available():
        import bitsandbytes

        kinds += (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def linear_weights(model: PreTrainedModel, sensitive: Iterable[str] = ()) -> dict[str, Any]:
    """Count the weights in linear layers, and their bytes in the dtype of the rest of the model and as they are now.

    Linear layers are the quantized ones, with what it takes to interpret them (scales, code books), and the sensitive
    ones, which are not quantized. Biases do not count.

    Raises:
        ValueError: no quantized layer, or one that is not quantized after all since it shares its weights.
    """
    modules = _quantized_modules(model)
    if not modules:
        raise ValueError(f"the recipes quantize linear layers, got none to quantize in {type(model).__name__}")
    shared = [name for name, module in modules.items() if module.weight.is_floating_point()]
    if shared:
        raise ValueError(
            f"the layers {shared} share their weights with embeddings and cannot be quantized; name them in "
            "llm_int8_skip_modules, which takes the place of the default list"
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
    """Describe the parameters that are not quantized, `*` standing for layer numbers: how many, dtype, bytes.

    A tied head counts no bytes of its own.
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
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return logits `[T, V]`, float32, of `ids` `[1, T]`."""

    def is_new(record: LogRecord) -> bool:  # of hundreds of calls, each says that int8 casts to float16
        return "inputs will be cast" not in str(record.msg)

    bitsandbytes_logger = getLogger("bitsandbytes.autograd._functions")
    bitsandbytes_logger.addFilter(is_new)
    try:
        return model.eval()(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu()
    finally:
        bitsandbytes_logger.removeFilter(is_new)


def compare(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Compare logits `[T, V]`, float32, before and after quantization."""
    return {
        "tokens": len(before),
        "kl_nats_per_token": divergence(before, after),
        "max_abs_logit_difference": (before - after).abs().max().item(),
        "same_likeliest_token": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
    }


def divergence(before: Tensor, after: Tensor) -> float:
    """Return the mean KL divergence of the predictions of `after` from those of `before`, in nats per token."""
    wanted, got = before.log_softmax(-1), after.log_softmax(-1)
    return kl_div(got, wanted, log_target=True, reduction="sum").item() / len(before)
