"""Where a training script goes on: `--resume_from_checkpoint last`, also where nothing has been saved yet."""

from transformers import Trainer, TrainingArguments

from whisper_hf import last_checkpoint
from whisper_hf.checkpoint_io import clear_write_errors


def checkpoint(args: TrainingArguments) -> str | None:
    """Return what to go on from, if anything; a run that was interrupted before its first checkpoint begins anew.

    The last checkpoint is the last one that was written to its end.
    """
    if str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        return args.resume_from_checkpoint
    return last_checkpoint(args.output_dir)


def train(trainer: Trainer) -> None:
    """Train, from a checkpoint if the arguments say so; where one cannot be written, say what to do."""
    with clear_write_errors(trainer.args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint(trainer.args))
