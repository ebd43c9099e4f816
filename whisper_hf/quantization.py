"""Weights of 8 or 4 bits through bitsandbytes: named recipes, and a command that applies them.

    python -m whisper_hf.quantization SOURCE TARGET --recipe nf4

A recipe is a standard config object and nothing more: `from_pretrained(..., quantization_config=recipe("nf4"))` is all
that is needed to use one, for any model. What stays in high precision is what transformers keeps: the output head (tied
or not), embeddings and norms.

Legend: `T` tokens, `V` tokens in the vocabulary.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_bitsandbytes_available

from .folders import new_folder, save_tokenizer
from .model.modeling_whisper_lm import keep_4bit_arrangement

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
REPORT = "quantization.json"
COMPARED_TOKENS = 512  # at most: enough to see a fault, little enough for logits of any vocabulary
SAMPLE = (  # Jane Austen, Northanger Abbey
    "No one who had ever seen Catherine Morland in her infancy would have supposed her born to be an heroine. Her "
    "situation in life, the character of her father and mother, her own person and disposition, were all equally "
    "against her. Her father was a clergyman, without being neglected, or poor, and a very respectable man, though his "
    "name was Richard, and he had never been handsome. He had a considerable independence besides two good livings, "
    "and he was not in the least addicted to locking up his daughters. Her mother was a woman of useful plain sense, "
    "with a good temper, and, what is more remarkable, with a good constitution."
)


def recipe(name: str, compute_dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """Return the standard config object of a recipe, to be used or changed like any other.

    - `int8` is LLM.int8 (https://arxiv.org/abs/2208.07339): weights *and* activations of 8 bits, multiplied as
      integers. A weight row and a token have a scale each; columns in which any token of the batch reaches 6 are
      multiplied in float16, so rows of a batch are not quite independent. On a CPU in training mode bitsandbytes
      quantizes weights alone.
    - `nf4` (https://arxiv.org/abs/2305.14314): weights alone, 4 bits on the quantiles of a normal distribution, with a
      float32 scale for 64 of them, 4.5 bits in all; products are computed in `compute_dtype`.
    - `nf4-double`: the same with scales of 8 bits, 4.13 bits in all.

    Args:
        name: a key of `RECIPES`.
        compute_dtype: of the products of nf4, best the dtype of the model; bfloat16 if left out.

    Raises:
        ValueError: an unknown name, or a compute dtype where integers are multiplied.
        ImportError: no bitsandbytes.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    if not is_bitsandbytes_available():
        raise ImportError(f"the recipe {name!r} needs a recent bitsandbytes, found none; pip install -U bitsandbytes")
    options = dict(RECIPES[name])
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = compute_dtype or torch.bfloat16
    elif compute_dtype is not None:
        raise ValueError(f"{name!r} multiplies integers, got compute_dtype={compute_dtype}; leave it out")
    return BitsAndBytesConfig(**options)


def disable_cpu_repacking(model: Any) -> Any:
    """Let 4-bit weights lie as they were loaded, in place.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) rearranges them when they are first used without gradients, for a
    kernel in bfloat16: faster for a few tokens, slower for many. Rearranged weights are saved wrongly, `dequantize()`
    makes nonsense of them, and no gradient flows through them, all in silence. So call this after loading, if the model
    is to be evaluated *and then* saved, dequantized or trained on such a CPU; elsewhere it changes nothing.

    Args:
        model (`PreTrainedModel`, or wrapped by peft): before it was used.

    Returns:
        the model.

    Raises:
        ValueError: weights that are rearranged already, which cannot be undone without loss.
    """
    refuse_repacked(model)
    keep_4bit_arrangement(model)
    return model


def refuse_repacked(model: Any) -> None:
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    count = sum(hasattr(state, "original_dtype") for state in states)  # remembered from the first time on
    if count:
        raise ValueError(
            f"expected 4-bit weights as they were loaded, got {count} that bitsandbytes rearranged, with loss, when "
            "the model was evaluated; load it again and call disable_cpu_repacking(model) before use, or merge the "
            "adapter from its saved folder"
        )


def quantize(
    source: str | os.PathLike,
    target: str | os.PathLike,
    recipe: str | BitsAndBytesConfig,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    text: str | None = SAMPLE,
    max_shard_size: str | int = "50GB",
    progress: Callable[[str], object] | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Write a quantized checkpoint with tokenizer, generation config and a report; all of it or nothing.

    Args:
        source: folder or Hub id of a causal language model of any family.
        target: the folder to write; it must not exist, or be empty.
        recipe: a name of `RECIPES`, with products in the dtype of the model; or a config.
        dtype: of what is not quantized; by default that of the source.
        device: where to quantize, the GPU by default if there is one.
        text: on whose first 512 tokens the quantized model is compared with the source, which is loaded for that;
            `None` saves the time and memory.
        max_shard_size: largest file of weights.
        progress: called with a line before each step.
        hub_kwargs: for loading, such as `revision` or `trust_remote_code`.

    Returns:
        what `quantization.json` in the target holds: recipe; bytes of the linear weights before and after, and ratios;
        what was kept in high precision; bytes on disk; versions; and the comparison (`null` without text or tokenizer),
        which is a check against faults rather than a measure of quality: mean KL divergence (nats per token), largest
        difference of logits, and how often the likeliest token is the same (ratio in [0, 1]).

    Raises:
        ValueError: an unknown recipe, a source that is quantized, has an adapter or lies in memory, a target that holds
            something, a device on which the recipe does not run, a text without tokenizer, or a model without linear
            layers.
        ImportError: no bitsandbytes.
    """
    say = progress or (lambda line: None)
    config = _source_config(source, hub_kwargs)
    quantization = resolve(recipe, dtype_of(config.dtype if dtype == "auto" else dtype))
    device = _usable_device(quantization, device)
    options = {"dtype": dtype, "device_map": {"": device}, **hub_kwargs}
    with new_folder(target) as folder:
        tokenizer = save_tokenizer(source, folder, hub_kwargs)
        if tokenizer is None and text not in (None, SAMPLE):
            raise ValueError(f"a text to compare on needs a tokenizer, got none with {str(source)!r}; leave it out")
        say(f"quantizing on {device}")
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, **options)
        report: dict[str, Any] = {
            "source": str(source),
            "recipe": recipe if isinstance(recipe, str) else "custom",
            "quantization_config": {k: v for k, v in quantization.to_diff_dict().items() if not k.startswith("_")},
            "linear_weights": linear_weights(model),
            "kept": kept(model),
        }
        say("saving")
        model.save_pretrained(folder, max_shard_size=max_shard_size)  # before it is used: see disable_cpu_repacking
        report["bytes_on_disk"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report["comparison"] = None
        if text is not None and tokenizer is not None:
            say("comparing with the source")
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :COMPARED_TOKENS]
            after = _logits(disable_cpu_repacking(model), ids)
            del model
            before = _logits(AutoModelForCausalLM.from_pretrained(source, **options), ids)
            report["comparison"] = _compare(before, after)
        report["versions"] = {name: version(name) for name in ("transformers", "bitsandbytes", "torch")}
        Path(folder, REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _source_config(source: Any, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a source that can be quantized, before anything large is loaded."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"the source must be a folder or a Hub id, got a {type(source).__name__}; weights are quantized while they "
            "are loaded, so save_pretrained a full-precision model first, with its tokenizer"
        )
    if Path(source, "adapter_config.json").is_file():
        raise ValueError(f"the source {str(source)!r} has an adapter; merge it first and quantize the result")
    config = AutoConfig.from_pretrained(source, **hub_kwargs)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the source {str(source)!r} is quantized already, got a quantization_config; quantize the full-precision "
            "checkpoint that it was made from"
        )
    return config


def resolve(recipe_or_config: str | BitsAndBytesConfig, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    if isinstance(recipe_or_config, str):
        is_integer = "load_in_8bit" in RECIPES.get(recipe_or_config, {})
        return recipe(recipe_or_config, None if is_integer else dtype)
    if not isinstance(recipe_or_config, BitsAndBytesConfig) or not recipe_or_config.is_quantizable():
        raise ValueError(
            f"the recipe must be one of {', '.join(RECIPES)} or a BitsAndBytesConfig of 4 or 8 bits, got "
            f"{recipe_or_config!r}"
        )
    return recipe_or_config


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | None:
    """Return a floating dtype given by name (as configs have it) or as such."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be 'auto' or a floating dtype such as 'bfloat16', got {value!r}")
    return dtype


def _usable_device(config: BitsAndBytesConfig, device: torch.device | str | None) -> torch.device:
    """Return the device, after a product with a small layer has shown that the recipe runs there."""
    import bitsandbytes

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    layer: torch.nn.Module
    if config.load_in_8bit:
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=config.llm_int8_threshold)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            64,
            64,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
    try:
        with torch.no_grad():
            layer.to(device)(torch.ones(1, 64, dtype=torch.float16, device=device)).tolist()
    except (RuntimeError, AssertionError, ValueError) as error:  # torch has no single error for a missing device
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the recipe does not run on the device {str(device)!r} here: {reason}; name another"
        ) from error
    return torch.device(device)


