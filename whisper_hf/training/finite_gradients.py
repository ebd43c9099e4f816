"""Training that stops before a step which would turn the weights into NaN."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class FiniteGradientsCallback(TrainerCallback):
    """Stops training with an error when a gradient is infinite or NaN, before the optimizer takes it in.

    Trainer itself leaves such a loss out of its logs (`logging_nan_inf_filter`) and goes on with weights that are NaN.
    Asking costs the time of one norm of all gradients in each optimizer step, and on a GPU waits for it; Trainer's
    own filter waits in each micro-step. [`DistillationTrainer`] has this callback by itself.

    With float16 the gradient scaler sees to it, by passing over such steps. DeepSpeed keeps gradients to itself: then
    nothing is checked, and a warning says so.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients.

        Raises:
            ValueError: some are not finite.
        """
        if args.fp16:
            return
        groups = kwargs["optimizer"].param_groups
        parameters = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            logger.warning_once("gradients are not checked for NaN: the optimizer holds none, as with DeepSpeed")
            return
        if _whole(get_total_norm([parameter.grad for parameter in parameters])).isfinite():
            return
        names = {parameter: name for name, parameter in kwargs["model"].named_parameters()}
        bad = [names.get(p, "a projection") for p in parameters if not _is_finite(p.grad)]
        if not bad:  # the norm alone is too large for its dtype
            return
        is_good = all(_is_finite(parameter.detach()) for parameter in parameters)
        weights = "the weights are still those" if is_good else "the weights are not finite any more"
        raise ValueError(
            f"the gradients of step {state.global_step + 1} must be finite, got infinities or NaN in {len(bad)} of "
            f"{len(parameters)} tensors, such as {bad[:3]}; {weights} of step {state.global_step}. Look at the batch "
            "and its labels; if they are sound, lower the learning rate and go on from the last checkpoint"
        )


def _whole(value: Tensor) -> Tensor:
    """Return a scalar of all processes, where each holds a shard."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_finite(value: Tensor) -> bool:
    return not _whole(value.isfinite().logical_not().sum())  # a maximum over processes would lose NaN
