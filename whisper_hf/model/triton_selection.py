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
"""Who chooses which block, in Triton: block means, scores and a running top-k.

Scores are those of [`block_scores`]: what a head makes of a block counts relative to its largest product with any
complete block of the past, so that the past is walked twice, first for these, then for the scores. No product reaches
memory. Each query keeps its best blocks as 64-bit integers, score above index, so that they sort with ties to the more
recent block.

Products are as exact as in float32 at the speed of the keys' own dtype: queries have that dtype already, and means are
split into a sum of numbers that have it. The legend is that of `triton_plan.py`; also `P` parts of a mean.
"""

import torch
from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .triton_optional import VARYING, power_of_two, tl, triton
from .triton_plan import (
    BLOCK_COLUMNS,
    BLOCK_FIRST_SLOT,
    BLOCK_KEY_ROW,
    BLOCK_NUM_KEYS,
    TILE_COLUMNS,
    TILE_FIRST_BLOCK,
    TILE_FIRST_TOKEN,
    TILE_NUM_TOKENS,
    TILE_QUERY_ROW,
    TritonPlan,
)
from .triton_tiling import Tiling

# number of parts of a mean, and by how much each is scaled up against the one before, to stay clear of underflow
PARTS = {torch.bfloat16: (3, 1.0), torch.float16: (2, 2.0**11), torch.float32: (1, 1.0)}


