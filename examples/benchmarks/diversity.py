"""Compare training objectives against repetition, at three strengths each: what they achieve and cost.

    pip install -e ".[examples,metrics]"
    python examples/benchmarks/diversity.py                 # everything: about two hours on an idle core
    python examples/benchmarks/diversity.py --only mle whisper --seeds 1
    python examples/benchmarks/diversity.py --cost          # only time and memory of a step

The script runs on one CPU thread. It trains a sparse WhisperLM of 2.2 million parameters on three novels, which takes
twelve minutes, and keeps it in `--output`. From these weights each method continues for 200 steps of 1,024 tokens. For
each seed, all methods get the same tokens in the same order:

    mle                   cross-entropy
    token-unlikelihood    Welleck et al. 2019; strength: weight
    sequence-unlikelihood Welleck et al. 2019; strength: share of the steps with this loss
    scalegrad             Lin et al. 2021; strength: gamma, the smaller the stronger
    simctg                Su et al. 2022; strength: margin
    contrastive-token     Jiang et al. 2022; strength: weight
    ditto                 Xu et al. 2022, in every other step; strength: lambda, the smaller the stronger
    gem                   Li et al. 2025; strength: beta, the smaller the stronger
    contrast              `WhisperLMConfig.diversity`, without generation; strength: weight
    whisper               `SequenceUnlikelihoodCallback`; strength: interval between applications in steps, the smaller
                          the stronger

The script measures on a fourth novel: perplexity; cross-entropy on the tokens where the human author repeats three
tokens of the same row; the repetition (seq-rep-4) of 64 greedy continuations of 96 tokens; and, of nucleus samples
(p = 0.95) after the same prefixes, the share of repeated pairs (seq-rep-2) and their similarity (self-BLEU). The target
is the repetition of human text: less of it is as wrong as more. Results in `--output` with the same settings are not
measured again.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers.utils import logging

from examples.benchmarks import published
from examples.benchmarks.measuring import alternate, peak_memory

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package is missing; only 4-bit products need it
    logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from tabulate import tabulate
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed
    from transformers import PreTrainedModel as Model
    from transformers import default_data_collator as collate

    from whisper_hf import SequenceUnlikelihoodCallback, WhisperLMConfig, use_diversity
    from whisper_hf.objectives import unlikelihood
    from whisper_hf.repetition.metrics import self_bleu, sequence_repetition
    from whisper_hf.training.generation import continue_prompts
except ImportError as error:
    raise SystemExit(f"diversity.py: {error}; pip install 'whisper-hf[examples,metrics]'") from error

BOOKS = Path(__file__).resolve().parents[1] / "data"
READ = ("sense_and_sensibility", "pride_and_prejudice", "emma")  # the novels to train on
HELD_OUT = "northanger_abbey"  # the novel to measure on
VOCABULARY = 2048
LENGTH, BATCH = 256, 4  # tokens of a row, rows of a step
STEPS, RATE = 200, 1e-3  # steps and learning rate of each method
PRETRAINING = {"steps": 700, "rate": 3e-3, "batch": 16}
SPARSE = {"block_size": 16, "topk_blocks": 2, "local_blocks": 4, "sink_blocks": 1}  # a budget of 112 of 256 tokens
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 6}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ROWS = 192  # held-out rows
WRITTEN, PREFIX, NEW = 64, 32, 96  # number of continuations, tokens of their prefix, tokens that they add
OWN_ROWS, OWN_NEW = 16, 64  # continuations in training (sequence-unlikelihood, whisper): number, tokens that they add
COST_BATCH, COST_STEPS = 16, 16  # rows of a step and steps of a measurement of cost
MEASURES = ("perplexity", "on_repeats", "greedy", "sampled", "self_bleu")


@dataclass(frozen=True)
class Method:
    """A training method with its strengths, in ascending order of effect.

    Args:
        strengths: the values of the method's parameter that are compared.
        loss: computes the loss from model, token ids `[B, T]`, strength and step; `None` for the model's own loss.
        settings: makes the model's diversity settings from the strength; they are `None` by default.
        callback: makes the Trainer's callback from the strength, for the methods that have one.
    """

    strengths: tuple[float, ...]
    loss: Callable[[Model, Tensor, float, int], Tensor] | None = None
    settings: Callable[[float], dict[str, Any] | None] = lambda strength: None
    callback: Callable[[float], SequenceUnlikelihoodCallback] | None = None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits `[B, T, V]` at targets `[B, T]`, in nats, `[B, T]`; 0 for targets of -100."""
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)


