"""What matters in a model: which layers, and which features inside them, measured on a few calibration tokens.

Shape legend: `B` batch, `T` tokens, `N` visible tokens of a batch.
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

Batches = list[dict[str, Tensor]]  # of `input_ids`, `attention_mask` and `labels`, each `[B, T]` int64
Measure = Callable[[Tensor, Tensor], Tensor]  # of a module's input and output, `[N, ...]` float32, for each token

IMPORTANCES = ("perplexity", "block_influence")
REMEDY = "pass a list of token id tensors, [T] or [B, T] int64, or of dicts of input_ids and attention_mask"

# no cache, where skipped layers would leave holes; no hidden states, for which transformers hooks the layers it finds
QUIET = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}


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
    refuse_unknown(importance)
    layers = decoder_layers(model)
    batches = calibration_batches(calibration, model)
    if importance == "block_influence":
        similarities = mean_measures(model, layers, partial(functional.cosine_similarity, dim=-1), batches, skipped=())
        return [1.0 - similarity.item() for similarity in similarities]
    whole = _cross_entropy(model, batches)
    return [_cross_entropy(model, batches, [layer]) - whole for layer in range(len(layers))]


def most_important(model: PreTrainedModel, count: int, batches: Batches, importance: str) -> list[int]:
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


def mean_measures(
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


def calibration_batches(calibration: Iterable | None, model: PreTrainedModel) -> Batches:
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
        labels = ids.long().masked_fill(~is_target, IGNORED)
        batches.append({"input_ids": ids.long(), "attention_mask": visible, "labels": labels})
    if not any((batch["labels"] >= 0).any() for batch in batches):
        raise ValueError(f"calibration must hold two visible tokens in a row, got {len(batches)} items; {REMEDY}")
    return batches


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    is_model = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    layers = getattr(model.base_model, "layers", None) if is_model else None
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            "the model must be a causal language model with base_model.layers, such as LlamaForCausalLM, got "
            f"{type(model).__name__}; load it with AutoModelForCausalLM and merge adapters first"
        )
    return layers


def refuse_unknown(importance: str) -> None:
    if importance not in IMPORTANCES:
        raise ValueError(f"unknown importance, got {importance!r}; choose one of {list(IMPORTANCES)}")
