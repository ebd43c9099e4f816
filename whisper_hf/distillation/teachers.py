"""The teacher: loaded, checked against the student, kept from being trained, and placed like the student."""

import copy
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_io import UNTRUSTED, load_causal_lm
from ..objectives import Head

MOST_PADDING = 1024  # rows by which vocabularies of one tokenizer may differ, padded for the sake of speed


def load_teacher(teacher: str | Path | PreTrainedModel, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """Return the teacher, loaded if it is given by name.

    Raises:
        ValueError: options for a model that is loaded already, something that is no model, or one in training mode.
    """
    if isinstance(teacher, (str, Path)):
        model = load_causal_lm(str(teacher), **(init_kwargs or {}))
    elif init_kwargs:
        raise ValueError(f"teacher_init_kwargs need a teacher given by name, got a loaded {type(teacher).__name__}")
    else:
        model = teacher
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"teacher must be a model, a path, a Hub id or a folder of signals, got {type(teacher).__name__}"
        )
    refuse_training_mode(model)
    return model


def refuse_training_mode(teacher: nn.Module) -> None:
    """Raise a `ValueError` for a teacher whose dropout would be active."""
    if teacher.training:
        raise ValueError("the teacher is in training mode, expected evaluation mode; call teacher.eval()")


def refuse_shared_parameters(teacher: nn.Module, student: nn.Module, trained: list[nn.Parameter]) -> None:
    """Raise a `ValueError` where training would change the teacher, or freezing it the student."""
    frozen = {id(parameter) for parameter in teacher.parameters()}
    for whose, parameters in (("the student", student.parameters()), ("the optimizer", trained)):
        if any(id(parameter) in frozen for parameter in parameters):
            raise ValueError(
                f"{whose} holds parameters of the teacher, which must stay as it is; give the student weights of its "
                "own (copy.deepcopy, or whisper_hf.student_from)"
            )


def load_tokenizer(teacher: str | Path | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside a teacher, or `None` where there is none."""
    name = str(teacher) if isinstance(teacher, (str, Path)) else getattr(teacher, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name, **UNTRUSTED) if name else None
    except (OSError, ValueError):
        return None


def head_size(model: PreTrainedModel) -> int:
    """Return the number of logits of a model."""
    return Head(model.get_output_embeddings()).vocabulary


def refuse_smaller_vocabulary(student: int, stored: int) -> None:
    """Raise a `ValueError` where stored signals may hold tokens that the student does not have."""
    if student < stored:
        raise ValueError(
            f"the signals are about {stored} tokens, and the student has only {student}; write them with the tokenizer "
            "beside the teacher (padding is then left out), or give the student the teacher's vocabulary"
        )


def refuse_other_vocabulary(
    sizes: tuple[int, int], student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None
) -> None:
    """Raise a `ValueError` unless token `i` means the same to both models, for all `i` that both have.

    Args:
        sizes: number of logits of student and teacher.
        student, teacher (tokenizers, *optional*): where one is unknown, sizes that differ by padding at most will do.
    """
    remedy = (
        'choose divergence="universal", which compares only how sure the models are, and give the batches '
        "teacher_input_ids and teacher_labels"
    )
    if student is None or teacher is None:
        if abs(sizes[0] - sizes[1]) > MOST_PADDING:
            raise ValueError(
                f"student and teacher have {sizes[0]} and {sizes[1]} tokens, expected one tokenizer, padded by at most "
                f"{MOST_PADDING}; pass processing_class and teacher_processing_class if they have, else {remedy}"
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
    """Move the teacher to the student's device, sharded as the student is; without gradients it needs no wrapper.

    Args:
        teacher (`PreTrainedModel`): frozen.
        accelerator (`Accelerator`): of the trainer.
        is_sharded (`bool`): where the student is sharded; else each process keeps the whole teacher.

    Raises:
        ValueError: FSDP version 1, or a teacher that DeepSpeed has sharded already.
    """
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError("a teacher beside FSDP version 1 is not supported; set fsdp_version=2")
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
    """Shard the weights layer by layer (FSDP2)."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    # what counts as a layer is kept in the plugin, from the first model on, and the student has layers of another class
    accelerator.state.fsdp_plugin = copy.copy(plugin)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, teacher)
    finally:
        accelerator.state.fsdp_plugin = plugin


def _shard_by_deepspeed(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Let DeepSpeed shard the weights (ZeRO stage 3), or just hold them (other stages, which shard what is trained)."""
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config.pop("optimizer", None), config.pop("scheduler", None)
    if config.get("zero_optimization", {}).get("stage") != 3:
        config["zero_optimization"] = {"stage": 0}
    engine = deepspeed.initialize(model=teacher, config=config)[0]
    engine.eval()
    return engine
