"""Train in processes that `accelerate launch` starts, or in a single process, for `test_distributed.py`."""

import gc
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from whisper_hf import DistillationConfig, DistillationTrainer, SequenceUnlikelihoodCallback, WhisperLMForCausalLM

from ..conftest import ROOT
from ..distillation.test_trainer import examples, pad

STEPS, SAVED, BATCH, MICRO = 4, 2, 8, 2  # batches of eight examples, in two micro-batches
ENDS = [*range(3, 60)]  # tokens that end a text: continuations end after one token or late


def options(folder: Path, processes: int, **changed: Any) -> dict[str, Any]:
    """Return arguments of the Trainer with which any number of processes gets the same batches."""
    return {
        "output_dir": str(folder),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH // MICRO // processes,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": MICRO,
        "max_steps": STEPS,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"}
        & {*os.environ},  # on_cpu.py selects the CPU for these two
        **changed,
    }


def student(models: Path, **changed: Any) -> WhisperLMForCausalLM:
    """Load the student, whose head is tied to its embeddings."""
    return WhisperLMForCausalLM.from_pretrained(models / "student", **changed)


def plain(models: Path, folder: Path, processes: int, **changed: Any) -> Trainer:
    """Return a stock Trainer of the student."""
    model = changed.pop("model", None) or student(models)
    callbacks = changed.pop("callbacks", None)
    arguments = TrainingArguments(**options(folder, processes, **changed))
    return Trainer(model, arguments, train_dataset=examples(), data_collator=pad, callbacks=callbacks)


def diverse(models: Path, folder: Path, processes: int) -> Trainer:
    """Return a stock Trainer of a student whose loss penalises repetition."""
    return plain(models, folder, processes, model=student(models, diversity={"contrast_weight": 0.5}))


def loops(models: Path, folder: Path, processes: int) -> Trainer:
    """Return a stock Trainer with unlikelihood of loops, in which one process writes shorter texts than the other."""
    model = student(models)
    model.generation_config.eos_token_id = [*range(model.config.vocab_size)] if os.environ["RANK"] == "0" else None
    callback = SequenceUnlikelihoodCallback(every=2, rows=2, prefix_tokens=4, new_tokens=12, ngram=1)
    return plain(models, folder, processes, model=model, callbacks=[callback])


def distilled(models: Path, folder: Path, processes: int, teacher: Any = "teacher", **changed: Any) -> Trainer:
    """Return a DistillationTrainer with a teacher of another family."""
    arguments = DistillationConfig(**options(folder, processes, cross_entropy_weight=0.3, **changed))
    data = {"train_dataset": examples(), "eval_dataset": examples().select(range(7)), "data_collator": pad}
    teacher = models / teacher if isinstance(teacher, str) else teacher
    return DistillationTrainer(student(models), teacher, arguments, **data)


def replicated(models: Path, folder: Path, processes: int) -> Trainer:
    """Return a DistillationTrainer with a whole teacher in each process, which DeepSpeed would otherwise shard."""
    teacher = LlamaForCausalLM.from_pretrained(models / "teacher")
    return distilled(models, folder, processes, teacher, shard_teacher=False)


def states(models: Path, folder: Path, processes: int) -> Trainer:
    """Return a DistillationTrainer that also compares hidden states and attention outputs."""
    inside = {"hidden_states_weight": 0.1, "attention_outputs_weight": 0.1, "diversity_weight": 0.5}
    return distilled(models, folder, processes, "narrow teacher", **inside)


def on_policy(models: Path, folder: Path, processes: int) -> Trainer:
    """Return a DistillationTrainer whose student writes the training texts, of different lengths."""
    writing = {"on_policy_fraction": 1.0, "on_policy_temperature": 0.0, "on_policy_max_new_tokens": 12}
    trainer = distilled(models, folder, processes, **writing)
    trainer.model.generation_config.eos_token_id = ENDS
    return trainer


KINDS: dict[str, Callable[..., Trainer]] = {
    kind.__name__: kind for kind in (plain, diverse, loops, distilled, replicated, states, on_policy)
}
KINDS_OF = {
    "ddp": ("plain", "diverse", "loops"),  # test_processes.py has the other kinds
    "fsdp2": tuple(KINDS),
    "deepspeed_zero3": ("replicated", "plain", "distilled", "states", "on_policy"),
}