def after(ids: Tensor) -> Tensor:
    """Return the target of each position, `[B, T]` int64: the next token, or -100 at the end of a row."""
    return nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def mean(losses: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of losses `[B, T]` over the positions whose target is a token."""
    return losses.sum() / (targets >= 0).sum()


def token_unlikelihood(model: Model, ids: Tensor, weight: float, step: int) -> Tensor:
    """Return cross-entropy plus weighted token unlikelihood."""
    logits = model(ids, use_cache=False).logits
    targets = after(ids)
    return mean(cross_entropy(logits, targets) + weight * published.token_unlikelihood(logits, targets), targets)


def sequence_unlikelihood(model: Model, ids: Tensor, share: float, step: int) -> Tensor:
    """Return sequence unlikelihood of the model's own continuations in a share of the steps, else cross-entropy."""
    if int((step + 1) * share) == int(step * share):
        return model(ids, labels=ids, use_cache=False).loss
    row = torch.randint(len(ids), (OWN_ROWS, 1))
    start = torch.randint(LENGTH - PREFIX, (OWN_ROWS, 1))
    prompts = ids[row, start + torch.arange(PREFIX)]
    own = continue_prompts(model, prompts, torch.ones_like(prompts), OWN_NEW, pad_token_id=0)
    logits = model(own["input_ids"], use_cache=False).logits
    targets = after(own["labels"])
    return mean(unlikelihood.sequence_unlikelihood(logits, targets), targets)


def scalegrad(model: Model, ids: Tensor, gamma: float, step: int) -> Tensor:
    """Return the loss of ScaleGrad."""
    targets = after(ids)
    return mean(published.scalegrad(model(ids, use_cache=False).logits, targets, gamma=gamma), targets)


def simctg(model: Model, ids: Tensor, margin: float, step: int) -> Tensor:
    """Return cross-entropy plus the contrastive loss of SimCTG."""
    output = model(ids, use_cache=False, output_hidden_states=True)
    targets = after(ids)
    contrast = published.simctg(output.hidden_states[-1], targets, margin=margin)
    return mean(cross_entropy(output.logits, targets) + contrast, targets)


def contrastive_token(model: Model, ids: Tensor, weight: float, step: int) -> Tensor:
    """Return cross-entropy plus the weighted contrastive token loss."""
    logits = model(ids, use_cache=False).logits
    targets = after(ids)
    contrast = published.contrastive_token(logits, targets, window=LENGTH // 8)
    return mean(cross_entropy(logits, targets) + weight * contrast, targets)


def ditto(model: Model, ids: Tensor, ratio: float, step: int) -> Tensor:
    """Return the loss of DITTO on repeated sentences in every other step, else cross-entropy."""
    if step % 2 == 0:
        return model(ids, labels=ids, use_cache=False).loss
    starts, ends = sentences(ids)
    inputs, targets = published.repeat_span(ids, starts, ends)
    logits = model(inputs, use_cache=False).logits
    return mean(published.ditto(logits, targets, ends - starts, ratio=ratio), targets)


def sentences(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return start and end, `[B]` int64, of a random sentence of 5 to 40 tokens in each row of `ids`, `[B, T]`.

    A row without such a sentence gets the 20 tokens in its middle.
    """
    spans = []
    for row in torch.isin(ids, stops()):
        ends = (row.nonzero()[:, 0] + 1).tolist()
        found = [(a, b) for a, b in itertools.pairwise(ends) if 5 <= b - a <= 40] or [(118, 138)]
        spans.append(found[int(torch.randint(len(found), ()))])
    starts, ends = torch.tensor(spans).T
    return starts, ends


def gem(model: Model, ids: Tensor, beta: float, step: int) -> Tensor:
    """Return the loss of GEM."""
    targets = after(ids)
    return mean(published.gem(model(ids, use_cache=False).logits, targets, beta=beta), targets)


def penalty(every: float) -> SequenceUnlikelihoodCallback:
    """Return the package's callback, with continuations as long as those of sequence-unlikelihood."""
    return SequenceUnlikelihoodCallback(int(every), OWN_ROWS, PREFIX, OWN_NEW)


METHODS = {
    "mle": Method((0,)),
    "token-unlikelihood": Method((0.3, 1, 3), token_unlikelihood),
    "sequence-unlikelihood": Method((0.1, 0.25, 0.5), sequence_unlikelihood),
    "scalegrad": Method((0.8, 0.5, 0.2), scalegrad),
    "simctg": Method((0.3, 0.5, 0.8), simctg),
    "contrastive-token": Method((0.1, 0.3, 1), contrastive_token),
    "ditto": Method((0.9, 0.5, 0.1), ditto),
    "gem": Method((0.9, 0.7, 0.5), gem),
    "contrast": Method((0.5, 1, 2), settings=lambda weight: {"contrast_weight": weight}),
    "whisper": Method((16, 8, 4), callback=penalty),
}


class ObjectiveTrainer(Trainer):
    """A Trainer that minimises a given function of model, token ids, strength and step.

    Args:
        loss: the function, see [`Method`].
        strength: its third argument.
    """

    def __init__(self, *, loss: Callable[..., Tensor], strength: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss
        self.strength = strength

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch, a scalar."""
        return self.loss(model, inputs["input_ids"], self.strength, self.state.global_step)


@functools.cache
def tokenizer() -> Tokenizer:
    """Train a byte-pair tokenizer on the novels to train on; the result is the same each time."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=letters, show_progress=False)
    made.train([str(BOOKS / f"{name}.txt") for name in READ], trainer)
    return made


@functools.cache
def stops() -> Tensor:
    """Return the ids of tokens that end a sentence, `[tokens]` int64."""
    found = [i for token, i in tokenizer().get_vocab().items() if token.endswith((".", "!", "?"))]
    return torch.tensor(found)


@functools.cache
def read_rows(*names: str) -> Tensor:
    """Return novels as rows of tokens, `[N, LENGTH]` int64."""
    ids = [i for name in names for i in tokenizer().encode((BOOKS / f"{name}.txt").read_text(encoding="utf-8")).ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def spread(rows: Tensor, count: int) -> Tensor:
    """Return `count` evenly spaced rows of `[N, T]`."""
    return rows[torch.arange(count) * len(rows) // count]


def train(model: Model, kind: type[Trainer], steps: int, rate: float, batch: int, seed: int, **more: Any) -> float:
    """Train a model on the novels, and return the CPU seconds per step."""
    schedule = {"max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": steps // 20}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    device = {"use_cpu": True, "dataloader_pin_memory": False, "bf16": False}
    args = TrainingArguments(seed=seed, per_device_train_batch_size=batch, **schedule, **quiet, **device)
    rows = read_rows(*READ).tolist()
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = kind(model=model, args=args, train_dataset=dataset, data_collator=collate, **more)
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return (time.process_time() - start) / steps


def pretrain(folder: Path) -> None:
    """Train the weights with which all methods start; the folder appears when it is complete."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        WhisperLMConfig(vocab_size=VOCABULARY, **SIZES, **SPECIAL, tie_word_embeddings=True, sparse_attention=SPARSE)
    )
    model.set_attn_implementation("sdpa")
    print(f"training {model.num_parameters():,} parameters to start from ...", flush=True)
    train(model, Trainer, seed=0, **PRETRAINING)
    unfinished = folder.with_name("start-unfinished")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def load(folder: Path) -> Model:
    """Load the model with which all methods start."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_attn_implementation("sdpa")  # it computes the same function, and is faster on rows this short
    return model


def fit(model: Model, name: str, strength: float, seed: int, steps: int, batch: int = BATCH) -> float:
    """Train a model by one method, and return the CPU seconds per step."""
    method = METHODS[name]
    use_diversity(model, method.settings(strength))
    more: dict[str, Any] = {} if method.loss is None else {"loss": method.loss, "strength": strength}
    more["callbacks"] = [] if method.callback is None else [method.callback(strength)]
    kind = Trainer if method.loss is None else ObjectiveTrainer
    seconds = train(model, kind, steps, RATE, batch, seed, **more)
    use_diversity(model, None)
    return seconds


def repeats(rows: Tensor) -> Tensor:
    """Return which next tokens repeat: they end a sequence of three tokens that is earlier in their row.

    Args:
        rows: `[N, T]`, int64.

    Returns:
        `[N, T - 1]`, bool, for the tokens from the second on.
    """
    found = torch.zeros(len(rows), rows.shape[1] - 1, dtype=torch.bool)
    for number, row in enumerate(rows.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(2, len(row)):
            three = tuple(row[end - 2 : end + 1])
            found[number, end - 1] = three in seen
            seen.add(three)
    return found


@torch.no_grad()
def measure(model: Model) -> dict[str, float]:
    """Return the perplexity of a model on the held-out novel, and the measures of repetition, by name."""
    model.eval()
    rows = spread(read_rows(HELD_OUT), ROWS)
    losses = torch.cat([cross_entropy(model(part).logits, after(part))[:, :-1] for part in rows.split(16)])
    prompts = spread(read_rows(HELD_OUT), WRITTEN)[:, :PREFIX]
    set_seed(0)
    greedy, sampled = (
        continue_prompts(model, prompts, torch.ones_like(prompts), NEW, temperature, pad_token_id=0, **nucleus)
        for temperature, nucleus in ((0.0, {}), (1.0, {"top_p": 0.95}))
    )
    return {
        "perplexity": math.exp(losses.mean()),
        "on_repeats": losses[repeats(rows)].mean().item(),
        **measure_text(greedy["input_ids"][:, PREFIX:], sampled["input_ids"][:, PREFIX:]),
    }


def measure_text(greedy: Tensor, sampled: Tensor) -> dict[str, float]:
    """Return the measures of repetition in greedy and in sampled continuations, both `[N, T]` int64."""
    texts = tokenizer().decode_batch(sampled.tolist())
    values = {"greedy": sequence_repetition(greedy, 4), "sampled": sequence_repetition(sampled, 2)}
    return {**values, "self_bleu": self_bleu(texts)}


def run(name: str, strength: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model by one method, measure it, and return a row of results."""
    model = load(options.output / "start")
    seconds = fit(model, name, strength, seed, options.steps)
    measured = measure(model)
    shown = ", ".join(f"{key} {measured[key]:.4g}" for key in MEASURES)
    print(f"{name:22s} {strength:<4g} seed {seed}: {shown}, {1000 * seconds:.0f} ms a step", flush=True)
    return {"method": name, "strength": strength, "seed": seed, "seconds": seconds, **measured}


def prepare_steps(folder: Path, name: str, strength: float) -> Callable[[], object]:
    """Return a function that trains for some steps, with a larger batch.

    Generation in training costs the same for any batch, so that its share is realistic only in a larger one.
    """
    model = load(folder)
    return lambda: fit(model, name, strength, 0, COST_STEPS, COST_BATCH)


def measure_cost(folder: Path) -> list[dict[str, Any]]:
    """Return time and peak memory of training with the package's two methods, as ratios to cross-entropy."""
    compared = {"mle": 0.0, "contrast": 0.5, "whisper": 16.0, "whisper, more often": 8.0}
    named = {label: (folder, label.split(",")[0], strength) for label, strength in compared.items()}
    seconds = alternate({label: prepare_steps(*which) for label, which in named.items()}, most=3)
    memory = {label: peak_memory(prepare_steps, *which) for label, which in named.items()}
    rows = [{"method": label, "time": seconds[label] / seconds["mle"]} for label in compared]
    return [{**row, "memory": memory[row["method"]] and memory[row["method"]] / memory["mle"]} for row in rows]


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds, for each method and strength, also of ratios to cross-entropy."""
    base = {row["seed"]: row for row in rows if row["method"] == "mle"}
    summary = []
    for name, strength in dict.fromkeys((row["method"], row["strength"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["strength"]) == (name, strength)]
        columns = {key: [row[key] for row in mine] for key in MEASURES}
        for key in ("perplexity", "on_repeats", "seconds"):
            columns[f"{key}_ratio"] = [row[key] / base[row["seed"]][key] for row in mine]
        spread = {k: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for k, v in columns.items()}
        summary.append({"method": name, "strength": strength, "seeds": len(mine), **spread})
    return summary


def at_matched_perplexity(rows: list[dict[str, Any]], most: float) -> dict[str, list[float | None]]:
    """Return each method's least greedy repetition among the strengths with a small loss of perplexity.

    Args:
        rows: the results.
        most: largest accepted perplexity, as a ratio to cross-entropy's.

    Returns:
        for each method a value per seed, or `None` where no strength is accepted.
    """
    base = {row["seed"]: row["perplexity"] for row in rows if row["method"] == "mle"}
    best: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        fit = [row for row in rows if row["method"] == name and row["perplexity"] <= most * base[row["seed"]]]
        best[name] = [min((row["greedy"] for row in fit if row["seed"] == seed), default=None) for seed in base]
    return best


def report(summary: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Return the results as two Markdown tables: all strengths, and the best strength at matched perplexity."""
    table = [["people", "", "", "", *(f"{100 * results['people'][key]:.1f}" for key in MEASURES[2:])]]
    for row in summary:
        ratios = [f"{100 * row[f'{key}_ratio'][0] - 100:+.1f}" for key in ("perplexity", "on_repeats")]
        shares = [f"{100 * row[key][0]:.1f} ± {100 * row[key][1]:.1f}" for key in MEASURES[2:]]
        table.append([row["method"], f"{row['strength']:g}", *ratios, *shares])
    headers = ["", "strength", "perplexity, %", "on repeats, %", "greedy seq-rep-4, %", "sampled seq-rep-2, %"]
    first = tabulate(table, [*headers, "self-BLEU, %"], "github", disable_numparse=True)
    matched = {most: at_matched_perplexity(results["rows"], most) for most in (1.01, 1.03)}
    lines = [
        [name, *(" / ".join("-" if v is None else f"{100 * v:.1f}" for v in found[name]) for found in matched.values())]
        for name in matched[1.01]
    ]
    headers = ["least greedy seq-rep-4, %, by seed", "perplexity at most +1 %", "at most +3 %"]
    return f"{first}\n\n{tabulate(lines, headers, 'github', disable_numparse=True)}"


def plot(summary: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Plot repetition against perplexity, with a line for each method."""
    axis = Figure(figsize=(8, 5), layout="constrained").subplots()
    for number, name in enumerate(dict.fromkeys(row["method"] for row in summary)):
        mine = [row for row in summary if row["method"] == name]
        x, y = ([100 * (row[key][0] - less) for row in mine] for key, less in (("perplexity_ratio", 1), ("greedy", 0)))
        axis.plot(x, y, "o-", label=name, color=f"C{number}", linewidth=3 if name == "whisper" else 1)
    axis.axhline(100 * results["people"]["greedy"], color="black", linestyle=":", label="people")
    axis.set_xlabel("perplexity above cross-entropy's, %")
    axis.set_ylabel("greedy seq-rep-4, %")
    axis.legend()
    axis.figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, help="training steps of each method (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs of each method (default: 0 1 2)")
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--cost", action="store_true", help="measure only time and memory of a step, which needs an idle machine")
    add("--output", type=Path, default=Path("runs/diversity"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be positive, got {options.steps}; the default is {STEPS}")
    return options


def read_results(options: argparse.Namespace) -> dict[str, Any]:
    """Return earlier results with the same settings, or else new ones that hold only the measures of human text."""
    path = options.output / "diversity.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    made = {"steps": options.steps, "torch": torch.__version__}
    if found.get("settings") == made:
        return found
    true = spread(read_rows(HELD_OUT), WRITTEN)[:, PREFIX : PREFIX + NEW]
    return {"settings": made, "people": measure_text(true, true), "rows": []}


def main() -> None:
    """Run the methods without results, print the tables, and write the results."""
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.output / "start").exists():
        pretrain(options.output / "start")
    if options.cost:
        cost = measure_cost(options.output / "start")
        (options.output / "diversity_cost.json").write_text(json.dumps(cost, indent=1) + "\n")
        print(tabulate(cost, "keys", "github", floatfmt=".2f"))
        return
    results = read_results(options)
    for seed in options.seeds:
        for name in dict.fromkeys(["mle", *options.only]):  # mle: the baseline of all other methods
            for strength in METHODS[name].strengths:
                if (name, strength, seed) not in {(r["method"], r["strength"], r["seed"]) for r in results["rows"]}:
                    results["rows"].append(run(name, strength, seed, options))
                    (options.output / "diversity.json").write_text(json.dumps(results, indent=1) + "\n")
    summary = summarize(results["rows"])
    print(f"\n{report(summary, results)}")
    plot(summary, results, options.output / "diversity.svg")


if __name__ == "__main__":
    main()
