"""Memory and time of distillation, ours against TRL's, side by side in one run on one thread.

    pip install trl==1.16 liger-kernel   # what is not installed is left out; Liger only offers the loss
    python examples/benchmarks/distillation_memory.py                  # everything: about ten minutes
    python examples/benchmarks/distillation_memory.py --largest 32768  # the smaller vocabulary: about four
    python examples/benchmarks/distillation_memory.py --only trainer   # or 'loss', or 'cross-entropy'

Prints ratios (ours over theirs: below 1, ours is better), and writes them with what they come from and a plot to
`--output`. All compute the forward KL at temperature 1 in float32 from the same data and weights; values, and of the
losses alone gradients, are compared, and a difference is an error.

GKD holds the logits of both models; GOLD does the same on fixed data, and is not measured again. "TRL chunked" is
`trl.DistillationTrainer`, which computes its loss from tiles of the vocabulary. It trains only what the student
generates, so rows of the dataset take the place of its generations here (by a private method of TRL 1.16).

CPU time includes the system's time for fresh memory, most of GKD's at the larger vocabulary: expect less of a
difference where memory is reused, as on a GPU. Peak memory includes what malloc keeps of freed blocks.

Legend: B sequences, T tokens a sequence, N tokens, H hidden size, V vocabulary.
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
    # on some CPUs bitsandbytes, which peft imports, asks for a package that only 4-bit products need: none happen here
    logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from tabulate import tabulate
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer
    from transformers import default_data_collator as collate

    from whisper_hf import DistillationConfig, DistillationTrainer
    from whisper_hf.objectives import Head, TeacherTarget, chunked_distillation_loss, weighted_divergence
except ImportError as error:
    raise SystemExit(f"distillation_memory.py: {error}; pip install 'whisper-hf[examples]'") from error

HIDDEN = {32768: 256, 151936: 64}  # V: H, chosen so that the vocabulary dominates
BATCH, LENGTH = 4, 256  # B, T
TOKENS = BATCH * LENGTH  # N
TOLERANCE = 1e-3  # relative difference of losses and gradients


def linear(weight: Tensor) -> nn.Linear:
    """Return a module that holds a weight, `[V, H]`."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return module


def our_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return our loss: mean nats a token, as below; `hidden` `[N, H]` and `head` `[V, H]`, the teacher's alike."""
    target = TeacherTarget(teacher_hidden, Head(linear(teacher_head)), weighted_divergence({"forward_kl": 1.0}))
    labels = torch.zeros(len(hidden), dtype=torch.long)
    return chunked_distillation_loss(hidden, linear(head), labels, target).loss / len(hidden)


def gkd_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the loss of TRL's GKD on full logits; it is spared the copy that the shift costs its trainer."""
    from trl.experimental.gkd import GKDTrainer

    logits = (hidden @ head.T)[None]
    with torch.no_grad():
        teacher_logits = (teacher_hidden @ teacher_head.T)[None]
    labels = torch.zeros(1, len(hidden), dtype=torch.long)  # none is -100: all tokens are trained
    loss = GKDTrainer.generalized_jsd_loss
    return loss(logits, teacher_logits, labels, beta=0.0, num_items_in_batch=len(hidden))  # beta 0: forward KL


def trl_chunked_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the loss of TRL's DistillationTrainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.0)
    return per_token.mean()


def liger_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return Liger's loss in chunks of 256 tokens: its default of 1,024 would be a single chunk here."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=256)
    return loss(hidden, head, teacher_hidden, teacher_head, torch.zeros(len(hidden), dtype=torch.long))


LOSSES = {"GKD": gkd_loss, "TRL chunked": trl_chunked_loss, "Liger": liger_loss, "ours": our_loss}


