"""A Trainer callback that stops training before infinite or NaN gradients reach the weights."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class FiniteGradientsCallback(TrainerCallback):
    """Stop training with an error if a gradient is infinite or NaN, before the optimizer applies it.

    The Trainer itself leaves infinite and NaN losses out of its logs (`logging_nan_inf_filter`), and continues with
    weights that are NaN. The check costs the time of one norm of all gradients per optimizer step. It waits for a GPU
    once, while the Trainer's own filter waits in each micro-step. [`DistillationTrainer`] adds this callback by
    default.

    With float16 nothing is checked, because the gradient scaler skips steps with such gradients. With DeepSpeed nothing
    is checked, because its optimizer does not show the gradients; a warning says so.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all gradients of the optimizer's parameters.

        Raises:
            ValueError: a gradient is infinite or NaN.
        """
        if args.fp16:
            return
        groups = kwargs["optimizer"].param_groups
        parameters = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            logger.warning_once(
                "gradients are not checked for NaN, because the optimizer holds no gradients, as with DeepSpeed"
            )
            return
        if _whole(get_total_norm([parameter.grad for parameter in parameters])).isfinite():
            return
        names = {parameter: name for name, parameter in kwargs["model"].named_parameters()}
        bad = [names.get(p, "a projection") for p in parameters if not _is_finite(p.grad)]
        if not bad:  # all gradients are finite, and only their norm is too large for its dtype
            return
        is_good = all(_is_finite(parameter.detach()) for parameter in parameters)
        step = state.global_step
        weights = f"the weights are still those of step {step}" if is_good else "the weights are not finite any more"
        raise ValueError(
            f"the gradients of step {step + 1} must be finite, got infinities or NaN in {len(bad)} of "
            f"{len(parameters)} tensors, such as {bad[:3]}; {weights}. Look at the batch and its labels; if they are "
            "sound, lower the learning rate and continue from the last checkpoint"
        )


def _whole(value: Tensor) -> Tensor:
    """Return a scalar as a plain tensor; a sharded scalar is reduced over all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_finite(value: Tensor) -> bool:
    """Return whether all elements of a tensor are finite, in the shards of all processes."""
    return not _whole(value.isfinite().logical_not().sum())  # a sum, because a maximum over processes would lose NaN
