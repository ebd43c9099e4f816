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
"""The plan of the Triton kernels: where documents, their blocks and the tiles of their queries lie in memory.

Blocks are numbered through the whole batch, document after document, so that a kernel needs to know of a document only
its first block and where its keys begin. Content is contiguous: where hidden tokens interrupt a document, keys and
values are gathered first. The shape legend is that of `sparse_selection.py`; also `C` tokens per block, and `X = B * T`
queries, numbered row after row.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .sparse_selection import query_slots
from .triton_optional import ceil_divide, tl

QUERIES_PER_ITEM = 1024  # queries that one program takes towards the gradient of a sink block

# columns of the plan's tables, in the order in which the tables are stacked below
BLOCK_COLUMNS = tl.constexpr(6)
BLOCK_KEY_ROW = tl.constexpr(0)
BLOCK_FIRST_SLOT = tl.constexpr(1)
BLOCK_NUM_KEYS = tl.constexpr(2)
BLOCK_QUERY_ROW = tl.constexpr(3)
BLOCK_FIRST = tl.constexpr(4)  # number of the first block of its document
BLOCK_END = tl.constexpr(5)  # and one past the last

TILE_COLUMNS = tl.constexpr(6)
TILE_QUERY_ROW = tl.constexpr(0)
TILE_FIRST_TOKEN = tl.constexpr(1)
TILE_NUM_TOKENS = tl.constexpr(2)
TILE_KEY_ROW = tl.constexpr(3)
TILE_FIRST_SLOT = tl.constexpr(4)
TILE_FIRST_BLOCK = tl.constexpr(5)

ITEM_COLUMNS = tl.constexpr(3)
ITEM_BLOCK = tl.constexpr(0)
ITEM_FIRST_QUERY = tl.constexpr(1)
ITEM_END_QUERY = tl.constexpr(2)


@dataclass(frozen=True)
class TritonPlan:
    """Tables of int32 that kernels read; all on the device but `tile_starts`.

    Attributes:
        tiles (`[tiles, 6]`): of each tile of queries: batch row, first token, number of tokens, row of its keys, slot
            of its document's first key, its document's first block.
        tile_starts (`[tiles + 1]`, int64, on the CPU): number of the first query of each tile; at the end `X`.
        last (`[X]`): position in its document of the last key that each query sees; -1 where it sees none.
        blocks (`[N, 6]`): of each block: row of its keys, slot of its first key, number of keys, batch row of its
            queries, its document's first block and one past the last.
        query_start (`[N + 1]`): number of the first query whose last key lies in this block or a later one.
        items (`[items, 3]`): of each share of a sink block's far queries: the block, the first query and one past the
            last.
        item_start (`[N + 1]`): number of each block's first item.
        gather (`[M]`, int64, or `None`): flat slots (row times `S` plus slot) of content, where it must be gathered.
    """

    tiles: Tensor
    tile_starts: Tensor
    last: Tensor
    blocks: Tensor
    query_start: Tensor
    items: Tensor
    item_start: Tensor
    gather: Tensor | None

    @property
    def num_blocks(self) -> int:
        """`N`."""
        return len(self.blocks)


@dataclass(frozen=True)
class _Documents:
    """Where documents lie; vectors `[documents]`, int64, on the CPU, but for `last` and `of_query`, `[X]`."""

    query_row: Tensor
    key_row: Tensor
    first_slot: Tensor
    length: Tensor
    last: Tensor
    of_query: Tensor
    gather: Tensor | None


Shape = tuple[int, int, int]  # B, T, S
MOST_REMEMBERED = 4
_recent: list[tuple[tuple, Tensor, Any]] = []  # what layouts say; all layers of a model pass the same tensor


def plan_tiles(
    layout: Tensor | None, shape: Shape, settings: SparseAttentionConfig, tile_tokens: int, device: torch.device
) -> TritonPlan:
    """Return the plan of a batch; plans of the latest layouts are remembered.

    A layout is copied to the CPU, which waits for the device, once for all layers that share it.

    Args:
        layout (`[B, 1, 1, S]`, int32, or `None`): see `sparse_selection.py`.
        shape: `B`, `T` and `S`.
        settings (`SparseAttentionConfig`): block size and budget.
        tile_tokens (`int`): most query tokens in a tile.
        device (`torch.device`): of the tables.
    """
    if layout is None:
        return _plan_without_layout(shape, settings, tile_tokens, device)

    def build(layout: Tensor) -> TritonPlan:
        return _plan(_documents(layout, shape), shape, settings, tile_tokens, device)

    return remembered(layout, (shape, settings, tile_tokens, device), build)


def remembered(layout: Tensor, key: Hashable, build: Callable[[Tensor], Any]) -> Any:
    """Return `build(layout)`, or what it returned for this tensor and key before, if it was among the latest."""
    if layout.is_inference():  # it does not tell when it is written to
        return build(layout)
    identity = (layout.data_ptr(), layout._version, layout.shape, layout.stride(), key)
    for known, _, result in _recent:
        if known == identity:
            return result
    result = build(layout)
    # the tensor is kept, so that no other can take its place in memory
    _recent[:] = [*_recent[1 - MOST_REMEMBERED :], (identity, layout, result)]
    return result


@lru_cache(maxsize=16)
def _plan_without_layout(
    shape: Shape, settings: SparseAttentionConfig, tile_tokens: int, device: torch.device
) -> TritonPlan:
    batch, queries, keys = shape
    row = torch.arange(batch)
    last = torch.arange(keys - queries, keys).repeat(batch)
    length = torch.full_like(row, keys)
    documents = _Documents(row, row, torch.zeros_like(row), length, last, row.repeat_interleave(queries), None)
    return _plan(documents, shape, settings, tile_tokens, device)


def _documents(layout: Tensor, shape: Shape) -> _Documents:
    """Read a layout: slots with the same document number, up to the sign, are a document."""
    batch, queries, keys = shape
    layout = layout.detach().cpu()
    slots = query_slots(layout, queries, keys, layout.device).clamp(min=0)
    own = layout[:, 0, 0].abs()
    begins = torch.ones_like(own, dtype=torch.bool)
    begins[:, 1:] = own[:, 1:] != own[:, :-1]
    document = begins.flatten().cumsum(0) - 1  # [B * S]
    visible = (layout > 0).flatten()
    content = visible.nonzero()[:, 0]
    row = begins.flatten().nonzero()[:, 0] // keys

    length = torch.bincount(document[content], minlength=len(row))
    start = length.cumsum(0) - length  # in the order of content
    has_content = length > 0
    first, final = torch.zeros_like(start), torch.zeros_like(start) - 1
    first[has_content] = content[start[has_content]]
    final[has_content] = content[(start + length - 1)[has_content]]
    flat = (torch.arange(batch)[:, None] * keys + slots).flatten()
    of_query = document[flat]
    last = (visible.cumsum(0) - 1)[flat] - start[of_query]
    if bool(((final - first + 1 == length) | ~has_content).all()):
        return _Documents(row, row, (first - row * keys).clamp(min=0), length, last, of_query, None)
    return _Documents(row, torch.zeros_like(row), start, length, last, of_query, content)


def _plan(
    documents: _Documents, shape: Shape, settings: SparseAttentionConfig, tile_tokens: int, device: torch.device
) -> TritonPlan:
    size = settings.block_size
    _, queries, _ = shape
    count = ceil_divide(documents.length, size)  # of blocks
    end = count.cumsum(0)
    start = end - count
    block_document = torch.repeat_interleave(count)
    block = torch.arange(len(block_document))
    offset = (block - start[block_document]) * size  # of its first key in the document
    blocks = torch.stack(
        [
            documents.key_row[block_document],
            documents.first_slot[block_document] + offset,
            (documents.length[block_document] - offset).clamp(max=size),
            documents.query_row[block_document],
            start[block_document],
            end[block_document],
        ],
        dim=1,
    )
    # queries that see nothing count as of their document's first block, where they see nothing either
    query_block = start[documents.of_query] + documents.last.clamp(min=0) // size
    query_start = torch.searchsorted(query_block, torch.arange(len(block) + 1))
    items, item_start = _share_sinks(blocks, query_start, settings)
    tiles, tile_starts = _tiles(documents, start, queries, tile_tokens)
    tables = [tiles, documents.last, blocks, query_start, items, item_start]
    tiles, last, blocks, query_start, items, item_start = (table.to(torch.int32).to(device) for table in tables)
    gather = None if documents.gather is None else documents.gather.to(device)
    return TritonPlan(tiles, tile_starts, last, blocks, query_start, items, item_start, gather)


def _tiles(documents: _Documents, first_block: Tensor, queries: int, tile_tokens: int) -> tuple[Tensor, Tensor]:
    """Cut each document's queries into tiles; return the table and the number of each tile's first query."""
    document, counts = documents.of_query.unique_consecutive(return_counts=True)
    num_tiles = ceil_divide(counts, tile_tokens)
    of_tile = torch.repeat_interleave(num_tiles)
    offset = (torch.arange(len(of_tile)) - (num_tiles.cumsum(0) - num_tiles)[of_tile]) * tile_tokens
    first = (counts.cumsum(0) - counts)[of_tile] + offset
    taken = (counts[of_tile] - offset).clamp(max=tile_tokens)
    document = document[of_tile]
    row = documents.query_row[document]
    columns = [row, first - row * queries, taken, documents.key_row[document], documents.first_slot[document]]
    table = torch.stack([*columns, first_block[document]], dim=1)
    return table, torch.cat([first, first.new_tensor([len(documents.of_query)])])


def _share_sinks(blocks: Tensor, query_start: Tensor, settings: SparseAttentionConfig) -> tuple[Tensor, Tensor]:
    """Divide the queries that see a sink block from beyond its local ones; return items and each block's first."""
    block = torch.arange(len(blocks))
    first, end = blocks[:, -2:].unbind(1)  # BLOCK_FIRST and BLOCK_END
    begin = query_start[torch.minimum(block + settings.local_blocks, end)]
    stop = torch.where(block - first < settings.sink_blocks, query_start[end], begin)
    num_items = ceil_divide(stop - begin, QUERIES_PER_ITEM)
    of_item = torch.repeat_interleave(num_items)
    item_start = torch.nn.functional.pad(num_items.cumsum(0), (1, 0))
    low = begin[of_item] + (torch.arange(len(of_item)) - item_start[of_item]) * QUERIES_PER_ITEM
    items = torch.stack([of_item, low, torch.minimum(low + QUERIES_PER_ITEM, stop[of_item])], dim=1)
    return items, item_start
