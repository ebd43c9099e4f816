"""Write a quantized checkpoint from a full-precision one, with a report of what it holds."""

import copy
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..checkpoint_io import has_checksums, load_causal_lm, load_config, new_folder, save_tokenizer
from .recipes import QuantizationConfig, disable_cpu_repacking, dtype_of, resolve, usable_device
from .report import compare, kept, linear_weights, logits
from .sensitivity import check_share, keep_layers, layer_divergences, most_sensitive

REPORT = "quantization.json"
COMPARED_TOKENS = 512  # at most: enough to detect a fault, and few enough to hold the logits of any vocabulary

SAMPLE = (  # Jane Austen, Northanger Abbey
    "No one who had ever seen Catherine Morland in her infancy would have supposed her born to be an heroine. Her "
    "situation in life, the character of her father and mother, her own person and disposition, were all equally "
    "against her. Her father was a clergyman, without being neglected, or poor, and a very respectable man, though his "
    "name was Richard, and he had never been handsome. He had a considerable independence besides two good livings, "
    "and he was not in the least addicted to locking up his daughters. Her mother was a woman of useful plain sense, "
    "with a good temper, and, what is more remarkable, with a good constitution."
)


def quantize(
    source: str | os.PathLike,
    target: str | os.PathLike,
    recipe: str | QuantizationConfig,
    *,
    keep: float = 0.0,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    text: str | None = SAMPLE,
    max_shard_size: str | int = "50GB",
    progress: Callable[[str], object] | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Quantize a checkpoint, and write it with its tokenizer, its generation config and a report.

    The weights of the source are verified against its `SHA256SUMS`, if it has this file. The target folder is written
    completely, or not at all.

    Args:
        source: folder or Hub id of a causal language model of any family.
        target: the folder to write; it must not exist, or be empty.
        recipe: a name in `RECIPES`, with products in the dtype of the model; or a quantization config.
        keep: share of the linear layers' weights, in [0, 1), to leave in full precision. The layers chosen are those
            with the largest divergence per weight: the change of the predictions on the text when only this layer is
            quantized. Measuring takes a forward pass per layer.
        dtype: dtype of the tensors that are not quantized; by default the dtype of the source.
        device: where to quantize; by default the GPU, if there is one.
        text: its first 512 tokens serve to measure the layers, and to compare the quantized model with the source,
            which is loaded for this; `None` saves the time and memory.
        max_shard_size: largest size of one file of weights.
        progress: called with a line of text before each step.
        hub_kwargs: options for loading, such as `revision` or `trust_remote_code`.

    Returns:
        the content of `quantization.json` in the target: the recipe; the bytes of the linear weights before and after,
        and their ratios; the parameters left in high precision, and the divergence (nats per token) of each layer that
        `keep` chose; the bytes on disk; the versions of packages; and the comparison with the source (`None` without
        text or tokenizer). The comparison detects faults and does not measure quality: mean KL divergence (nats per
        token), largest absolute difference of logits, and share of tokens with the same most likely prediction, in
        [0, 1].

    Raises:
        ValueError: an unknown recipe; a source that is quantized, has an adapter, or is a model in memory; weights that
            have changed since they were saved; a target folder that is not empty; a device on which the recipe does not
            run; a share outside its range; a text or a share without a tokenizer; a text without tokens; or a model
            without linear layers.
        ImportError: bitsandbytes is needed and not installed.
    """
    say = progress or (lambda line: None)
    config = _source_config(source, hub_kwargs)
    quantization = copy.deepcopy(resolve(recipe, dtype_of(config.dtype if dtype == "auto" else dtype)))
    device = usable_device(quantization, device)
    check_share(keep)
    verify = has_checksums(source, **hub_kwargs)
    options = {"dtype": dtype, "device_map": {"": device}, **hub_kwargs}
    report: dict[str, Any] = {"source": str(source), "recipe": recipe if isinstance(recipe, str) else "custom"}
    with new_folder(target) as folder:
        ids = _read(text, save_tokenizer(source, folder, config.get_text_config(decoder=True).vocab_size, hub_kwargs))
        if ids is None and (keep or text not in (None, SAMPLE)):
            missing = "text" if text is None else "tokenizer"
            raise ValueError(
                f"measuring needs a text and a tokenizer, got no {missing}; add it, or leave text and keep out"
            )
        sensitive: dict[str, float] = {}
        if ids is not None:
            say("running the source")
            model = load_causal_lm(source, finite=True, verify_checksums=verify, **options)
            before = logits(model, ids)
            if keep:
                divergences = layer_divergences(model, quantization, ids)
                sensitive = {name: divergences[name] for name in most_sensitive(model, divergences, keep)}
                keep_layers(model, quantization, list(sensitive))
            del model
        say(f"quantizing on {device}")
        checks = (
            {} if ids is not None else {"finite": True, "verify_checksums": verify}
        )  # the source was checked above if it was loaded to be measured
        model = load_causal_lm(source, quantization_config=quantization, **checks, **options)
        settings = quantization.to_diff_dict()
        report["quantization_config"] = {key: value for key, value in settings.items() if not key.startswith("_")}
        report |= {"linear_weights": linear_weights(model, sensitive), "kept": kept(model), "sensitive": sensitive}
        say("saving")
        # save before the first forward pass, which may rearrange the weights: see disable_cpu_repacking
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        report["bytes_on_disk"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report["comparison"] = None
        if ids is not None:
            say("comparing with the source")
            report["comparison"] = compare(before, logits(disable_cpu_repacking(model), ids))
        packages = ["transformers", "torch"]
        if isinstance(quantization, BitsAndBytesConfig):
            packages.append("bitsandbytes")
        report["versions"] = {name: version(name) for name in packages}
        Path(folder, REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _read(text: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Tensor | None:
    """Return the first tokens of a text, `[1, T]` int64 with T <= 512, or `None` without text or tokenizer."""
    if text is None or tokenizer is None:
        return None
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :COMPARED_TOKENS]
    if not ids.numel():
        raise ValueError(
            f"the text to measure on must have tokens, got {text[:20]!r}, which has none; give another text"
        )
    return ids


def _source_config(source: Any, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a source, after checking that the source can be quantized; no weights are loaded."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"the source must be a folder or a Hub id, got a {type(source).__name__}; weights are quantized while they "
            "are loaded, so save the full-precision model and its tokenizer by save_pretrained first"
        )
    if Path(source, "adapter_config.json").is_file():
        raise ValueError(
            f"the source must be a whole model, but {str(source)!r} has an adapter; merge it first and quantize "
            "the result"
        )
    config = load_config(source, **hub_kwargs)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the source {str(source)!r} is quantized already, got a quantization_config; quantize the full-precision "
            "checkpoint from which it was made"
        )
    return config
