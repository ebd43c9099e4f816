"""Measure masked sparse attention against dense attention on a GPU, including the selection of blocks.

    python examples/benchmarks/attention.py --device cuda        # runs this file; needs a CUDA device

Shapes: head dimension 128, bfloat16, batch 1, 64 query heads over 4 key-value heads and 32 over 8. Blocks have 64
tokens, and each query attends to 16 blocks: 11 chosen, 4 local, 1 sink. The baselines are PyTorch's FlashAttention 2
and cuDNN backends, and FlashAttention 3 if the package `flash_attn_interface` is installed. Decoding is replayed from
CUDA graphs, with cached block means. Times are medians of device times. The competitors take turns, and each run starts
with a cold L2 cache.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from whisper_hf import SparseAttentionConfig
from whisper_hf.model.attention_gathered import mean_blocks
from whisper_hf.model.attention_triton import attention_triton
from whisper_hf.model.triton_decode import attention_triton_decode

Run = Callable[[], object]
Timer = Callable[[Run], float]  # runs a function once, and returns milliseconds

HEAD_DIM = 128
HEADS = ((64, 4), (32, 8))  # query heads and key-value heads
SETTINGS = SparseAttentionConfig(block_size=64, topk_blocks=11, local_blocks=4, sink_blocks=1)
SHORTEST, LONGEST = 8192, 131072
CACHE_BYTES = 2**28  # written before each run; larger than any L2 cache
BASELINES = ("flash2", "cudnn", "flash3")
PASSES = ("forward", "backward", "forward + backward", "decode")


def inputs(length: int, heads: int, kv_heads: int, queries: int, device: str = "cuda") -> list[Tensor]:
    """Return query `[1, heads, queries, 128]`, key and value `[1, kv_heads, length, 128]`, strided as in models."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = ((queries, heads), (length, kv_heads), (length, kv_heads))
    states = [torch.randn(1, *size, HEAD_DIM, device=device, dtype=dtype) for size in sizes]
    return [each.transpose(1, 2).requires_grad_() for each in states]


def dense(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute dense attention by a backend of PyTorch; it is causal, but a single query attends to all keys."""
    with sdpa_kernel(backend):
        return sdpa(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


def flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute dense causal attention by FlashAttention 3."""
    from flash_attn_interface import flash_attn_func

    output = flash_attn_func(*(states.transpose(1, 2) for states in (query, key, value)), causal=True)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


def sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute sparse attention by the Triton kernels, including the selection of blocks."""
    return attention_triton(query, key, value, None, HEAD_DIM**-0.5, SETTINGS)


def competitors() -> dict[str, Callable[..., Tensor]]:
    """Return the implementations of attention that are installed, by name."""
    found: dict[str, Callable[..., Tensor]] = {
        "sparse": sparse,
        "flash2": functools.partial(dense, SDPBackend.FLASH_ATTENTION),
        "cudnn": functools.partial(dense, SDPBackend.CUDNN_ATTENTION),
    }
    if importlib.util.find_spec("flash_attn_interface"):
        found["flash3"] = flash3
    return found


def runs_of(what: str, attend: Callable[..., Tensor], states: list[Tensor]) -> Run:
    """Return a function that runs one pass of an implementation; `backward` is only the backward pass."""
    if what == "forward":
        return torch.no_grad()(functools.partial(attend, *states))
    output = attend(*states)
    upstream = torch.randn_like(output)
    if what == "backward":
        return lambda: torch.autograd.grad(output, states, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(attend(*states), states, upstream)


def decoding(attend: Callable[..., Tensor], states: list[Tensor]) -> Run:
    """Return a function that runs one decoding step; the sparse one gets block means, as from its cache."""
    query, key, value = (each.detach() for each in states)
    if attend is sparse:
        means = mean_blocks(key, None, SETTINGS.block_size)
        arguments = (query, key, value, None, HEAD_DIM**-0.5, SETTINGS, means)
        return torch.no_grad()(functools.partial(attention_triton_decode, *arguments))
    return torch.no_grad()(functools.partial(attend, query, key, value))


def graphed(run: Run) -> Run:
    """Capture a run in a CUDA graph, and return the function that replays it."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def device_milliseconds(scratch: Tensor, run: Run) -> float:
    """Return the device time of one run in milliseconds, starting with a cold cache."""
    scratch.zero_()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(run: Run) -> int:
    """Return the peak device memory of a run in bytes, above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def alternate(runs: dict[str, Run], timer: Timer, rounds: int) -> dict[str, float]:
    """Time competitors in turns, after two warm-up rounds; return the median milliseconds of each, by name."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            times[name].append(timer(run))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def measure_row(
    what: str, length: int, heads: tuple[int, int], timer: Timer, rounds: int, device: str = "cuda"
) -> dict[str, object]:
    """Measure one pass at one length, for all competitors.

    Args:
        what: the pass, one of `PASSES`.
        length: tokens of the sequence.
        heads: query heads and key-value heads.
        timer: times one run in milliseconds.
        rounds: counted rounds.
        device: where to run.

    Returns:
        `milliseconds` by competitor, `ratios` (milliseconds / those of sparse attention), `peak_bytes`, and `failed`:
        the errors of competitors that could not run.
    """
    states = inputs(length, *heads, queries=1 if what == "decode" else length, device=device)
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    memory: dict[str, int] = {}
    for name, attend in competitors().items():
        try:
            run = decoding(attend, states) if what == "decode" else runs_of(what, attend, states)
            run()  # compiles the kernels
            if device == "cuda":
                memory[name] = peak_bytes(run)
                run = graphed(run) if what == "decode" else run
        except RuntimeError as error:  # an error for lack of memory is one of these too
            failed[name] = str(error).splitlines()[0]
            continue
        runs[name] = run
    milliseconds = alternate(runs, timer, rounds)
    ratios = {name: milliseconds[name] / milliseconds["sparse"] for name in milliseconds if name != "sparse"}
    row = {"what": what, "length": length, "heads": heads[0], "kv_heads": heads[1], "milliseconds": milliseconds}
    return {**row, "ratios": ratios, "peak_bytes": memory, "failed": failed}