def loss_run(name: str, vocabulary: int, tokens: int = TOKENS) -> Callable[[], list[Tensor]]:
    """Return a run of one loss, forward and backward: its value and its gradients for hidden states and head."""
    torch.set_num_threads(1)
    generator, size = torch.Generator().manual_seed(0), HIDDEN[vocabulary]
    tensors = [torch.randn(shape, generator=generator) for shape in [(tokens, size), (vocabulary, size)] * 2]
    for head in tensors[1::2]:
        head *= size**-0.5  # logits of unit variance
    tensors[:2] = [nn.Parameter(tensor) for tensor in tensors[:2]]

    def run() -> list[Tensor]:
        value = LOSSES[name](*tensors)
        return [value.detach(), *torch.autograd.grad(value, tensors[:2])]

    return run


def prepare_loss(name: str, vocabulary: int) -> Run:
    """Return the run whose memory is measured, after one of two tokens, so that what it imports is not counted."""
    loss_run(name, vocabulary, tokens=2)()
    return loss_run(name, vocabulary)


def check_losses(names: list[str], vocabulary: int) -> None:
    """Raise unless all losses agree with ours, in value and gradients."""
    expected = loss_run("ours", vocabulary, tokens=64)()
    for name in names:
        found = loss_run(name, vocabulary, tokens=64)()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(expected, found, strict=True)]
        if max(errors) > TOLERANCE:
            raise ValueError(f"Relative errors of ours to {name} must be at most {TOLERANCE}, got {errors}")


def tiny_models(vocabulary: int) -> list[LlamaForCausalLM]:
    """Return a student and a teacher, the same for every competitor: Llamas of two layers."""
    size = HIDDEN[vocabulary]
    sizes = {"vocab_size": vocabulary, "hidden_size": size, "intermediate_size": 2 * size}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, initializer_range=size**-0.5)  # logits of unit variance
    torch.manual_seed(0)
    return [LlamaForCausalLM(config).eval() for _ in range(2)]


def token_rows(vocabulary: int, steps: int) -> Dataset:
    """Return rows of random tokens: `input_ids`, `attention_mask` and `labels`, each `[T]`, all tokens trained."""
    ids = torch.randint(2, vocabulary, (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * LENGTH] * len(ids), "labels": ids})


def settings(config: type, steps: int, **more: object) -> Any:
    """Return training arguments, the same for all: SGD, which keeps no state, at a rate of 0, so that work repeats."""
    shared = {"optim": "sgd", "learning_rate": 0.0, "max_steps": steps, "per_device_train_batch_size": BATCH}
    off = {"bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}  # on in TRL
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return config(output_dir=tempfile.gettempdir(), use_cpu=True, **shared, **off, **quiet, **more)


def trl_arguments(vocabulary: int, steps: int) -> dict[str, object]:
    """Return what TRL's trainers take; they insist on a tokenizer, though nothing is tokenized."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    models = dict(zip(("model", "teacher_model"), tiny_models(vocabulary), strict=True))
    return models | {"train_dataset": token_rows(vocabulary, steps), "processing_class": tokenizer}


def our_trainer(vocabulary: int, steps: int, cross_entropy: float = 0.0) -> Trainer:
    """Return our trainer; `cross_entropy` in [0, 1] is that term's weight, the divergence has the rest."""
    weights = {"divergence_weight": 1 - cross_entropy, "cross_entropy_weight": cross_entropy}
    args = settings(DistillationConfig, steps, divergence="forward_kl", temperature=1.0, **weights)
    (student, teacher), rows = tiny_models(vocabulary), token_rows(vocabulary, steps)
    return DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=rows, data_collator=collate)


