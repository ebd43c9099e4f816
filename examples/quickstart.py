"""Convert a dense language model to a sparse WhisperLM, compare, generate, measure, fine-tune, save and reload.

    pip install -e ".[examples]"
    python examples/quickstart.py                     # about five minutes on a CPU

The script runs on the CPU in float32, since bfloat16 matrix products are slow on CPUs that do not support them in
hardware. The model is SmolLM2-135M-Instruct, which is downloaded once, or with `--model` any Llama, Mistral, Qwen2 or
Qwen3 checkpoint.
"""

import argparse
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.support.smollm2 import smollm2_checkpoint
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.conversion import sparse_config

try:
    # peft imports bitsandbytes, which on some CPUs logs that a package is missing; only 4-bit products need it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tabulate import tabulate
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise SystemExit(f"quickstart.py: {error}; pip install 'whisper-hf[examples]'") from error

# a budget of 25 blocks, smaller than the default of 50, so that 4,096 tokens are several times longer than the budget
SPARSE = SparseAttentionConfig(block_size=32, topk_blocks=16, local_blocks=8, sink_blocks=1)
BUDGET = SPARSE.budget_blocks * SPARSE.block_size  # tokens
SHORT = 512  # tokens of a sequence within the budget, where attention is dense
HELD_OUT = 8  # sequences of SHORT tokens
CHUNK = 1024  # tokens of a long window per forward pass; bounds the memory for logits
BOOKS = Path(__file__).parent / "data"
NUMBERS = "quickstart.json"  # saved beside the model; the file marks a folder as the result of an earlier run
PROMPT = "Emma had hardly closed the door of the library, when"
QUESTION = "What is the capital of France?"


def main() -> None:
    """Run all phases, from loading the dense checkpoint to reloading the fine-tuned sparse one."""
    args = parse_arguments()
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}

    with phase("load and convert", seconds):
        dense, tokenizer = load(args.model, args.context)
        long, short = held_out_text(tokenizer, args.context)
        model = from_dense(dense, sparse_attention=SPARSE)
        print(f"{type(dense).__name__} -> {type(model).__name__}, {model.num_parameters():,} parameters")
        print(f"budget: each token attends to at most {BUDGET} tokens; {SPARSE}")

    with phase("compare with the dense model, within the budget", seconds):
        difference, is_same = compare(dense, model, short[:1])
        print(f"largest difference of logits on {SHORT} tokens: {difference:.1e}; same greedy tokens: {is_same}")

    with phase("generate and chat", seconds):
        sample = generate(model, tokenizer, args.seed)

    with phase(f"perplexity on {args.context} tokens of a novel, and on {HELD_OUT} times {SHORT}", seconds):
        results["dense"] = perplexities(dense, long, short, "dense")
        results["sparse"] = perplexities(model, long, short, "sparse")
        results["sparse"] |= {"difference to dense logits": difference, "sample": sample}
        del dense

    with phase("fine-tune on another novel", seconds):
        model = finetune(model, read_book("sense_and_sensibility", tokenizer), args)

    with phase("perplexity and text after fine-tuning", seconds):
        results["fine-tuned"] = perplexities(model, long, short, "fine-tuned")
        results["fine-tuned"]["sample"] = generate(model, tokenizer, args.seed)

    with phase("save and reload", seconds):
        save(model, tokenizer, args.output, results)
        check_reload(model, args.output, long)

    print_summary(results, seconds)


