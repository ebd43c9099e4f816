"""Cut a smaller student model out of a trained teacher: fewer layers, narrower MLPs, fewer key-value heads.

The parts that matter least on a few calibration tokens are removed. The other weights are copied bit for bit, so that
distillation starts from the teacher's own features.

Legend: `B` rows of `T` tokens, `N` visible tokens of a batch.
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

# For each part of a layer: the config field with its width, which counts groups of features that are kept or removed
# together, and its projections, of which the last one leads out of the part
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
    """Cut a smaller model of the same class out of a teacher, and keep its embeddings, final norm and head.

    Layers are removed first. In each layer that is left, the MLP keeps the channels with the largest mean absolute
    activation (Minitron, https://arxiv.org/abs/2407.14679). The attention keeps the key-value heads whose output has
    the largest mean norm, together with their query heads.

    Args:
        teacher: a causal language model with Llama's layers (WhisperLM, Llama, Mistral, Qwen2, Qwen3 and similar
            families), or the folder or Hub id of one. It is not changed, and the student shares no memory with it.
        num_hidden_layers: how many layers to keep; `importance` chooses them.
        layers: which layers to keep, as strictly increasing indices. It excludes `num_hidden_layers`; without either,
            all layers are kept.
        intermediate_size: the number of channels that each MLP keeps; by default all.
        num_key_value_heads: the number of key-value heads that each layer keeps; by default all. The size of a head
            does not change.
        calibration: the texts to measure on, needed if there is a choice. An iterable of token ids, as int64 tensors or
            lists of shape `[T]` or `[B, T]`, or of dicts with these as `input_ids` and an optional `attention_mask` (0
            hides padding).
        importance: how to choose layers. `"perplexity"` removes the layer without which the cross-entropy is lowest,
            and repeats this (Shortened LLaMA, https://arxiv.org/abs/2402.02834). Each removal costs one pass over the
            calibration per layer that is left. `"block_influence"` removes the layers that change the direction of the
            hidden states least (ShortGPT, https://arxiv.org/abs/2403.03853), which costs one pass in total.

    Returns:
        The student in evaluation mode, on the teacher's device and in its dtype, with the teacher's generation config.

    Raises:
        ValueError: a teacher without Llama's layers, quantized, or on several devices; sizes or indices that are out of
            range or that the teacher's family cannot represent; missing or malformed calibration; an unknown
            importance.
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
    """Find the groups of features with the largest mean norm in each kept layer.

    Returns:
        for each kept layer the indices of `count` groups, `[count]` int64, in increasing order.
    """
    width, projections = PARTS[part]

    def norms(inputs: Tensor, _: Tensor) -> Tensor:
        """Compute the norm of each group, from `[N, features]` to `[N, groups]`."""
        return inputs.unflatten(-1, (getattr(model.config, width), -1)).norm(dim=-1)

    layers = model.base_model.layers
    outwards = [layers[layer].get_submodule(f"{part}.{projections[-1]}") for layer in kept]
    means = mean_measures(model, outwards, norms, batches, skipped=sorted(set(range(len(layers))) - set(kept)))
    return [mean.argsort(descending=True, stable=True)[:count].sort().values for mean in means]


def _student_config(teacher: Any, kept: list[int], channels: int | None, heads: int | None) -> Any:
    """Copy the teacher's config, adjust it to the student's sizes, and validate it as loading will."""
    config = copy.deepcopy(teacher)
    config.intermediate_size = _size("intermediate_size", channels, config.intermediate_size)
    heads = _size("num_key_value_heads", heads, config.num_key_value_heads)
    if heads < config.num_key_value_heads:
        # `head_dim` must be explicit, because `hidden_size // num_attention_heads` changes
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.num_attention_heads = heads * (config.num_attention_heads // config.num_key_value_heads)
        config.num_key_value_heads = heads
    for name, value in list(vars(config).items()):
        # lists with one entry per layer; the length is not enough, because `eos_token_id` may be a list as long
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
    """Copy the student's weights from the teacher: renumber the layers, and select kept groups in smaller tensors."""
    with torch.device("meta"):
        student = type(teacher)(config).state_dict()
    source = teacher.state_dict()
    prefix = f"{teacher.base_model_prefix}.layers."
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
    """Validate a size of the student; `None` stands for the teacher's."""
    if value is None:
        return maximum
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise ValueError(f"{name} must be an integer from 1 to {maximum} (the teacher's), got {value!r}")
    return value


def _loaded(teacher: PreTrainedModel | str | os.PathLike) -> PreTrainedModel:
    """Load a teacher that is given by name, in its saved dtype; refuse a quantized one before its weights are read."""
    is_name = isinstance(teacher, str | os.PathLike)
    config = load_config(teacher) if is_name else getattr(teacher, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "the teacher must not be quantized, got one with a quantization_config; cut the full-precision teacher, "
            "and quantize the student"
        )
    return load_causal_lm(teacher, dtype="auto") if is_name else teacher


def _refuse_other_shapes(teacher: PreTrainedModel) -> None:
    """Raise a `ValueError` for a teacher on several devices or without Llama's layers."""
    devices = {str(parameter.device) for parameter in teacher.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise ValueError(f"the teacher must lie on one device, got {sorted(devices)}; load it without a device_map")
    missing = [width for width, _ in PARTS.values() if not isinstance(getattr(teacher.config, width, None), int)]
    projections = {f"{part}.{name}" for part, (_, names) in PARTS.items() for name in names}
    for index, layer in enumerate(teacher.base_model.layers):
        linear = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        missing += [f"layers.{index}.{name}" for name in sorted(projections - linear)]
    if missing:
        raise ValueError(
            f"the teacher must have Llama's layers, got a {type(teacher).__name__} without {missing}; choose a Llama, "
            "Mistral, Qwen2, Qwen3 or WhisperLM"
        )
