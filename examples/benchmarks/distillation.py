"""Compare methods of distillation: what a small sparse student learns from a teacher five times its size.

    python examples/benchmarks/distillation.py                   # everything: about half an hour on an idle core
    python examples/benchmarks/distillation.py --seeds 1 --only forward_kl samples-12
    pip install trl==1.16 && python examples/benchmarks/distillation.py --only trl-gkd

The script runs on one CPU thread, with models of bytes. The teacher, a dense Llama, is trained on one novel for six
minutes and kept in `--output`. All students are WhisperLMs of 0.27 million parameters with a budget of 64 tokens. They
are trained on 960 rows of 192 bytes of that novel, in the same order, at the learning rate that is best for
cross-entropy. Most students start from random weights; `student_from` makes the `cut` students from layers of the
teacher. `top`, `renormalised` (no probability for other tokens) and `samples` learn from stored predictions, and `int8`
and `nf4` learn from a quantized teacher. A method without the name of a divergence uses forward KL.

The script measures on another novel: the perplexity per byte; the share that a method closes of the gap between
cross-entropy and the teacher; the repetition of greedy continuations (share of 4-grams that occurred before); and the
CPU time of a step as a ratio to cross-entropy's. Perplexity is a forward KL, so it favours this divergence over
mode-seeking ones. Means and standard deviations are over seeds, which set weights and order. Results in `--output` with
the same settings are not measured again.
"""

import argparse
import functools
import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers.utils import logging

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package for faster 4-bit products is missing
    logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from tabulate import tabulate
    from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, Trainer, TrainingArguments
    from transformers import PreTrainedModel as Model
    from transformers import default_data_collator as collate

    from whisper_hf import DistillationConfig, DistillationTrainer, WhisperLMConfig, from_dense, student_from
    from whisper_hf.distillation import write_signals
    from whisper_hf.objectives.divergences import SAME_TOKENS
except ImportError as error:
    raise SystemExit(f"distillation.py: {error}; pip install 'whisper-hf[examples]'") from error

BOOKS = Path(__file__).resolve().parents[1] / "data"
LENGTH = 192  # bytes of a row
BATCH = 4  # rows of a step
SPARSE = {"block_size": 16, "topk_blocks": 1, "local_blocks": 2, "sink_blocks": 1}  # a budget of 64 bytes
SHARED = {"vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
SHARED |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 1024}
TEACHER = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 6}
SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
CUT = {"intermediate_size": 96, "num_hidden_layers": 2}  # as many parameters as SMALL
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 1000, 8, 4e-3
HELD_OUT = 256  # rows of the held-out novel
WRITTEN, PREFIX, NEW = 20, 64, 64  # number of continuations, bytes of their prefix, bytes that they add
DIGITS = {"perplexity": 3, "closed": 1, "repetition": 3, "time": 2}  # reported quantity -> digits after the point


@dataclass(frozen=True)
class Method:
    """A method of distillation.

    Args:
        losses: options of `DistillationConfig`; `None` for cross-entropy, by the stock Trainer.
        student: the kind of student, "small" (random weights) or "cut" (layers of the teacher).
        teacher: what it learns from: "full", "int8", "nf4", or stored predictions such as "top-4".
        is_gkd: whether TRL's GKDTrainer trains the student.
    """

    losses: dict[str, Any] | None = field(default_factory=dict)
    student: str = "small"
    teacher: str = "full"
    is_gkd: bool = False


METHODS = {
    "cross-entropy": Method(None),
    **{name: Method({"divergence": name}) for name in SAME_TOKENS},
    **{name: Method(teacher=name) for name in ("top-4", "top-16", "renormalised-4", "renormalised-16", "samples-12")},
    **{name: Method(teacher=name) for name in ("int8", "nf4")},
    "cut, cross-entropy": Method(None, "cut"),
    "cut, forward_kl": Method(student="cut"),
    "cut, hidden states": Method({"hidden_states_weight": 1.0}, "cut"),
    "trl-gkd": Method(is_gkd=True),
}


