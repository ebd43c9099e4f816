"""whisper-lm-135m: a dense model converted to sparse attention, and adapted to it by its own dense predictions.

    python examples/recipes/whisper_lm_135m.py                  # under an hour on two CPU cores
    python examples/recipes/whisper_lm_135m.py --size gpu       # sized for 25 minutes of one GPU
    python examples/recipes/whisper_lm_135m.py --size gpu --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct \\
        --train_data HuggingFaceFW/fineweb-edu

Each token attends to at most 1,664 others: two blocks of 16 at the beginning, the 16 most recent ones and 86 chosen by
content. The attention layers alone learn, on long rows of text with facts hidden in them, to predict what the dense
model does (forward KL). Then int8 and nf4 are made, each with an adapter that makes up for what was lost.

What is there is not made again, and training goes on from its last checkpoint: after an interruption run it again. All
arguments of `DistillationConfig`, and so of transformers' Trainer, can be given; `--help` lists them.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from examples.recipes import corpus
from examples.recipes.recipe import (
    SPARSE,
    RecipeArguments,
    learn,
    load,
    once,
    parse,
    quantized_forms,
    save,
    teacher_source,
    training_rows,
)
from whisper_hf import DistillationConfig, SparseAttentionConfig, from_dense

SHARED = {"learning_rate": 5e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
SHARED |= {"output_dir": "runs/whisper-lm-135m"}
SIZES = {
    # rows of half the length, at half the budget
    "cpu": {
        "max_steps": 12,
        "learning_rate": 1e-4,
        "row_tokens": 4096,
        "trained_blocks": 30,
        "save_steps": 4,
        "use_cpu": True,
    },
    "gpu": {"max_steps": 400, "row_tokens": 8192, "save_steps": 100, "recovery_steps": 100},
}


@dataclass
class SparseArguments(RecipeArguments):
    """And what concerns adaptation."""

    trained_blocks: int = field(default=86, metadata={"help": "blocks that are chosen while training: fewer is harder"})


def adapt(folder: Path, source: str, rows: list[list[int]], blocks: int, args: DistillationConfig) -> None:
    """Convert the teacher, let its attention learn, and save it."""
    set_seed(args.seed)
    student = from_dense(source, sparse_attention={**SPARSE, "topk_blocks": blocks}, dtype=torch.float32)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
    learn(student, load(source, args), rows, args)
    student.config.sparse_attention = SparseAttentionConfig(**SPARSE)
    save(student, source, folder)


def main() -> None:
    """Make what is not there yet."""
    script, args = parse(SIZES, SparseArguments, **SHARED)
    output, source = Path(args.output_dir), teacher_source(script.teacher)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = corpus.with_facts(training_rows(script, tokenizer, args), tokenizer, args.seed)
    settings = dataclasses.replace(args, output_dir=str(output / "training"))
    model = once(output / "model", lambda folder: adapt(folder, source, rows, script.trained_blocks, settings))
    quantized_forms(model, source, rows, script, settings)
    print(f"done: {model} and its quantized forms beside it; the checkpoints in {output}/training* can go")


if __name__ == "__main__":
    main()
