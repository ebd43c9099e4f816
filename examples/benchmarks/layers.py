"""Measure a whole attention layer, with its projections, against the sparse layer of MiniMax-M3 in transformers.

Both layers choose blocks for each token and each key head. The layer of MiniMax-M3 scores the blocks with additional
projections, its indexer, and compares every query with every key. On a CPU it turns the choice into a mask for dense
attention, so its cost is quadratic here. On GPUs there are kernels that read only the chosen blocks.
`attention.py --compare` runs this file.
"""

import importlib.util
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

from examples.benchmarks.measuring import Run, alternate, peak_memory
from whisper_hf import SparseAttentionConfig, WhisperLMConfig
from whisper_hf.model.modeling_whisper_lm import WhisperLMAttention, WhisperLMRotaryEmbedding

LENGTHS = (1024, 2048, 4096)
COMPETITORS = ("dense", "MiniMax-M3", "ours")
PASSES = ("forward", "forward + backward")
NOTE = """\
Whole layers: projections, norms and RoPE are included, and with MiniMax-M3 also its indexer. Without a GPU, its sparse
layer is dense attention with a computed mask. `dense` is a MiniMax-M3 layer without indexer. In both sparse layers a
token attends to the same number of tokens."""


def is_available() -> bool:
    """Return whether the installed version of transformers has MiniMax-M3."""
    return importlib.util.find_spec("transformers.models.minimax_m3_vl") is not None


def build_layers(sizes: dict[str, int], settings: SparseAttentionConfig) -> tuple[dict[str, nn.Module], nn.Module]:
    """Build the layers, by name, and their RoPE; all have norms on query and key heads, and the same budget.

    Args:
        sizes: `hidden_size`, `num_attention_heads`, `num_key_value_heads` and `head_dim`.
        settings: block size and budget.
    """
    from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as configuration
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

    torch.manual_seed(0)
    theirs = configuration.MiniMaxM3VLTextConfig(
        **sizes,
        num_hidden_layers=2,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=sizes["num_key_value_heads"],
        index_head_dim=sizes["head_dim"],
        index_block_size=settings.block_size,
        index_topk_blocks=settings.budget_blocks,  # this number includes the local blocks
        index_local_blocks=settings.local_blocks,
        attn_implementation="sdpa",
    )
    ours = WhisperLMConfig(**sizes, num_hidden_layers=1, use_qk_norm=True, sparse_attention=settings)
    ours._attn_implementation = "masked_sparse"
    dense, sparse = (modeling.MiniMaxM3VLAttention(theirs, index) for index in range(2))
    layers = {"dense": dense, "MiniMax-M3": sparse, "ours": WhisperLMAttention(ours, 0)}
    return layers, WhisperLMRotaryEmbedding(ours)


def layer_run(name: str, what: str, length: int, sizes: dict[str, int], settings: SparseAttentionConfig) -> Run:
    """Return a function that runs one pass of one layer over `[1, length, hidden_size]`, float32.

    Args:
        name: the layer, one of `COMPETITORS`.
        what: the pass, one of `PASSES`; the backward pass computes the gradients of inputs and parameters.
        length: tokens of the sequence.
        sizes: as in [`build_layers`].
        settings: block size and budget.
    """
    layers, rope = build_layers(sizes, settings)
    layer = layers[name]
    hidden = torch.randn(1, length, sizes["hidden_size"], generator=torch.Generator().manual_seed(0))
    position_embeddings = rope(hidden, torch.arange(length)[None])

    def attend() -> Tensor:
        return layer(hidden, position_embeddings=position_embeddings, attention_mask=None)[0]

    if what == "forward":
        return torch.no_grad()(attend)
    leaves = [hidden.requires_grad_(), *layer.parameters()]
    upstream = torch.ones_like(hidden)
    # allow_unused: no gradient flows through the choice of blocks to the indexer
    return lambda: torch.autograd.grad(attend(), leaves, upstream, allow_unused=True)


def prepare_memory(*arguments: object) -> Run:
    """Return the run whose peak memory is measured, on one thread; the arguments are those of [`layer_run`]."""
    torch.set_num_threads(1)
    return layer_run(*arguments)


def measure_layers(
    sizes: dict[str, int], settings: SparseAttentionConfig, longest: int, seconds: float, wanted: Callable[[str], bool]
) -> list[dict]:
    """Measure time and peak memory of the layers; return a row for each pass and length.

    Args:
        sizes: as in [`build_layers`].
        settings: block size and budget.
        longest: longest sequence, in tokens.
        seconds: time for each comparison.
        wanted: says for the name of a pass whether to measure it.
    """
    rows: list[dict] = []
    lengths = [length for length in LENGTHS if length <= longest]
    for length in lengths:
        for what in PASSES:
            if not wanted(f"layer, {what}"):
                continue
            arguments = (what, length, sizes, settings)
            times = alternate({name: layer_run(name, *arguments) for name in COMPETITORS}, seconds)
            memory = {name: peak_memory(prepare_memory, name, *arguments) for name in COMPETITORS}
            rows.append({"what": f"layer, {what}", "length": length, "seconds": times, "memory": memory})
            shown = f"dense / ours {times['dense'] / times['ours']:6.2f}, "
            shown += f"MiniMax-M3 / ours {times['MiniMax-M3'] / times['ours']:6.2f}"
            print(f"{length:7d} {rows[-1]['what']:32s} {shown}", flush=True)
    return rows


def report_layers(rows: list[dict]) -> str:
    """Return ratios of time and of peak memory as a table, per comparison (lines) and length (columns)."""
    lengths = sorted({row["length"] for row in rows})
    found = {(row["what"], row["length"]): row for row in rows}
    table = []
    for quantity, title in (("seconds", "time"), ("memory", "peak memory")):
        for what in dict.fromkeys(row["what"] for row in rows):
            for above, below in (("dense", "MiniMax-M3"), ("dense", "ours"), ("MiniMax-M3", "ours")):
                cells = [ratio(found[what, length][quantity], above, below) for length in lengths]
                table.append([f"{what}, {title}: {above} / {below}", *cells])
    headers = ["whole attention layers", *(f"{length // 1024}k" for length in lengths)]
    return tabulate(table, headers, "github", floatfmt=".2f")


def ratio(values: dict[str, float | None], above: str, below: str) -> float | str:
    """Return one competitor's value / another's, or an empty text if a value is missing."""
    return values[above] / values[below] if values[above] and values[below] else ""
