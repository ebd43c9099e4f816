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
"""Plan a batch for the Triton kernels: find documents, their blocks and the tiles of their queries in memory.

Blocks are numbered through the whole batch, document after document. A kernel therefore needs only two numbers of a
document: its first block and the slot of its first key. The keys of a document must be contiguous in memory: if hidden
tokens interrupt any document, the keys and values of all visible tokens are gathered first.

The shape legend of `sparse_selection.py` applies here. In addition, `C` is the number of tokens per block, `M` the
number of visible tokens of the batch, and `X = B * T` the number of queries, which are numbered row after row.
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

QUERIES_PER_ITEM = 1024  # queries whose share of a sink block's gradient one program computes

# Columns of the plan's tables, in the order in which `_plan`, `_tiles` and `_share_sinks` stack them.
BLOCK_COLUMNS = tl.constexpr(6)
BLOCK_KEY_ROW = tl.constexpr(0)
BLOCK_FIRST_SLOT = tl.constexpr(1)
BLOCK_NUM_KEYS = tl.constexpr(2)
BLOCK_QUERY_ROW = tl.constexpr(3)
BLOCK_FIRST = tl.constexpr(4)  # number of the first block of its document
BLOCK_END = tl.constexpr(5)  # one past the number of the last block of its document

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
    """Tables of a batch that the Triton kernels read.

    All tables are int32 and on the device, unless stated otherwise.

    Attributes:
        tiles (`[tiles, 6]`): for each tile of queries of one document, the batch row, the first token, the number of
            tokens, the row of its keys, the slot of the document's first key, and the document's first block.
        tile_starts (`[tiles + 1]`, int64, on the CPU): number of the first query of each tile; the last entry is `X`.
        last (`[X]`): position, within its document, of the last key that each query sees; -1 if it sees no key.
        blocks (`[N, 6]`): for each block, the row of its keys, the slot of its first key, the number of its keys, the
            batch row of its queries, and the first and one past the last block of its document.
        query_start (`[N + 1]`): for each block, the number of the first query whose last key lies in it or in a later
            block.
        items (`[items, 3]`): work items of the gradient of sink blocks. Each holds a sink block, and the first and one
            past the last of some queries that see it from beyond its local blocks.
        item_start (`[N + 1]`): for each block, the number of its first item.
        gather (`[M]`, int64, or `None`): flat slots (row times `S` plus slot) of the visible tokens, if keys and values
            must be gathered.
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
        """Number of blocks of the whole batch, `N`."""
        return len(self.blocks)


@dataclass(frozen=True)
class _Documents:
    """Positions of the documents of a batch in memory; all vectors are int64 and on the CPU.

    Attributes:
        query_row (`[documents]`): batch row of the document's queries.
        key_row (`[documents]`): row of the document's keys, which is 0 if they are gathered.
        first_slot (`[documents]`): slot of the document's first visible key.
        length (`[documents]`): number of visible tokens.
        last (`[X]`): position, within its document, of the last key that each query sees; -1 if it sees no key.
        of_query (`[X]`): number of each query's document.
        gather (`[M]`, or `None`): flat slots of the visible tokens, if keys and values must be gathered.
    """

    query_row: Tensor
    key_row: Tensor
    first_slot: Tensor
    length: Tensor
    last: Tensor
    of_query: Tensor
    gather: Tensor | None


Shape = tuple[int, int, int]  # B, T, S
MOST_REMEMBERED = 4  # layouts whose results are kept
_recent: list[tuple[tuple, Tensor, Any]] = []  # results of the latest layouts: all layers of a model pass one tensor


def plan_tiles(
    layout: Tensor | None, shape: Shape, settings: SparseAttentionConfig, tile_tokens: int, device: torch.device
) -> TritonPlan:
    """Return the plan of a batch, from memory if the layout is one of the latest.

    A new layout is copied to the CPU, which waits for the device. This happens once for all layers that pass the same
    layout.

    Args:
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it.
        shape: `B`, `T` and `S`.
        settings (`SparseAttentionConfig`): block size and budget.
        tile_tokens (`int`): largest number of query tokens in a tile.
        device (`torch.device`): device of the tables.
    """
    if layout is None:
        return _plan_without_layout(shape, settings, tile_tokens, device)

    def build(layout: Tensor) -> TritonPlan:
        return _plan(_documents(layout, shape), shape, settings, tile_tokens, device)

    return remembered(layout, (shape, settings, tile_tokens, device), build)


def remembered(layout: Tensor, key: Hashable, build: Callable[[Tensor], Any]) -> Any:
    """Return `build(layout)`, from memory if the layout is one of the latest and has not been written to since.

    Args:
        layout (`[B, 1, 1, S]`, int32): argument of `build`.
        key: everything else that the result depends on, including the kind of result.
        build: function that computes the result.
    """
    if layout.is_inference():  # an inference tensor has no version counter that would reveal a write
        return build(layout)
    identity = (layout.data_ptr(), layout._version, layout.shape, layout.stride(), key)
    for known, _, result in _recent:
        if known == identity:
            return result
    result = build(layout)
    # The list holds the tensor itself, so that no other tensor can be allocated at its address.
    _recent[:] = [*_recent[1 - MOST_REMEMBERED :], (identity, layout, result)]
    return result


