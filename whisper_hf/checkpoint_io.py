"""Write checkpoint folders completely or not at all, and load checkpoints with checks of their files."""

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

from .model.checkpoint_integrity import find_checksums, load_intact
from .model.checksums import CHECKSUMS, write_checksums

logger = logging.get_logger(__name__)

UNTRUSTED = {"trust_remote_code": False}  # a default: without it, transformers would ask on the terminal


@contextmanager
def clear_write_errors(folder: str | os.PathLike) -> Iterator[None]:
    """Replace the obscure errors of safetensors and `torch.save` on a full disk by an `OSError` that explains them.

    Args:
        folder: the folder that is being written.

    Raises:
        OSError: a file could not be written; the message says how much space is free.
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
    """Return whether an error of Python, safetensors or torch means that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    return "inline_container" in str(error) and "Reader" not in str(
        error
    )  # torch's archive writer raises a RuntimeError that names this file


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Provide a temporary folder that becomes the target at the end of the `with` block.

    It lies beside the target, and is deleted if there was an error. The weights in it get checksums, if there are none
    yet.

    Args:
        target: the folder to write; it must not exist, or be empty.

    Raises:
        ValueError: the target is a file or a folder that is not empty; nothing has been written then.
        OSError: the disk is full (see [`clear_write_errors`]).
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the target {str(target)!r} exists and is not an empty folder; name another folder")
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
        ValueError: fields of wrong types, or JSON that is nested too deeply.
        OSError: the checkpoint does not exist.
    """
    try:
        return AutoConfig.from_pretrained(source, **{**UNTRUSTED, **hub_kwargs})
    except (StrictDataclassError, RecursionError) as error:
        raise ValueError(
            f"the config of {source} must have fields of the right types, got: {error}; fix its config.json"
        ) from error


def has_checksums(source: Any, **options: Any) -> bool:
    """Return whether a checkpoint's weights can be verified: safetensors with a file `SHA256SUMS` beside them.

    Args:
        source: folder or Hub id.
        options: options of `from_pretrained`, which say where to look and which files to read.

    Where the Hub is offline and the cache does not hold the file, a warning says that nothing will be verified.
    """
    if options.get("use_safetensors") is False or options.get("gguf_file") is not None:
        return False
    try:
        return find_checksums(source, **options) is not None
    except OSError as error:
        logger.warning(f"the weights are not verified: {error}")
        return False


def check_source(source: str) -> None:
    """Check that the source of a command can be a folder or a Hub id.

    Raises:
        ValueError: an empty name or the path of a file.
        OSError: a path of a folder that does not exist.
    """
    if not source or Path(source).is_file():
        raise ValueError(
            f"the source must be a folder or a Hub id, got {'a file: ' if source else ''}{source!r}; name the folder "
            "that holds config.json and the weights"
        )
    if not Path(source).exists() and (source.startswith((".", "~", os.sep)) or source.count("/") > 1):
        raise FileNotFoundError(f"the folder {source!r} does not exist; correct the path, or name a Hub id")


def load_causal_lm(source: Any, **options: Any) -> Any:
    """Load a causal language model of any family, with the checks of weights that a WhisperLM always makes.

    Args:
        source: folder or Hub id.
        options: options of `from_pretrained`, and `shapes`, `finite` and `verify_checksums` of [`load_intact`].

    Returns:
        the model, in evaluation mode.

    Raises:
        ValueError: weights that are damaged, missing or of another shape.
        OSError: the checkpoint does not exist.
    """
    return load_intact(AutoModelForCausalLM.from_pretrained, source, **{**UNTRUSTED, **options})


def save_tokenizer(
    source: Any, folder: Path, vocabulary: int, hub_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase | None:
    """Copy the tokenizer of a source into a folder.

    Args:
        source: folder or Hub id.
        folder: where to save the tokenizer.
        vocabulary: number of tokens in the model's vocabulary.
        hub_kwargs: options for loading, such as `revision`.

    Returns:
        the tokenizer; or `None`, with a warning in the log, if the source has none.

    Raises:
        ValueError: a tokenizer with ids beyond the model's vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{**UNTRUSTED, **(hub_kwargs or {})})
        if len(tokenizer) == len(
            tokenizer.all_special_ids
        ):  # some families make one without vocabulary where there is no file
            raise ValueError("it has no vocabulary")
    except (OSError, ValueError) as error:
        logger.warning(f"{source} has no tokenizer that could be copied: {error}")
        return None
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= vocabulary:
        raise ValueError(
            f"the tokenizer of {source} must have ids below the model's vocab_size, {vocabulary}, got {token!r} with "
            f"id {index}; call model.resize_token_embeddings({index + 1}) and save the model, or use the tokenizer "
            "that belongs to it"
        )
    tokenizer.save_pretrained(folder)
    return tokenizer
