"""Compare ways to choose the blocks of sparse attention, side by side on a dense model without further training.

    python examples/benchmarks/selection.py           # about two hours on one core
    python examples/benchmarks/selection.py --budget 1600 --only dense "local, 64" "oracle, 64" default
    python examples/benchmarks/selection.py --model MODEL --text FILE FILE   # any dense Llama, any texts

All ways but `dense` attend to the same number of tokens: a sink of 32, a quarter of the budget as local blocks, and
chosen blocks for the rest. `local` is the lower bound: all blocks but the sink are local. `oracle` is the upper bound:
it chooses the blocks with the most true attention, which only dense attention can compute. Other ways choose by a score
`s(b)` from a summary of block `b`, whose keys have the mean `m_b` and the variance `v_b`; `q_h` is the scaled query of
head `h` in a group. The number in the name of a way is the block size.

- `summed`:        `s(b) = (sum_h q_h) . m_b`
- `heads`:         `s(b) = max_h (e_h(b) - max_b' e_h(b'))` with `e_h(b) = q_h . m_b`, which `masked_sparse` computes
- `second`:        `heads` with `e_h(b) = q_h . m_b + q_h^2 . v_b / 4`; the second-order estimate of the block's
                   log-sum-exp has 1/2 in place of 1/4, and overestimates
- `probabilities`: `s(b) = sum_h softmax_b(e_h(b))`, with `e_h` as in `second`

`default` is `heads` with the default settings, which have a budget of 1,600 tokens; `--budget` does not change it.

The script measures

- the perplexity of each 1,024 tokens of a novel and of source code, and the share that a way closes of the gap between
  `local, 64` and `oracle, 64`,
- the recall: the share of the true attention in the blocks that are attended,
- the share of digits of hidden pass keys and facts that the model finds again in both texts,
- the share of selection in the time of sparse attention, and the bytes of a block's summary.

All but the last compute attention densely with a mask, as they compare choices and not speed.
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

SEGMENT = 1024  # tokens whose perplexity is reported together
ROWS = 256  # queries that are computed at once
SINK = 32  # tokens
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where in a text facts are hidden, in [0, 1]
LOCAL, REACHED = "local, 64", "oracle, 64"  # the ends of the gap that a score may close
SCORES, SIZES = ("summed", "heads", "second"), (64, 32, 16)
WAYS = ("dense", LOCAL, REACHED, *(f"{score}, {size}" for score in SCORES for size in SIZES))
WAYS += ("probabilities, 32", "oracle, 32", "oracle, 16", "default")
LENGTH_OF_COST = 32768  # tokens of the measurement of cost


@dataclass
class Lab:
    """The state of the registered attention: how it chooses blocks, and the recall that it has measured.

    Args:
        score: the name of the score, or "dense", "local" or "oracle".
        settings: block size and budget.
        recalled: sum of the mean recall of the measured groups of queries.
        seen: number of these groups.
    """

    score: str = "dense"
    settings: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    recalled: float = 0.0
    seen: int = 0


LAB = Lab()


def settings_for(way: str, budget: int) -> SparseAttentionConfig:
    """Return the settings of a way: how its budget of tokens is divided among sink, local and chosen blocks."""
    if way == "default":
        return SparseAttentionConfig()
    score, _, block_size = way.partition(", ")
    size = int(block_size or 64)
    sink = max(SINK // size, 1)
    local = budget // size - sink if score in ("dense", "local") else max(budget // 4 // size, 1)
    return SparseAttentionConfig(size, budget // size - sink - local, local, sink)


def score_blocks(score: str, query: Tensor, key: Tensor, past: Tensor, size: int) -> Tensor:
    """Score the blocks of each group for each query.

    Args:
        score: the name of the score, see the docstring of this file.
        query: `[K, G, T, D]`, scaled, for `K` key heads and `G` query heads per group.
        key: `[K, N * size, D]`, the keys of `N` blocks.
        past: `[T, N]`, bool, the blocks before the query's.
        size: tokens of a block.

    Returns:
        scores `[K, T, N]`.
    """
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
    """Compute attention with the choice of blocks that `LAB` holds, for one text without cache.

    Args:
        module: the attention layer, which is not used.
        query: `[1, H, T, D]`.
        key, value: `[1, K, T, D]`.
        scaling: factor of the products of queries and keys.

    Returns:
        outputs `[1, T, H, D]`, and no weights.
    """
    if LAB.score == "dense":
        output = sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    grouped = query[0].unflatten(0, (key.shape[1], -1)) * scaling
    tiles = [attend_rows(grouped[:, :, i : i + ROWS], key[0], value[0], i) for i in range(0, query.shape[2], ROWS)]
    return torch.cat(tiles, dim=2).flatten(0, 1).transpose(0, 1)[None].contiguous(), None


def attend_rows(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    """Compute attention for some queries, and add their recall to `LAB` if they are in the second half of the text.

    Args:
        query: `[K, G, T, D]`, scaled, of the tokens from `start` on.
        key, value: `[K, S, D]`, of the whole text.
        start: position of the first query.

    Returns:
        outputs `[K, G, T, D]`.
    """
    settings = LAB.settings
    size = settings.block_size
    stop = start + query.shape[2]
    position = torch.arange(start, stop)
    length = key.shape[1]
    end = math.ceil(stop / size) * size  # of the last query's block
    key, value = (pad(states[:, :end], (0, 0, 0, max(end - length, 0))) for states in (key, value))
    causal = torch.arange(end) <= position[:, None]
    logits = (query @ key[:, None].transpose(2, 3)).masked_fill_(~causal, float("-inf"))
    true = logits.softmax(-1)
    block = torch.arange(end // size)
    current = position[:, None] // size
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
    """Make the attention choose blocks in a way, and reset its recall."""
    LAB.score = "heads" if way == "default" else way.split(", ")[0]
    LAB.settings = settings_for(way, budget)
    LAB.recalled = 0.0
    LAB.seen = 0


def measure_perplexity(model: Any, ids: Tensor) -> dict[str, Any]:
    """Return the perplexity of each 1,024 tokens of `ids`, `[T]` int64, and of its second half, and the recall."""
    found = losses(model, ids)
    return {
        "by_position": [part.mean().exp().item() for part in found.split(SEGMENT)],
        "second_half": found[len(ids) // 2 :].mean().exp().item(),
        "recall": LAB.recalled / LAB.seen if LAB.seen else 1.0,
    }


def measure_retrieval(model: Any, tokenizer: Any, texts: Iterable[Tensor]) -> dict[str, float]:
    """Return the share of hidden digits that the model finds, in [0, 1]: of single pass keys, and of five at once."""
    proses = [ids[:-ROOM] for ids in texts]
    alone = [hide(tokenizer, prose, facts((depth,), len(prose))) for prose in proses for depth in DEPTHS]
    together = [hide(tokenizer, prose, facts(DEPTHS, len(prose))) for prose in proses]
    found = {"pass key": alone, "facts": together}
    return {name: mean(share_found(tokens_found(model, *ask)) for ask in asked) for name, asked in found.items()}


def measure_cost(budget: int, size: int, heads: int, kv_heads: int, width: int) -> dict[str, float]:
    """Return the share of selection in the time of `masked_sparse` attention, in [0, 1], and bytes of a summary.

    Args:
        budget: tokens to attend to.
        size: tokens of a block.
        heads: number of query heads.
        kv_heads: number of key heads.
        width: head dimension.
    """
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
    """Return the results as Markdown tables."""
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
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="folder or Hub id of a dense Llama (default: SmolLM2-135M-Instruct)")
    add("--text", type=Path, nargs="+", default=[], help="text files (default: a novel and source code)")
    add("--length", type=int, default=8192, help="tokens of a text (default: %(default)s)")
    add("--budget", type=int, default=512, help="tokens to attend to (default: %(default)s)")
    add("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    add("--skip", nargs="+", choices=("perplexity", "retrieval", "cost"), default=[], help="measurements to leave out")
    add("--output", type=Path, default=Path("runs/selection.json"), help="file (default: %(default)s)")
    options = parser.parse_args()
    if options.budget % 64 or options.budget < 256 or options.length < 4 * options.budget:
        parser.error(
            f"--budget must be a multiple of 64 and at least 256, and --length at least 4 times as long, got "
            f"{options.budget} and {options.length}; the defaults are 512 and 8192"
        )
    return options


def main() -> None:
    """Measure, print the tables, and write the results; earlier results with the same settings are kept."""
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
        """Measure a row that a table does not have, and write all results."""
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
