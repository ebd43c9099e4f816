"""Checkpoint folders that are written whole or not at all, and read as far as they are whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .model.checkpoint_integrity import find_file, load_intact
from .model.checksums import CHECKSUMS, write_checksums

logger = logging.get_logger(__name__)

UNTRUSTED = {"trust_remote_code": False}  # what a caller may change; left out, transformers asks on the terminal


@contextmanager
def clear_write_errors(folder: str | os.PathLike) -> Iterator[None]:
    """Say what has happened where a file cannot be written: safetensors and `torch.save` have words of their own.

    Raises:
        OSError: in place of theirs, with the room that is left.
    """
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:
        if not _is_write_error(error):
            raise
        existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
        raise OSError(
            f"could not write to the end of a file, with {shutil.disk_usage(existing).free / 1e6:,.0f} MB free in "
            f"{existing}; make room, or raise the limit on file sizes or the quota, and run it again ({error})",
        ) from error


def _is_write_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    return "inline_container" in str(error) and "Reader" not in str(error)  # torch's writer of archives


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Give a folder beside the target that becomes the target at the end, or vanishes if there was an error.

    The weights in it get checksums, if they have none yet.

    Raises:
        ValueError: a target that holds something; nothing has been made yet.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the target {str(target)!r} exists and is not an empty folder; name another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        folder = Path(scratch, "checkpoint")
        folder.mkdir()
        with clear_write_errors(target.parent):
            yield folder
            if not (folder / CHECKSUMS).is_file():
                write_checksums(folder)
        if target.exists():
            target.rmdir()
        folder.rename(target)


def load_config(source: Any, **hub_kwargs: Any) -> PreTrainedConfig:
    """Load the config of a folder or Hub id.

    Raises:
        ValueError: fields of wrong types, or JSON nested beyond reason.
        OSError: no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(source, **{**UNTRUSTED, **hub_kwargs})
    except (StrictDataclassError, RecursionError) as error:
        raise ValueError(f"the config of {source} must have fields of the right types, got: {error}") from error


def has_checksums(source: Any, **options: Any) -> bool:
    """Tell whether the weights of a folder or Hub id can be verified: safetensors with a `SHA256SUMS` beside them.

    Args:
        source: folder or Hub id.
        options: of `from_pretrained`, which say where to look and what to read.

    Raises:
        OSError: no such checkpoint.
    """
    if options.get("use_safetensors") is False or options.get("gguf_file") is not None:
        return False
    return find_file(source, CHECKSUMS, **options) is not None


def load_causal_lm(source: Any, **options: Any) -> Any:
    """Load a causal language model of any family, with the checks that a WhisperLM makes by itself.

    Args:
        source: folder or Hub id.
        options: of `from_pretrained`, and `shapes`, `finite` and `verify_checksums` of [`load_intact`].

    Raises:
        ValueError: weights that are damaged, missing or of another shape.
        OSError: no such checkpoint.
    """
    return load_intact(AutoModelForCausalLM.from_pretrained, source, **{**UNTRUSTED, **options})


def save_tokenizer(
    source: Any, folder: Path, vocabulary: int, hub_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase | None:
    """Save the tokenizer of a source in a folder, and return it; or say that there is none.

    Raises:
        ValueError: a tokenizer with ids beyond the model's vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{**UNTRUSTED, **(hub_kwargs or {})})
        if len(tokenizer) == len(tokenizer.all_special_ids):  # what some families get where there is no file
            raise ValueError("it has no vocabulary")
    except (OSError, ValueError) as error:
        logger.warning(f"{source} has no tokenizer that could be carried along: {error}")
        return None
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= vocabulary:
        raise ValueError(
            f"the tokenizer of {source} must have ids below the model's vocab_size, {vocabulary}, got {token!r} with "
            f"id {index}; call model.resize_token_embeddings({index + 1}) and save the model, or take the tokenizer "
            "that belongs to it"
        )
    tokenizer.save_pretrained(folder)
    return tokenizer