def gkd_trainer(vocabulary: int, steps: int) -> Trainer:
    """Return TRL's GKD, on fixed data alone."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = settings(GKDConfig, steps, lmbda=0.0, seq_kd=False, beta=0.0, temperature=1.0)
    return GKDTrainer(args=args, data_collator=collate, **trl_arguments(vocabulary, steps))


def trl_chunked_trainer(vocabulary: int, steps: int) -> Trainer:
    """Return TRL's DistillationTrainer, on rows of the dataset in place of generations."""
    import trl

    class OnFixedData(trl.DistillationTrainer):
        def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
            ids = torch.tensor([row["input_ids"] for row in inputs])
            prompt, completion = ids[:, :1], ids[:, 1:]  # all tokens but the first are trained, as by the others
            masks = {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
            count = torch.tensor(float(completion.numel()))
            return {"prompt_ids": prompt, "completion_ids": completion, **masks, "num_items_in_batch": count}

    args = settings(trl.DistillationConfig, steps, beta=0.0, temperature=1.0, remove_unused_columns=False)
    return OnFixedData(args=args, **trl_arguments(vocabulary, steps))


WITH = "ours with cross-entropy"
TRAINERS = {"GKD": gkd_trainer, "TRL chunked": trl_chunked_trainer, "ours": our_trainer}
TRAINERS[WITH] = functools.partial(our_trainer, cross_entropy=0.5)


def trainer_run(name: str, vocabulary: int, steps: int) -> Callable[[], float]:
    """Return a run of one trainer, built here; the run returns the mean loss in nats a token."""
    torch.set_num_threads(1)
    trainer = TRAINERS[name](vocabulary, steps)
    trainer.remove_callback(PrinterCallback)
    return lambda: trainer.train().training_loss


def measure_losses(names: list[str], vocabulary: int, options: argparse.Namespace) -> list[dict]:
    """Measure the loss alone, on N tokens."""
    check_losses(names, vocabulary)
    seconds = alternate({name: loss_run(name, vocabulary) for name in names}, options.seconds)
    return [result(name, TOKENS / seconds[name], peak_memory(prepare_loss, name, vocabulary)) for name in names]


def measure_trainers(names: list[str], vocabulary: int, options: argparse.Namespace) -> list[dict]:
    """Measure whole trainers, on N tokens a step; raise unless those of the divergence alone report one loss."""
    steps, losses = options.steps, {}
    runs = {name: trainer_run(name, vocabulary, steps) for name in names}

    def record(name: str) -> None:
        losses[name] = runs[name]()

    seconds = alternate({name: functools.partial(record, name) for name in names}, options.seconds)
    alike = [loss for name, loss in losses.items() if name != WITH]
    if max(alike) - min(alike) > TOLERANCE * max(alike):
        raise ValueError(f"All trainers must report one loss within a relative {TOLERANCE}, got {losses}")
    memory = {name: peak_memory(trainer_run, name, vocabulary, steps) for name in names}
    return [result(name, steps * TOKENS / seconds[name], memory[name]) for name in names]


def result(name: str, speed: float, memory: float | None) -> dict:
    """Return a row, and print it: peak MB above what there was before the run, tokens per second of process time."""
    print(f"    {name:24s} {memory or float('nan'):7.0f} MB {speed:7.0f} tokens per CPU second", flush=True)
    return {"name": name, "memory": memory, "speed": speed}


def measure(options: argparse.Namespace) -> list[dict]:
    """Measure everything asked for of what is installed."""
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
    """Return the ratios as a table: ours over each competitor, and ours with cross-entropy over ours without it."""
    ours = {(row["what"], row["vocabulary"]): row for row in rows if row["name"] == "ours"}
    table = []
    for row in (row for row in rows if row["name"] != "ours"):
        top, bottom = ours[row["what"], row["vocabulary"]], row
        if row["name"] == WITH:
            top, bottom = bottom, top
        memory, time = top["memory"] and top["memory"] / bottom["memory"], bottom["speed"] / top["speed"]
        label = f"{row['what']}: {top['name']} / {bottom['name']}"
        table.append([label, row["vocabulary"], memory, time, f"{100 * (time - 1):+.0f} %"])
    return tabulate(table, ["one thread, float32", "V", "peak memory", "CPU time", ""], "github", floatfmt=".2f")


def plot(rows: list[dict], path: Path) -> None:
    """Draw peak memory and speed, a group of bars for each measurement."""
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
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["loss", "trainer", "cross-entropy"], help="measure only this")
    parser.add_argument("--largest", type=int, default=max(HIDDEN), help="largest vocabulary (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a trainer (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each comparison (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.largest < min(HIDDEN):
        parser.error(f"--largest must be at least {min(HIDDEN)}, the smallest vocabulary, got {options.largest}")
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
