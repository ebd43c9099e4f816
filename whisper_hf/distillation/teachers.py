"""Load a teacher, check it against the student, protect it from training, and place it on the student's devices."""

import copy
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_io import UNTRUSTED, load_causal_lm
from ..objectives import Head

MOST_PADDING = 1024  # by how many rows padded embeddings of one tokenizer may differ; padding makes them faster


def load_teacher(teacher: str | Path | PreTrainedModel, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """Return the teacher in evaluation mode, and load it if it is given by name.

    Args:
        teacher (`str`, `Path` or `PreTrainedModel`): a path, a Hub id, or a loaded model.
        init_kwargs (`dict`, *optional*): options for loading a teacher by name.

    Raises:
        ValueError: options for a loaded model, a value that is not a model, or a model in training mode.
    """
    if isinstance(teacher, (str, Path)):
        model = load_causal_lm(str(teacher), **(init_kwargs or {}))
    elif init_kwargs:
        raise ValueError(
            f"teacher_init_kwargs need a teacher given by name, got a loaded {type(teacher).__name__}; leave them out"
        )
    else:
        model = teacher
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"teacher must be a model, a path, a Hub id or a folder of signals, got {type(teacher).__name__}"
        )
    refuse_training_mode(model)
    return model


def refuse_training_mode(teacher: nn.Module) -> None:
    """Raise a `ValueError` for a teacher in training mode, whose dropout would be active."""
    if teacher.training:
        raise ValueError("the teacher is in training mode, expected evaluation mode; call teacher.eval()")


def refuse_shared_parameters(teacher: nn.Module, student: nn.Module, trained: list[nn.Parameter]) -> None:
    """Raise a `ValueError` if the student or the optimizer holds a parameter of the teacher.

    Training would then change the teacher, or freezing the teacher would freeze a part of the student.
    """
    frozen = {id(parameter) for parameter in teacher.parameters()}
    for whose, parameters in (("the student", student.parameters()), ("the optimizer", trained)):
        if any(id(parameter) in frozen for parameter in parameters):
            raise ValueError(
                f"{whose} holds parameters of the teacher, which must stay as it is; give the student weights of its "
                "own (copy.deepcopy, or whisper_hf.student_from)"
            )


def load_tokenizer(teacher: str | Path | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that is saved beside a teacher, or return `None` if there is no tokenizer."""
    name = str(teacher) if isinstance(teacher, (str, Path)) else getattr(teacher, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name, **UNTRUSTED) if name else None
    except (OSError, ValueError):
        return None


def head_size(model: PreTrainedModel) -> int:
    """Return the number of logits that a model computes for a token."""
    return Head(model.get_output_embeddings()).vocabulary


def refuse_smaller_vocabulary(student: int, stored: int) -> None:
    """Raise a `ValueError` if stored signals may hold tokens that the student does not have.

    Args:
        student, stored (`int`): the sizes of the student's vocabulary and of the vocabulary of the signals.
    """
    if student < stored:
        raise ValueError(
            f"the signals are about {stored} tokens, and the student has only {student}; write them with the tokenizer "
            "beside the teacher (padding is then left out), or give the student the teacher's vocabulary"
        )


def refuse_other_vocabulary(
    sizes: tuple[int, int], student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None
) -> None:
    """Raise a `ValueError` unless every token id that both models have stands for the same token.

    Args:
        sizes: the numbers of logits of student and teacher.
        student, teacher (tokenizers, *optional*): the tokenizers. If one is unknown, the sizes may differ by padding.
    """
    remedy = (
        'choose divergence="universal", which compares only how sure the models are, and give the batches '
        "teacher_input_ids and teacher_labels"
    )
    if student is None or teacher is None:
        if abs(sizes[0] - sizes[1]) > MOST_PADDING:
            raise ValueError(
                f"student and teacher have {sizes[0]} and {sizes[1]} tokens, expected one tokenizer, padded by at most "
                f"{MOST_PADDING}; if they share one, pass processing_class and teacher_processing_class, else {remedy}"
            )
        return
    names = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)]
    for index in range(min(*sizes, *(max(n) + 1 for n in names))):
        ours, theirs = (n.get(index) for n in names)
        if ours != theirs:
            raise ValueError(
                f"student and teacher have different tokenizers: token {index} is {ours!r} to the student and "
                f"{theirs!r} to the teacher; {remedy}"
            )


def place_teacher(teacher: PreTrainedModel, accelerator: Accelerator, is_sharded: bool = True) -> nn.Module:
    """Move the teacher to the student's device, and shard it if the student is sharded.

    A teacher that is not sharded needs no wrapper, because it has no gradients.

    Args:
        teacher (`PreTrainedModel`): the frozen teacher.
        accelerator (`Accelerator`): the trainer's accelerator.
        is_sharded (`bool`): whether to shard the teacher if the student is sharded. Otherwise each process keeps the
            whole teacher.

    Returns:
        the teacher, perhaps in a wrapper.

    Raises:
        ValueError: FSDP version 1, or a sharded teacher where each process should keep all of it.
    """
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError("distillation with FSDP needs version 2, got version 1; set fsdp_version=2")
    if is_sharded and is_deepspeed:
        return _shard_by_deepspeed(teacher, accelerator)
    if is_sharded and is_fsdp:
        return _shard_by_fsdp(teacher, accelerator)
    if any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
        raise ValueError(
            "expected a whole teacher for shard_teacher=False, got one that DeepSpeed sharded while it was loaded; "
            "load it before the DistillationConfig is made, or set shard_teacher=True"
        )
    if getattr(teacher, "hf_quantizer", None) is None and getattr(teacher, "hf_device_map", None) is None:
        teacher.to(accelerator.device)
    return teacher


def _shard_by_fsdp(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Shard the teacher's weights layer by layer with FSDP 2."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    # The plugin keeps the layer classes of the first model that it wraps. Teacher and student may differ in these
    # classes, so the teacher gets a copy of the plugin without them.
    accelerator.state.fsdp_plugin = copy.copy(plugin)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, teacher)
    finally:
        accelerator.state.fsdp_plugin = plugin


def _shard_by_deepspeed(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Let DeepSpeed shard the teacher's weights under ZeRO stage 3, and hold them whole under the other stages.

    The other stages shard only gradients and optimizer states, which a teacher does not have.
    """
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config.pop("optimizer", None)
    config.pop("scheduler", None)
    if config.get("zero_optimization", {}).get("stage") != 3:
        config["zero_optimization"] = {"stage": 0}
    engine = deepspeed.initialize(model=teacher, config=config)[0]
    engine.eval()
    return engine
