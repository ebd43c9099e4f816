"""What the recipes share: arguments, stages that are done once, training, quantization with recovery, checksums."""

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
    # on some CPUs bitsandbytes, which peft imports, asks for a package that speeds up 4-bit products: they do without
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # it warns of a rounding on every call
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

TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the default teacher is a copy of
SPARSE = {"block_size": 16, "sink_blocks": 2, "local_blocks": 16, "topk_blocks": 86}  # 1,664 tokens at most
RECIPES = {"int8": "int8", "nf4": "nf4-double"}  # the quantized forms of each model
PLACE: dict[str, Any] = {"device_map": {"": 0}} if torch.cuda.is_available() else {}  # what is loaded goes there
HALF = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()  # elsewhere bfloat16 is far slower
DTYPE = torch.bfloat16 if HALF else torch.float32  # to compute in, where nothing else is said
RANK = 12  # of the adapters that make up for quantization
QUIET = {"report_to": "none", "per_device_train_batch_size": 1, "save_total_limit": 1, "logging_steps": 5}


@dataclass
class RecipeArguments:
    """Models and text; what concerns training is in [`~whisper_hf.DistillationConfig`]."""

    size: str = field(default="cpu", metadata={"help": "cpu or gpu: how much is trained, where nothing else is said"})
    teacher: str | None = field(default=None, metadata={"help": "path or Hub id; by default SmolLM2-135M-Instruct"})
    train_data: list[str] = field(
        default_factory=lambda: [*NOVELS, PROGRAMS],
        metadata={
            "help": "text files, folders of them, or Hub ids; by default three novels and the sources of torch.nn"
        },
    )
    text_column: str = field(default="text", metadata={"help": "of a data set"})
    row_tokens: int = field(default=512, metadata={"help": "tokens of a training example"})
    recovery_steps: int = field(default=0, metadata={"help": "of the adapters on quantized weights"})


def parse(
    sizes: dict[str, dict[str, Any]], kind: type = RecipeArguments, **shared: Any
) -> tuple[Any, DistillationConfig]:
    """Read the command line, with the defaults of the size that it names."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--size", choices=sizes, default="cpu")
    size = chosen.parse_known_args()[0].size
    parser = HfArgumentParser((kind, DistillationConfig))
    parser.set_defaults(**{**QUIET, "bf16": HALF, **shared, **sizes[size]})
    return parser.parse_args_into_dataclasses()


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that is made if it is not there; all of it appears, or nothing."""
    if not folder.exists():
        print(f"making {folder} ...", flush=True)
        with new_folder(folder) as unfinished:
            make(unfinished)
    return folder


def teacher_source(given: str | None) -> str:
    """Return the folder or Hub id of the teacher."""
    return smollm2_checkpoint() if given is None else given


def training_rows(script: RecipeArguments, tokenizer: Any, args: DistillationConfig) -> list[list[int]]:
    """Return as many rows as there are steps for, or all that the sources have."""
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    return read_rows(script.train_data, tokenizer, script.row_tokens, count, script.text_column, args.seed)


def load(source: str | Path, args: DistillationConfig) -> Model:
    """Return a model that is not trained, or quantized, in the dtype that training computes in."""
    return load_in(torch.bfloat16 if args.bf16 else torch.float32, source)


def load_in(dtype: torch.dtype, source: str | Path) -> Model:
    """Return a model that computes in a dtype, even if it is quantized: transformers leaves that as it was saved."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **PLACE).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    return model


def as_dataset(rows: list[list[int]]) -> datasets.Dataset:
    """Return rows with labels."""
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def learn(
    student: Model, teacher: Model | None, rows: list[list[int]], args: DistillationConfig, **options: Any
) -> None:
    """Train a student from its teacher, or from text alone; from the last checkpoint if there is one."""
    args.resume_from_checkpoint = "last"
    known = {"model": student, "args": args, "train_dataset": as_dataset(rows), "data_collator": collate, **options}
    resuming.train(Trainer(**known) if teacher is None else DistillationTrainer(teacher=teacher, **known))


def save(model: Model, source: str | Path, folder: Path) -> None:
    """Save a model in the dtype of its source, with its tokenizer."""
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def quantized_forms(model: Path, teacher: str, rows: list[list[int]], script: RecipeArguments, args: Any) -> None:
    """Write the quantized forms of a model, and an adapter for each that makes up for what they lose."""
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
    """Start an adapter as the best correction of its rank, and let it learn what the teacher predicts."""
    set_seed(args.seed)
    quantized, original = load(base, args), load(model, args)
    student = get_peft_model(quantized, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    compensate(student, original, rows[: max(1, 2048 // len(rows[0]))])
    if script.recovery_steps:
        changes = {"max_steps": script.recovery_steps, "learning_rate": 1e-3, "hidden_states_weight": 0.0}
        own = dataclasses.replace(args, **changes, output_dir=f"{args.output_dir}/training-{base.name}")
        learn(student, load(teacher, args), rows, own)
    student.save_pretrained(folder)
