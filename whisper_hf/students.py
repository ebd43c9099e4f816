"""Smaller students cut out of a trained teacher: fewer layers, narrower MLPs, fewer key-value heads.

What matters least on a few calibration tokens goes; what stays is copied bit for bit, so that distillation starts from
the teacher's own features. Shape legend: `B` batch, `T` tokens, `N` visible tokens of a batch.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .conversion import _rebuild

Batches = list[dict[str, Tensor]]  # of `input_ids`, `attention_mask` and `labels`, each `[B, T]` int64
Measure = Callable[[Tensor, Tensor], Tensor]  # of a module's input and output, `[N, ...]` float32, for each token

IMPORTANCES = ("perplexity", "block_influence")
REMEDY = "pass a list of token id tensors, [T] or [B, T] int64, or of dicts of input_ids and attention_mask"

# part of a layer -> its width in the config, in groups of features that go as a whole; its projections (last: outwards)
PARTS = {
    "mlp": ("intermediate_size", ("gate_proj", "up_proj", "down_proj")),
    "self_attn": ("num_key_value_heads", ("q_proj", "k_proj", "v_proj", "o_proj")),
}

# no cache, where skipped layers would leave holes; no hidden states, for which transformers hooks the layers it finds
QUIET = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}


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
    _refuse_unknown(importance)
    teacher = _loaded(teacher)
    depth = len(_decoder_layers(teacher))
    if layers is not None and num_hidden_layers is not None:
        raise ValueError(f"got both num_hidden_layers={num_hidden_layers} and layers={list(layers)}; give one of them")
    kept = list(range(depth) if layers is None else layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
        raise ValueError(f"layers must be one or more strictly increasing indices below {depth}, got {kept}")
    count = _size("num_hidden_layers", num_hidden_layers, len(kept))
    _refuse_other_shapes(teacher)
    config = _student_config(teacher.config, kept, intermediate_size, num_key_value_heads)

    narrow = [part for part, (width, _) in PARTS.items() if getattr(config, width) < getattr(teacher.config, width)]
    batches = _batches(calibration, teacher) if narrow or count < len(kept) else []
    if count < len(kept):
        kept = _most_important(teacher, count, batches, importance)
        config = _student_config(teacher.config, kept, intermediate_size, num_key_value_heads)
    groups = {part: _largest_groups(teacher, kept, part, getattr(config, PARTS[part][0]), batches) for part in narrow}
    return _rebuild(teacher, type(teacher), config, _weights(teacher, config, kept, groups)).eval()


def layer_importance(model: PreTrainedModel, calibration: Iterable, importance: str = "perplexity") -> list[float]:
    """Measure how much each layer of a causal language model matters while all others are in place.

    Args:
        model: the model, possibly quantized, with its decoder layers in `base_model.layers`. It is not changed.
        calibration: token ids, as in [`student_from`].
        importance: the measure, as in [`student_from`].

    Returns:
        One value per layer. `"perplexity"`: by how much the mean next-token cross-entropy rises without the layer, in
        nats per token (negative where the model is better off). `"block_influence"`: one minus the mean cosine
        similarity of the hidden states before and after the layer, a ratio in [0, 2].

    Raises:
        ValueError: a model without such layers or without a head, malformed calibration, or an unknown importance.
    """
    _refuse_unknown(importance)
    layers = _decoder_layers(model)
    batches = _batches(calibration, model)
    if importance == "block_influence":
        similarities = _means(model, layers, partial(functional.cosine_similarity, dim=-1), batches, skipped=())
        return [1.0 - similarity.item() for similarity in similarities]
    whole = _cross_entropy(model, batches)
    return [_cross_entropy(model, batches, [layer]) - whole for layer in range(len(layers))]


def _most_important(model: PreTrainedModel, count: int, batches: Batches, importance: str) -> list[int]:
    """Return the indices of the `count` layers to keep, in increasing order."""
    kept = list(range(len(model.base_model.layers)))
    if importance == "block_influence":
        influences = layer_importance(model, batches, importance)
        return sorted(sorted(kept, key=influences.__getitem__)[-count:])
    removed: list[int] = []
    while len(kept) > count:
        without = [_cross_entropy(model, batches, [*removed, layer]) for layer in kept]
        removed.append(kept.pop(without.index(min(without))))
    return kept


def _cross_entropy(model: PreTrainedModel, batches: Batches, skipped: Sequence[int] = ()) -> float:
    """Return the mean cross-entropy of the labels in nats, with some layers skipped."""
    total, count = 0.0, 0
    with _measuring(model, skipped):
        for batch in batches:
            targets = int((batch["labels"] >= 0).sum())
            total += targets * model(**batch, **QUIET).loss.item() if targets else 0.0
            count += targets
    if not total < float("inf"):
        raise ValueError(f"the cross-entropy on the calibration must be finite, got {total}; load a wider dtype")
    return total / count


def _largest_groups(model: PreTrainedModel, kept: list[int], part: str, count: int, batches: Batches) -> list[Tensor]:
    """For each kept layer return which groups of features to keep, `[count]` int64, in increasing order."""
    width, projections = PARTS[part]

    def norms(inputs: Tensor, _: Tensor) -> Tensor:  # [N, features] to [N, groups]; of one feature, the absolute value
        return inputs.unflatten(-1, (getattr(model.config, width), -1)).norm(dim=-1)

    layers = model.base_model.layers
    outwards = [layers[layer].get_submodule(f"{part}.{projections[-1]}") for layer in kept]
    means = _means(model, outwards, norms, batches, skipped=sorted(set(range(len(layers))) - set(kept)))
    return [mean.argsort(descending=True, stable=True)[:count].sort().values for mean in means]


def _means(
    model: PreTrainedModel, modules: Iterable[nn.Module], measure: Measure, batches: Batches, skipped: Sequence[int]
) -> list[Tensor]:
    """Average the measure of each module over all visible tokens, with some layers skipped."""
    sums: dict[int, Any] = {}

    def add(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # selected, not multiplied by the mask: what padding holds may not even be a number
        sums[index] = sums.get(index, 0.0) + measure(inputs[0][visible].float(), output[visible].float()).sum(0)

    with _measuring(model, skipped), ExitStack() as hooks:
        for index, module in enumerate(modules):
            hooks.enter_context(module.register_forward_hook(partial(add, index)))
        for batch in batches:
            visible = batch["attention_mask"].bool()
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **QUIET)
    count = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return [sums[index] / count for index in sorted(sums)]


class _Skip(nn.Module):
    """Stands in for a layer, so that those after it keep their index and with it their type in the config."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@contextmanager
