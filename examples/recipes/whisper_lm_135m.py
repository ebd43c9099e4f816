"""Make whisper-lm-135m: convert a dense model to sparse attention, and adapt it to its own dense predictions.

    python examples/recipes/whisper_lm_135m.py                  # under an hour on two CPU cores
    python examples/recipes/whisper_lm_135m.py --size gpu       # sized for 25 minutes of one GPU
    python examples/recipes/whisper_lm_135m.py --size gpu --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct \\
        --train_data HuggingFaceFW/fineweb-edu

Each token attends to at most 1,664 tokens, in blocks of 16: the first 2 blocks, the 16 most recent blocks and 86 blocks
chosen by content. Only the attention layers are trained, to predict what the dense model predicts (forward KL), on long
rows of text with hidden facts. Then the script makes int8 and nf4 forms, each with an adapter that corrects the
quantization.

After an interruption, run the same command again: finished parts are kept, and training resumes from its last
checkpoint. All arguments of `DistillationConfig`, which include those of transformers' Trainer, can be given; `--help`
lists them.
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
    # rows of half the length, trained with less than half the budget
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
    """The arguments of all recipes, and those of the adaptation."""

    trained_blocks: int = field(
        default=86, metadata={"help": "blocks chosen by content during training; fewer blocks make the task harder"}
    )


def adapt(folder: Path, source: str, rows: list[list[int]], blocks: int, args: DistillationConfig) -> None:
    """Convert the teacher to sparse attention, train its attention layers, and save the result."""
    set_seed(args.seed)
    student = from_dense(source, sparse_attention={**SPARSE, "topk_blocks": blocks}, dtype=torch.float32)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".self_attn." in name)
    learn(student, load(source, args), rows, args)
    student.config.sparse_attention = SparseAttentionConfig(**SPARSE)
    save(student, source, folder)


def main() -> None:
    """Make the model and its quantized forms, except for finished parts."""
    script, args = parse(SIZES, SparseArguments, **SHARED)
    output = Path(args.output_dir)
    source = teacher_source(script.teacher)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = corpus.with_facts(training_rows(script, tokenizer, args), tokenizer, args.seed)
    settings = dataclasses.replace(args, output_dir=str(output / "training"))
    model = once(output / "model", lambda folder: adapt(folder, source, rows, script.trained_blocks, settings))
    quantized_forms(model, source, rows, script, settings)
    print(f"done: {model} and its quantized forms beside it; the checkpoints in {output}/training* may be deleted")


if __name__ == "__main__":
    main()
