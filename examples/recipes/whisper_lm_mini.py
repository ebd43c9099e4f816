"""Make whisper-lm-mini: a sparse student with some layers of its teacher, trained by distillation from it.

    python examples/recipes/whisper_lm_mini.py                  # under an hour on two CPU cores
    python examples/recipes/whisper_lm_mini.py --size gpu       # sized for 25 minutes of one GPU
    python examples/recipes/whisper_lm_mini.py --size gpu --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct \\
        --train_data HuggingFaceFW/fineweb-edu
    python examples/recipes/whisper_lm_mini.py --baselines      # also train the same student without a teacher

The student has less than half of the teacher's parameters. Layers are removed one at a time, each time the layer
without which the teacher's perplexity rises least; in the remaining layers, the most active channels of the MLPs are
kept. The student learns the teacher's predictions (forward KL) and hidden states. Two objectives act against
repetition: the contrast with tokens that would continue a repetition, and unlikelihood of loops in the student's own
text. Then the script makes int8 and nf4 forms, each with an adapter that is trained on the quantized weights.

After an interruption, run the same command again: finished parts are kept, and training resumes from its last
checkpoint. All arguments of `DistillationConfig`, which include those of transformers' Trainer, can be given; `--help`
lists them.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

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
from whisper_hf import DistillationConfig, SequenceUnlikelihoodCallback, from_dense, student_from
from whisper_hf.calibration import calibration_batches, most_important

LAYERS = "layers.json"  # names the layers of the teacher that the student has
SHARED = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
SHARED |= {"output_dir": "runs/whisper-lm-mini", "hidden_states_weight": 1.0, "diversity_weight": 0.5}
SIZES = {
    "cpu": {
        "max_steps": 100,
        "per_device_train_batch_size": 2,
        "save_steps": 25,
        "use_cpu": True,
        "recovery_steps": 16,
    },
    "gpu": {"max_steps": 4000, "per_device_train_batch_size": 32, "save_steps": 500, "recovery_steps": 300},
}


@dataclass
class MiniArguments(RecipeArguments):
    """The arguments of all recipes, and those of the student."""

    num_hidden_layers: int | None = field(default=None, metadata={"help": "layers to keep; by default 8 of 15"})
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "channels of the MLPs to keep; by default 4 of 7, rounded down to a multiple of 16"},
    )
    calibration_tokens: int = field(
        default=128, metadata={"help": "tokens of each text on which layers and channels are chosen"}
    )
    baselines: bool = field(default=False, metadata={"help": "also train the same student without a teacher"})


def cut(folder: Path, source: str, rows: list[list[int]], script: MiniArguments, args: DistillationConfig) -> None:
    """Save an untrained student with the layers of the teacher that matter most for its perplexity on rows."""
    teacher = load(source, args)
    calibration = [row[: script.calibration_tokens] for row in rows]
    batches = calibration_batches(calibration, teacher)
    depth = teacher.config.num_hidden_layers
    width = teacher.config.intermediate_size
    layers = most_important(teacher, script.num_hidden_layers or depth * 8 // 15, batches, "perplexity")
    shape = {"layers": layers, "intermediate_size": script.intermediate_size or width * 4 // 7 // 16 * 16}
    student = from_dense(student_from(teacher, **shape, calibration=calibration), sparse_attention=SPARSE)
    save(student, source, folder)
    kept = {"kept": layers, "of": depth}
    (folder / LAYERS).write_text(json.dumps(kept) + "\n", encoding="utf-8")


def imitated(layers: dict) -> list[tuple[int, int]]:
    """Return for each layer of the student the layer of the teacher whose output it should imitate.

    The next layer of the student was the teacher's layer `n` and was trained to read the output of layer `n - 1`.
    The last layer imitates the teacher's last.

    Args:
        layers: `kept`, the teacher's layers in the student, and `of`, the number of the teacher's layers.

    Returns:
        pairs of a student's layer and a teacher's layer.
    """
    after = [*(layer - 1 for layer in layers["kept"][1:]), layers["of"] - 1]
    return list(enumerate(after))


def distil(folder: Path, student: Path, source: str, rows: list[list[int]], args: DistillationConfig) -> None:
    """Train the student by distillation, with unlikelihood of its own loops, and save it."""
    set_seed(args.seed)
    args = dataclasses.replace(args, layer_map=imitated(json.loads((student / LAYERS).read_text(encoding="utf-8"))))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    learn(model, load(source, args), rows, args, callbacks=[SequenceUnlikelihoodCallback(every=16)])
    save(model, student, folder)


def train_alone(student: Path, start: str, rows: list[list[int]], args: DistillationConfig, folder: Path) -> None:
    """Train the student without a teacher, from its own or from random weights, and save it."""
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    if start == "random":
        model = type(model)(model.config)
    learn(model, None, rows, args)
    save(model, student, folder)


def main() -> None:
    """Make the model, its quantized forms and the baselines, except for finished parts."""
    script, args = parse(SIZES, MiniArguments, **SHARED)
    output = Path(args.output_dir)
    source = teacher_source(script.teacher)
    tokenizer = AutoTokenizer.from_pretrained(source)
    sources = script.train_data
    length = script.row_tokens
    few = corpus.read_rows(sources, tokenizer, length, len(sources), script.text_column, args.seed)
    rows = training_rows(script, tokenizer, args)
    student = once(output / "cut", lambda folder: cut(folder, source, few, script, args))
    settings = dataclasses.replace(args, output_dir=str(output / "training"))
    model = once(output / "model", lambda folder: distil(folder, student, source, rows, settings))
    quantized_forms(model, source, rows, script, settings)
    for start in ("random", "cut") if script.baselines else ():
        alone = dataclasses.replace(args, output_dir=str(output / f"training-{start}"))
        once(output / f"{start}-without-teacher", functools.partial(train_alone, student, start, rows, alone))
    print(f"done: {model} and its quantized forms beside it; the checkpoints in {output}/training* may be deleted")


if __name__ == "__main__":
    main()
