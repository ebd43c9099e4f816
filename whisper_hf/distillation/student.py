"""Smaller students cut out of a trained teacher: fewer layers, narrower MLPs, fewer key-value heads.

What matters least on a few calibration tokens goes; what stays is copied bit for bit, so that distillation starts from
the teacher's own features. Shape legend: `B` batch, `T` tokens, `N` visible tokens of a batch.
"""

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import (
    Batches,
    calibration_batches,
    decoder_layers,
    mean_measures,
    most_important,
    refuse_unknown,
)
from ..checkpoint_io import load_causal_lm, load_config
from ..conversion import rebuild

# part of a layer -> its width in the config, in groups of features that go as a whole; its projections (last: outwards)
PARTS = {
    "mlp": ("intermediate_size", ("gate_proj", "up_proj", "down_proj")),
    "self_attn": ("num_key_value_heads", ("q_proj", "k_proj", "v_proj", "o_proj")),
}


def student_from(
    teacher: PreTrainedModel | str | os.PathLike,
    num_hidden_layers: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    intermediate_size: int | None = None,
    num_key_value_heads: int | None = None,
    calibration: Iterable | None = None,
    importance: str = "perplexity",
) -> PreTrainedModel:
    """Cut a smaller model of the same class out of a teacher; embeddings, final norm and head stay as they are.

    Layers go first. In what is left, each MLP keeps the channels with the largest mean absolute activation (Minitron,
    https://arxiv.org/abs/2407.14679), and each attention the key-value heads, with their query heads, whose output has
    the largest mean norm.

    Args:
        teacher: a causal language model with the layers of Llama (WhisperLM, Llama, Mistral, Qwen2, Qwen3 and their
            like), or a folder or Hub id of one. It is not changed, and shares no memory with the student.
        num_hidden_layers: how many layers to keep, chosen by `importance`; or else
        layers: which ones, as strictly increasing indices. Without either, all of them.
        intermediate_size: channels that each MLP keeps; all by default.
        num_key_value_heads: key-value heads that each layer keeps; all by default. The size of a head stays.
        calibration: what to measure on where there is a choice: an iterable of token ids, `[T]` or `[B, T]` int64
            tensors or lists, or of dicts with such `input_ids` and, against padding, an `attention_mask` (0: hidden).
        importance: `"perplexity"` removes one layer at a time, the one without which the cross-entropy is lowest
            (Shortened LLaMA, https://arxiv.org/abs/2402.02834, measured anew after each removal: one pass over the
            calibration for each layer that is left). `"block_influence"` removes the layers that turn the hidden
            states least (ShortGPT, https://arxiv.org/abs/2403.03853), in one pass altogether.

    Returns:
        The student in evaluation mode, on the teacher's device and in its dtype, with its generation config.

    Raises:
        ValueError: a teacher of another shape, quantized or spread over devices; sizes or indices out of range or
            beyond what its family can represent; missing or malformed calibration; an unknown importance.
    """
    refuse_unknown(importance)
    teacher = _loaded(teacher)
    depth = len(decoder_layers(teacher))
    if layers is not None and num_hidden_layers is not None:
        raise ValueError(f"got both num_hidden_layers={num_hidden_layers} and layers={list(layers)}; give one of them")
    kept = list(range(depth) if layers is None else layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
        raise ValueError(f"layers must be one or more strictly increasing indices below {depth}, got {kept}")
    count = _size("num_hidden_layers", num_hidden_layers, len(kept))
    _refuse_other_shapes(teacher)
    config = _student_config(teacher.config, kept, intermediate_size, num_key_value_heads)

    narrow = [part for part, (width, _) in PARTS.items() if getattr(config, width) < getattr(teacher.config, width)]
    batches = calibration_batches(calibration, teacher) if narrow or count < len(kept) else []
    if count < len(kept):
        kept = most_important(teacher, count, batches, importance)
        config = _student_config(teacher.config, kept, intermediate_size, num_key_value_heads)
    groups = {part: _largest_groups(teacher, kept, part, getattr(config, PARTS[part][0]), batches) for part in narrow}
    return rebuild(teacher, type(teacher), config, _weights(teacher, config, kept, groups)).eval()


def _largest_groups(model: PreTrainedModel, kept: list[int], part: str, count: int, batches: Batches) -> list[Tensor]:
    """For each kept layer return which groups of features to keep, `[count]` int64, in increasing order."""
    width, projections = PARTS[part]

    def norms(inputs: Tensor, _: Tensor) -> Tensor:  # [N, features] to [N, groups]; of one feature, the absolute value
        return inputs.unflatten(-1, (getattr(model.config, width), -1)).norm(dim=-1)

    layers = model.base_model.layers
    outwards = [layers[layer].get_submodule(f"{part}.{projections[-1]}") for layer in kept]
    means = mean_measures(model, outwards, norms, batches, skipped=sorted(set(range(len(layers))) - set(kept)))
    return [mean.argsort(descending=True, stable=True)[:count].sort().values for mean in means]


def _student_config(teacher: Any, kept: list[int], channels: int | None, heads: int | None) -> Any:
    """Return an adjusted copy of the teacher's config, checked as it will be when it is loaded."""
    config = copy.deepcopy(teacher)
    config.intermediate_size = _size("intermediate_size", channels, config.intermediate_size)
    heads = _size("num_key_value_heads", heads, config.num_key_value_heads)
    if heads < config.num_key_value_heads:
        # explicit: hidden_size // num_attention_heads will be another number
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.num_attention_heads = heads * (config.num_attention_heads // config.num_key_value_heads)
        config.num_key_value_heads = heads
    for name, value in list(vars(config).items()):
        # lists of one entry per layer, by name as well as by length: eos_token_id can be a list as long
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)
    try:
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(
            f"{type(config).__name__} cannot represent num_key_value_heads, got {heads} ({error.__cause__}); choose "
            "another number or convert the teacher with whisper_hf.from_dense first"
        ) from error
    return config


def _weights(teacher: PreTrainedModel, config: Any, kept: list[int], groups: dict[str, list[Tensor]]) -> dict:
    """Copy the student's state dict from the teacher's: layers renumbered, kept groups selected where it is smaller."""
    with torch.device("meta"):
        student = type(teacher)(config).state_dict()
    source, prefix = teacher.state_dict(), f"{teacher.base_model_prefix}.layers."
    weights = {}
    for name, smaller in student.items():
        layer, _, rest = name.removeprefix(prefix).partition(".")
        tensor = source[f"{prefix}{kept[int(layer)]}.{rest}" if name.startswith(prefix) else name]
        for dimension, size in enumerate(smaller.shape):
            if size < tensor.shape[dimension]:
                part = rest.split(".")[0]
                by_group = tensor.unflatten(dimension, (getattr(teacher.config, PARTS[part][0]), -1))
                tensor = by_group.index_select(dimension, groups[part][int(layer)]).flatten(dimension, dimension + 1)
        weights[name] = tensor.clone()
    return weights


def _size(name: str, value: int | None, maximum: int) -> int:
    if value is None:
        return maximum
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise ValueError(f"{name} must be an integer from 1 to {maximum} (the teacher's), got {value!r}")
    return value


def _loaded(teacher: PreTrainedModel | str | os.PathLike) -> PreTrainedModel:
    """Load a folder or Hub id in the dtype it was saved in; refuse quantized weights before they are loaded."""
    is_name = isinstance(teacher, str | os.PathLike)
    config = load_config(teacher) if is_name else getattr(teacher, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("got a teacher with a quantization_config; cut the full-precision one, quantize the student")
    return load_causal_lm(teacher, dtype="auto") if is_name else teacher


def _refuse_other_shapes(teacher: PreTrainedModel) -> None:
    devices = {str(parameter.device) for parameter in teacher.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise ValueError(f"the teacher must lie on one device, got {sorted(devices)}; load it so")
    missing = [width for width, _ in PARTS.values() if not isinstance(getattr(teacher.config, width, None), int)]
    projections = {f"{part}.{name}" for part, (_, names) in PARTS.items() for name in names}
    for index, layer in enumerate(teacher.base_model.layers):
        linear = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        missing += [f"layers.{index}.{name}" for name in sorted(projections - linear)]
    if missing:
        raise ValueError(f"the teacher must have Llama's layers, got none of {missing}; choose one of such a family")
