"""Measure masked sparse attention against dense attention, side by side on one CPU thread.

    python examples/benchmarks/attention.py                      # 1k to 32k tokens, about five minutes
    python examples/benchmarks/attention.py --longest 131072     # to 128k: half an hour, mostly for dense attention
    python examples/benchmarks/attention.py --compare            # also whole layers, with MiniMax-M3's, to 4k tokens
    python examples/benchmarks/attention.py --device cuda        # another table, on a GPU: see attention_cuda.py

The script prints how many times faster sparse attention is (median dense time / median sparse time). It writes these
ratios, the times and a plot to `--output`. Shapes: 8 query heads, 2 key-value heads, head dimension 64, float32, blocks
of 64 tokens.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from examples.benchmarks import attention_cuda
from examples.benchmarks.layers import NOTE, is_available, measure_layers, report_layers
from examples.benchmarks.measuring import alternate, peak_memory
from whisper_hf import SparseAttentionConfig
from whisper_hf.model.attention_blockwise import attention_blockwise
from whisper_hf.model.attention_gathered import attention_gathered, mean_blocks
from whisper_hf.model.attention_masks import explicit_mask

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
GROUPS, SCALING = HEADS // KV_HEADS, HEAD_DIM**-0.5
PREFILL = SparseAttentionConfig(block_size=64, topk_blocks=8, local_blocks=4, sink_blocks=1)
DECODE = SparseAttentionConfig(block_size=64, topk_blocks=16, local_blocks=4, sink_blocks=1)
LONGEST_MASK = 8192  # SDPA with an explicit mask needs memory for the mask, quadratic in the length


def inputs(length: int, kind: str = "random", batch: int = 1, queries: int | None = None) -> list[Tensor]:
    """Return query `[batch, HEADS, queries, HEAD_DIM]`, key and value `[batch, KV_HEADS, length, HEAD_DIM]`.

    `correlated` keys drift slowly, like the keys of a text: neighbouring keys are similar, so many queries choose the
    same blocks.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, KV_HEADS, length, HEAD_DIM)
    query = torch.randn(batch, HEADS, queries or length, HEAD_DIM, generator=generator)
    key = torch.randn(shape, generator=generator)
    value = torch.randn(shape, generator=generator)
    if kind == "correlated":
        drift = torch.randn(batch, KV_HEADS, math.ceil(length / 256), HEAD_DIM, generator=generator)
        key = key + 2 * drift.repeat_interleave(256, dim=2)[:, :, :length]
    return [query, key, value]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute dense causal attention, `[B, HEADS, T, HEAD_DIM]`, by PyTorch's fused attention."""
    key, value = (states.repeat_interleave(GROUPS, dim=1) for states in (key, value))
    return sdpa(query, key, value, is_causal=True)


