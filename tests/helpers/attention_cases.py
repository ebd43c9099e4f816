"""Inputs of attention that the tests of its implementations share: random states, layouts of batches, the oracle.

The shape legend of `sparse_selection.py` applies here, with `E` for the value dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from whisper_hf.model.attention_reference import masked_sparse_attention_reference
from whisper_hf.model.configuration_whisper_lm import SparseAttentionConfig
from whisper_hf.model.sparse_selection import content_layout

LENGTH = 203  # no multiple of a block, and several times the budget of the tests that use it


class Row(NamedTuple):
    """One row of a layout.

    Attributes:
        starts: slots at which a document begins, besides slot 0.
        hidden: slots that hold padding.
        holes: share of the slots that are hidden at random, in [0, 1].
    """

    starts: tuple[int, ...] = ()
    hidden: slice = slice(0)
    holes: float = 0.0


ALL_SHOWN, ALL_HIDDEN = Row(), Row(hidden=slice(None))
LEFT, RIGHT = Row(hidden=slice(37)), Row(hidden=slice(-37, None))

LAYOUTS: dict[str, tuple[Row, Row] | None] = {  # the two rows of a batch; `None` where no layout is passed
    "none": None,
    "left": (LEFT, ALL_SHOWN),
    "right": (ALL_SHOWN, RIGHT),
    "left and right": (LEFT, RIGHT),
    "holes": (Row(holes=0.3), Row(holes=0.3)),
    "packed": (Row(starts=(23, 24, 140)), Row(starts=(100,))),
    "packed with holes": (Row(starts=(50, 60), holes=0.1), Row(starts=(50, 120), holes=0.2)),
    "all hidden": (ALL_HIDDEN, ALL_SHOWN),
    "one token": (Row(hidden=slice(1, None)), ALL_SHOWN),
    "one token and all hidden": (Row(hidden=slice(1, None)), ALL_HIDDEN),
}


def attention_inputs(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    queries: int = LENGTH,
    keys: int = LENGTH,
    value_dim: int | None = None,
    rows: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokens_first: bool = False,
) -> list[Tensor]:
    """Return normally distributed query, key and value, leaves of the graph.

    Args:
        heads, kv_heads, head_dim, queries, keys, rows (`int`): `H`, `K`, `D`, `T`, `S` and `B`.
        value_dim (`int`, *optional*): `E`; by default `D`.
        dtype, device: of all three tensors.
        tokens_first (`bool`): whether memory is laid out as in models, `[B, T, H, D]`; else tensors are contiguous.

    Returns:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`).
    """
    tensors = []
    for count, length, width in (
        (heads, queries, head_dim),
        (kv_heads, keys, head_dim),
        (kv_heads, keys, value_dim or head_dim),
    ):
        states = torch.randn(rows, count, length, width, dtype=torch.float64).to(device, dtype)
        if tokens_first:
            states = states.transpose(1, 2).contiguous().transpose(1, 2)
        tensors.append(states.requires_grad_())
    return tensors


def layout_of(name: str, length: int = LENGTH, device: str = "cpu") -> Tensor | None:
    """Return a layout of `LAYOUTS` by its name, `[2, 1, 1, length]` int32, or `None`."""
    rows = LAYOUTS[name]
    if rows is None:
        return None
    shown, starts = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.bool)
    for row, (row_starts, hidden, holes) in enumerate(rows):
        shown[row] = torch.rand(length) >= holes
        shown[row, hidden] = False
        starts[row, list(row_starts)] = True
    return content_layout(shown, starts, length).to(device)


def attend_by_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig,
) -> Tensor:
    """Return the output of the oracle, `[B, H, T, E]`."""
    return masked_sparse_attention_reference(query, key, value, layout, scaling, settings)[0]
