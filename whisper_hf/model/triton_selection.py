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
"""Choose the best-scoring blocks of each query, in Triton: block means, scores and a running top-k.

The scores equal the scores of [`block_scores`]: the product of a head's query with a block's mean counts relative to
the head's largest product with any complete past block. Therefore the kernel loops over the past twice: first for the
largest products, then for the scores. It writes no product to memory. A query keeps its best blocks as 64-bit integers
with the score in the upper and the block number in the lower half, so that ties go to the more recent block.

Products are as exact as in float32, at the speed of products in the dtype of the keys: queries have this dtype, and
each mean is split into a sum of parts in this dtype.

The shape legend of `triton_plan.py` applies here; in addition, `P` is the number of parts of a mean.
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

# The number of parts of a mean, and the factor by which each part is scaled up relative to the part before it, so that
# small parts do not underflow.
PARTS = {torch.bfloat16: (3, 1.0), torch.float16: (2, 2.0**11), torch.float32: (1, 1.0)}


@triton.jit(do_not_specialize=VARYING)
def _means_kernel(
    key, blocks, means, key_stride_b, key_stride_h, key_stride_s, num_blocks, D: tl.constexpr, DP: tl.constexpr,
    C: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Write the mean of a block's keys in parts; one program per block and key-value head."""
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
    """Multiply query rows `[rows, D]` with the means of blocks `[n]`; means of blocks from `end` on count as zero.

    `means` points to the first part of a key-value head's means; parts lie `num_programs(1)` heads apart.
    """
    dim = tl.arange(0, DP)
    mask = (dim[:, None] < D) & (block[None, :] < end)
    part_stride = tl.num_programs(1).to(tl.int64) * num_blocks * D
    at = block.to(tl.int64)[None, :] * D + dim[:, None]
    products = tl.zeros([queries.shape[0], block.shape[0]], dtype=tl.float32)
    for part in tl.static_range(PARTS - 1, -1, -1):  # the smallest part first, which loses the fewest bits
        piece = tl.load(means + part * part_stride + at, mask=mask, other=0.0)
        products = tl.dot(queries, piece, products * (1.0 / SHIFT), input_precision="tf32x3")
    return products


@triton.jit
def sortable(score, block):
    """Pack float32 scores and block numbers into int64 that sort by score first and by block number second."""
    bits = score.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | block.to(tl.int64)


@triton.jit
def _insert(best, new):
    """Replace the numbers of `best` (`[rows, k]`) by larger numbers of `new` (`[rows, n]`), row by row.

    No number may occur twice in a row, except `-(2**63)`, which is never inserted. The result is in no particular
    order. The loop takes as many steps as the largest number of replacements in a row, which soon becomes small.
    """
    largest_new, smallest = tl.max(new, axis=1), tl.min(best, axis=1)
    while tl.max((largest_new > smallest).to(tl.int32), axis=0) > 0:
        is_replaced = (best == smallest[:, None]) & (largest_new > smallest)[:, None]
        best = tl.where(is_replaced, largest_new[:, None], best)
        new = tl.where(new == largest_new[:, None], -(2**63), new)
        largest_new, smallest = tl.max(new, axis=1), tl.min(best, axis=1)
    return best


@triton.jit(do_not_specialize=VARYING)
def _select_kernel(
    query, means, tiles, last, chosen, query_stride_b, query_stride_h, query_stride_t, num_tokens, num_queries,
    num_blocks, topk, local_blocks, sink_blocks, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    C: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Write the blocks that a tile of queries chooses; one program per tile and key-value head.

    The last tiles are computed first, because their queries have the longest past and take the most time.
    """
    LOWEST: tl.constexpr = -(2**63)
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    of_tile = tiles + tile * TILE_COLUMNS
    query_row = tl.load(of_tile + TILE_QUERY_ROW)
    first = tl.load(of_tile + TILE_FIRST_TOKEN)
    count = tl.load(of_tile + TILE_NUM_TOKENS)
    first_block = tl.load(of_tile + TILE_FIRST_BLOCK)
    number = query_row * num_tokens + first  # number of the tile's first query in the batch

    token = tl.arange(0, TOKENS)
    position = tl.load(last + number + token, mask=token < count, other=-1)
    # the candidates, by `candidate_range` of sparse_selection.py
    begin = first_block + sink_blocks
    end = first_block + tl.maximum(position, 0) // C - local_blocks + 1
    farthest = tl.max(end, axis=0)
    rank = tl.arange(0, KP)
    if farthest - begin <= topk:  # every query chooses all its candidates
        selected = tl.where(begin + rank[None, :] < end[:, None], begin + rank[None, :], -1)
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
        # Heads that only pad the group to a power of two get scores of minus infinity, so that they never count.
        largest = tl.where(group < G, tl.where(largest == float("-inf"), 0.0, largest), float("inf"))

        # Empty places hold distinct numbers below any packed score. Places beyond `topk`, which pad `best` to a power
        # of two, hold a number that no packed score exceeds.
        empty = tl.where(rank < topk, LOWEST + rank.to(tl.int64), 2**63 - 1)
        best = tl.zeros([TOKENS, KP], dtype=tl.int64) + empty[None, :]
        for start in range(begin, farthest, STEP):
            block = start + tl.arange(0, STEP)
            products = _products(queries, means, block, farthest, num_blocks, D, DP, PARTS, SHIFT)
            scores = tl.max(tl.reshape(products - largest[:, None], [TOKENS, GP, STEP]), axis=1)
            packed = tl.where(block[None, :] < end[:, None], sortable(scores, block[None, :]), LOWEST)
            best = _insert(best, packed)
        selected = tl.where(best < LOWEST + KP, -1, (best & 0xFFFFFFFF).to(tl.int32))

    out = chosen + (head.to(tl.int64) * num_queries + number + token[:, None]) * topk + rank[None, :]
    tl.store(out, selected, mask=(token[:, None] < count) & (rank[None, :] < topk))


def block_means(key: Tensor, plan: TritonPlan, tiling: Tiling) -> Tensor:
    """Compute the mean key of each block, as a sum of parts in the dtype of the keys.

    Args:
        key (`[B, K, S, D]`, or `[1, K, M, D]` if the plan gathers visible tokens): bfloat16, float16 or float32.
        plan (`TritonPlan`): plan of the batch.
        tiling (`Tiling`): sizes of tiles.

    Returns:
        `[P, K, N, D]` in the dtype of `key`: the mean is `sum_p part_p / factor ** p`, with the factor in `PARTS`. The
        means of incomplete blocks are meaningless.
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
        query (`[B, H, T, D]`), key (`[B, K, S, D]`, or `[1, K, M, D]` if the plan gathers visible tokens): one dtype,
            bfloat16, float16 or float32.
        plan (`TritonPlan`): plan of the batch.
        tiling (`Tiling`): sizes of tiles.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `[K, X, topk_blocks]`, int32: numbers of blocks in the batch, in no particular order. A query with fewer
        candidates than `topk_blocks` has -1 in the remaining places.
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
