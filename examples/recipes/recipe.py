"""Functions that the recipes share: arguments, stages that run only once, training, quantization with recovery."""

import argparse
import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers import PreTrainedModel as Model

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package for faster 4-bit products is missing
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.autograd").setLevel(
        logging.ERROR
    )  # it warns in every call that inputs are cast to float16
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer
    from transformers import default_data_collator as collate

    from examples.recipes.corpus import NOVELS, PROGRAMS, read_rows
    from examples.support import resuming
    from examples.support.smollm2 import smollm2_checkpoint
    from whisper_hf import DistillationConfig, DistillationTrainer
    from whisper_hf.checkpoint_io import new_folder
    from whisper_hf.quantization import compensate, quantize
except ImportError as error:
    raise SystemExit(f"the recipes need more packages: {error}; pip install 'whisper-hf[examples]'") from error

TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the original of the default teacher
SPARSE = {"block_size": 16, "sink_blocks": 2, "local_blocks": 16, "topk_blocks": 86}  # a budget of 1,664 tokens
RECIPES = {"int8": "int8", "nf4": "nf4-double"}  # name of a quantized form -> its recipe
PLACE: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}  # where models are loaded
HALF = (
    torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
)  # on other CPUs bfloat16 is far slower than float32
DTYPE = torch.bfloat16 if HALF else torch.float32  # the dtype of computations by default
RANK = 12  # rank of the adapters that correct quantization
QUIET = {"report_to": "none", "per_device_train_batch_size": 1, "save_total_limit": 1, "logging_steps": 5}


@dataclass
class RecipeArguments:
    """The arguments of models and text; those of training are [`~whisper_hf.DistillationConfig`]."""

    size: str = field(default="cpu", metadata={"help": "cpu or gpu: the defaults of all arguments that are not given"})
    teacher: str | None = field(
        default=None, metadata={"help": "path or Hub id of the teacher; by default SmolLM2-135M-Instruct"}
    )
    train_data: list[str] = field(
        default_factory=lambda: [*NOVELS, PROGRAMS],
        metadata={
            "help": "text files, folders of them, or Hub ids; by default three novels and the sources of torch.nn"
        },
    )
    text_column: str = field(default="text", metadata={"help": "column of a data set that holds the text"})
    row_tokens: int = field(default=512, metadata={"help": "tokens of a training example"})
    recovery_steps: int = field(default=0, metadata={"help": "training steps of the adapters on quantized weights"})


def parse(
    sizes: dict[str, dict[str, Any]], kind: type = RecipeArguments, **shared: Any
) -> tuple[Any, DistillationConfig]:
    """Parse the command line, with the defaults of the size that it names.

    Args:
        sizes: defaults by size, "cpu" and "gpu".
        kind: the dataclass of the recipe's own arguments.
        shared: defaults of all sizes.
    """
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--size", choices=sizes, default="cpu")
    size = chosen.parse_known_args()[0].size
    parser = HfArgumentParser((kind, DistillationConfig))
    parser.set_defaults(**{**QUIET, "bf16": HALF, **shared, **sizes[size]})
    return parser.parse_args_into_dataclasses()


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder, after making it unless it exists; it appears completely or not at all."""
    if not folder.exists():
        print(f"making {folder} ...", flush=True)
        with new_folder(folder) as unfinished:
            make(unfinished)
    return folder


def teacher_source(given: str | None) -> str:
    """Return the folder or Hub id of the teacher."""
    return smollm2_checkpoint() if given is None else given


def training_rows(script: RecipeArguments, tokenizer: Any, args: DistillationConfig) -> list[list[int]]:
    """Return as many rows as the steps need, or all rows of the sources if these are fewer."""
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    return read_rows(script.train_data, tokenizer, script.row_tokens, count, script.text_column, args.seed)


def load(source: str | Path, args: DistillationConfig) -> Model:
    """Load a model that is not trained itself, such as a teacher, in the dtype of the training's computations."""
    return load_in(torch.bfloat16 if args.bf16 else torch.float32, source)


def load_in(dtype: torch.dtype, source: str | Path) -> Model:
    """Load a model that computes in a dtype, also if it is quantized.

    transformers ignores `dtype` for a quantized model, and loads the dtypes that were saved.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **PLACE).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    return model


def as_dataset(rows: list[list[int]]) -> datasets.Dataset:
    """Return rows of token ids as a data set with labels."""
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def learn(
    student: Model, teacher: Model | None, rows: list[list[int]], args: DistillationConfig, **options: Any
) -> None:
    """Train a student by distillation, or without a teacher on text; resume from the last checkpoint, if any."""
    args.resume_from_checkpoint = "last"
    known = {"model": student, "args": args, "train_dataset": as_dataset(rows), "data_collator": collate, **options}
    resuming.train(Trainer(**known) if teacher is None else DistillationTrainer(teacher=teacher, **known))


def save(model: Model, source: str | Path, folder: Path) -> None:
    """Save a model in the dtype of its source, with its tokenizer."""
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def quantized_forms(model: Path, teacher: str, rows: list[list[int]], script: RecipeArguments, args: Any) -> None:
    """Write the quantized forms of a model, each with an adapter that corrects the quantization."""
    for name, kind in RECIPES.items():
        base = model.with_name(f"{model.name}-{name}")
        if not base.exists():
            print(f"making {base} ...", flush=True)
            quantize(model, base, kind)
        make = functools.partial(recover, base, model, teacher, rows, script, args)
        once(base.with_name(f"{base.name}-adapter"), make)


def recover(
    base: Path, model: Path, teacher: str, rows: list[list[int]], script: RecipeArguments, args: Any, folder: Path
) -> None:
    """Initialise an adapter as the best correction of its rank, train it by distillation, and save it."""
    set_seed(args.seed)
    quantized = load(base, args)
    original = load(model, args)
    student = get_peft_model(quantized, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    compensate(student, original, rows[: max(1, 2048 // len(rows[0]))])
    if script.recovery_steps:
        changes = {"max_steps": script.recovery_steps, "learning_rate": 1e-3, "hidden_states_weight": 0.0}
        own = dataclasses.replace(args, **changes, output_dir=f"{args.output_dir}/training-{base.name}")
        learn(student, load(teacher, args), rows, own)
    student.save_pretrained(folder)