@contextmanager
def phase(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print the title of a phase, and store how many seconds the phase took under its title."""
    print(f"\n{len(seconds) + 1}. {title}", flush=True)
    start = time.monotonic()
    yield
    seconds[title] = time.monotonic() - start


def load(source: str | None, context: int) -> tuple[Model, Tokenizer]:
    """Load the dense model, in float32, and its tokenizer, after checking that the model can be converted."""
    try:
        source = smollm2_checkpoint() if source is None else source
        positions = sparse_config(AutoConfig.from_pretrained(source), SPARSE).max_position_embeddings
        if context > positions:
            raise ValueError(f"--context must be at most the model's {positions} positions, got {context}; lower it")
        tokenizer = AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"quickstart.py: cannot use the folder or Hub id {source!r}: {reason}") from error


def held_out_text(tokenizer: Tokenizer, context: int) -> tuple[Tensor, Tensor]:
    """Return a long window of a novel, `[1, context]`, and the short windows after it, `[HELD_OUT, SHORT]`, int64."""
    tokens = read_book("northanger_abbey", tokenizer)
    longest = len(tokens) - HELD_OUT * SHORT
    if context > longest:
        raise SystemExit(f"quickstart.py: --context must be at most {longest}, the tokens in the novel, got {context}")
    return tokens[None, :context], tokens[context : context + HELD_OUT * SHORT].view(HELD_OUT, SHORT)


def read_book(name: str, tokenizer: Tokenizer) -> Tensor:
    """Return the token ids of a novel, `[tokens]` int64, whose file has one paragraph per line."""
    lines = Path(BOOKS, f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    return torch.tensor([token for ids in tokenizer(lines, add_special_tokens=False).input_ids for token in ids])


@torch.no_grad()
def compare(dense: Model, model: Model, tokens: Tensor) -> tuple[float, bool]:
    """Compare two models on `tokens`, `[1, T]` int64.

    Returns:
        the largest absolute difference of their logits, and whether greedy decoding gives the same continuation.
    """
    difference = (dense(tokens).logits - model(tokens).logits).abs().max().item()
    greedy = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 16, "do_sample": False}
    return difference, torch.equal(dense.generate(tokens, **greedy), model.generate(tokens, **greedy))


def generate(model: Model, tokenizer: Tokenizer, seed: int) -> str:
    """Print a sampled continuation of a prompt and, if the model can chat, an answer; return the continuation."""
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    torch.manual_seed(seed)
    text = writer(PROMPT, max_new_tokens=48, do_sample=True, top_p=0.9)[0]["generated_text"]
    print(text)
    if tokenizer.chat_template is not None:
        chat = writer([{"role": "user", "content": QUESTION}], max_new_tokens=24, do_sample=False)
        print(f"user: {QUESTION}\nassistant: {chat[0]['generated_text'][-1]['content']}")
    return text


def perplexities(model: Model, long: Tensor, short: Tensor, name: str) -> dict[str, float]:
    """Measure perplexity beyond the budget, where attention is sparse, and within it, where attention is dense.

    Args:
        model: the model to measure.
        long: `[1, context]` int64, measured beyond its first `BUDGET` tokens.
        short: `[HELD_OUT, SHORT]` int64, each row within the budget.
        name: name of the model in the output.
    """
    beyond = perplexity(model, long, f"{name}, long", skip=BUDGET)
    within = perplexity(model, short, f"{name}, short")
    print(f"{name}: {beyond:.2f} beyond the first {BUDGET} tokens, {within:.2f} within")
    return {"perplexity beyond the budget": beyond, "perplexity within the budget": within}


@torch.no_grad()
def perplexity(model: Model, windows: Tensor, label: str, skip: int = 0) -> float:
    """Return the perplexity per token of `windows`, `[N, T]` int64, without the first `skip` predictions of each."""
    losses = []  # nats
    cache = None
    chunks = [(row, start) for row in windows for start in range(0, len(row) - 1, CHUNK)]
    for row, start in tqdm(chunks, desc=label, unit="chunk"):
        cache = DynamicCache(config=model.config) if start == 0 else cache
        inputs = row[:-1][start : start + CHUNK]
        targets = row[1:][start : start + CHUNK]
        logits = model(inputs[None], cache=cache, use_cache=True).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        losses.append(loss[max(0, skip - start) :])
    return torch.cat(losses).mean().exp().item()


class Progress(TrainerCallback):
    """A progress bar for training that shows the loss, and stops training after `limit` seconds."""

    def __init__(self, limit: float, bar: tqdm) -> None:
        self.limit = limit
        self.bar = bar
        self.start = time.monotonic()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Move the bar after a step, and stop training when the time is up."""
        elapsed = time.monotonic() - self.start
        self.bar.n = min(1.0, max(elapsed / self.limit, state.global_step / state.max_steps))
        self.bar.set_postfix_str(f"step {state.global_step}, loss {logs['loss']:.3f}" if "loss" in logs else "done")
        control.should_training_stop = control.should_training_stop or elapsed >= self.limit


def finetune(model: Model, tokens: Tensor, args: argparse.Namespace) -> Model:
    """Train a LoRA adapter on `tokens`, `[tokens]` int64, with transformers' Trainer, and merge it into the model."""
    # peft reads a property that transformers has renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    torch.manual_seed(args.seed)
    rows = tokens[: len(tokens) // SHORT * SHORT].view(-1, SHORT).tolist()
    bar = tqdm(desc="training", total=1.0, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
    with tempfile.TemporaryDirectory() as scratch, bar:
        trainer = Trainer(
            model=get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            args=TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=1,
                learning_rate=1e-3,
                lr_scheduler_type="constant_with_warmup",  # independent of the number of steps, which is unknown
                warmup_steps=4,
                max_steps=args.steps or 1_000_000,
                label_names=["labels"],  # the Trainer cannot infer them from a model with an adapter
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,  # the callback below has a bar that shows the time
                use_cpu=True,
                seed=args.seed,
            ),
            callbacks=[Progress(math.inf if args.steps else args.minutes * 60, bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.merge_and_unload().eval()


def save(model: Model, tokenizer: Tokenizer, folder: Path, results: dict[str, Any]) -> None:
    """Save model, tokenizer and results; files appear in the folder only when all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        Path(scratch, NUMBERS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)


@torch.no_grad()
def check_reload(model: Model, folder: Path, long: Tensor) -> None:
    """Print whether the saved model, reloaded, is still sparse and gives the same logits beyond the budget."""
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = long[:, : BUDGET + SHORT]
    is_same = torch.equal(model(tokens).logits, reloaded(tokens).logits)
    print(f"{folder}: {type(reloaded).__name__}, {reloaded.config.sparse_attention}")
    print(f"same logits on {tokens.shape[1]} tokens, bit for bit: {is_same}")


def print_summary(results: dict[str, dict[str, Any]], seconds: dict[str, float]) -> None:
    """Print the results of the dense, the sparse and the fine-tuned model side by side, and the time of each phase."""
    rows = [[title, *(column.get(title, "") for column in results.values())] for title in results["sparse"]]
    rows = [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    print("\n" + tabulate(rows, ["", *results], "grid", disable_numparse=True, maxcolwidths=[28, None, 36, 36]))
    timing = [*seconds.items(), ("total", sum(seconds.values()))]
    print("\n" + tabulate(timing, ["phase", "seconds"], floatfmt=".0f"))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, and refuse invalid values before anything is loaded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="Hub id or folder of a dense model (default: SmolLM2-135M-Instruct)")
    add("--output", type=Path, default="runs/quickstart", help="folder for the result (default: %(default)s)")
    add("--minutes", type=float, default=2, help="how long to fine-tune (default: %(default)s)")
    add(
        "--steps",
        type=int,
        help="fine-tune for this number of steps instead; the same seed then gives the same numbers",
    )
    add("--seed", type=int, default=0, help="for sampling and fine-tuning (default: %(default)s)")
    add("--context", type=int, default=4096, help="tokens of the long window (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes must be a positive number, got {args.minutes}; 2 are enough to see an effect")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}; leave it out to train for --minutes")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2**32, got {args.seed}; the default is 0")
    if args.context <= BUDGET:
        parser.error(f"--context must exceed the sparse budget of {BUDGET} tokens, got {args.context}; try 4096")
    try:
        folder = args.output.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
        if existing == folder and any(folder.iterdir()) and not Path(folder, NUMBERS).is_file():
            parser.error(
                f"--output must be new, empty or an earlier result, got '{args.output}' with other files; name another"
            )
    except OSError as error:
        parser.error(
            f"--output must be a folder to write to, got '{args.output}': {error.strerror}; name another folder"
        )
    return args


if __name__ == "__main__":
    main()