def report(rows: list[dict]) -> str:
    """Return a Markdown table of baseline time / sparse time, per pass and baseline (lines) and length (columns)."""
    lengths = sorted({row["length"] for row in rows})
    found = {(row["what"], row["heads"], row["length"]): row for row in rows}
    lines = []
    for what, heads in dict.fromkeys((row["what"], row["heads"]) for row in rows):
        at = [found[what, heads, length] for length in lengths if (what, heads, length) in found]
        for name in BASELINES:
            if any(name in row["ratios"] for row in at):
                lines.append([f"{what}, {heads} heads: {name} / sparse", *(row["ratios"].get(name, "") for row in at)])
        lines.append([f"{what}, {heads} heads: sparse, ms", *(row["milliseconds"]["sparse"] for row in at)])
        if "flash2" in at[-1]["peak_bytes"]:
            shares = [row["peak_bytes"]["sparse"] / row["peak_bytes"]["flash2"] for row in at]
            lines.append([f"{what}, {heads} heads: memory, sparse / flash2", *shares])
    return tabulate(lines, ["bfloat16", *(f"{n // 1024}k" for n in lengths)], "github", floatfmt=".2f")


def plot(rows: list[dict], path: Path) -> None:
    """Plot forward + backward time against length, both logarithmic, with a panel for each number of heads."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(HEADS), sharey=True, figsize=(10, 4))
    for panel, (heads, kv_heads) in zip(panels, HEADS, strict=True):
        chosen = [row for row in rows if row["what"] == "forward + backward" and row["heads"] == heads]
        for name in ("sparse", *BASELINES):
            points = [(row["length"], row["milliseconds"][name]) for row in chosen if name in row["milliseconds"]]
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", label=name)
        panel.set(title=f"{heads} query heads, {kv_heads} key-value heads", xlabel="tokens")
        panel.legend()
    panels[0].set_ylabel("milliseconds, forward + backward")
    figure.savefig(path)


def versions() -> dict[str, str]:
    """Return the device and the versions of the software on which the times depend."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "flash3": "installed" if importlib.util.find_spec("flash_attn_interface") else "not installed",
    }


def main(options: argparse.Namespace) -> None:
    """Measure on the current CUDA device, print, and write `attention_cuda.json` and `.svg`; without one, exit."""
    if not torch.cuda.is_available():
        sys.exit("--device cuda needs a CUDA device, got none; nothing was measured or written")
    torch.manual_seed(0)
    scratch = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    timer = functools.partial(device_milliseconds, scratch)
    rows = []
    for length in (n for n in (SHORTEST << i for i in range(5)) if n <= options.longest):
        for heads in HEADS:
            for what in PASSES:
                if options.only and options.only not in what:
                    continue
                rows.append(measure_row(what, length, heads, timer, rounds=10))
                print(json.dumps(rows[-1]), flush=True)
    if not rows:
        sys.exit(f"nothing to measure: --only is {options.only!r}, --longest {options.longest}; passes are {PASSES}")
    print(f"\n{report(rows)}")
    results = {**versions(), "settings": str(SETTINGS), "head_dim": HEAD_DIM, "dtype": "bfloat16", "rows": rows}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "attention_cuda.json").write_text(json.dumps(results, indent=1) + "\n")
    if any(row["what"] == "forward + backward" for row in rows):
        plot(rows, options.output / "attention_cuda.svg")
