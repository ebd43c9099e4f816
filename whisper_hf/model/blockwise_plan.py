# Copyright 2026 The whisper_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Plan a batch for [`attention_blockwise`]: where its content, blocks and queries lie, and which queries meet a block.

The shape legend is that of `sparse_selection.py`, and per batch row: `M` content tokens, `N` blocks of them, `Q`
queries that see any of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .sparse_selection import query_slots

QUERIES_PER_TILE = 1024  # handled at once: their rows and logits stay in a core's cache


@dataclass(frozen=True)
class RowPlan:
    """Which content one batch row has, and where its blocks and queries lie in it.

    Attributes:
        keys (`[M]`, int64, or `None`: all): slots of the content tokens, in order.
        queries (`[Q]`, int64, or `None`: all): queries that see any content, in order.
        last_key (`[Q]`, int64): content index of the last key that each query sees.
        query_block (`[Q]`, int64): block of that key; never decreases.
        first_block (`[Q]`, int64): first block of the query's document.
        key_bounds: `N + 1` content indices; block `b` holds the tokens `key_bounds[b]` to `key_bounds[b + 1]`.
        query_bounds: `N + 1` query indices; the queries of block `b` are `query_bounds[b]` to `query_bounds[b + 1]`.
        documents: for each block, the first and one past the last block of its document.
        band: the block of the first query, where the queries are the last tokens of the only document and begin a
            block; else `None`.
    """

    keys: Tensor | None
    queries: Tensor | None
    last_key: Tensor
    query_block: Tensor
    first_block: Tensor
    key_bounds: list[int]
    query_bounds: list[int]
    documents: list[tuple[int, int]]
    band: int | None


def plan_rows(
    layout: Tensor | None, batch_size: int, query_length: int, key_length: int, block_size: int, device: torch.device
) -> list[RowPlan]:
    """Return one plan per batch row; without a layout all rows share one."""
    slots = query_slots(layout, query_length, key_length, device)
    if layout is None:
        return [_plan_row(None, slots[0], key_length, block_size)] * batch_size
    return [_plan_row(layout[row, 0, 0], slots[row], key_length, block_size) for row in range(batch_size)]


def _plan_row(document: Tensor | None, slots: Tensor, key_length: int, block_size: int) -> RowPlan:
    """Plan one row from the signed documents of its slots, `[S]`, and its queries' slots, `[T]`."""
    device = slots.device
    if document is None:
        keys = queries = None
        last_key = slots
        key_document = torch.zeros(key_length, dtype=torch.int64, device=device)
    else:
        visible = document > 0
        keys = visible.nonzero()[:, 0]
        key_document = document[keys]
        last_key = visible.cumsum(0)[slots] - 1
        sees = (last_key >= 0) & (key_document[last_key.clamp(min=0)] == document[slots].abs()) if len(keys) else None
        queries = slots.new_empty(0) if sees is None else sees.nonzero()[:, 0]
        last_key = last_key[queries]

    index = torch.arange(len(key_document), device=device)
    starts_document = torch.ones_like(index, dtype=torch.bool)
    starts_document[1:] = key_document[1:] != key_document[:-1]
    document_start = torch.where(starts_document, index, 0).cummax(0).values if len(index) else index
    starts_block = (index - document_start) % block_size == 0
    block = starts_block.cumsum(0) - 1
    first_of_document = block[document_start]

    key_bounds = [*starts_block.nonzero()[:, 0].tolist(), len(index)]
    query_block = block[last_key]
    bounds = torch.searchsorted(query_block, torch.arange(len(key_bounds), device=device))
    first_blocks = first_of_document[starts_block].tolist()
    ends = {first: b + 1 for b, first in enumerate(first_blocks)}
    documents = [(first, ends[first]) for first in first_blocks]
    first = len(index) - len(last_key)
    is_band = len(set(first_blocks)) == 1 and first % block_size == 0 and torch.equal(last_key, index[first:])
    band = first // block_size if is_band else None
    first_block = first_of_document[last_key]
    return RowPlan(keys, queries, last_key, query_block, first_block, key_bounds, bounds.tolist(), documents, band)


def attending_tiles(
    chosen: Tensor, plan: RowPlan, settings: SparseAttentionConfig
) -> Iterator[tuple[int, slice | None, list[slice | Tensor]]]:
    """Yield key blocks from last to first, so that a query meets its own block before any other.

    Args:
        chosen (`[Q, topk_blocks]`, int32): from [`choose_blocks`].
        plan, settings: of the row; where the plan has a band, own and local blocks are left out.

    Yields:
        The block, the queries in it, and tiles of later queries that attend to it: slices of queries or, for those that
        chose the block, their indices.
    """
    num_blocks, topk = len(plan.key_bounds) - 1, settings.topk_blocks
    flat = chosen.flatten()
    order = flat.to(torch.int16 if num_blocks < 2**15 else torch.int32).sort(stable=True).indices
    choosers = order.div_(max(topk, 1), rounding_mode="floor")
    ends = torch.bincount(flat, minlength=num_blocks + 1).cumsum(0).tolist()
    for block in range(num_blocks - 1, -1, -1):
        first, end = plan.documents[block]
        own, local = (plan.query_bounds[b] for b in (block, min(block + settings.local_blocks, end)))
        start = local if plan.band is not None else plan.query_bounds[block + 1]
        stop = plan.query_bounds[end] if block - first < settings.sink_blocks else local
        tiles: list[slice | Tensor] = [
            slice(i, min(i + QUERIES_PER_TILE, stop)) for i in range(start, stop, QUERIES_PER_TILE)
        ]
        picked = choosers[ends[block - 1] if block else 0 : ends[block]]
        tiles += picked.split(QUERIES_PER_TILE) if len(picked) else ()
        has_own = plan.band is None and plan.query_bounds[block + 1] > own
        yield block, slice(own, plan.query_bounds[block + 1]) if has_own else None, tiles


def hidden_in_own_block(plan: RowPlan, block: int, own: slice) -> Tensor:
    """Return `[own queries, 1, keys of the block]`, bool: keys of its own block that a query does not see yet."""
    key = torch.arange(plan.key_bounds[block], plan.key_bounds[block + 1], device=plan.last_key.device)
    return key > plan.last_key[own, None, None]
