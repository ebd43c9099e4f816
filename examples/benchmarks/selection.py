"""Which blocks are worth attending to: ways to choose them, side by side on a dense model as it is.

    python examples/benchmarks/selection.py           # about two hours on one core
    python examples/benchmarks/selection.py --budget 1600 --only dense "local, 64" "oracle, 64" default
    python examples/benchmarks/selection.py --model MODEL --text FILE FILE   # any dense Llama, any texts

Every way attends to the same number of tokens: a sink of 32, a quarter of them local, the rest chosen. Between the two
ends, `local` (nothing is chosen) and `oracle` (the blocks that hold most of the true attention, unknown before it is
computed), stand scores from summaries of blocks, named with their block size:

- `summed`: the sum of the group's queries times the mean key,
- `heads`: each head's query times the mean key, relative to its largest product; the largest over the heads. This is
  what `masked_sparse` does,
- `second`: the same with the second-order estimate of the block's log-sum-exp, which adds a quarter of the squared
  query times the variance of the keys (an estimate that is halved, as in full it overshoots),
- `probabilities`: as `second`, but probabilities are summed over the heads.

`default` is `heads` with the default settings, whatever the budget of the others (they are alike at 1,600).

Measured are perplexity by position (1,024 tokens each) on a novel and on program text, with the share of the way from
local to the oracle of 64 that a score goes; the recall of true attention; pass keys and facts found again in both
texts; and the share of selection in the time of sparse attention, with the bytes of a block's summary. Attention is
computed densely and masked here: what is measured is the choice, not speed, but for the last.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from examples.benchmarks.measuring import alternate
from examples.support.long_texts import ROOM, facts, hide, losses, read, share_found, tokens_found
from examples.support.smollm2 import smollm2_checkpoint
from whisper_hf import SparseAttentionConfig
from whisper_hf.model.attention_blockwise import attention_blockwise
from whisper_hf.model.blockwise_plan import plan_rows
from whisper_hf.model.blockwise_selection import choose_blocks
from whisper_hf.model.sparse_selection import block_scores, top_blocks

SEGMENT, ROWS = 1024, 256  # tokens: reported together; attended from at once
SINK = 32  # tokens
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
LOCAL, REACHED = "local, 64", "oracle, 64"
SCORES, SIZES = ("summed", "heads", "second"), (64, 32, 16)
WAYS = ("dense", LOCAL, REACHED, *(f"{score}, {size}" for score in SCORES for size in SIZES))
WAYS += ("probabilities, 32", "oracle, 32", "oracle, 16", "default")
LENGTH_OF_COST = 32768


@dataclass
class Lab:
    """How the registered attention chooses blocks, and what it has seen: of `seen` rows, the recall."""

    score: str = "dense"
    settings: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    recalled: float = 0.0
    seen: int = 0


LAB = Lab()


def settings_for(way: str, budget: int) -> SparseAttentionConfig:
    """Return how a budget of tokens is shared out."""
    if way == "default":
        return SparseAttentionConfig()
    score, size = way.split(", ")[0], int(way.split(", ")[-1]) if ", " in way else 64
    sink = max(SINK // size, 1)
    local = budget // size - sink if score in ("dense", "local") else max(budget // 4 // size, 1)
    return SparseAttentionConfig(size, budget // size - sink - local, local, sink)


def score_blocks(score: str, query: Tensor, key: Tensor, past: Tensor, size: int) -> Tensor:
    """Return scores `[K, T, N]` of blocks from queries `[K, G, T, D]`, scaled, and keys `[K, N * size, D]`."""
    blocks = key.unflatten(1, (-1, size))
    means = blocks.mean(2)[:, None].transpose(2, 3)  # [K, 1, D, N]
    if score == "summed":
        return query.sum(1) @ means[:, 0]
    products = query @ means
    if score in ("second", "probabilities"):
        products += query.square() @ blocks.var(2, correction=0)[:, None].transpose(2, 3) / 4
    if score == "probabilities":
        return products.masked_fill(~past, float("-inf")).softmax(-1).nan_to_num(0.0).sum(1)
    return block_scores(products.transpose(1, 2), past)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Attend as the lab says: `[1, H, T, D]`, `[1, K, T, D]`; one text, no cache."""
    if LAB.score == "dense":
        output = sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    grouped = query[0].unflatten(0, (key.shape[1], -1)) * scaling
    tiles = [attend_rows(grouped[:, :, i : i + ROWS], key[0], value[0], i) for i in range(0, query.shape[2], ROWS)]
    return torch.cat(tiles, dim=2).flatten(0, 1).transpose(0, 1)[None].contiguous(), None


