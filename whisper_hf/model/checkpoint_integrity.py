# Copyright 2026 The whisper_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Load weights only if all of them are there, or raise a `ValueError` that says which file to get again.

transformers reads what it finds, from wherever an index points, and initializes missing weights at random, with a
warning. Here each loading checks what is cheap to check: that every file is whole, that its header and the index name
the expected weights, and that their shapes fit the config. safetensors does not notice a changed byte inside a weight.
`verify_checksums=True` does, by hashing every file and comparing `SHA256SUMS`, which this package writes when it saves.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import cached_files

from .checksums import AGAIN, CHECKSUMS, RENEW, refuse_changed

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class ShapeMismatchError(ValueError, RuntimeError):
    """Weights of another shape than the config's; a `RuntimeError` too since that is what transformers raises."""

    def __init__(self, source: Any, name: str, expected: Iterable[int], got: Iterable[int]) -> None:
        super().__init__(
            f"the weights of {str(source)!r} do not fit its config: {name} must have the shape {tuple(expected)}, got "
            f"{tuple(got)}; correct config.json, or save the model again, or, to train new weights in their place, "
            "pass ignore_mismatched_sizes=True"
        )


def weight_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's weights by name, without allocating them; none where they are quantized."""
    if getattr(config, "quantization_config", None) is not None:
        return {}
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    tied = model.all_tied_weights_keys
    return {name: weight.shape for name, weight in model.state_dict().items() if name not in tied}


def load_intact(
    load: Callable[..., Any],
    source: str | os.PathLike,
    *args: Any,
    may_be_new: tuple[str, ...] = (),
    shapes: Callable[[], dict[str, torch.Size]] | None = None,
    finite: bool = False,
    verify_checksums: bool = False,
    **kwargs: Any,
) -> Any:
    """Call a `from_pretrained`, and return what it returns, unless weights are missing or damaged.

    With `output_loading_info=True` weights may be missing: whoever asks for the list is told.

    Args:
        load: the method.
        source: folder or Hub id.
        args, kwargs: of the method. Only safetensors are read unless `use_safetensors` says otherwise.
        may_be_new: beginnings of the names of weights that need not be in the checkpoint, such as a classifier's.
        shapes: returns those of the model's weights by name, to be compared before anything is allocated for them.
        finite: also refuse integers, infinities and NaN, which takes the time of reading everything.
        verify_checksums: also hash the files and compare `SHA256SUMS`, which takes a second per gigabyte and core.

    Raises:
        ValueError: what [`intact_files`] refuses; pickled weights; a weight that is missing, or not finite, or, without
            `ignore_mismatched_sizes`, of another shape; checksums to verify for files that are not safetensors.
        OSError: no safetensors.
    """
    if kwargs.get("output_loading_info"):
        may_be_new = ("",)
    is_safetensors = kwargs.get("gguf_file") is None and kwargs.get("use_safetensors") is not False
    if verify_checksums and not is_safetensors:
        raise ValueError(
            f"verify_checksums=True hashes safetensors, got gguf_file={kwargs.get('gguf_file')!r} and use_safetensors="
            f"{kwargs.get('use_safetensors')}; leave out verify_checksums, and check these files with `sha256sum -c`"
        )
    if is_safetensors:
        kwargs["use_safetensors"] = True
        files = intact_files(source, verify_checksums=verify_checksums, **kwargs)
        pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if not files and Path(source, name).is_file()]
        if pickled:
            raise ValueError(
                f"{str(source)!r} must hold safetensors, got {pickled[0]}, a pickle, which could run code; ask its "
                "author for safetensors, or pass use_safetensors=False to read it with torch's restricted unpickler"
            )
        kwargs.pop("force_download", None)  # done
        if files and shapes is not None and not (kwargs.get("ignore_mismatched_sizes") or kwargs.get("key_mapping")):
            _refuse_misfit(source, files, shapes(), may_be_new)
        if finite:
            _refuse_non_finite(files)
    options = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load(source, *args, **options)
    if found["mismatched_keys"] and not kwargs.get("ignore_mismatched_sizes"):
        name, got, expected = min(found["mismatched_keys"])
        raise ShapeMismatchError(source, name, expected, got)
    _refuse_missing(source, found["missing_keys"], type(model).__name__, may_be_new)
    return (model, found) if kwargs.get("output_loading_info") else model