def masked(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute sparse attention by dense attention with a given mask, whose computation is not timed."""
    key, value = (states.repeat_interleave(GROUPS, dim=1) for states in (key, value))
    return sdpa(query, key, value, attn_mask=mask)


def sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute sparse attention, including the selection of blocks, `[1, HEADS, T, HEAD_DIM]`."""
    return attention_blockwise(query, key, value, None, SCALING, PREFILL)


def forward(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    """Return a function that runs the forward pass of an attention."""
    return torch.no_grad()(functools.partial(attend, *tensors))


def forward_backward(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    """Return a function that runs the forward and the backward pass of an attention."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    upstream = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


def prepare_memory(name: str, length: int) -> Callable[[], object]:
    """Return the run whose peak memory is measured: a forward and backward pass on one thread."""
    torch.set_num_threads(1)
    return forward_backward({"dense": dense, "sparse": sparse}[name], inputs(length))


def prefill_row(length: int, kind: str, passes: Callable, seconds: float) -> dict[str, float]:
    """Time the competitors on a whole sequence; return the median seconds of each, by name."""
    tensors = inputs(length, kind)
    runs = {"dense": passes(dense, tensors), "sparse": passes(sparse, tensors)}
    if length <= LONGEST_MASK and passes is forward and not PREFILL.covers(length):
        mask = explicit_mask(tensors[0], tensors[1], None, PREFILL)
        runs["masked"] = passes(functools.partial(masked, mask), tensors)
    return alternate(runs, seconds)


def decode_row(length: int, batch: int, seconds: float) -> dict[str, float]:
    """Time one new token; return the median seconds of dense and sparse attention.

    Dense attention gets its heads packed, which is its fastest form, and sparse attention gets cached block means.
    """
    query, key, value = inputs(length, batch=batch, queries=1)
    means = mean_blocks(key, None, DECODE.block_size)
    packed = query.view(batch, KV_HEADS, GROUPS, HEAD_DIM)
    runs = {
        "dense": lambda: sdpa(packed, key, value),
        "sparse": lambda: attention_gathered(query, key, value, None, SCALING, DECODE, means),
    }
    return alternate({name: torch.no_grad()(run) for name, run in runs.items()}, seconds, most=300)


def multiplication_bound(length: int, flops: float) -> float:
    """Return a lower bound on the forward seconds of sparse attention, from its multiplications alone.

    Args:
        length: tokens of the sequence.
        flops: multiplications and additions per second of the machine.
    """
    blocks = torch.arange(length) // PREFILL.block_size + 1
    attended = blocks.clamp(max=PREFILL.budget_blocks).double().mul(PREFILL.block_size).sum() - length * 31.5
    scoring = KV_HEADS * length * (length / PREFILL.block_size) / 2
    return float((attended * HEADS * 2 + scoring) * 2 * HEAD_DIM / flops)


def peak_flops() -> float:
    """Measure the multiplications and additions per second of one thread, on a product of this attention's size."""
    left, right = torch.randn(2048, HEAD_DIM), torch.randn(HEAD_DIM, 256)
    return 2 * 2048 * HEAD_DIM * 256 / alternate({"product": lambda: left @ right}, 0.5, 200)["product"]


def measure(options: argparse.Namespace) -> list[dict]:
    """Time all passes at all lengths, and print a line for each."""
    lengths = [2**exponent for exponent in range(10, int(math.log2(options.longest)) + 1)]
    rows: list[dict] = []
    for length in lengths:
        jobs: list[tuple[str, Callable[[], dict[str, float]]]] = []
        for kind in ("random", "correlated"):
            for name, passes in (("forward", forward), ("forward + backward", forward_backward)):
                arguments = (length, kind, passes, options.seconds)
                jobs.append((f"{name}, {kind}", functools.partial(prefill_row, *arguments)))
        for batch in (1, 8):
            jobs.append((f"decode, batch {batch}", functools.partial(decode_row, length, batch, options.seconds / 4)))
        for what, job in jobs:
            if options.only and options.only not in what:
                continue
            seconds = job()
            row = {"what": what, "length": length, **seconds, "ratio": seconds["dense"] / seconds["sparse"]}
            rows.append(row)
            print(f"{length:7d} {what:32s} dense / sparse {row['ratio']:6.2f}", flush=True)
    return rows


def compare(options: argparse.Namespace) -> list[dict]:
    """Measure whole attention layers: a dense one, the sparse one of MiniMax-M3, and ours."""
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    sizes["hidden_size"] = HEADS * HEAD_DIM
    return measure_layers(sizes, PREFILL, options.longest, options.seconds, lambda what: (options.only or "") in what)


def report(rows: list[dict]) -> str:
    """Return the ratios as a Markdown table, with a line for each measurement and a column for each length."""
    lengths = sorted({row["length"] for row in rows})
    found = {(row["what"], row["length"]): row for row in rows}
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    table = [[f"{kind}: dense / sparse", *(found[kind, n]["ratio"] for n in lengths)] for kind in kinds]
    masked_rows = [[f"{kind}: masked / sparse"] for kind in kinds if "masked" in found[kind, lengths[0]]]
    for line, kind in zip(masked_rows, [k for k in kinds if "masked" in found[k, lengths[0]]], strict=True):
        line += [
            found[kind, n]["masked"] / found[kind, n]["sparse"] if "masked" in found[kind, n] else "" for n in lengths
        ]
    for kind in kinds:
        growth = [found[kind, b]["sparse"] / found[kind, a]["sparse"] for a, b in itertools.pairwise(lengths)]
        table.append([f"{kind}: time per doubling", "", *growth])
    headers = ["one thread, float32", *(f"{n // 1024}k" for n in lengths)]
    return tabulate(table + masked_rows, headers, "github", floatfmt=".2f")


def plot(rows: list[dict], flops: float, path: Path) -> None:
    """Plot the forward time against the length, both logarithmic, with the lower bound from the multiplications."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row["what"] == "forward, random"]
    lengths = [row["length"] for row in chosen]
    for name in ("dense", "sparse"):
        pyplot.loglog(lengths, [row[name] for row in chosen], marker="o", label=name)
    bounds = [multiplication_bound(length, flops) for length in lengths]
    pyplot.loglog(lengths, bounds, linestyle=":", label="sparse, multiplications alone")
    pyplot.xlabel("tokens")
    pyplot.ylabel("seconds, one thread")
    pyplot.legend()
    pyplot.savefig(path)


def main() -> None:
    """Measure, print the tables, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--longest", type=int, help="longest sequence, in tokens (default: 32768; on a GPU 131072)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each comparison (default: %(default)s)")
    parser.add_argument(
        "--only", help="measure only passes whose name contains this, such as 'decode', 'forward, random' or 'layer'"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also measure whole layers, with MiniMax-M3's, up to 4k tokens"
    )
    parser.add_argument("--output", type=Path, help="folder (default: runs/attention; on a GPU model_cards/benchmarks)")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.longest = options.longest or (attention_cuda.LONGEST if on_gpu else 32768)
    options.output = options.output or Path("model_cards/benchmarks" if on_gpu else "runs/attention")
    if on_gpu:
        attention_cuda.main(options)
        return
    if options.longest < 1024:
        parser.error(f"--longest must be at least 1024, got {options.longest}; the default is 32768")
    if options.compare and not is_available():
        parser.error("--compare needs a transformers that has MiniMax-M3, got one without; pip install -U transformers")
    torch.set_num_threads(1)
    flops = peak_flops()
    rows = measure(options)
    layers = compare(options) if options.compare else []
    trained = [row["length"] for row in rows if "backward" in row["what"]]
    memory = {name: peak_memory(prepare_memory, name, max(trained)) for name in ("dense", "sparse") if trained}

    if rows:
        print(f"\n{report(rows)}\n")
    if memory:
        print(f"peak memory above the inputs, forward + backward at {max(trained)}: {memory} MB")
    if layers:
        print(f"\n{report_layers(layers)}\n{NOTE}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"rows": rows, "layers": layers, "flops": flops, "memory": memory, "torch": torch.__version__}
    (options.output / "attention.json").write_text(json.dumps(results, indent=1) + "\n")
    if any(row["what"] == "forward, random" for row in rows):
        plot(rows, flops, options.output / "attention.svg")


if __name__ == "__main__":
    main()
