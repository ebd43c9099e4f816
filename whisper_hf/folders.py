"""Checkpoint folders that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Give a folder beside the target that becomes the target at the end, or vanishes if there was an error.

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
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)


def save_tokenizer(
    source: Any, folder: Path, hub_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase | None:
    """Save the tokenizer of a source in a folder, and return it; or say that there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **(hub_kwargs or {}))
        if len(tokenizer) == len(tokenizer.all_special_ids):  # what some families get where there is no file
            raise ValueError("it has no vocabulary")
    except (OSError, ValueError) as error:
        logger.warning(f"{source} has no tokenizer that could be carried along: {error}")
        return None
    tokenizer.save_pretrained(folder)
    return tokenizer
