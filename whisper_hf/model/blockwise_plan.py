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
"""Plan a batch for [`attention_blockwise`]: find its tokens, blocks, and the queries that attend to each block.

The shape legend of `sparse_selection.py` applies here; in addition, a batch row has `M` content tokens (its visible
tokens, in order), `N` blocks of content tokens, and `Q` queries that see at least one content token. A *content index*
numbers the content tokens of a row from 0 to `M - 1`, over all its documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .sparse_selection import query_slots

QUERIES_PER_TILE = 1024  # queries that are multiplied at once; their rows and logits fit into the cache of a CPU core


@dataclass(frozen=True)
class RowPlan:
    """Positions of the content tokens, blocks and queries of one batch row.

    Attributes:
        keys (`[M]`, int64, or `None` for all slots): slots of the content tokens, ascending.
        queries (`[Q]`, int64, or `None` for all queries): queries that see at least one key, ascending.
        last_key (`[Q]`, int64): content index of the last key that each query sees.
        query_block (`[Q]`, int64): block of the last key that each query sees; it never decreases.
        first_block (`[Q]`, int64): first block of each query's document.
        key_bounds (list of `N + 1` ints): block `b` holds the content indices `key_bounds[b] <= i < key_bounds[b + 1]`.
        query_bounds (list of `N + 1` ints): the last key of query `q` lies in block `b` if
            `query_bounds[b] <= q < query_bounds[b + 1]`.
        documents (list of `N` pairs of ints): for each block, the first and one past the last block of its document.
        band (`int` or `None`): block of the first query, if the queries are the last tokens of the only document and
            the first query begins a block; `None` otherwise. With a band, own and local blocks are computed as one
            banded product.
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
    """Find the positions of content tokens, blocks and queries in every batch row.

    Args:
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it.
        batch_size, query_length, key_length (`int`): `B`, `T` and `S`.
        block_size (`int`): tokens per block.
        device (`torch.device`): device of the plans' tensors.

    Returns:
        One plan per batch row; without a layout, all entries are the same plan.
    """
    slots = query_slots(layout, query_length, key_length, device)
    if layout is None:
        return [_plan_row(None, slots[0], key_length, block_size)] * batch_size
    return [_plan_row(layout[row, 0, 0], slots[row], key_length, block_size) for row in range(batch_size)]


def _plan_row(document: Tensor | None, slots: Tensor, key_length: int, block_size: int) -> RowPlan:
    """Find the positions of content tokens, blocks and queries in one batch row.

    Args:
        document (`[S]`, int32, or `None`): this row of the layout.
        slots (`[T]`, int64): slots of the queries' own keys.
        key_length (`int`): `S`.
        block_size (`int`): tokens per block.
    """
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
        if len(keys):
            is_own_document = key_document[last_key.clamp(min=0)] == document[slots].abs()
            queries = ((last_key >= 0) & is_own_document).nonzero()[:, 0]
        else:
            queries = slots.new_empty(0)
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
    query_bounds = torch.searchsorted(query_block, torch.arange(len(key_bounds), device=device)).tolist()
    first_blocks = first_of_document[starts_block].tolist()
    ends = {first: block_index + 1 for block_index, first in enumerate(first_blocks)}
    documents = [(first, ends[first]) for first in first_blocks]
    first_query = len(index) - len(last_key)  # its content index, if the queries are the last tokens
    is_one_document = len(set(first_blocks)) == 1
    is_band = is_one_document and first_query % block_size == 0 and torch.equal(last_key, index[first_query:])
    band = first_query // block_size if is_band else None
    first_block = first_of_document[last_key]
    return RowPlan(keys, queries, last_key, query_block, first_block, key_bounds, query_bounds, documents, band)


def attending_tiles(
    chosen: Tensor, plan: RowPlan, settings: SparseAttentionConfig
) -> Iterator[tuple[int, slice | None, list[slice | Tensor]]]:
    """Yield every key block, from the last to the first, with the queries that attend to it.

    In this order every query meets its own block before any other block. If the plan has a band, own and local blocks
    are left out, because the band covers them.

    Args:
        chosen (`[Q, topk_blocks]`, int32): blocks that each query chose, as [`choose_blocks`] returns them.
        plan (`RowPlan`): plan of the batch row.
        settings (`SparseAttentionConfig`): block size and budget.

    Yields:
        The number of the block, the slice of queries whose own block it is (`None` if there are none), and tiles of
        later queries that attend to it. A tile is a slice of queries, or the indices of queries that chose the block
        (int64).
    """
    num_blocks = len(plan.key_bounds) - 1
    topk = settings.topk_blocks
    flat = chosen.flatten()
    order = flat.to(torch.int16 if num_blocks < 2**15 else torch.int32).sort(stable=True).indices
    choosers = order.div_(max(topk, 1), rounding_mode="floor")  # queries, sorted by the block that they chose
    ends = torch.bincount(flat, minlength=num_blocks + 1).cumsum(0).tolist()
    for block in range(num_blocks - 1, -1, -1):
        first_block, end_block = plan.documents[block]
        own_start = plan.query_bounds[block]
        own_end = plan.query_bounds[block + 1]
        local_end = plan.query_bounds[min(block + settings.local_blocks, end_block)]
        start = own_end if plan.band is None else local_end
        stop = plan.query_bounds[end_block] if block - first_block < settings.sink_blocks else local_end
        tiles: list[slice | Tensor] = [
            slice(i, min(i + QUERIES_PER_TILE, stop)) for i in range(start, stop, QUERIES_PER_TILE)
        ]
        block_choosers = choosers[ends[block - 1] if block else 0 : ends[block]]
        if len(block_choosers):
            tiles += block_choosers.split(QUERIES_PER_TILE)
        own = slice(own_start, own_end) if plan.band is None and own_end > own_start else None
        yield block, own, tiles


def hidden_in_own_block(plan: RowPlan, block: int, own: slice) -> Tensor:
    """Mark the keys of a block that lie after the last key that a query of the same block sees.

    Args:
        plan (`RowPlan`): plan of the batch row.
        block (`int`): number of the block.
        own (`slice`): queries whose own block it is.

    Returns:
        `[own queries, 1, keys of the block]`, bool: `True` where the query must not attend.
    """
    key = torch.arange(plan.key_bounds[block], plan.key_bounds[block + 1], device=plan.last_key.device)
    return key > plan.last_key[own, None, None]
