"""Measure a whole model with 135 million parameters, sparse against dense, side by side on one CPU thread.

    python examples/benchmarks/model.py                                   # 2k and 8k tokens: about half an hour
    python examples/benchmarks/model.py --lengths 1024 2048 --only prefill decode

The dense model is SmolLM2-135M-Instruct with PyTorch's fused attention (`sdpa`), in float32. The sparse model is the
WhisperLM that `from_dense` makes of it, with the same weights and no further training. For each length, the script
measures the following.

- Prefill: the forward pass over a prompt, which fills a cache and computes only the logits of the last token.
- Decode: greedy decoding of single tokens, batch 1, after a prefill of this length. Each model has its default cache.
  The dense cache of transformers copies its content for each token and the sparse cache does not, which is part of the
  ratio.
- Training step: forward and backward with labels. Beyond 2,048 tokens it uses gradient checkpointing, and beyond 8,192
  it computes logits and loss in parts.
- Peak memory of prefill and training step, above what is in memory before (which includes the weights).

It also measures the perplexity of a novel on the tokens beyond the sparse budget. It prints how many times faster or
smaller the sparse model is (dense / sparse), and writes the ratios with the times to `--output`.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import PreTrainedModel as Model
from transformers.utils import logging

from examples.benchmarks.measuring import Run, alternate, peak_memory
from examples.support.smollm2 import smollm2_checkpoint
from whisper_hf import SparseAttentionConfig, from_dense
from whisper_hf.conversion import sparse_config

BOOK = Path(__file__).resolve().parents[1] / "data" / "northanger_abbey.txt"
NEW_TOKENS = 16  # tokens that are decoded in one run
SHORTEST = 64  # tokens
LONGEST_PLAIN = 2048  # tokens; in longer sequences a training step recomputes the activations of each layer
LONGEST_LOGITS = 8192  # tokens; in longer sequences a training step computes logits and loss of PART tokens at a time
PART = 2048


def load(source: str, settings: SparseAttentionConfig) -> dict[str, Model]:
    """Load the dense model in float32, and convert it to the sparse model."""
    logging.disable_progress_bar()
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa").eval()
    return {"dense": dense, "sparse": from_dense(dense, sparse_attention=settings)}


def read_book(source: str) -> Tensor:
    """Return the token ids of a novel, `[1, tokens]` int64, whose file has one paragraph per line."""
    lines = BOOK.read_text(encoding="utf-8").splitlines(keepends=True)
    tokenized = AutoTokenizer.from_pretrained(source)(lines, add_special_tokens=False).input_ids
    return torch.tensor([[token for ids in tokenized for token in ids]])


def prefill(model: Model, ids: Tensor) -> Run:
    """Return a function that reads a prompt, `[1, T]` int64, into a new cache."""
    model.eval()
    return torch.no_grad()(lambda: fill_cache(model, ids))


def fill_cache(model: Model, ids: Tensor) -> tuple[DynamicCache, Tensor]:
    """Read a prompt, `[1, T]` int64; return the filled cache and the greedy next token, `[1, 1]` int64."""
    cache = DynamicCache(config=model.config)
    logits = model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits.argmax(-1)


def decode(model: Model, ids: Tensor) -> Run:
    """Return a function that decodes NEW_TOKENS tokens after a prompt, `[1, T]` int64, which is read only once."""
    cache, first = prefill(model, ids)()

    @torch.no_grad()
    def run() -> None:
        token = first
        for _ in range(NEW_TOKENS):
            token = model(token, cache=cache, use_cache=True).logits.argmax(-1)
        cache.crop(-NEW_TOKENS)  # the next run starts after the prompt

    return run


def training_step(model: Model, ids: Tensor) -> Run:
    """Return a function that computes the gradients of all weights from one sequence, `[1, T]` int64."""

    def run() -> None:
        model.train()
        if ids.shape[1] > LONGEST_PLAIN:
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()
        training_loss(model, ids).backward()
        model.zero_grad(set_to_none=True)

    return run


def training_loss(model: Model, ids: Tensor) -> Tensor:
    """Return the mean loss of `ids`, `[1, T]` int64, in nats per token, for long sequences from parts of the logits."""
    if ids.shape[1] <= LONGEST_LOGITS:
        return model(ids, labels=ids, use_cache=False).loss
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0, :-1]
    targets = ids[0, 1:]

    def summed(part: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(model.get_output_embeddings()(part), target, reduction="sum")

    parts = zip(hidden.split(PART), targets.split(PART), strict=True)
    losses = [checkpoint(summed, part, target, use_reentrant=False) for part, target in parts]
    return torch.stack(losses).sum() / len(targets)


PASSES: dict[str, Callable[[Model, Tensor], Run]] = {
    "prefill": prefill,
    "decode": decode,
    "training step": training_step,
}
PARTS = ("prefill", "decode", "training", "perplexity")  # the values of --only


@torch.no_grad()
def perplexity(model: Model, ids: Tensor, skip: int) -> float:
    """Return the perplexity of one window, `[1, T]` int64, without the predictions of its first `skip` tokens."""
    model.eval()
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0, skip:-1]
    parts = zip(hidden.split(PART), ids[0, skip + 1 :].split(PART), strict=True)
    losses = [cross_entropy(model.get_output_embeddings()(part), ids, reduction="none") for part, ids in parts]
    return torch.cat(losses).mean().exp().item()


def prepare_memory(source: str, settings: SparseAttentionConfig, name: str, what: str, tokens: list[int]) -> Run:
    """Return the run whose peak memory is measured; both models are loaded, so that each measurement starts equal."""
    torch.set_num_threads(1)
    models = load(source, settings)
    run = PASSES[what](models[name], torch.tensor([tokens]))
    return lambda: (run(), models)


def measure(options: argparse.Namespace, models: dict[str, Model], book: Tensor) -> list[dict]:
    """Measure all passes at all lengths, and print a line for each.

    Returns:
        rows with the measured quantity, its unit, the values of both models and their ratio.
    """
    rows: list[dict] = []
    for length in options.lengths:
        for what, make in PASSES.items():
            if what.split()[0] not in options.only:
                continue
            ids = book[:, :length]
            runs = {name: make(model, ids) for name, model in models.items()}
            seconds = alternate(runs, options.seconds)
            if what == "decode":
                per_token = {name: value / NEW_TOKENS for name, value in seconds.items()}
                rows.append(row(length, "decode: time per token", "s", per_token))
                continue
            rows.append(row(length, f"{what}: time", "s", seconds))
            del runs
            arguments = (options.source, options.settings)
            memory = {name: peak_memory(prepare_memory, *arguments, name, what, ids[0].tolist()) for name in models}
            if None not in memory.values():
                rows.append(row(length, f"{what}: peak memory", "MB", memory))
    return rows


def row(length: int, what: str, unit: str, values: dict[str, float]) -> dict:
    """Return the row of one comparison, and print it, for decoding also in tokens per second."""
    ratio = values["dense"] / values["sparse"]
    shown = f"dense {values['dense']:9.3f} {unit}, sparse {values['sparse']:9.3f} {unit}"
    if what.startswith("decode"):
        shown += f" ({1 / values['dense']:.1f} and {1 / values['sparse']:.1f} tokens per second)"
    print(f"{length:6d} {what:28s} dense / sparse {ratio:5.2f}: {shown}", flush=True)
    return {"what": what, "length": length, "unit": unit, **values, "ratio": ratio}


def report(rows: list[dict]) -> str:
    """Return the ratios as a Markdown table, with a line for each measurement and a column for each length."""
    lengths = sorted({row["length"] for row in rows})
    found = {(row["what"], row["length"]): row["ratio"] for row in rows}
    kinds = sorted({row["what"] for row in rows}, key=[row["what"] for row in rows].index)
    table = [[kind, *(found.get((kind, length), "") for length in lengths)] for kind in kinds]
    headers = ["dense / sparse, one thread, float32", *(f"{length:,} tokens" for length in lengths)]
    return tabulate(table, headers, "github", floatfmt=".2f")


def compare_perplexity(options: argparse.Namespace, models: dict[str, Model], book: Tensor) -> dict[str, float]:
    """Return the perplexity of both models on the same window of the novel, and print it."""
    budget = tokens_in_budget(options.settings)
    values = {name: perplexity(model, book[:, : options.context], budget) for name, model in models.items()}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    print(f"perplexity of a novel on tokens {budget + 2:,} to {options.context:,} of one window: {shown}", flush=True)
    return values


def tokens_in_budget(settings: SparseAttentionConfig) -> int:
    """Return the largest number of tokens to which one token attends."""
    return settings.budget_blocks * settings.block_size


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line, and refuse invalid values before anything is loaded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[2048, 8192],
        help="lengths of sequences in tokens (default: 2048 8192)",
    )
    add("--context", type=int, default=8192, help="tokens of the window for perplexity (default: %(default)s)")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="measure only these (default: all)")
    add("--seconds", type=float, default=4.0, help="time for each comparison, if one round fits (default: %(default)s)")
    add("--model", help="another dense checkpoint: Hub id or folder (default: SmolLM2-135M-Instruct)")
    add("--output", type=Path, default=Path("runs/model"), help="folder for model.json (default: %(default)s)")
    for field, default in (("block_size", 64), ("topk_blocks", 8), ("local_blocks", 4), ("sink_blocks", 1)):
        what = "tokens per block" if field == "block_size" else f"blocks: {field.split('_')[0]}"
        add(f"--{field.replace('_', '-')}", type=int, default=default, help=f"{what} (default: %(default)s)")
    options = parser.parse_args()
    if min(options.lengths) < SHORTEST:
        parser.error(f"--lengths must be at least {SHORTEST}, got {min(options.lengths)}; the default is 2048 8192")
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be a positive number, got {options.seconds}; the default is 4")
    try:
        sizes = (options.block_size, options.topk_blocks, options.local_blocks, options.sink_blocks)
        options.settings = SparseAttentionConfig(*sizes)
        options.output.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output must be a folder to write to, got '{options.output}': {error.strerror}; name another")
    budget = tokens_in_budget(options.settings)
    if "perplexity" in options.only and options.context < budget + 2:
        parser.error(
            f"--context must exceed the sparse budget of {budget} tokens by 2, got {options.context}; raise it"
        )
    return parser, options


def load_all(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[dict[str, Model], Tensor]:
    """Load the models and the novel, or exit with an error of one line if this fails or does not fit the options."""
    try:
        options.source = options.model or smollm2_checkpoint()
        positions = sparse_config(AutoConfig.from_pretrained(options.source), options.settings).max_position_embeddings
        if "perplexity" in options.only and options.context > positions:
            raise ValueError(
                f"--context must be at most the model's {positions} positions, got {options.context}; lower it"
            )
        book = read_book(options.source)
        longest = max(*options.lengths, options.context)
        if longest > book.shape[1]:
            raise ValueError(
                f"--lengths and --context must be at most the novel's {book.shape[1]}, got {longest}; lower it"
            )
        if max(options.lengths) > positions:
            print(f"beyond the model's {positions} positions times are valid, but predictions are not meaningful")
        return load(options.source, options.settings), book
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def main() -> None:
    """Measure, print the tables, and write the results."""
    parser, options = parse_arguments()
    torch.set_num_threads(1)
    models, book = load_all(parser, options)
    print(f"{type(models['dense']).__name__}, sdpa, against {type(models['sparse']).__name__}, {options.settings}")
    measured = compare_perplexity(options, models, book) if "perplexity" in options.only else {}
    rows = measure(options, models, book)
    if rows:
        print(f"\n{report(rows)}")
    results = {
        "rows": rows,
        "perplexity": measured,
        "context": options.context,
        "sparse_attention": vars(options.settings),
        "torch": torch.__version__,
    }
    (options.output / "model.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
