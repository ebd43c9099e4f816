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
"""Compute the forward pass of masked sparse attention, in Triton.

The batch is divided into chunks of queries, which bound the memory of partial outputs. Two kernels compute a chunk:

1. For each key block, the first kernel loads keys and values once, gathers the queries that chose the block, and
   multiplies them densely. Each *pair* of a query and a block that it chose leaves a normalised partial output and its
   log-sum-exp.
2. For each tile of queries, the second kernel attends densely to sink and local blocks, and merges the result with the
   partial outputs of the tile's pairs.

If each query read its chosen blocks instead, a pair would move `C` rows of keys and values. Here it moves `G` rows of
queries and partial outputs. The tiles of the tensor cores are full even if `G` is small.

The shape legend of `triton_plan.py` applies here; in addition, `E` is the value dimension and `R` the number of rows of
a tile, which is query tokens times heads of the group, padded to a power of two. Log-sum-exps are to the base 2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .triton_choosers import list_choosers
from .triton_optional import VARYING, tl, triton
from .triton_plan import (
    BLOCK_COLUMNS,
    BLOCK_FIRST_SLOT,
    BLOCK_KEY_ROW,
    BLOCK_QUERY_ROW,
    TILE_COLUMNS,
    TILE_FIRST_SLOT,
    TILE_FIRST_TOKEN,
    TILE_KEY_ROW,
    TILE_NUM_TOKENS,
    TILE_QUERY_ROW,
    TritonPlan,
)
from .triton_tiling import Tiling

# The partial outputs of a chunk take at most this many bytes, or at most this share of the query's bytes, whichever is
# more.
PARTIAL_BYTES = 2**27
PARTIAL_SHARE = 0.25


@dataclass(frozen=True)
class Chunk:
    """Some consecutive tiles of a batch, and the lists of their queries that chose each block.

    Attributes:
        first_tile, num_tiles (`int`): the tiles.
        first_query, num_queries (`int`): the queries in these tiles.
        starts (`[K * N + 1]`, int32), pairs (`[pairs]`, int32): the lists, as [`list_choosers`] returns them; empty if
            queries choose no blocks.
    """

    first_tile: int
    num_tiles: int
    first_query: int
    num_queries: int
    starts: Tensor
    pairs: Tensor


def chunks(query: Tensor, chosen: Tensor, plan: TritonPlan, width: int) -> Iterator[Chunk]:
    """Divide a batch into chunks whose partial results fit into a limited memory.

    Args:
        query (`[B, H, T, D]`): queries; only their shape and dtype are read.
        chosen (`[K, X, topk_blocks]`, int32): blocks that each query chose, as [`choose`] returns them.
        plan (`TritonPlan`): plan of the batch.
        width (`int`): numbers of a partial result per head, in the dtype of `query`.

    Yields:
        The chunks, in the order of their queries.
    """
    num_tiles = len(plan.tiles)
    num_queries, topk = chosen.shape[1:]
    if not topk:
        yield Chunk(0, num_tiles, 0, num_queries, chosen.new_empty(0), chosen.new_empty(0))
        return
    query_bytes = query.shape[1] * topk * width * query.element_size()  # bytes of all partial results of one query
    limit = max(PARTIAL_BYTES, int(PARTIAL_SHARE * query.numel() * query.element_size()))
    num_chunks = max(min(math.ceil(num_queries * query_bytes / limit), num_tiles), 1)
    tile_bounds = [num_tiles * i // num_chunks for i in range(num_chunks + 1)]
    query_bounds = plan.tile_starts[tile_bounds].tolist()
    for i in range(num_chunks):
        first_tile, first_query = tile_bounds[i], query_bounds[i]
        chunk_queries = query_bounds[i + 1] - first_query
        starts, pairs = list_choosers(chosen, first_query, chunk_queries, plan.num_blocks)
        yield Chunk(first_tile, tile_bounds[i + 1] - first_tile, first_query, chunk_queries, starts, pairs)


@triton.jit(do_not_specialize=VARYING)
def _pairs_kernel(
    query, key, value, blocks, starts, pairs, partial, partial_lse, scaling, query_stride_b, query_stride_h,
    query_stride_t, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s,
    num_tokens, first_query, num_pairs, topk, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Attend to a block from the queries of a chunk that chose it; one program per block and key-value head."""
    block, head = tl.program_id(0), tl.program_id(1)
    list_number = head * tl.num_programs(0) + block
    begin, end = tl.load(starts + list_number), tl.load(starts + list_number + 1)
    if begin == end:
        return
    of_block = blocks + block * BLOCK_COLUMNS
    key_row = tl.load(of_block + BLOCK_KEY_ROW).to(tl.int64)
    slot = tl.load(of_block + BLOCK_FIRST_SLOT).to(tl.int64) + tl.arange(0, C)
    query_row = tl.load(of_block + BLOCK_QUERY_ROW)
    dim, value_dim = tl.arange(0, DP), tl.arange(0, EP)
    key += key_row * key_stride_b + head.to(tl.int64) * key_stride_h
    value += key_row * value_stride_b + head.to(tl.int64) * value_stride_h
    keys = tl.load(key + slot[None, :] * key_stride_s + dim[:, None], mask=dim[:, None] < D, other=0.0)
    values = tl.load(
        value + slot[:, None] * value_stride_s + value_dim[None, :], mask=value_dim[None, :] < E, other=0.0
    )

    row = tl.arange(0, TOKENS * GP)
    group = row % GP
    query += query_row.to(tl.int64) * query_stride_b + (head * G + group).to(tl.int64)[:, None] * query_stride_h
    for start in range(begin, end, TOKENS):
        place = start + row // GP
        is_row = (place < end) & (group < G)
        pair = tl.load(pairs + place, mask=is_row, other=first_query * topk)
        token = (pair // topk - query_row * num_tokens).to(tl.int64)
        at = query + token[:, None] * query_stride_t + dim[None, :]
        queries = tl.load(at, mask=is_row[:, None] & (dim[None, :] < D), other=0.0)
        logits = tl.dot(queries, keys, input_precision="tf32x3") * scaling
        largest = tl.max(logits, axis=1)
        weights = tl.exp2(logits - largest[:, None])
        total = tl.sum(weights, axis=1)
        output = tl.dot(weights.to(values.dtype), values, input_precision="tf32x3") / total[:, None]
        out = (head.to(tl.int64) * num_pairs + pair - first_query * topk) * G + group
        tl.store(partial_lse + out, largest + tl.log2(total), mask=is_row)
        at = partial + out[:, None] * E + value_dim[None, :]
        tl.store(at, output.to(partial.dtype.element_ty), mask=is_row[:, None] & (value_dim[None, :] < E))


@triton.jit
def _attend(
    queries, key, value, key_stride, value_stride, begin, end, low, high, scaling, largest, total, output,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to keys of a document, and merge the result with a running softmax.

    The loop visits the positions `begin <= p < end`. If `MASKED`, a row attends only to positions `low <= p < high`.
    Otherwise every row attends to all visited positions, and their number must be a multiple of `STEP`.

    Args:
        queries: `[R, DP]`.
        key, value: pointers to the first key and value of the document.
        low, high: `[R]`, bounds of the positions that each row sees.
        largest, total, output: running maximum of the logits (`[R]`), sum of the weights relative to it (`[R]`), and
            weighted sum of the values (`[R, EP]`).

    Returns:
        The new `largest`, `total` and `output`.
    """
    dim, value_dim = tl.arange(0, DP), tl.arange(0, EP)
    for start in range(begin, end, STEP):
        position = start + tl.arange(0, STEP)
        key_mask, value_mask = dim[:, None] < D, value_dim[None, :] < E
        if MASKED:
            key_mask, value_mask = key_mask & (position < end)[None, :], value_mask & (position < end)[:, None]
        at = position.to(tl.int64)
        keys = tl.load(key + at[None, :] * key_stride + dim[:, None], mask=key_mask, other=0.0)
        logits = tl.dot(queries, keys, input_precision="tf32x3") * scaling
        if MASKED:
            visible = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        lifted = tl.maximum(largest, tl.max(logits, axis=1))
        reference = tl.where(lifted == float("-inf"), 0.0, lifted) if MASKED else lifted
        weights = tl.exp2(logits - reference[:, None])
        shrink = tl.exp2(largest - reference)
        values = tl.load(value + at[:, None] * value_stride + value_dim[None, :], mask=value_mask, other=0.0)
        output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision="tf32x3")
        total = total * shrink + tl.sum(weights, axis=1)
        largest = lifted
    return largest, total, output


@triton.jit
def band_of(position, least, C: tl.constexpr, STEP: tl.constexpr, local_blocks, sink_blocks):
    """Return the bounds of the sink and local blocks that the rows of a tile see.

    All bounds are positions within the document.

    Args:
        position: `[R]`, position of the last key that each row sees: -1 if it sees no key, and 0x3FFFFFFF, which is
            larger than any position, if the row holds no query.
        least: the smallest of these positions.

    Returns:
        The end of the sink blocks that are not local (`[R]`), the beginning of the local blocks (`[R]`), the smallest
        beginning of local blocks, and the end of the range from there in which every row sees every key; the length of
        this range is a multiple of `STEP`.
    """
    low = tl.maximum(position // C - local_blocks + 1, 0) * C
    first, latest = tl.min(low, axis=0), tl.max(tl.where(position == 0x3FFFFFFF, 0, low), axis=0)
    unmasked_end = tl.where((first == latest) & (least >= 0), first + (least + 1 - first) // STEP * STEP, first)
    return tl.minimum(low, sink_blocks * C), low, first, tl.maximum(unmasked_end, first)


@triton.jit(do_not_specialize=VARYING)
def _band_kernel(
    query, key, value, tiles, last, chosen, partial, partial_lse, output, lse, scaling, query_stride_b, query_stride_h,
    query_stride_t, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s,
    output_stride_b, output_stride_h, output_stride_t, first_tile, num_tokens, num_queries, first_query, num_pairs,
    topk, local_blocks, sink_blocks, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge partial outputs with attention to sink and local blocks; one program per tile and key-value head."""
    tile, head = first_tile + tl.program_id(0), tl.program_id(1)
    of_tile = tiles + tile * TILE_COLUMNS
    query_row = tl.load(of_tile + TILE_QUERY_ROW)
    first = tl.load(of_tile + TILE_FIRST_TOKEN)
    count = tl.load(of_tile + TILE_NUM_TOKENS)
    key_row = tl.load(of_tile + TILE_KEY_ROW).to(tl.int64)
    slot = tl.load(of_tile + TILE_FIRST_SLOT).to(tl.int64)
    row, dim, value_dim = tl.arange(0, TOKENS * GP), tl.arange(0, DP), tl.arange(0, EP)
    token, group = row // GP, row % GP
    is_token, is_row = token < count, (token < count) & (group < G)
    number = query_row * num_tokens + first + token
    position = tl.load(last + number, mask=is_token, other=0x3FFFFFFF)
    q_head = (head * G + group).to(tl.int64)
    at = (
        query_row.to(tl.int64) * query_stride_b
        + q_head * query_stride_h
        + (first + token).to(tl.int64) * query_stride_t
    )
    queries = tl.load(query + at[:, None] + dim[None, :], mask=is_row[:, None] & (dim[None, :] < D), other=0.0)
    key += key_row * key_stride_b + head.to(tl.int64) * key_stride_h + slot * key_stride_s
    value += key_row * value_stride_b + head.to(tl.int64) * value_stride_h + slot * value_stride_s

    largest = tl.full([TOKENS * GP], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TOKENS * GP], dtype=tl.float32)
    result = tl.zeros([TOKENS * GP, EP], dtype=tl.float32)
    for rank in range(topk):
        is_chosen = (
            tl.load(chosen + (head.to(tl.int64) * num_queries + number) * topk + rank, mask=is_row, other=-1) >= 0
        )
        pair = (head.to(tl.int64) * num_pairs + (number - first_query).to(tl.int64) * topk + rank) * G + group
        part_lse = tl.load(partial_lse + pair, mask=is_chosen, other=float("-inf"))
        part_mask = is_chosen[:, None] & (value_dim[None, :] < E)
        part = tl.load(partial + pair[:, None] * E + value_dim[None, :], mask=part_mask, other=0.0)
        lifted = tl.maximum(largest, part_lse)
        reference = tl.where(lifted == float("-inf"), 0.0, lifted)
        shrink, weight = tl.exp2(largest - reference), tl.exp2(part_lse - reference)
        result = result * shrink[:, None] + part.to(tl.float32) * weight[:, None]
        total = total * shrink + weight
        largest = lifted

    # Three ranges of keys: the sink blocks, local keys that every row sees, and the remaining local keys.
    sink_end, low, begin, unmasked_end = band_of(position, tl.min(position, axis=0), C, STEP, local_blocks, sink_blocks)
    seen = tl.where(is_token, position, -1) + 1
    end, sinks = tl.max(seen, axis=0), tl.max(tl.where(is_token, sink_end, 0), axis=0)
    largest, total, result = _attend(
        queries, key, value, key_stride_s, value_stride_s, 0, sinks, low * 0, sink_end, scaling,
        largest, total, result, D, DP, E, EP, STEP, True,
    )  # fmt: skip
    largest, total, result = _attend(
        queries, key, value, key_stride_s, value_stride_s, begin, unmasked_end, low, seen, scaling,
        largest, total, result, D, DP, E, EP, STEP, False,
    )  # fmt: skip
    largest, total, result = _attend(
        queries, key, value, key_stride_s, value_stride_s, unmasked_end, end, low, seen, scaling,
        largest, total, result, D, DP, E, EP, STEP, True,
    )  # fmt: skip

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    result = result / total[:, None]
    sums = tl.where(is_empty, 0.0, largest + tl.log2(total))
    tl.store(
        lse + (query_row * num_tokens).to(tl.int64) * G * tl.num_programs(1) + q_head * num_tokens + first + token,
        sums,
        mask=is_row,
    )
    at = (
        query_row.to(tl.int64) * output_stride_b
        + q_head * output_stride_h
        + (first + token).to(tl.int64) * output_stride_t
    )
    at = output + at[:, None] + value_dim[None, :]
    tl.store(at, result.to(output.dtype.element_ty), mask=is_row[:, None] & (value_dim[None, :] < E))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    plan: TritonPlan,
    tiling: Tiling,
    settings: SparseAttentionConfig,
) -> None:
    """Compute masked sparse attention, and write it to `output` and `lse`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): one dtype, bfloat16, float16 or float32;
            keys and values are `[1, K, M, D]` and `[1, K, M, E]` if the plan gathers visible tokens.
        chosen (`[K, X, topk_blocks]`, int32): blocks that each query chose, as [`choose`] returns them.
        output (`[B, H, T, E]`, dtype of `query`), lse (`[B, H, T]`, float32, contiguous): where to write the output and
            the log-sum-exp of the logits, to the base 2. Every element is written; it is zero if a query sees no key.
        scaling (`float`): factor on the logits.
        plan (`TritonPlan`): plan of the batch.
        tiling (`Tiling`): sizes of tiles.
        settings (`SparseAttentionConfig`): block size and budget.
    """
    tokens, kv_heads, topk = query.shape[2], key.shape[1], settings.topk_blocks
    constants = tiling.constants
    groups, width = constants["G"], constants["E"]
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
    factor = scaling * math.log2(math.e)  # the kernels compute exponentials to the base 2
    for chunk in chunks(query, chosen, plan, width):
        num_pairs = chunk.num_queries * topk
        partial = query.new_empty(kv_heads, num_pairs, groups, width)
        partial_lse = lse.new_empty(kv_heads, num_pairs, groups)
        if topk:
            _pairs_kernel[(plan.num_blocks, kv_heads)](
                query, key, value, plan.blocks, chunk.starts, chunk.pairs, partial, partial_lse, factor, *strides,
                tokens, chunk.first_query, num_pairs, topk, **constants, TOKENS=tiling.pair_tokens, num_warps=4,
                num_stages=tiling.stages,
            )  # fmt: skip
        _band_kernel[(chunk.num_tiles, kv_heads)](
            query, key, value, plan.tiles, plan.last, chosen, partial, partial_lse, output, lse, factor, *strides,
            *output.stride()[:3], chunk.first_tile, tokens, chosen.shape[1], chunk.first_query, num_pairs, topk,
            settings.local_blocks, settings.sink_blocks, **constants,
            TOKENS=tiling.tile_tokens, STEP=tiling.keys, num_warps=8, num_stages=tiling.stages,
        )  # fmt: skip