@lru_cache(maxsize=16)
def _plan_without_layout(
    shape: Shape, settings: SparseAttentionConfig, tile_tokens: int, device: torch.device
) -> TritonPlan:
    """Plan a batch whose rows are one document each, without hidden tokens."""
    batch, queries, keys = shape
    row = torch.arange(batch)
    last = torch.arange(keys - queries, keys).repeat(batch)
    length = torch.full_like(row, keys)
    documents = _Documents(row, row, torch.zeros_like(row), length, last, row.repeat_interleave(queries), None)
    return _plan(documents, shape, settings, tile_tokens, device)


def _documents(layout: Tensor, shape: Shape) -> _Documents:
    """Find the documents of a layout `[B, 1, 1, S]`: runs of slots whose numbers have the same absolute value."""
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
    start = length.cumsum(0) - length  # number of the document's first visible token, over the whole batch
    has_content = length > 0
    first = torch.zeros_like(start)  # flat slot of the document's first visible token
    final = torch.zeros_like(start) - 1  # flat slot of its last visible token
    first[has_content] = content[start[has_content]]
    final[has_content] = content[(start + length - 1)[has_content]]
    flat = (torch.arange(batch)[:, None] * keys + slots).flatten()
    of_query = document[flat]
    last = (visible.cumsum(0) - 1)[flat] - start[of_query]
    is_contiguous = (final - first + 1 == length) | ~has_content
    if bool(is_contiguous.all()):
        return _Documents(row, row, (first - row * keys).clamp(min=0), length, last, of_query, None)
    return _Documents(row, torch.zeros_like(row), start, length, last, of_query, content)


def _plan(
    documents: _Documents, shape: Shape, settings: SparseAttentionConfig, tile_tokens: int, device: torch.device
) -> TritonPlan:
    """Divide documents into blocks, tiles and work items, and move the tables to the device."""
    size = settings.block_size
    _, queries, _ = shape
    num_blocks = ceil_divide(documents.length, size)  # blocks of each document
    end = num_blocks.cumsum(0)
    start = end - num_blocks
    block_document = torch.repeat_interleave(num_blocks)
    block = torch.arange(len(block_document))
    offset = (block - start[block_document]) * size  # position of the block's first key in its document
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
    # A query that sees no key is counted as a query of its document's first block. It sees no key there either.
    query_block = start[documents.of_query] + documents.last.clamp(min=0) // size
    query_start = torch.searchsorted(query_block, torch.arange(len(block) + 1))
    items, item_start = _share_sinks(blocks, query_start, settings)
    tiles, tile_starts = _tiles(documents, start, queries, tile_tokens)
    tables = [tiles, documents.last, blocks, query_start, items, item_start]
    tiles, last, blocks, query_start, items, item_start = (table.to(torch.int32).to(device) for table in tables)
    gather = None if documents.gather is None else documents.gather.to(device)
    return TritonPlan(tiles, tile_starts, last, blocks, query_start, items, item_start, gather)


def _tiles(documents: _Documents, first_block: Tensor, queries: int, tile_tokens: int) -> tuple[Tensor, Tensor]:
    """Divide each document's queries into tiles.

    Args:
        documents (`_Documents`): the documents of the batch.
        first_block (`[documents]`, int64): first block of each document.
        queries (`int`): `T`.
        tile_tokens (`int`): largest number of query tokens in a tile.

    Returns:
        `tiles` and `tile_starts` of [`TritonPlan`], as int64 on the CPU.
    """
    document, counts = documents.of_query.unique_consecutive(return_counts=True)
    num_tiles = ceil_divide(counts, tile_tokens)
    of_tile = torch.repeat_interleave(num_tiles)
    first_tile = num_tiles.cumsum(0) - num_tiles
    offset = (torch.arange(len(of_tile)) - first_tile[of_tile]) * tile_tokens
    first_query = (counts.cumsum(0) - counts)[of_tile] + offset
    num_tokens = (counts[of_tile] - offset).clamp(max=tile_tokens)
    document = document[of_tile]
    row = documents.query_row[document]
    table = torch.stack(
        [
            row,
            first_query - row * queries,
            num_tokens,
            documents.key_row[document],
            documents.first_slot[document],
            first_block[document],
        ],
        dim=1,
    )
    return table, torch.cat([first_query, first_query.new_tensor([len(documents.of_query)])])


def _share_sinks(blocks: Tensor, query_start: Tensor, settings: SparseAttentionConfig) -> tuple[Tensor, Tensor]:
    """Divide the queries that see a sink block from beyond its local blocks into work items.

    Args:
        blocks (`[N, 6]`, int64), query_start (`[N + 1]`, int64): as in [`TritonPlan`], on the CPU.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `items` and `item_start` of [`TritonPlan`], as int64 on the CPU.
    """
    block = torch.arange(len(blocks))
    first, end = blocks[:, -2:].unbind(1)  # the columns BLOCK_FIRST and BLOCK_END
    begin = query_start[torch.minimum(block + settings.local_blocks, end)]
    stop = torch.where(block - first < settings.sink_blocks, query_start[end], begin)
    num_items = ceil_divide(stop - begin, QUERIES_PER_ITEM)
    of_item = torch.repeat_interleave(num_items)
    item_start = torch.nn.functional.pad(num_items.cumsum(0), (1, 0))
    low = begin[of_item] + (torch.arange(len(of_item)) - item_start[of_item]) * QUERIES_PER_ITEM
    items = torch.stack([of_item, low, torch.minimum(low + QUERIES_PER_ITEM, stop[of_item])], dim=1)
    return items, item_start
