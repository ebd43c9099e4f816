"""Measure memory and time of distillation, ours against TRL's and Liger's, side by side on one CPU thread.

    pip install trl==1.16 liger-kernel   # optional: competitors that are not installed are left out
    python examples/benchmarks/distillation_memory.py                  # everything: about ten minutes
    python examples/benchmarks/distillation_memory.py --largest 32768  # only the smaller vocabulary: about four minutes
    python examples/benchmarks/distillation_memory.py --only trainer   # or 'loss', or 'cross-entropy'

The script prints ratios (ours / theirs; below 1, ours is better), and writes them with the measured values and a plot
to `--output`. All competitors compute the forward KL at temperature 1 in float32, from the same data and weights. The
values of the losses are compared, and for a loss without trainer also its gradients; a difference is an error.

GKD holds the logits of both models. GOLD does the same on fixed data, so it is not measured. "TRL chunked" is
`trl.DistillationTrainer`, which computes its loss from tiles of the vocabulary. It trains only on text that the student
generates, so rows of the data set replace the generated text here, by overriding a private method of TRL 1.16. Of
Liger, only the loss is measured.

CPU time includes the system's time for new memory, which is most of GKD's time at the larger vocabulary. Where memory
is reused, as on a GPU, the difference is smaller. Peak memory includes freed blocks that malloc keeps.

Legend: `B` sequences, `T` tokens per sequence, `N` tokens, `H` hidden size, `V` vocabulary.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers.utils import logging

from examples.benchmarks.measuring import Run, alternate, peak_memory

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package is missing; only 4-bit products need it
    logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from tabulate import tabulate
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer
    from transformers import default_data_collator as collate

    from whisper_hf import DistillationConfig, DistillationTrainer
    from whisper_hf.objectives import Head, TeacherTarget, chunked_distillation_loss, weighted_divergence
except ImportError as error:
    raise SystemExit(f"distillation_memory.py: {error}; pip install 'whisper-hf[examples]'") from error

HIDDEN = {32768: 256, 151936: 64}  # V -> H, such that most of the time goes into the vocabulary
BATCH, LENGTH = 4, 256  # B, T
TOKENS = BATCH * LENGTH  # N
TOLERANCE = 1e-3  # relative difference of losses and gradients


def linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer with the given weight, `[V, H]`, without copying it."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return module


def our_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the loss of this package, in nats per token.

    Args:
        hidden, teacher_hidden: `[N, H]`, the hidden states of student and teacher.
        head, teacher_head: `[V, H]`, the weights of their heads.
    """
    target = TeacherTarget(teacher_hidden, Head(linear(teacher_head)), weighted_divergence({"forward_kl": 1.0}))
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return chunked_distillation_loss(hidden, linear(head), labels, target).loss / len(hidden)


def gkd_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the loss of TRL's GKD on full logits, without the copy that the shift in its trainer makes.

    The arguments are those of [`our_loss`].
    """
    from trl.experimental.gkd import GKDTrainer

    logits = (hidden @ head.T)[None]
    with torch.no_grad():
        teacher_logits = (teacher_hidden @ teacher_head.T)[None]
    labels = torch.zeros(1, len(hidden), dtype=torch.long)  # no label is -100: the loss counts all tokens
    loss = GKDTrainer.generalized_jsd_loss
    return loss(logits, teacher_logits, labels, beta=0.0, num_items_in_batch=len(hidden))  # beta 0: forward KL


def trl_chunked_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the loss of TRL's DistillationTrainer; the arguments are those of [`our_loss`]."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.0)
    return per_token.mean()


def liger_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return Liger's loss in chunks of 256 tokens, since its default of 1,024 would be a single chunk here.

    The arguments are those of [`our_loss`].
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=256)
    return loss(hidden, head, teacher_hidden, teacher_head, torch.zeros(len(hidden), dtype=torch.long))


LOSSES = {"GKD": gkd_loss, "TRL chunked": trl_chunked_loss, "Liger": liger_loss, "ours": our_loss}


def loss_run(name: str, vocabulary: int, tokens: int = TOKENS) -> Callable[[], list[Tensor]]:
    """Return a function that runs one loss forward and backward.

    It returns the value of the loss, and its gradients for the student's hidden states and head.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    size = HIDDEN[vocabulary]
    tensors = [torch.randn(shape, generator=generator) for shape in [(tokens, size), (vocabulary, size)] * 2]
    for head in tensors[1::2]:
        head *= size**-0.5  # logits of unit variance
    tensors[:2] = [nn.Parameter(tensor) for tensor in tensors[:2]]

    def run() -> list[Tensor]:
        value = LOSSES[name](*tensors)
        return [value.detach(), *torch.autograd.grad(value, tensors[:2])]

    return run


def prepare_loss(name: str, vocabulary: int) -> Run:
    """Return the run whose peak memory is measured, after a run of two tokens that imports what the loss needs."""
    loss_run(name, vocabulary, tokens=2)()
    return loss_run(name, vocabulary)