def read_rows(name: str, count: int | None = None) -> Tensor:
    """Return a novel as rows of bytes, `[N, LENGTH]` int64, or `count` evenly spaced rows of it."""
    text = torch.tensor(list((BOOKS / f"{name}.txt").read_bytes()))
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows if count is None else rows[torch.arange(count) * len(rows) // count]


def dataset(rows: Tensor) -> datasets.Dataset:
    """Return rows, `[N, LENGTH]` int64, as a data set with labels."""
    return datasets.Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


def settings(kind: type, steps: int, rate: float, seed: int, batch: int = BATCH, **more: Any) -> Any:
    """Return training arguments of a kind, with all that the methods share."""
    schedule = {"max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": steps // 12}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    shared = {"use_cpu": True, "dataloader_pin_memory": False, "bf16": False, "seed": seed}
    return kind(per_device_train_batch_size=batch, **schedule, **quiet, **shared, **more)


def train(trainer: Trainer) -> float:
    """Train, and return the CPU seconds per step."""
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return (time.process_time() - start) / trainer.args.max_steps


def train_teacher(folder: Path) -> None:
    """Train and save the teacher; the folder appears when it is complete."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHARED, **TEACHER))
    print(f"training a teacher of {model.num_parameters():,} parameters ...", flush=True)
    rows = dataset(read_rows("sense_and_sensibility"))
    args = settings(TrainingArguments, TEACHER_STEPS, TEACHER_RATE, 0, TEACHER_BATCH, output_dir=str(folder.parent))
    train(Trainer(model=model, args=args, train_dataset=rows, data_collator=collate))
    model.save_pretrained(folder.with_name("teacher-unfinished"))
    folder.with_name("teacher-unfinished").rename(folder)


@functools.cache
def load_teacher(folder: Path, precision: str = "full") -> Model:
    """Load the teacher, in float32 ("full") or quantized ("int8", "nf4")."""
    kinds = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    config = {"quant_method": "bitsandbytes", **kinds[precision]} if precision in kinds else None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def teacher_of(method: Method, folder: Path, rows: datasets.Dataset) -> Model | Path:
    """Return the teacher of a method, or the folder of its stored predictions, which are written if missing."""
    kind, _, count = method.teacher.partition("-")
    what = "samples" if kind == "samples" else "top"
    if not count:
        return load_teacher(folder, kind)
    stored = folder.with_name(f"{what}-{count}-{len(rows)}")
    write_signals(load_teacher(folder), rows, stored, kind=what, count=int(count), progress=False)
    return without_rest(stored) if kind == "renormalised" else stored


def without_rest(stored: Path) -> Path:
    """Copy stored predictions, with the probability of all other tokens set to zero: the usual truncation."""
    target = stored.with_name(f"renormalised-{stored.name}")
    if not (target / "signals.json").exists():
        for part in stored.glob("part-*"):
            read = datasets.load_from_disk(str(part))
            read = read.map(lambda row: {"teacher_log_rest": [-1e4] * LENGTH}, features=read.features)
            read.save_to_disk(str(target / part.name))
        shutil.copy(stored / "signals.json", target)
    return target


def make_student(kind: str, teacher: Model, rows: datasets.Dataset, seed: int) -> Model:
    """Make a student of a kind; a student made from the teacher's layers is the same for all seeds."""
    torch.manual_seed(seed)
    if kind == "small":
        model = AutoModelForCausalLM.from_config(WhisperLMConfig(**SHARED, **SMALL, sparse_attention=SPARSE))
    else:
        model = from_dense(student_from(teacher, **CUT, calibration=rows[:16]["input_ids"]), SPARSE)
    model.set_attn_implementation("sdpa")  # it computes the same function, and is faster on rows this short
    return model


def make_trainer(method: Method, teacher: Any, arguments: dict[str, Any], **shared: Any) -> Trainer:
    """Build the trainer of a method."""
    if method.is_gkd:
        from transformers import ByT5Tokenizer
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        shared["train_dataset"] = shared["train_dataset"].map(lambda row: {"attention_mask": [1] * LENGTH})
        forward_kl = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "activation_checkpointing": False}
        args = settings(GKDConfig, **arguments, **forward_kl)
        # the tokenizer is required, but not used
        return GKDTrainer(teacher_model=teacher, args=args, processing_class=ByT5Tokenizer(), **shared)
    if method.losses is None:
        return Trainer(args=settings(TrainingArguments, **arguments), **shared)
    args = settings(DistillationConfig, **arguments, **method.losses)
    return DistillationTrainer(teacher=teacher, args=args, **shared)


def repetition(rows: Tensor) -> float:
    """Return the share of 4-grams that occurred before in their row, in [0, 1], mean over rows `[N, T]` int64."""
    return statistics.mean(1 - len(row.unfold(0, 4, 1).unique(dim=0)) / (len(row) - 3) for row in rows)


@torch.no_grad()
def measure(model: Model) -> dict[str, float]:
    """Return the perplexity and the repetition of a model on the held-out novel."""
    rows = read_rows("northanger_abbey", HELD_OUT)
    model.eval()
    prompts = rows[:: HELD_OUT // WRITTEN][:WRITTEN, :PREFIX]
    greedy = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    written = model.generate(prompts, **greedy)[:, PREFIX:]
    losses = [model(part, labels=part, use_cache=False).loss for part in rows.split(32)]
    return {"perplexity": math.exp(torch.stack(losses).mean().item()), "repetition": repetition(written)}


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a student by one method, measure it, and return a row of results."""
    method = METHODS[name]
    rows = dataset(read_rows("sense_and_sensibility", options.steps * BATCH))
    folder = options.output / "teacher"
    student = make_student(method.student, load_teacher(folder), rows, seed)
    arguments = {"steps": options.steps, "rate": options.learning_rate, "seed": seed, "output_dir": str(options.output)}
    shared = {"model": student, "train_dataset": rows, "data_collator": collate}
    seconds = train(make_trainer(method, teacher_of(method, folder, rows), arguments, **shared))
    measured = measure(student)
    print(f"{name:20s} seed {seed}: {measured['perplexity']:.3f}, {1000 * seconds:.0f} ms a step", flush=True)
    return {"method": name, "seed": seed, "seconds": seconds, **measured}


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds, for each method; ratios to cross-entropy are per seed."""
    base = {row["seed"]: row for row in results["rows"] if row["method"] == "cross-entropy"}
    best = results["teacher"]["perplexity"]
    rows = []
    summary = []
    for row in results["rows"]:
        plain = base[row["seed"]]
        closed = 100 * (plain["perplexity"] - row["perplexity"]) / (plain["perplexity"] - best)
        rows.append({**row, "closed": closed, "time": row["seconds"] / plain["seconds"]})
    for name in METHODS:
        columns = {key: [row[key] for row in rows if row["method"] == name] for key in DIGITS}
        if count := len(columns["closed"]):
            spread = {k: (statistics.mean(v), statistics.stdev(v) if count > 1 else 0) for k, v in columns.items()}
            summary.append({"method": name, "seeds": count, **spread})
    return summary


def report(summary: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Return the summary as a Markdown table; methods with a single run have no standard deviation."""
    table = []
    for row in summary:
        cells = [(f"{row[key][0]:.{n}f}", f" ± {row[key][1]:.{n}f}") for key, n in DIGITS.items()]
        table.append([row["method"], *(mean + spread * (row["seeds"] > 1) for mean, spread in cells), row["seeds"]])
    table.append(["teacher", f"{results['teacher']['perplexity']:.3f}", 100, f"{results['teacher']['repetition']:.3f}"])
    table.append(["the novel itself", "", "", f"{results['novel']:.3f}"])
    headers = ["", "perplexity", "gap closed, %", "repetition", "time of a step", "seeds"]
    return tabulate(table, headers, "github", disable_numparse=True)


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Plot how much of the gap each method closes, with its standard deviation over seeds."""
    axis = Figure(figsize=(8, 0.3 * len(summary) + 1), layout="constrained").subplots()
    values, spread = zip(*(row["closed"] for row in summary), strict=True)
    axis.barh([row["method"] for row in summary], values, xerr=spread)
    axis.invert_yaxis()
    axis.set_xlabel("gap between cross-entropy and the teacher that is closed, %")
    axis.figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=240, help="training steps of a student (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="; ".join(METHODS))
    add("--learning-rate", type=float, default=2e-3, help="learning rate of all students (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/distillation"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if min(options.steps, options.seeds) < 1 or not options.learning_rate > 0:
        parser.error(f"--steps, --seeds and --learning-rate must be positive, got {vars(options)}; leave them out")
    return options


def read_results(options: argparse.Namespace) -> dict[str, Any]:
    """Return earlier results with the same settings, or else new ones that hold only the teacher's measures."""
    path = options.output / "distillation.json"
    folder = options.output / "teacher"
    found = json.loads(path.read_text()) if path.exists() else {}
    made = {"steps": options.steps, "learning_rate": options.learning_rate, "torch": torch.__version__}
    if found.get("settings") == made:
        return found
    if not folder.exists():
        train_teacher(folder)
    novel = repetition(read_rows("northanger_abbey", HELD_OUT)[:, :NEW])
    return {"settings": made, "teacher": measure(load_teacher(folder)), "novel": novel, "rows": []}


def main() -> None:
    """Run the methods without results, print the table, and write the results."""
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.get_logger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every call that inputs are cast to float16
    options.output.mkdir(parents=True, exist_ok=True)
    results = read_results(options)
    if "trl-gkd" in options.only and not find_spec("trl"):
        print("TRL is not installed, so its GKD is left out; to compare: pip install trl==1.16")
        options.only.remove("trl-gkd")
    for seed in range(options.seeds):
        for name in dict.fromkeys(["cross-entropy", *options.only]):  # cross-entropy: the baseline of all other methods
            if (name, seed) not in {(row["method"], row["seed"]) for row in results["rows"]}:
                results["rows"].append(run(name, seed, options))
                (options.output / "distillation.json").write_text(json.dumps(results, indent=1) + "\n")
    summary = summarize(results)
    print(f"\n{report(summary, results)}")
    plot(summary, options.output / "distillation.svg")


if __name__ == "__main__":
    main()
