"""Adapters that were trained on quantized weights, merged into the dequantized ones."""

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
    """Merge an adapter that was trained on a quantized base into the dequantized base, and write the dense checkpoint.

    Merging in place would round the sum to the base's few bits again and lose much of what was learnt. The weights to
    which the adapter was fitted are the dequantized ones, not those before quantization.

    Args:
        adapter: folder or Hub id of an adapter of peft; or a `PeftModel` with one active adapter, which stays as it is.
        target: the folder to write; it must not exist, or be empty. Gets the tokenizer of the adapter's folder, or else
            of the base; of a `PeftModel` none.
        base: folder or Hub id of the base; by default the one that the adapter names, in the revision it names.
        recipe: in which the base was loaded for training, where its checkpoint is in full precision.
        dtype: of the result; by default that of the base outside its quantized layers.
        device: where to load a base and merge, in memory for the whole dense model; a `PeftModel` stays where it is.
        max_shard_size: largest file of weights.
        hub_kwargs: for loading the base, such as `revision` or `trust_remote_code`.

    Raises:
        ValueError: a target that holds something, a base that is not quantized (or a recipe for one that is, or one for
            inference alone), more than one active adapter, one that cannot be merged or that changes tied embeddings,
            or 4-bit weights that bitsandbytes has rearranged (see [`disable_cpu_repacking`]).
    """
    from peft import PeftModel

    is_live = isinstance(adapter, PeftModel)
    if is_live:
        if base is not None or recipe is not None or hub_kwargs:
            raise ValueError("a PeftModel has its base already; leave out base, recipe and options for loading")
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
    """Refuse a live model that cannot be merged, before it is copied."""
    refuse_repacked(adapter)
    if len(adapter.active_adapters) != 1:
        raise ValueError(f"expected one active adapter, got {adapter.active_adapters}; see set_adapter")
    if adapter.active_peft_config.is_prompt_learning:
        raise ValueError(f"an adapter of prompts cannot be merged, got {adapter.active_peft_config.peft_type}")
    if not getattr(adapter.get_base_model(), "is_quantized", False):
        raise ValueError("the base is not quantized; use peft's own merge_and_unload, which is exact there")


def _base_of(adapter: Any, base: Any, hub_kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the base of a saved adapter, and the options for finding it."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise ValueError(f"an adapter of prompts cannot be merged, got {config.peft_type}")
    if base is not None:
        return base, hub_kwargs
    if config.base_model_name_or_path is None:
        raise ValueError(f"the adapter {str(adapter)!r} does not name its base, got None; pass base")
    revision = {"revision": config.revision} if config.revision else {}
    return config.base_model_name_or_path, {**revision, **hub_kwargs}


def _missing_quantization(
    base: Any, recipe: str | QuantizationConfig | None, hub_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return how a base must be quantized when it is loaded, if its checkpoint is not."""
    found = load_config(base, **hub_kwargs)
    if getattr(found, "quantization_config", None) is not None:
        if recipe is not None:
            raise ValueError(f"the base {str(base)!r} is quantized already, got recipe={recipe!r}; leave it out")
        return {}
    if recipe is None:
        raise ValueError(
            f"the base {str(base)!r} is not quantized; pass the recipe in which it was loaded for training, one of "
            f"{', '.join(RECIPES)}, or, if it was trained in full precision, use peft's own merge_and_unload"
        )
    config = resolve(recipe, None)
    if isinstance(config, Int8CpuConfig):
        raise ValueError(f"adapters are not trained in {METHOD}, which is for inference; name the recipe that was used")
    return {"quantization_config": config}


def _dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Dequantize a model, and bring back to its dtype what `prepare_model_for_kbit_training` may have raised."""
    model = model.dequantize(dtype=dtype)
    conversions = getattr(model, "_weight_conversions", None) or []
    # transformers 5.23 keeps how it read the quantized weights, and would fail to undo that when saving
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
    ]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _refuse_tied(adapted: Any) -> None:
    """Refuse an adapter on one of two layers that share a matrix: merged, it would change the other too."""
    keys = adapted.get_base_model().all_tied_weights_keys
    tied = {name.removesuffix(".weight") for pair in keys.items() for name in pair}
    touched = sorted(tied & set(adapted.base_model.targeted_module_names))
    if touched:
        raise ValueError(
            f"the layers {sorted(tied)} share a matrix, got an adapter on {touched}: merged, it would change them all; "
            "train it on a base with tie_word_embeddings=False, or leave these layers out"
        )