def intact_files(
    source: str | os.PathLike, *, variant: str | None = None, verify_checksums: bool = False, **options: Any
) -> list[Path]:
    """Find the files of weights of a folder or Hub id, download them if need be, and check them.

    Args:
        source: folder or Hub id.
        variant: as for `from_pretrained`.
        verify_checksums: hash the files, and compare the digests in `SHA256SUMS`.
        options: those of `from_pretrained` that say where to look; others are ignored.

    Returns:
        paths of safetensors; none where the source has none in the usual place.

    Raises:
        ValueError: an index that is not one, that leads out of the checkpoint, or names a weight that is not in its
            file; a missing, truncated or garbled file. With `verify_checksums` also contents that `SHA256SUMS`
            contradicts, or a source without this file.
    """
    single, index_name = (
        name if variant is None else name.replace(".safetensors", f".{variant}.safetensors")
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    file = find_file(source, single, **options)
    index = None if file is not None else find_file(source, index_name, **options)
    if file is not None:
        files: dict[Path, set[str]] = {file: set()}
    elif index is not None:
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
        paths = _shards(source, names, _hub_options(options))
        files = {
            path: {weight for weight, shard in weight_map.items() if shard == name}
            for name, path in zip(names, paths, strict=True)
        }
    else:
        return []
    for path, weights in files.items():
        refuse_garbled(path, weights)
    if verify_checksums:
        sums = find_checksums(source, **options)
        if sums is None:
            raise ValueError(
                f"verify_checksums=True needs a file {CHECKSUMS} beside the weights of {str(source)!r}, got none; "
                f"leave verify_checksums out, or, if you trust these weights, write it in their folder: `{RENEW}`"
            )
        refuse_changed(sums, [*files, *([index] if index else [])])
    return list(files)


def find_file(source: str | os.PathLike, name: str, **options: Any) -> Path | None:
    """Return the path of a file of a folder or Hub id, downloaded if need be; `None` where it does not exist.

    Args:
        source: folder or Hub id.
        name: of the file.
        options: those of `from_pretrained` that say where to look; others are ignored.

    Raises:
        OSError: the folder or Hub id does not exist.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    found = cached_file(source, name, **quiet, **_hub_options(options))
    return None if found is None else Path(found)


def find_checksums(source: str | os.PathLike, **options: Any) -> Path | None:
    """Return the path of the `SHA256SUMS` of a folder or Hub id, downloaded if need be; `None` if there is none.

    Args:
        source: folder or Hub id.
        options: options of `from_pretrained` that say where to look; other options are ignored.

    Raises:
        OSError: the folder or Hub id does not exist, or the file is not in the cache and the Hub is offline.
    """
    found = find_file(source, CHECKSUMS, **options)
    if found is None and not Path(source).is_dir() and (is_offline_mode() or options.get("local_files_only")):
        folder, revision = options.get("subfolder") or "", options.get("revision")
        name, where = str(Path(folder, CHECKSUMS)), {"cache_dir": options.get("cache_dir"), "revision": revision}
        if try_to_load_from_cache(str(source), name, **where) is None:
            raise OSError(
                f"{str(source)!r} is not a folder, and its {CHECKSUMS} is not in the cache of the Hub, which cannot be "
                "asked offline; correct the name, or go online (HF_HUB_OFFLINE=0, without local_files_only)"
            )
    return found


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}


def leads_out(name: str) -> bool:
    """Tell whether a name that a checkpoint gives for one of its files leads out of the checkpoint's folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or bool(PureWindowsPath(name).drive) or ".." in parts.parts


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index, and refuse names that lead out of the folder."""
    try:
        contents = json.loads(index.read_text(encoding="utf-8"))
        weight_map, _ = contents["weight_map"], contents["metadata"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # whatever the JSON holds
        raise ValueError(
            f"{index} must be JSON with `metadata` and a `weight_map` of names and files, got {error!r}; {AGAIN}"
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or leads_out(shard):
            raise ValueError(
                f"{index} must name files in its own folder, got {shard!r}; do not use this checkpoint: reading what "
                "lies elsewhere on this machine is no accident"
            )
    return weight_map


def _shards(source: str | os.PathLike, names: list[str], where: dict[str, Any]) -> list[Path]:
    if Path(source).is_dir():
        return [Path(source, where.get("subfolder", ""), name) for name in names]
    return [Path(path) for path in cached_files(source, names, **where) or ()]


def refuse_garbled(path: Path, weights: Iterable[str] = ()) -> None:
    """Refuse a file that safetensors cannot read, or that lacks weights."""
    try:
        with safe_open(path, framework="pt") as opened:
            missing = sorted(set(weights) - set(opened.keys()))
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}; {AGAIN}") from error
    if missing:
        raise ValueError(f"{path} must hold {missing[0]} according to its index, got a file without it; {AGAIN}")


def _refuse_misfit(
    source: Any, files: Iterable[Path], shapes: dict[str, torch.Size], may_be_new: tuple[str, ...]
) -> None:
    """Refuse weights of other shapes, or fewer, than the config's; a decoder alone has names without `model.`."""
    expected = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    found: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                plain, got = name.removeprefix("model."), opened.get_slice(name).get_shape()
                found.add(plain)
                if tuple(got) != tuple(expected.get(plain, got)):
                    raise ShapeMismatchError(source, name, expected[plain], got)
    absent = [name for name in shapes if name.removeprefix("model.") not in found]
    _refuse_missing(source, absent, "model of its config", may_be_new)


def _refuse_missing(source: Any, names: Iterable[str], kind: str, may_be_new: tuple[str, ...]) -> None:
    missing = sorted(name for name in names if not name.startswith(may_be_new))
    if missing:
        raise ValueError(
            f"{str(source)!r} lacks {len(missing)} weights of a {kind}, such as {missing[0]}: expected all of them; "
            f"{AGAIN}, or, to train new weights on purpose, pass output_loading_info=True, which returns their names"
        )


def _refuse_non_finite(files: Iterable[Path]) -> None:
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                weight = opened.get_tensor(name)
                if not weight.is_floating_point() or not weight.float().isfinite().all():
                    raise ValueError(
                        f"{path} must hold finite floating-point numbers, got {name} of {weight.dtype} with "
                        f"{weight.numel() - int(weight.float().isfinite().sum())} that are not finite; {AGAIN}"
                    )
