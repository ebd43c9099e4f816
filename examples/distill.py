"""Distil a language model into a smaller one with sparse attention.

    python examples/distill.py --max_steps 20 --output_dir runs/distill       # a few minutes on a CPU
    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 examples/distill.py \\
        --teacher Qwen/Qwen3-0.6B --num_hidden_layers 14 --block_tokens 4096 --train_data HuggingFaceFW/fineweb-edu \\
        --train_split 'train[:1%]'

The teacher is SmolLM2-135M-Instruct unless another one is named. The student is cut out of it (fewer layers, narrower
MLPs) or given, and converted to a WhisperLM; text is tokenized and packed into blocks. All arguments of
`DistillationConfig`, and so of transformers' Trainer, can be given: `--resume_from_checkpoint last` goes on after an
interruption, `--divergence skewed_kl` changes the loss. Run it with `--help` for the list.
"""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.support.smollm2 import smollm2_checkpoint

try:
    # on some CPUs bitsandbytes, which peft imports, asks for a package that speeds up 4-bit products: they do without
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import datasets
    from tabulate import tabulate
    from transformers import Trainer, default_data_collator

    from examples.support import resuming
    from whisper_hf import (
        DistillationConfig,
        DistillationTrainer,
        SparseAttentionConfig,
        WhisperLMForCausalLM,
        from_dense,
        student_from,
    )
except ImportError as error:
    raise SystemExit(f"distill.py: {error}; pip install 'whisper-hf[examples]'") from error

BOOKS = Path(__file__).parent / "data"
DEFAULTS = {
    "output_dir": "runs/distill",
    "max_steps": 200,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "hidden_states_weight": 1.0,  # helps students that were cut out of their teacher
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """Models and text; what concerns training is in [`~whisper_hf.DistillationConfig`]."""

    teacher: str | None = field(default=None, metadata={"help": "path or Hub id; by default SmolLM2-135M-Instruct"})
    student: str | None = field(default=None, metadata={"help": "path or Hub id; by default cut out of the teacher"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "of a cut student; by default half of them"})
    intermediate_size: int | None = field(default=None, metadata={"help": "of a cut student's MLPs; by default all"})
    importance: str = field(
        default="block_influence",
        metadata={
            "help": "how layers are chosen: block_influence, or perplexity, which takes longer and chooses better"
        },
    )
    sparse_attention: str = field(
        default='{"block_size": 16, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}',
        metadata={"help": "the student's, as JSON"},
    )
    train_data: str = field(
        default=str(BOOKS / "sense_and_sensibility.txt"), metadata={"help": "text file, or Hub id of a data set"}
    )
    eval_data: str = field(
        default=str(BOOKS / "northanger_abbey.txt"), metadata={"help": "text file, or Hub id of a data set"}
    )
    train_split: str = field(default="train", metadata={"help": "of a data set"})
    eval_split: str = field(default="train", metadata={"help": "of a data set"})
    text_column: str = field(default="text", metadata={"help": "of a data set"})
    block_tokens: int = field(default=512, metadata={"help": "tokens of a training example"})
    eval_blocks: int = field(default=8, metadata={"help": "examples to evaluate on"})
    calibration_blocks: int = field(default=2, metadata={"help": "training examples to choose layers on"})


def read_blocks(data: str, split: str, tokenizer: Tokenizer, script: ScriptArguments) -> datasets.Dataset:
    """Tokenize text and pack it into rows of `input_ids` and `labels`, all of one length; what is left over is dropped.

    Lines of a file follow one another; documents of a data set are separated by the end-of-text token.
    """
    is_file = Path(data).is_file()
    choices = {"path": "text", "data_files": data, "keep_linebreaks": True} if is_file else {"path": data}
    texts = datasets.load_dataset(**choices, split="train" if is_file else split)
    column = "text" if is_file else script.text_column
    end = [] if is_file or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length = script.block_tokens

    def pack(batch: dict[str, list]) -> dict[str, list]:
        rows = tokenizer(batch[column], add_special_tokens=False).input_ids
        tokens = [token for row in rows if row for token in (*row, *end)]
        blocks = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = texts.map(pack, batched=True, remove_columns=texts.column_names, desc=f"tokenizing {Path(data).name}")
    if not len(blocks):
        raise ValueError(f"{data} must have {length} tokens or more, got fewer; lower --block_tokens")
    return blocks


def load_student(teacher: Model, train: datasets.Dataset, script: ScriptArguments) -> Model:
    """Return the student as a WhisperLM, in float32."""
    if script.student is not None:
        student = AutoModelForCausalLM.from_pretrained(script.student, dtype=torch.float32)
    else:
        student = student_from(
            teacher,
            num_hidden_layers=script.num_hidden_layers or teacher.config.num_hidden_layers // 2,
            intermediate_size=script.intermediate_size,
            calibration=train[: script.calibration_blocks]["input_ids"],
            importance=script.importance,
        ).float()
    if isinstance(student, WhisperLMForCausalLM):
        return student
    return from_dense(student, sparse_attention=SparseAttentionConfig(**json.loads(script.sparse_attention)))


def teacher_perplexity(teacher: Model, args: DistillationConfig, blocks: datasets.Dataset) -> float:
    """Return the perplexity per token of the teacher; blocks are of one length, so a mean of means is exact."""
    trainer = Trainer(model=teacher, args=args, eval_dataset=blocks, data_collator=default_data_collator)
    return math.exp(trainer.evaluate()["eval_loss"])


def student_perplexity(trainer: DistillationTrainer) -> float:
    """Return the perplexity per token of the student."""
    return math.exp(trainer.evaluate()["eval_cross_entropy"])


def report(perplexities: dict[str, float], count: int) -> None:
    """Print what came out."""
    rows = [(name.replace("_", " "), value) for name, value in perplexities.items()]
    print("\n" + tabulate(rows, ["", "perplexity"], floatfmt=".2f"))
    print(f"per token, on {count} held-out blocks")


def parse_arguments() -> tuple[ScriptArguments, DistillationConfig]:
    """Read the command line."""
    parser = HfArgumentParser((ScriptArguments, DistillationConfig), description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses()


def main() -> None:
    """Load, distil, evaluate and save."""
    script, args = parse_arguments()
    with args.main_process_first(desc="fetching models and text"):
        name = smollm2_checkpoint() if script.teacher is None else script.teacher
        options: dict[str, Any] = {"dtype": "auto" if args.bf16 else torch.float32, **(args.teacher_init_kwargs or {})}
        teacher = AutoModelForCausalLM.from_pretrained(name, **options).eval()
        args.teacher_init_kwargs = None  # they are for a trainer that loads it
        tokenizer = AutoTokenizer.from_pretrained(name)
        train = read_blocks(script.train_data, script.train_split, tokenizer, script)
        held_out = read_blocks(script.eval_data, script.eval_split, tokenizer, script)
        held_out = held_out.select(range(min(script.eval_blocks, len(held_out))))
    student = load_student(teacher, train, script)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    perplexities = {}
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # which shard models for training only
        perplexities["teacher"] = teacher_perplexity(teacher, args, held_out)
        perplexities["student_before"] = student_perplexity(trainer)
    resuming.train(trainer)
    perplexities["student_after"] = student_perplexity(trainer)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("perplexity", perplexities)
    if trainer.is_world_process_zero():
        report(perplexities, len(held_out))


if __name__ == "__main__":
    main()