def _quantized_modules(model: Any) -> dict[str, Any]:
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def linear_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Count the weights in quantized layers, and their bytes in the dtype of the rest of the model and as they are now.

    What comes with them to interpret them (scales, code books) counts, biases do not.

    Raises:
        ValueError: no quantized layer, or one that is not quantized after all since it shares its weights.
    """
    modules = _quantized_modules(model)
    if not modules:
        raise ValueError(f"bitsandbytes quantizes linear layers, got none in {type(model).__name__}")
    shared = [name for name, module in modules.items() if module.weight.is_floating_point()]
    if shared:
        raise ValueError(
            f"the layers {shared} share their weights with embeddings and cannot be quantized; name them in "
            "llm_int8_skip_modules, which takes the place of the default list"
        )
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
    quantized = {f"{name}.weight" for name in _quantized_modules(model)}
    described: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in quantized:
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
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return logits `[T, V]`, float32, of `ids` `[1, T]`."""

    def is_new(record: LogRecord) -> bool:  # of hundreds of calls, each says that int8 casts to float16
        return "inputs will be cast" not in str(record.msg)

    bitsandbytes_logger = getLogger("bitsandbytes.autograd._functions")
    bitsandbytes_logger.addFilter(is_new)
    try:
        return model.eval()(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu()
    finally:
        bitsandbytes_logger.removeFilter(is_new)


def _compare(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Compare logits `[T, V]`, float32, before and after quantization."""
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    return {
        "tokens": len(before),
        "kl_nats_per_token": (log_before.exp() * (log_before - log_after)).sum(-1).mean().item(),
        "max_abs_logit_difference": (before - after).abs().max().item(),
        "same_likeliest_token": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m whisper_hf.quantization", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("source", help="folder or Hub id of a causal language model")
    add("target", help="folder to write; must not exist, or be empty")
    add("--recipe", required=True, help=", ".join(RECIPES))
    add("--dtype", default="auto", help="of what is not quantized (default: %(default)s)")
    add("--device", help="where to quantize (default: the GPU, if there is one)")
    add(
        "--text", type=Path, help="file on whose beginning to compare with the source (default: a paragraph of a novel)"
    )
    add("--no-comparison", action="store_true", help="do not load the source to compare")
    add("--max-shard-size", default="50GB", help="largest file of weights (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the source")
    options = parser.parse_args(arguments)
    hub_kwargs = {"trust_remote_code": True} if options.trust_remote_code else {}
    try:
        text = options.text.read_text(encoding="utf-8") if options.text else SAMPLE
        report = quantize(
            options.source,
            options.target,
            options.recipe,
            dtype=options.dtype,
            device=options.device,
            text=None if options.no_comparison else text,
            max_shard_size=options.max_shard_size,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
            **hub_kwargs,
        )
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    ratio = report["linear_weights"]["ratio_to_float32"]
    print(f"quantized {options.source} to {options.target}: linear weights take {ratio:.3f} of float32; see {REPORT}")


if __name__ == "__main__":
    main()