def check_losses(names: list[str], vocabulary: int) -> None:
    """Raise a `ValueError` unless all losses equal ours, in value and gradients."""
    expected = loss_run("ours", vocabulary, tokens=64)()
    for name in names:
        found = loss_run(name, vocabulary, tokens=64)()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(expected, found, strict=True)]
        if max(errors) > TOLERANCE:
            raise ValueError(
                f"relative errors of ours to {name} must be at most {TOLERANCE}, got {errors}; fix the loss"
            )


def tiny_models(vocabulary: int) -> list[LlamaForCausalLM]:
    """Return a student and a teacher: Llamas of two layers, with the same weights for every competitor."""
    size = HIDDEN[vocabulary]
    sizes = {"vocab_size": vocabulary, "hidden_size": size, "intermediate_size": 2 * size}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, initializer_range=size**-0.5)  # logits of unit variance
    torch.manual_seed(0)
    return [LlamaForCausalLM(config).eval() for _ in range(2)]


def token_rows(vocabulary: int, steps: int) -> Dataset:
    """Return rows of random `input_ids`, `attention_mask` and `labels`, each `[T]`; all tokens have labels."""
    ids = torch.randint(2, vocabulary, (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * LENGTH] * len(ids), "labels": ids})


def settings(config: type, steps: int, **more: object) -> Any:
    """Return training arguments, equal for all trainers: SGD without state, at a rate of 0, so that steps are equal."""
    shared = {"optim": "sgd", "learning_rate": 0.0, "max_steps": steps, "per_device_train_batch_size": BATCH}
    off = {"bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}  # TRL switches these on
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return config(output_dir=tempfile.gettempdir(), use_cpu=True, **shared, **off, **quiet, **more)


def trl_arguments(vocabulary: int, steps: int) -> dict[str, object]:
    """Return the arguments of TRL's trainers, including a tokenizer that they require and do not use."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    models = dict(zip(("model", "teacher_model"), tiny_models(vocabulary), strict=True))
    return models | {"train_dataset": token_rows(vocabulary, steps), "processing_class": tokenizer}


def our_trainer(vocabulary: int, steps: int, cross_entropy: float = 0.0) -> Trainer:
    """Build the trainer of this package.

    Args:
        vocabulary: size of the vocabulary.
        steps: training steps.
        cross_entropy: weight of the cross-entropy, in [0, 1]; the divergence has the weight `1 - cross_entropy`.
    """
    weights = {"divergence_weight": 1 - cross_entropy, "cross_entropy_weight": cross_entropy}
    args = settings(DistillationConfig, steps, divergence="forward_kl", temperature=1.0, **weights)
    student, teacher = tiny_models(vocabulary)
    rows = token_rows(vocabulary, steps)
    return DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=rows, data_collator=collate)


def gkd_trainer(vocabulary: int, steps: int) -> Trainer:
    """Build TRL's GKDTrainer, on fixed data only."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = settings(GKDConfig, steps, lmbda=0.0, seq_kd=False, beta=0.0, temperature=1.0)
    return GKDTrainer(args=args, data_collator=collate, **trl_arguments(vocabulary, steps))


def trl_chunked_trainer(vocabulary: int, steps: int) -> Trainer:
    """Build TRL's DistillationTrainer, on rows of the data set in place of generated text."""
    import trl

    class OnFixedData(trl.DistillationTrainer):
        def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
            ids = torch.tensor([row["input_ids"] for row in inputs])
            # the loss counts all tokens but the first, as in the other trainers
            prompt = ids[:, :1]
            completion = ids[:, 1:]
            masks = {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
            count = torch.tensor(float(completion.numel()))
            return {"prompt_ids": prompt, "completion_ids": completion, **masks, "num_items_in_batch": count}

    args = settings(trl.DistillationConfig, steps, beta=0.0, temperature=1.0, remove_unused_columns=False)
    return OnFixedData(args=args, **trl_arguments(vocabulary, steps))


WITH = "ours with cross-entropy"
TRAINERS = {"GKD": gkd_trainer, "TRL chunked": trl_chunked_trainer, "ours": our_trainer}
TRAINERS[WITH] = functools.partial(our_trainer, cross_entropy=0.5)


def trainer_run(name: str, vocabulary: int, steps: int) -> Callable[[], float]:
    """Build a trainer, and return a function that trains and returns the mean loss in nats per token."""
    torch.set_num_threads(1)
    trainer = TRAINERS[name](vocabulary, steps)
    trainer.remove_callback(PrinterCallback)
    return lambda: trainer.train().training_loss


def measure_losses(names: list[str], vocabulary: int, options: argparse.Namespace) -> list[dict]:
    """Measure the losses without trainer, on N tokens; return a row for each."""
    check_losses(names, vocabulary)
    seconds = alternate({name: loss_run(name, vocabulary) for name in names}, options.seconds)
    return [result(name, TOKENS / seconds[name], peak_memory(prepare_loss, name, vocabulary)) for name in names]


def measure_trainers(names: list[str], vocabulary: int, options: argparse.Namespace) -> list[dict]:
    """Measure whole trainers, on N tokens per step; return a row for each.

    Raises:
        ValueError: the trainers that minimise only the divergence report different losses.
    """
    steps = options.steps
    losses: dict[str, float] = {}
    runs = {name: trainer_run(name, vocabulary, steps) for name in names}

    def record(name: str) -> None:
        losses[name] = runs[name]()

    seconds = alternate({name: functools.partial(record, name) for name in names}, options.seconds)
    alike = [loss for name, loss in losses.items() if name != WITH]
    if max(alike) - min(alike) > TOLERANCE * max(alike):
        raise ValueError(
            f"all trainers must report one loss within a relative {TOLERANCE}, got {losses}; fix the trainer"
        )
    memory = {name: peak_memory(trainer_run, name, vocabulary, steps) for name in names}
    return [result(name, steps * TOKENS / seconds[name], memory[name]) for name in names]


def result(name: str, speed: float, memory: float | None) -> dict:
    """Return and print a row: peak memory in MB above the memory before the run, and tokens per CPU second."""
    print(f"    {name:24s} {memory or float('nan'):7.0f} MB {speed:7.0f} tokens per CPU second", flush=True)
    return {"name": name, "memory": memory, "speed": speed}


def measure(options: argparse.Namespace) -> list[dict]:
    """Run the measurements that the options select, with the competitors that are installed."""
    peers = ["GKD", "TRL chunked"] if find_spec("trl") else []
    liger = ["Liger"] if find_spec("liger_kernel") else []
    jobs: dict[str, tuple[Callable[..., list[dict]], list[str]]] = {
        "loss": (measure_losses, [*peers, *liger, "ours"]),
        "trainer": (measure_trainers, [*peers, "ours"]),
        "cross-entropy": (measure_trainers, ["ours", WITH]),
    }
    rows: list[dict] = []
    for what, (job, names) in jobs.items():
        for vocabulary in HIDDEN:
            if vocabulary <= options.largest and options.only in (None, what):
                print(f"{what}, vocabulary {vocabulary}", flush=True)
                rows += [{"what": what, "vocabulary": vocabulary, **row} for row in job(names, vocabulary, options)]
    return rows


def report(rows: list[dict]) -> str:
    """Return a Markdown table of ours / each competitor, and of ours with / without cross-entropy."""
    ours = {(row["what"], row["vocabulary"]): row for row in rows if row["name"] == "ours"}
    table = []
    for row in (row for row in rows if row["name"] != "ours"):
        top, bottom = ours[row["what"], row["vocabulary"]], row
        if row["name"] == WITH:
            top, bottom = bottom, top
        memory = top["memory"] and top["memory"] / bottom["memory"]
        time = bottom["speed"] / top["speed"]
        label = f"{row['what']}: {top['name']} / {bottom['name']}"
        table.append([label, row["vocabulary"], memory, time, f"{100 * (time - 1):+.0f} %"])
    return tabulate(table, ["one thread, float32", "V", "peak memory", "CPU time", ""], "github", floatfmt=".2f")


def plot(rows: list[dict], path: Path) -> None:
    """Plot peak memory and speed, with a group of bars for each measurement."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    chosen = [r | {"group": f"{r['what']}\nV {r['vocabulary']:,}"} for r in rows if r["what"] != "cross-entropy"]
    groups, names = (list(dict.fromkeys(row[key] for row in chosen)) for key in ("group", "name"))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("memory", "speed"), ("peak MB", "tokens per CPU second"), strict=True):
        for index, name in enumerate(names):
            bars = {groups.index(row["group"]) + index / 5: row[key] or 0 for row in chosen if row["name"] == name}
            axis.bar(list(bars), list(bars.values()), 1 / 5, label=name)
        axis.set_xticks([group + (len(names) - 1) / 10 for group in range(len(groups))], groups)
        axis.set_ylabel(label)
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["loss", "trainer", "cross-entropy"], help="measure only this")
    parser.add_argument("--largest", type=int, default=max(HIDDEN), help="largest vocabulary (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a trainer (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each comparison (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.largest < min(HIDDEN):
        parser.error(
            f"--largest must be at least {min(HIDDEN)}, the smallest vocabulary, got {options.largest}; raise it"
        )
    if not find_spec("trl"):
        print("TRL is not installed, so only ours is measured; to compare: pip install trl==1.16")
    rows = measure(options)

    print(f"\n{report(rows)}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"rows": rows, "steps": options.steps, "torch": torch.__version__}
    (options.output / "distillation_memory.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.only != "cross-entropy":
        plot(rows, options.output / "distillation_memory.svg")


if __name__ == "__main__":
    main()
