"""Which checkpoint of a training was written to its end: a process can be killed, or its disk fill up, while it saves.

transformers' `get_last_checkpoint` goes by the name alone and returns half of a checkpoint, too. Trainer writes
`trainer_state.json` last and removes older checkpoints only then, so that a whole one is there from the first save on.
"""

import json
import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
# what training cannot go on without, and the names it has: of one file, of an index of several, of adapters, as written
# by FSDP (whole and sharded) and by DeepSpeed, which keeps all but random numbers in one folder
NEEDED = {
    "weights": (
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "pytorch_model_fsdp*",
        "global_step*",
    ),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "learning rate schedule": ("scheduler.pt", "global_step*"),
    "random numbers": ("rng_state*.pth",),
}


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest whole checkpoint of a training, if any, for `Trainer.train(resume_from_checkpoint=...)`.

    Newer ones that are not whole are named in a warning and left where they are; training writes them anew.
    """
    names = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")]
    for step in sorted((int(name[1]) for name in names if name), reverse=True):
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        fault = checkpoint_fault(folder)
        if fault is None:
            return str(folder)
        logger.warning(f"{folder} is passed over: {fault}")
    return None


def checkpoint_fault(folder: str | os.PathLike) -> str | None:
    """Return what is wrong with a checkpoint of transformers' Trainer, or `None` if it is whole.

    Every file is opened: archives and weights say how long they are, JSON must parse. Tensors are not read.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        return f"there is no {STATE}, which is written last"
    for what, names in NEEDED.items():
        if not any(path for name in names for path in folder.glob(name)):
            return f"there are no {what}" if what.endswith("s") else f"there is no {what}"
    for path in sorted(folder.rglob("*")):
        fault = _file_fault(path)
        if fault:
            return f"{path.relative_to(folder)} is not whole: {fault}"
    return _missing_part(folder)


def _file_fault(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error) or type(error).__name__
    return None


def _missing_part(folder: Path) -> str | None:
    """Return which part of what is written in parts is not there."""
    for index in folder.glob("*.index.json"):
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / name).is_file():
                return f"{index.name} names {name}, which is not there"
    for part in folder.glob("*/*.distcp"):
        if not (part.parent / ".metadata").is_file():
            return f"{part.parent.name} has no .metadata, which is written last"
    if any(folder.glob("global_step*")) and not (folder / "latest").is_file():
        return "there is no file named latest, which DeepSpeed writes last"
    ranks = sorted(int(path.stem.removeprefix("rng_state_")) for path in folder.glob("rng_state_*.pth"))
    if ranks != [*range(len(ranks))] or ranks == [0]:  # a single process writes rng_state.pth
        return f"random numbers are there of processes {ranks} only"
    return None