def attend_rows(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    """Attend from queries `[K, G, T, D]` that begin at `start`; note the recall of those in the second half."""
    settings, size = LAB.settings, LAB.settings.block_size
    position = torch.arange(start, start + query.shape[2])
    length, end = key.shape[1], -(-(start + query.shape[2]) // size) * size
    key, value = (pad(states[:, :end], (0, 0, 0, max(end - length, 0))) for states in (key, value))
    causal = torch.arange(end) <= position[:, None]
    logits = (query @ key[:, None].transpose(2, 3)).masked_fill_(~causal, float("-inf"))
    true = logits.softmax(-1)
    block, current = torch.arange(end // size), position[:, None] // size
    past = block < current
    fixed = (block < settings.sink_blocks) | (block > current - settings.local_blocks)
    if LAB.score == "oracle":
        scores = true.unflatten(-1, (-1, size)).sum((1, -1))
    else:
        scores = score_blocks(LAB.score, query, key, past, size)
    chosen = fixed | top_blocks(scores, past & ~fixed, settings.topk_blocks)
    weights = true * chosen.repeat_interleave(size, dim=-1)[:, None]
    recalled = weights.sum(-1, keepdim=True)
    if start >= length // 2:
        LAB.recalled += recalled.mean().item()
        LAB.seen += 1
    return weights.div_(recalled) @ value[:, None]


AttentionInterface.register("selection_lab", attend)
AttentionMaskInterface.register("selection_lab", lambda *_, **__: None)


def use(way: str, budget: int) -> None:
    """Let the attention choose blocks in another way, and forget what it has seen."""
    score = "heads" if way == "default" else way.split(", ")[0]
    LAB.score, LAB.settings, LAB.recalled, LAB.seen = score, settings_for(way, budget), 0.0, 0


def measure_perplexity(model: Any, ids: Tensor) -> dict[str, Any]:
    """Return perplexity of every 1,024 tokens and of the second half, and the recall of attention."""
    found = losses(model, ids)
    return {
        "by_position": [part.mean().exp().item() for part in found.split(SEGMENT)],
        "second_half": found[len(ids) // 2 :].mean().exp().item(),
        "recall": LAB.recalled / LAB.seen if LAB.seen else 1.0,
    }


def measure_retrieval(model: Any, tokenizer: Any, texts: Iterable[Tensor]) -> dict[str, float]:
    """Return the share of digits found in texts: of one pass key at each depth, and of five facts at once."""
    proses = [ids[:-ROOM] for ids in texts]
    alone = [hide(tokenizer, prose, facts((depth,), len(prose))) for prose in proses for depth in DEPTHS]
    together = [hide(tokenizer, prose, facts(DEPTHS, len(prose))) for prose in proses]
    found = {"pass key": alone, "facts": together}
    return {name: mean(share_found(tokens_found(model, *ask)) for ask in asked) for name, asked in found.items()}


def measure_cost(budget: int, size: int, heads: int, kv_heads: int, width: int) -> dict[str, float]:
    """Return the share of selection in the time of attention as `masked_sparse` computes it, and bytes of summaries."""
    settings = settings_for(f"heads, {size}", budget)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, LENGTH_OF_COST, width, generator=generator)
    key, value = (torch.randn(1, kv_heads, LENGTH_OF_COST, width, generator=generator) for _ in range(2))
    grouped = query[0].unflatten(0, (kv_heads, -1))

    def select() -> None:
        (plan,) = plan_rows(None, 1, LENGTH_OF_COST, LENGTH_OF_COST, size, query.device)
        for own, keys in zip(grouped, key[0], strict=True):
            choose_blocks(own.transpose(0, 1), keys, plan, settings)

    def run() -> None:
        attention_blockwise(query, key, value, None, width**-0.5, settings)

    seconds = alternate({"selection": select, "attention": run}, seconds=60)
    return {"share": seconds["selection"] / seconds["attention"], "summary_bytes": 4 * width}


def report(results: dict[str, Any]) -> str:
    """Return the tables."""
    parts = []
    for text, ways in results["perplexity"].items():
        ends = [ways.get(way, {}).get("second_half", math.nan) for way in (LOCAL, REACHED)]
        rows = []
        for way, found in ways.items():
            closed = (ends[0] - found["second_half"]) / (ends[0] - ends[1])
            later = [f"{value:.2f}" for value in found["by_position"][1:]]
            rows.append([way, f"{found['second_half']:.3f}", f"{closed:.0%}", f"{found['recall']:.3f}", *later])
        headers = [text, "second half", "closed", "recall", *(f"from {i * SEGMENT}" for i in range(1, len(later) + 1))]
        parts.append(tabulate(rows, headers, "github", disable_numparse=True))
    for name in ("retrieval", "cost"):
        rows = [[way, *(f"{value:.2f}" for value in found.values())] for way, found in results[name].items()]
        if rows:
            headers = [name, *next(iter(results[name].values()))]
            parts.append(tabulate(rows, headers, "github", disable_numparse=True))
    return "\n\n".join(parts)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="folder or Hub id of a dense Llama (default: SmolLM2-135M-Instruct)")
    add("--text", type=Path, nargs="+", default=[], help="files (default: a novel and program text)")
    add("--length", type=int, default=8192, help="tokens of a text (default: %(default)s)")
    add("--budget", type=int, default=512, help="tokens to attend to (default: %(default)s)")
    add("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    add("--skip", nargs="+", choices=("perplexity", "retrieval", "cost"), default=[], help="what not to measure")
    add("--output", type=Path, default=Path("runs/selection.json"), help="file (default: %(default)s)")
    options = parser.parse_args()
    if options.budget % 64 or options.budget < 256 or options.length < 4 * options.budget:
        parser.error("--budget must be a multiple of 64 from 256 on, and --length at least four times as long")
    return options


def main() -> None:
    """Measure, print and write; what the file holds for the same settings is kept."""
    options = parse_arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    source = options.model or smollm2_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(source)
    kind = {"dtype": torch.float32, "attn_implementation": "selection_lab"}
    model = AutoModelForCausalLM.from_pretrained(source, **kind).eval()
    texts = read(tokenizer, options.text, options.length)
    made = {name: getattr(options, name) for name in ("model", "length", "budget")} | {"texts": list(texts)}
    results: dict[str, Any] = {"settings": made, "perplexity": {}, "retrieval": {}, "cost": {}}
    results["perplexity"] = {text: {} for text in texts}
    if options.output.exists():
        found = json.loads(options.output.read_text())
        results = found if found["settings"] == made else results

    def note(table: dict[str, Any], row: str, measure: Callable[[], Any]) -> None:
        if row not in table:
            table[row] = measure()
            print(row, table[row], flush=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")

    options.output.parent.mkdir(parents=True, exist_ok=True)
    for way in options.only:
        use(way, options.budget)
        if "perplexity" not in options.skip:
            for text, ids in texts.items():
                use(way, options.budget)
                note(results["perplexity"][text], way, lambda ids=ids: measure_perplexity(model, ids))
        if "retrieval" not in options.skip:
            note(results["retrieval"], way, lambda: measure_retrieval(model, tokenizer, texts.values()))
    shape = (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim)
    for size in (64, 32, 16) if "cost" not in options.skip else ():
        note(results["cost"], f"heads, {size}", lambda size=size: measure_cost(options.budget, size, *shape))
    print(f"\n{report(results)}")


if __name__ == "__main__":
    main()
