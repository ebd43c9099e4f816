"""Merge adapters that were trained on a quantized model into its dequantized weights."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint_io import load_causal_lm, load_config, new_folder, save_tokenizer
from .int8_cpu import Int8CpuConfig
from .int8_linear import METHOD
from .recipes import RECIPES, QuantizationConfig, dtype_of, refuse_repacked, resolve


def merge_adapter(
    adapter: Any,
    target: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    recipe: str | QuantizationConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    max_shard_size: str | int = "50GB",
    **hub_kwargs: Any,
) -> None:
    """Merge an adapter trained on a quantized base into the dequantized base, and write the result.

    Merging in place would round the sum to the few bits of the base again and lose much of what was learnt. The adapter
    was fitted to the dequantized weights, not to the weights before quantization, so it is added to the former. The
    result is a checkpoint in full precision.

    Args:
        adapter: folder or Hub id of an adapter of peft; or a `PeftModel` with one active adapter, which does not
            change.
        target: the folder to write; it must not exist, or be empty. It gets the tokenizer of the adapter's folder, or
            else of the base; for a `PeftModel` it gets no tokenizer.
        base: folder or Hub id of the base; by default the base and revision that the adapter names.
        recipe: the recipe with which the base was loaded for training, if its checkpoint is in full precision.
        dtype: dtype of the result; by default the dtype of the base outside its quantized layers.
        device: where to load the base and merge; its memory must hold the whole dense model. A `PeftModel` is merged on
            the device it is on.
        max_shard_size: largest size of one file of weights.
        hub_kwargs: options for loading the base, such as `revision` or `trust_remote_code`.

    Raises:
        ValueError: a target folder that is not empty; a base that is not quantized; a recipe for a base that is
            quantized already, or the recipe `int8-cpu`, which is for inference; more than one active adapter, or an
            adapter that cannot be merged or that changes tied embeddings; or 4-bit weights that bitsandbytes has
            rearranged (see [`disable_cpu_repacking`]).
    """
    from peft import PeftModel

    is_live = isinstance(adapter, PeftModel)
    if is_live:
        if base is not None or recipe is not None or hub_kwargs:
            raise ValueError(
                "a PeftModel has its base already, got options for loading one; leave out base, recipe and the options"
            )
        _refuse_unmergeable(adapter)
        quantization: dict[str, Any] = {}
    else:
        base, hub_kwargs = _base_of(adapter, base, hub_kwargs)
        quantization = _missing_quantization(base, recipe, hub_kwargs)
    dtype = dtype_of(dtype)
    with new_folder(target) as folder:
        path = adapter
        if is_live:
            (name,) = adapter.active_adapters
            saved = folder.parent / "adapter"
            adapter.save_pretrained(saved, selected_adapters=[name])
            path = saved if name == "default" else saved / name
            model = copy.deepcopy(adapter).unload()
        else:
            options = {"dtype": "auto", "device_map": {"": device}, **quantization, **hub_kwargs}
            model = load_causal_lm(base, **options)
        dense = _dequantized(model, dtype or dtype_of(model.config.dtype) or model.dtype)
        adapted = PeftModel.from_pretrained(dense, path)
        _refuse_tied(adapted)
        adapted.merge_and_unload(safe_merge=True).save_pretrained(folder, max_shard_size=max_shard_size)
        if not is_live:
            has_one = Path(adapter, "tokenizer_config.json").is_file()
            save_tokenizer(adapter if has_one else base, folder, dense.config.vocab_size, hub_kwargs)


def _refuse_unmergeable(adapter: Any) -> None:
    """Refuse a `PeftModel` that cannot be merged, before it is copied."""
    refuse_repacked(adapter)
    if len(adapter.active_adapters) != 1:
        raise ValueError(f"expected one active adapter, got {adapter.active_adapters}; choose one by set_adapter")
    if adapter.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"expected an adapter of weights, got {adapter.active_peft_config.peft_type}, a learnt prompt, which "
            "cannot be merged; use the adapter with its base"
        )
    if not getattr(adapter.get_base_model(), "is_quantized", False):
        raise ValueError(
            "expected a quantized base, got one that is not quantized; use peft's own merge_and_unload, which is exact "
            "for it"
        )


def _base_of(adapter: Any, base: Any, hub_kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the base of a saved adapter, and the options with which to load it."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise ValueError(
            f"expected an adapter of weights, got {config.peft_type}, a learnt prompt, which cannot be merged; use the "
            "adapter with its base"
        )
    if base is not None:
        return base, hub_kwargs
    if config.base_model_name_or_path is None:
        raise ValueError(f"the adapter {str(adapter)!r} must name its base, got None; pass base")
    revision = {"revision": config.revision} if config.revision else {}
    return config.base_model_name_or_path, {**revision, **hub_kwargs}


def _missing_quantization(
    base: Any, recipe: str | QuantizationConfig | None, hub_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the option that quantizes a base while it is loaded: none, if its checkpoint is quantized."""
    found = load_config(base, **hub_kwargs)
    if getattr(found, "quantization_config", None) is not None:
        if recipe is not None:
            raise ValueError(f"the base {str(base)!r} is quantized already, got recipe={recipe!r}; leave it out")
        return {}
    if recipe is None:
        raise ValueError(
            f"the base {str(base)!r} is not quantized; pass the recipe with which it was loaded for training, one of "
            f"{', '.join(RECIPES)}, or, if it was trained in full precision, use peft's own merge_and_unload"
        )
    config = resolve(recipe, None)
    if isinstance(config, Int8CpuConfig):
        raise ValueError(
            f"the recipe must be one for training, got {METHOD}, which is for inference; pass the recipe with which "
            "the base was loaded for training"
        )
    return {"quantization_config": config}


def _dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Dequantize a model, in place, and cast all parameters to a dtype.

    peft's `prepare_model_for_kbit_training` may have cast some of them to float32.
    """
    model = model.dequantize(dtype=dtype)
    conversions = getattr(model, "_weight_conversions", None) or []
    # transformers 5.23 remembers how it quantized the weights, and would fail to reverse that when it saves them
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
    ]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _refuse_tied(adapted: Any) -> None:
    """Refuse an adapter on a layer that shares its matrix with another one, which merging would change too."""
    keys = adapted.get_base_model().all_tied_weights_keys
    tied = {name.removesuffix(".weight") for pair in keys.items() for name in pair}
    touched = sorted(tied & set(adapted.base_model.targeted_module_names))
    if touched:
        raise ValueError(
            f"the layers {sorted(tied)} share a matrix, got an adapter on {touched}: merged, it would change them all; "
            "train it on a base with tie_word_embeddings=False, or leave these layers out"
        )
