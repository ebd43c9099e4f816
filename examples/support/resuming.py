"""Support `--resume_from_checkpoint last` in a training script, also where no checkpoint has been saved yet."""

from transformers import Trainer, TrainingArguments

from whisper_hf import last_checkpoint
from whisper_hf.checkpoint_io import clear_write_errors


def checkpoint(args: TrainingArguments) -> str | None:
    """Return the checkpoint from which to resume, or `None` to start from the beginning.

    For "last", this is the last checkpoint that was written completely, or `None` if there is none.
    """
    if str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        return args.resume_from_checkpoint
    return last_checkpoint(args.output_dir)


def train(trainer: Trainer) -> None:
    """Train, from a checkpoint if the arguments ask for it, and explain the error if a checkpoint cannot be written."""
    with clear_write_errors(trainer.args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint(trainer.args))
