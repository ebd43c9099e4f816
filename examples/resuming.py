"""Where a training script goes on: `--resume_from_checkpoint last`, also where nothing has been saved yet."""

from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def checkpoint(args: TrainingArguments) -> str | None:
    """Return what to go on from, if anything; a run that was interrupted before its first checkpoint begins anew."""
    if str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        return args.resume_from_checkpoint
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
