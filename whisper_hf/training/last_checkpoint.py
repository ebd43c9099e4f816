"""Find the newest complete checkpoint of a training.

A checkpoint is incomplete if the process was killed, or the disk was full, while it was saved. `get_last_checkpoint` of
transformers looks at names only, so it may return an incomplete checkpoint. The Trainer writes `trainer_state.json`
last, and removes older checkpoints only after that. Therefore a complete checkpoint exists from the first save on.
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
# The parts that training cannot resume without, and the names that each part may have. Weights are one file, several
# files with an index, adapters, or files of FSDP (whole or sharded). DeepSpeed keeps all parts but the random states in
# one folder, `global_step*`.
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
    """Return the newest complete checkpoint of a training, for `Trainer.train(resume_from_checkpoint=...)`.

    A warning names newer checkpoints that are incomplete. They are left in place, and training overwrites them.

    Args:
        output_dir: the output folder of the training; it need not exist.

    Returns:
        the path of the checkpoint, or `None` if there is no complete checkpoint.
    """
    names = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")]
    for step in sorted((int(name[1]) for name in names if name), reverse=True):
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        fault = checkpoint_fault(folder)
        if fault is None:
            return str(folder)
        logger.warning(f"the checkpoint {folder} is incomplete and skipped: {fault}")
    return None


def checkpoint_fault(folder: str | os.PathLike) -> str | None:
    """Describe what is wrong with a checkpoint of transformers' Trainer, or return `None` if it is complete.

    Every file is opened. The headers of archives and of weights must match their length, and JSON must parse. Tensors
    are not read.
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
            return f"{path.relative_to(folder)} is incomplete: {fault}"
    return _missing_part(folder)


def _file_fault(path: Path) -> str | None:
    """Describe what is wrong with a file of a checkpoint, or return `None` if it is complete."""
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
    """Describe which file is missing from a part that consists of several files, or return `None`."""
    for index in folder.glob("*.index.json"):
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / name).is_file():
                return f"{index.name} names {name}, which is missing"
    for part in folder.glob("*/*.distcp"):
        if not (part.parent / ".metadata").is_file():
            return f"{part.parent.name} has no .metadata, which is written last"
    if any(folder.glob("global_step*")) and not (folder / "latest").is_file():
        return "there is no file named latest, which DeepSpeed writes last"
    ranks = sorted(int(path.stem.removeprefix("rng_state_")) for path in folder.glob("rng_state_*.pth"))
    if ranks != list(range(len(ranks))) or ranks == [0]:  # a single process writes rng_state.pth
        return f"random numbers were saved for processes {ranks} only"
    return None