@triton.jit(do_not_specialize=VARYING)
def _means_kernel(
    key, blocks, means, key_stride_b, key_stride_h, key_stride_s, num_blocks, D: tl.constexpr, DP: tl.constexpr,
    C: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Write the mean of one block's keys in parts; a program per block and key head."""
    block, head = tl.program_id(0), tl.program_id(1)
    of_block = blocks + block * BLOCK_COLUMNS
    row = tl.load(of_block + BLOCK_KEY_ROW).to(tl.int64)
    slot = tl.load(of_block + BLOCK_FIRST_SLOT).to(tl.int64) + tl.arange(0, C)
    is_key = tl.arange(0, C) < tl.load(of_block + BLOCK_NUM_KEYS)
    dim = tl.arange(0, DP)
    base = key + row * key_stride_b + head.to(tl.int64) * key_stride_h
    mask = is_key[:, None] & (dim[None, :] < D)
    keys = tl.load(base + slot[:, None] * key_stride_s + dim[None, :], mask=mask, other=0.0)
    rest = tl.sum(keys.to(tl.float32), axis=0) / C
    for part in tl.static_range(PARTS):
        piece = rest.to(means.dtype.element_ty)
        out = means + ((part * tl.num_programs(1) + head).to(tl.int64) * num_blocks + block) * D
        tl.store(out + dim, piece, mask=dim < D)
        rest = (rest - piece.to(tl.float32)) * SHIFT


@triton.jit
def _products(queries, means, block, end, num_blocks, D: tl.constexpr, DP: tl.constexpr, PARTS, SHIFT):
    """Multiply query rows `[M, D]` with the means of blocks `[n]`; those from `end` on read as zero.

    `means` points to a key head's first part; parts lie `num_programs(1)` heads apart.
    """
    dim = tl.arange(0, DP)
    mask = (dim[:, None] < D) & (block[None, :] < end)
    part_stride = tl.num_programs(1).to(tl.int64) * num_blocks * D
    at = block.to(tl.int64)[None, :] * D + dim[:, None]
    products = tl.zeros([queries.shape[0], block.shape[0]], dtype=tl.float32)
    for part in tl.static_range(PARTS - 1, -1, -1):  # the smallest first
        piece = tl.load(means + part * part_stride + at, mask=mask, other=0.0)
        products = tl.dot(queries, piece, products * (1.0 / SHIFT), input_precision="tf32x3")
    return products


@triton.jit
def sortable(score, block):
    """Pack float32 scores and block numbers into int64 that sort by score, then by number."""
    bits = score.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | block.to(tl.int64)


@triton.jit
def _insert(best, found):
    """Let found numbers take the places of smaller ones; `[rows, k]` and `[rows, n]`, both without repetitions.

    Takes as many steps as the row with most newcomers has, which soon become few, and no order is kept.
    """
    most, least = tl.max(found, axis=1), tl.min(best, axis=1)
    while tl.max((most > least).to(tl.int32), axis=0) > 0:
        best = tl.where((best == least[:, None]) & (most > least)[:, None], most[:, None], best)
        found = tl.where(found == most[:, None], -(2**63), found)
        most, least = tl.max(found, axis=1), tl.min(best, axis=1)
    return best


@triton.jit(do_not_specialize=VARYING)
def _select_kernel(
    query, means, tiles, last, chosen, query_stride_b, query_stride_h, query_stride_t, num_tokens, num_queries,
    num_blocks, topk, local_blocks, sink_blocks, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Write the blocks that a tile of queries chooses; a program per tile, the longest past first, and key head."""
    LOWEST: tl.constexpr = -(2**63)
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    of_tile = tiles + tile * TILE_COLUMNS
    query_row = tl.load(of_tile + TILE_QUERY_ROW)
    first = tl.load(of_tile + TILE_FIRST_TOKEN)
    count = tl.load(of_tile + TILE_NUM_TOKENS)
    first_block = tl.load(of_tile + TILE_FIRST_BLOCK)
    number = query_row * num_tokens + first  # of the first query

    token = tl.arange(0, TOKENS)
    position = tl.load(last + number + token, mask=token < count, other=-1)
    # the candidates, by `candidate_range` of sparse_selection.py
    begin = first_block + sink_blocks
    end = first_block + tl.maximum(position, 0) // C - local_blocks + 1
    farthest = tl.max(end, axis=0)
    rank = tl.arange(0, KP)
    if farthest - begin <= topk:
        picked = tl.where(begin + rank[None, :] < end[:, None], begin + rank[None, :], -1)
    else:
        row = tl.arange(0, TOKENS * GP)
        row_token, group, dim = row // GP, row % GP, tl.arange(0, DP)
        row_position = tl.load(last + number + row_token, mask=row_token < count, other=-1)
        current = first_block + tl.maximum(row_position, 0) // C
        base = (
            query + query_row.to(tl.int64) * query_stride_b + (first + row_token).to(tl.int64)[:, None] * query_stride_t
        )
        base += (head * G + group).to(tl.int64)[:, None] * query_stride_h
        is_query = (row_token < count) & (group < G)
        queries = tl.load(base + dim[None, :], mask=is_query[:, None] & (dim[None, :] < D), other=0.0)
        means += head.to(tl.int64) * num_blocks * D

        past = tl.max(current, axis=0)
        largest = tl.full([TOKENS * GP], float("-inf"), dtype=tl.float32)
        for start in range(first_block, past, STEP):
            block = start + tl.arange(0, STEP)
            products = _products(queries, means, block, past, num_blocks, D, DP, PARTS, SHIFT)
            products = tl.where(block[None, :] < current[:, None], products, float("-inf"))
            largest = tl.maximum(largest, tl.max(products, axis=1))
        # a head that is only there to fill up the group never has the largest score
        largest = tl.where(group < G, tl.where(largest == float("-inf"), 0.0, largest), float("inf"))

        # empty places hold different numbers, below any score; those beyond the k-th are never taken
        empty = tl.where(rank < topk, LOWEST + rank.to(tl.int64), 2**63 - 1)
        best = tl.zeros([TOKENS, KP], dtype=tl.int64) + empty[None, :]
        for start in range(begin, farthest, STEP):
            block = start + tl.arange(0, STEP)
            products = _products(queries, means, block, farthest, num_blocks, D, DP, PARTS, SHIFT)
            scores = tl.max(tl.reshape(products - largest[:, None], [TOKENS, GP, STEP]), axis=1)
            packed = tl.where(block[None, :] < end[:, None], sortable(scores, block[None, :]), LOWEST)
            best = _insert(best, packed)
        picked = tl.where(best < LOWEST + KP, -1, (best & 0xFFFFFFFF).to(tl.int32))

    out = chosen + (head.to(tl.int64) * num_queries + number + token[:, None]) * topk + rank[None, :]
    tl.store(out, picked, mask=(token[:, None] < count) & (rank[None, :] < topk))


def block_means(key: Tensor, plan: TritonPlan, tiling: Tiling) -> Tensor:
    """Return the mean key of each block as a sum of parts, `[P, K, N, D]`; only those of complete blocks are of use.

    Args:
        key (`[B, K, S, D]`): bfloat16, float16 or float32; gathered, where the plan says so.
    """
    heads, width = key.shape[1], key.shape[3]
    parts, shift = PARTS[key.dtype]
    means = key.new_empty(parts, heads, plan.num_blocks, width)
    constants = {name: tiling.constants[name] for name in ("D", "DP", "C")}
    _means_kernel[(plan.num_blocks, heads)](
        key, plan.blocks, means, *key.stride()[:3], plan.num_blocks, **constants, PARTS=parts, SHIFT=shift, num_warps=4
    )
    return means


def choose(query: Tensor, key: Tensor, plan: TritonPlan, tiling: Tiling, settings: SparseAttentionConfig) -> Tensor:
    """Choose the best-scoring candidate blocks of every query.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`, gathered where the plan says so): of one dtype.
        plan, tiling, settings: of the batch.

    Returns:
        `[K, X, topk_blocks]`, int32: numbers of blocks; -1 where there are fewer candidates.
    """
    batch, _, tokens, _ = query.shape
    kv_heads, topk = key.shape[1], settings.topk_blocks
    chosen = torch.empty(kv_heads, batch * tokens, topk, dtype=torch.int32, device=query.device)
    if not topk:
        return chosen
    means = block_means(key, plan, tiling)
    parts, shift = PARTS[key.dtype]
    _select_kernel[(len(plan.tiles), kv_heads)](
        query,
        means,
        plan.tiles,
        plan.last,
        chosen,
        *query.stride()[:3],
        tokens,
        batch * tokens,
        plan.num_blocks,
        topk,
        settings.local_blocks,
        settings.sink_blocks,
        **{name: tiling.constants[name] for name in ("G", "GP", "D", "DP", "C")},
        KP=power_of_two(max(topk, 2)),
        TOKENS=tiling.tile_tokens,
        STEP=tiling.blocks,
        PARTS=parts,
        SHIFT=shift,
        num_warps=4,
        num_stages=tiling.stages,
    )
    return chosen
