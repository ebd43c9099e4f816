"""Distil a language model into a smaller one with sparse attention.

    pip install -e ".[examples]"
    python examples/distill.py --max_steps 20 --output_dir runs/distill       # a few minutes on a CPU
    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 examples/distill.py \\
        --teacher Qwen/Qwen3-0.6B --num_hidden_layers 14 --block_tokens 4096 --train_data HuggingFaceFW/fineweb-edu \\
        --train_split 'train[:1%]'

The teacher is SmolLM2-135M-Instruct unless `--teacher` names another model. The student is made from some layers of
the teacher, possibly with narrower MLPs, or is given by `--student`; it is converted to a WhisperLM. Text is tokenized
and packed into blocks. All arguments of `DistillationConfig`, which include those of transformers' Trainer, can be
given: `--resume_from_checkpoint last` resumes after an interruption, and `--divergence skewed_kl` changes the loss.
`--help` lists all arguments.
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
    # peft imports bitsandbytes, which on some CPUs logs that a package for faster 4-bit products is missing
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
    "warmup_steps": 0.1,  # a value below 1 is a share of all steps
    "hidden_states_weight": 1.0,  # helps students made from layers of their teacher
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """The arguments of models and text; those of training are [`~whisper_hf.DistillationConfig`]."""

    teacher: str | None = field(
        default=None, metadata={"help": "path or Hub id of the teacher; by default SmolLM2-135M-Instruct"}
    )
    student: str | None = field(
        default=None, metadata={"help": "path or Hub id of the student; by default made from layers of the teacher"}
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "layers of a student made from the teacher; by default half"}
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "width of the MLPs of such a student; by default the teacher's"}
    )
    importance: str = field(
        default="block_influence",
        metadata={
            "help": "how layers are chosen: block_influence, or perplexity, which takes longer and chooses better"
        },
    )
    sparse_attention: str = field(
        default='{"block_size": 16, "topk_blocks": 8, "local_blocks": 4, "sink_blocks": 1}',
        metadata={"help": "block size and budget of the student's sparse attention, as JSON"},
    )
    train_data: str = field(
        default=str(BOOKS / "sense_and_sensibility.txt"), metadata={"help": "text file, or Hub id of a data set"}
    )
    eval_data: str = field(
        default=str(BOOKS / "northanger_abbey.txt"), metadata={"help": "text file, or Hub id of a data set"}
    )
    train_split: str = field(default="train", metadata={"help": "split of a data set to train on"})
    eval_split: str = field(default="train", metadata={"help": "split of a data set to evaluate on"})
    text_column: str = field(default="text", metadata={"help": "column of a data set that holds the text"})
    block_tokens: int = field(default=512, metadata={"help": "tokens of a training example"})
    eval_blocks: int = field(default=8, metadata={"help": "examples to evaluate on"})
    calibration_blocks: int = field(default=2, metadata={"help": "training examples on which layers are chosen"})


def read_blocks(data: str, split: str, tokenizer: Tokenizer, script: ScriptArguments) -> datasets.Dataset:
    """Tokenize text, and pack it into rows of `input_ids` and `labels` of `script.block_tokens` tokens each.

    The lines of a file are joined; documents of a data set are separated by the end-of-text token. Tokens that do not
    fill a row are dropped.
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
    """Load the student, or make it from layers of the teacher; return it as a WhisperLM in float32."""
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
    """Return the perplexity per token of the teacher; as blocks have one length, the mean of their means is exact."""
    trainer = Trainer(model=teacher, args=args, eval_dataset=blocks, data_collator=default_data_collator)
    return math.exp(trainer.evaluate()["eval_loss"])


def student_perplexity(trainer: DistillationTrainer) -> float:
    """Return the perplexity per token of the student."""
    return math.exp(trainer.evaluate()["eval_cross_entropy"])


def report(perplexities: dict[str, float], count: int) -> None:
    """Print a table of perplexities."""
    rows = [(name.replace("_", " "), value) for name, value in perplexities.items()]
    print("\n" + tabulate(rows, ["", "perplexity"], floatfmt=".2f"))
    print(f"per token, on {count} held-out blocks")


def parse_arguments() -> tuple[ScriptArguments, DistillationConfig]:
    """Parse the command line."""
    parser = HfArgumentParser((ScriptArguments, DistillationConfig), description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses()


def main() -> None:
    """Load the models and the text, evaluate, distil, evaluate again, and save the student."""
    script, args = parse_arguments()
    with args.main_process_first(desc="fetching models and text"):
        name = smollm2_checkpoint() if script.teacher is None else script.teacher
        options: dict[str, Any] = {"dtype": "auto" if args.bf16 else torch.float32, **(args.teacher_init_kwargs or {})}
        teacher = AutoModelForCausalLM.from_pretrained(name, **options).eval()
        args.teacher_init_kwargs = None  # these options are for a trainer that loads the teacher; here it is loaded
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
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # these shard a model only when training begins
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
