"""Measure on a few calibration tokens which layers of a model, and which features in them, matter most.

Legend: `B` rows of `T` tokens, `N` visible tokens of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .model.labels import IGNORED

Batches = list[dict[str, Tensor]]  # each with `input_ids`, `attention_mask` and `labels`, `[B, T]` int64
Measure = Callable[[Tensor, Tensor], Tensor]  # from a module's input and output, `[N, ...]` float32, to `[N, ...]`

IMPORTANCES = ("perplexity", "block_influence")
REMEDY = "pass a list of token id tensors, [T] or [B, T] int64, or of dicts of input_ids and attention_mask"

# No cache, because skipped layers would leave gaps in it; no hidden states, because transformers hooks layers for them
QUIET = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}


def layer_importance(model: PreTrainedModel, calibration: Iterable, importance: str = "perplexity") -> list[float]:
    """Measure how much each layer of a causal language model matters while all other layers are in place.

    Args:
        model: the model, possibly quantized, with its decoder layers in `base_model.layers`. It is not changed.
        calibration: the texts to measure on, as token ids in the form that [`student_from`] takes.
        importance: the measure, `"perplexity"` or `"block_influence"`.

    Returns:
        One value per layer. `"perplexity"`: the rise of the mean next-token cross-entropy without the layer, in nats
        per token; it is negative if the model is better without the layer (Shortened LLaMA,
        https://arxiv.org/abs/2402.02834). `"block_influence"`: one minus the mean cosine similarity of the hidden
        states before and after the layer, a ratio in [0, 2] (ShortGPT, https://arxiv.org/abs/2403.03853).

    Raises:
        ValueError: a model without decoder layers or without a head, malformed calibration, or an unknown importance.
    """
    refuse_unknown(importance)
    layers = decoder_layers(model)
    batches = calibration_batches(calibration, model)
    if importance == "block_influence":
        similarities = mean_measures(model, layers, partial(functional.cosine_similarity, dim=-1), batches, skipped=())
        return [1.0 - similarity.item() for similarity in similarities]
    whole = _cross_entropy(model, batches)
    return [_cross_entropy(model, batches, [layer]) - whole for layer in range(len(layers))]


def most_important(model: PreTrainedModel, count: int, batches: Batches, importance: str) -> list[int]:
    """Choose the `count` most important layers of a model, and return their indices in increasing order.

    Args:
        model: a causal language model; it is not changed.
        count: how many layers to keep.
        batches: from [`calibration_batches`].
        importance: as in [`student_from`]. `"perplexity"` measures again after each removed layer.
    """
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
    """Compute the mean cross-entropy of the labels, in nats per token, with some layers skipped."""
    total = 0.0
    count = 0
    with _measuring(model, skipped):
        for batch in batches:
            targets = int((batch["labels"] >= 0).sum())
            total += targets * model(**batch, **QUIET).loss.item() if targets else 0.0
            count += targets
    if not total < float("inf"):
        raise ValueError(
            f"the cross-entropy on the calibration must be finite, got {total}; load the model in a wider dtype"
        )
    return total / count


def mean_measures(
    model: PreTrainedModel, modules: Iterable[nn.Module], measure: Measure, batches: Batches, skipped: Sequence[int]
) -> list[Tensor]:
    """Average a measure of modules over all visible tokens, with some layers skipped.

    Args:
        model: a causal language model; it is not changed.
        modules: modules of the model.
        measure: a function from a module's input and output, `[N, ...]` float32, to a value per token, `[N, ...]`.
        batches: from [`calibration_batches`].
        skipped: indices of the layers to skip.

    Returns:
        for each module its mean, of the measure's shape without `N`.
    """
    sums: dict[int, Any] = {}

    def add(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # visible tokens are selected, not multiplied by the mask, because padding may hold NaN
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
    """The identity in place of a skipped layer, so that later layers keep their index and their type in the config."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@contextmanager
def _measuring(model: PreTrainedModel, skipped: Sequence[int]) -> Iterator[None]:
    """Run a block with some layers skipped, in evaluation mode and without gradients; then restore the model."""
    layers = model.base_model.layers
    removed = {layer: layers[layer] for layer in skipped}
    training = [module for module in model.modules() if module.training]  # not all modules need be in training mode
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


def calibration_batches(calibration: Iterable | None, model: PreTrainedModel) -> Batches:
    """Validate calibration texts, and convert them to batches on the model's device.

    Args:
        calibration: token ids, in the form that [`student_from`] takes.
        model: the model to measure.

    Returns:
        batches of `input_ids`, `attention_mask` and `labels`, `[B, T]` each, int64. A token has a label if it and the
        token before it are visible.

    Raises:
        ValueError: calibration that is missing or malformed, token ids beyond the model's vocabulary, or no token to
            predict.
    """
    if calibration is None or isinstance(calibration, str | Mapping):
        raise ValueError(f"the choice of what to keep needs calibration, got {type(calibration).__name__}; {REMEDY}")
    batches = []
    for item in calibration:
        is_mapping = isinstance(item, Mapping)
        ids = item.get("input_ids") if is_mapping else item
        mask = item.get("attention_mask") if is_mapping else None
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
        is_target = functional.pad(visible[:, 1:] * visible[:, :-1], (1, 0)).bool()  # a hidden token predicts no token
        labels = ids.long().masked_fill(~is_target, IGNORED)
        batches.append({"input_ids": ids.long(), "attention_mask": visible, "labels": labels})
    if not any((batch["labels"] >= 0).any() for batch in batches):
        raise ValueError(f"calibration must hold two visible tokens in a row, got {len(batches)} items; {REMEDY}")
    return batches


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal language model, or raise a `ValueError` for another model."""
    is_model = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    layers = getattr(model.base_model, "layers", None) if is_model else None
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            "the model must be a causal language model with base_model.layers, such as LlamaForCausalLM, got "
            f"{type(model).__name__}; load it with AutoModelForCausalLM and merge adapters first"
        )
    return layers


def refuse_unknown(importance: str) -> None:
    """Raise a `ValueError` for the name of an unknown measure of importance."""
    if importance not in IMPORTANCES:
        raise ValueError(f"unknown importance, got {importance!r}; choose one of {list(IMPORTANCES)}")