def _measuring(model: PreTrainedModel, skipped: Sequence[int]) -> Iterator[None]:
    """Run without some layers, without gradients and in evaluation mode, and leave the model as it was."""
    layers = model.base_model.layers
    removed = {layer: layers[layer] for layer in skipped}
    training = [module for module in model.modules() if module.training]  # parts of it may not be
    try:
        model.eval()
        for layer in removed:
            layers[layer] = _Skip()
        with torch.no_grad():
            yield
    finally:
        for layer, module in removed.items():
            layers[layer] = module
        for module in training:
            module.training = True


def _batches(calibration: Iterable | None, model: PreTrainedModel) -> Batches:
    """Check the calibration and bring it into one form, on the model's device."""
    if calibration is None or isinstance(calibration, str | Mapping):
        raise ValueError(f"choosing what to keep needs calibration, got {type(calibration).__name__}; {REMEDY}")
    batches = []
    for item in calibration:
        ids, mask = (item.get("input_ids"), item.get("attention_mask")) if isinstance(item, Mapping) else (item, None)
        try:
            ids = torch.atleast_2d(torch.as_tensor(ids, device=model.device))
            mask = torch.atleast_2d(torch.as_tensor(torch.ones_like(ids) if mask is None else mask, device=ids.device))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"calibration must hold token ids, got {type(item).__name__}: {error}; {REMEDY}"
            ) from error
        if ids.is_floating_point() or ids.dim() != 2 or not ids.numel() or mask.shape != ids.shape:
            got = f"{ids.dtype} {list(ids.shape)} with a mask {list(mask.shape)}"
            raise ValueError(f"calibration must hold integers in one or two dimensions, got {got}; {REMEDY}")
        if ids.min() < 0 or ids.max() >= model.config.vocab_size:
            got = f"{ids.min()} to {ids.max()}; use the model's own tokenizer"
            raise ValueError(f"calibration must hold ids below vocab_size={model.config.vocab_size}, got {got}")
        visible = (mask != 0).long()
        is_target = functional.pad(visible[:, 1:] * visible[:, :-1], (1, 0)).bool()  # a hidden token predicts nothing
        labels = ids.long().masked_fill(~is_target, -100)
        batches.append({"input_ids": ids.long(), "attention_mask": visible, "labels": labels})
    if not any((batch["labels"] >= 0).any() for batch in batches):
        raise ValueError(f"calibration must hold two visible tokens in a row, got {len(batches)} items; {REMEDY}")
    return batches


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
    config = AutoConfig.from_pretrained(teacher) if is_name else getattr(teacher, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("got a teacher with a quantization_config; cut the full-precision one, quantize the student")
    return AutoModelForCausalLM.from_pretrained(teacher, dtype="auto") if is_name else teacher


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    is_model = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    layers = getattr(model.base_model, "layers", None) if is_model else None
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            "the model must be a causal language model with base_model.layers, such as LlamaForCausalLM, got "
            f"{type(model).__name__}; load it with AutoModelForCausalLM and merge adapters first"
        )
    return layers


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


def _refuse_unknown(importance: str) -> None:
    if importance not in IMPORTANCES:
        raise ValueError(f"unknown importance, got {importance!r}; choose one of {list(IMPORTANCES)}")