def example_command(models: Path, output: Path, processes: int) -> list[str]:
    """Return the command line of a short run of `examples/distill.py`."""
    sparse = '{"block_size": 16, "topk_blocks": 1, "local_blocks": 1, "sink_blocks": 0}'  # a budget of 32 of 128 tokens
    command = ["distill.py", "--teacher", str(models / "teacher"), "--output_dir", str(output), "--max_steps", "2"]
    command += ["--per_device_train_batch_size", str(2 // processes), "--block_tokens", "128", "--eval_blocks", "3"]
    command += ["--train_data", str(models / "text.txt"), "--eval_data", str(models / "text.txt")]
    command += ["--sparse_attention", sparse, "--learning_rate", "0.01", "--warmup_steps", "0", "--disable_tqdm", "1"]
    return command


def run_example(command: list[str]) -> None:
    """Run `examples/distill.py` in this process with a command line."""
    sys.argv = command
    runpy.run_path(str(ROOT / "examples" / "distill.py"), run_name="__main__")


def history(trainer: Trainer) -> dict[str, list[float]]:
    """Return the losses and gradient norms of a training, by name."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in entries] for name in ("loss", "grad_norm")}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Return all weights of a trainer's model by name, gathered from all processes."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): whole(parameter)
        for name, parameter in trainer.model.named_parameters()
    }


def whole(parameter: nn.Parameter) -> Tensor:
    """Return the whole of a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().clone()
    if not is_sharded(parameter):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether FSDP or DeepSpeed has sharded a parameter."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def described(trainer: Trainer) -> dict[str, Any]:
    """Return the history of a training, and how its models are sharded and wrapped."""
    teacher, plugin = getattr(trainer, "teacher", None), getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return {
        **history(trainer),
        "processes": trainer.accelerator.num_processes,
        "sharded": [any(map(is_sharded, model.parameters())) for model in (trainer.model, teacher) if model],
        "layers": {type(layer).__name__ for layer in trainer.model.model.layers}.pop(),
        "ram_efficient": getattr(plugin, "cpu_ram_efficient_loading", None),
    }


def work(layout: str, models: Path, folder: Path) -> None:
    """Train in all ways of a layout, save weights and checkpoints, and write the results to `found.json`."""
    processes, found = int(os.environ["WORLD_SIZE"]), {}
    for name in KINDS_OF[layout]:
        trainer = KINDS[name](models, folder / name, processes)
        trainer.train()
        evaluation = trainer.evaluate() if name == "distilled" else {}
        found[name] = {**described(trainer), "evaluation": evaluation}
        write(trainer, folder / f"{name}.safetensors")
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    if layout != "deepspeed_zero3":
        plain(models, folder / "saved", processes, **saving).train()
    if layout == "fsdp2":
        trainer = plain(models, folder / "from ddp", processes)
        trainer.train(resume_from_checkpoint=str(folder / "from ddp" / f"checkpoint-{SAVED}"))
        write(trainer, folder / "from ddp.safetensors")
        run_example(example_command(models, folder / "example", processes))
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"  # what --fsdp_state_dict_type sets
        distilled(models, folder / "saved in shards", processes, **saving).train()
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as in the example config
        trainer = distilled(models, folder / "bfloat16", processes)
        trainer.train()
        found["bfloat16"] = described(trainer)
    if trainer.is_world_process_zero():
        (folder / "found.json").write_text(json.dumps(found))


def resume(models: Path, folder: Path) -> None:
    """Resume, in a single process, from the checkpoints that two processes saved."""
    for kind, name, layout in ((plain, "saved", "FULL"), (distilled, "saved in shards", "SHARDED")):
        os.environ["FSDP_STATE_DICT_TYPE"] = f"{layout}_STATE_DICT"
        trainer = kind(models, folder / name, 1)
        trainer.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{SAVED}"))
        write(trainer, folder / f"{name}.safetensors")


def write(trainer: Trainer, path: Path) -> None:
    """Save the gathered weights of a trainer's model to a file."""
    found = weights(trainer)
    if trainer.is_world_process_zero():
        save_file(found, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # garbage collections in training then skip the imported modules
    layout, models, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if layout != "ddp":
        from examples.accelerate import on_cpu

        on_cpu.use_gloo()
    if layout == "deepspeed_zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to build
    if os.environ["WORLD_SIZE"] == "1":
        resume(models, folder)
    else:
        work(layout, models, folder)
