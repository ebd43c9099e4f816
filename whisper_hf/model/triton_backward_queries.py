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
"""Compute the gradient of masked sparse attention with respect to its queries, in Triton.

`triton_backward_keys.py` describes the whole gradient, and computes the gradients of keys and values.

The shape legend of `triton_forward.py` applies here.
"""

import math

import torch
from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .triton_forward import Chunk, band_of
from .triton_optional import VARYING, tl, triton
from .triton_plan import (
    TILE_COLUMNS,
    TILE_FIRST_SLOT,
    TILE_FIRST_TOKEN,
    TILE_KEY_ROW,
    TILE_NUM_TOKENS,
    TILE_QUERY_ROW,
    TritonPlan,
)
from .triton_tiling import Tiling


@triton.jit(do_not_specialize=VARYING)
def _sum_products_kernel(
    grad, output, tiles, sums, grad_stride_b, grad_stride_h, grad_stride_t, output_stride_b, output_stride_h,
    output_stride_t, num_tokens, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the product of each output with its gradient; one program per tile and key-value head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, dim = tl.arange(0, TOKENS * GP), tl.arange(0, EP)[None, :]
    group = row % GP
    of_tile = tiles + tile * TILE_COLUMNS
    is_row = (row // GP < tl.load(of_tile + TILE_NUM_TOKENS)) & (group < G)
    query_row = tl.load(of_tile + TILE_QUERY_ROW).to(tl.int64)
    token = (tl.load(of_tile + TILE_FIRST_TOKEN) + row // GP).to(tl.int64)
    q_head = (head * G + group).to(tl.int64)
    mask = is_row[:, None] & (dim < E)
    grad_at = query_row * grad_stride_b + q_head * grad_stride_h + token * grad_stride_t
    output_at = query_row * output_stride_b + q_head * output_stride_h + token * output_stride_t
    grads = tl.load(grad + grad_at[:, None] + dim, mask=mask, other=0.0).to(tl.float32)
    outputs = tl.load(output + output_at[:, None] + dim, mask=mask, other=0.0).to(tl.float32)
    out = (query_row * tl.num_programs(1) * G + q_head) * num_tokens + token
    tl.store(sums + out, tl.sum(grads * outputs, axis=1), mask=is_row)


@triton.jit
def _add_keys(
    queries, grads, sums, centre, key, value, key_stride, value_stride, begin, end, low, high, scaling, query_grad,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the gradient through keys of a document to the gradient of rows of queries.

    The loop visits the positions `begin <= p < end`. If `MASKED`, a row attends only to positions `low <= p < high`.
    Otherwise every row attends to all visited positions, and their number must be a multiple of `STEP`.

    Args:
        queries, grads: `[R, DP]` and `[R, EP]`, queries and gradients of their outputs.
        sums, centre: `[R]`, log-sum-exps to the base 2, and products of outputs with their gradients.
        key, value: pointers to the first key and value of the document.
        low, high: `[R]`, bounds of the positions that each row sees.
        query_grad: `[R, DP]`, gradient so far; the factor on the logits is applied later.

    Returns:
        The new `query_grad`.
    """
    dim, value_dim = tl.arange(0, DP), tl.arange(0, EP)
    for start in range(begin, end, STEP):
        position = start + tl.arange(0, STEP)
        key_mask, value_mask = dim[:, None] < D, value_dim[:, None] < E
        if MASKED:
            key_mask, value_mask = key_mask & (position < end)[None, :], value_mask & (position < end)[None, :]
        at = position.to(tl.int64)[None, :]
        keys = tl.load(key + at * key_stride + dim[:, None], mask=key_mask, other=0.0)
        values = tl.load(value + at * value_stride + value_dim[:, None], mask=value_mask, other=0.0)
        logits = tl.dot(queries, keys, input_precision="tf32x3") * scaling
        weights = tl.exp2(tl.minimum(logits - sums[:, None], 0.0))
        if MASKED:
            visible = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
            weights = tl.where(visible, weights, 0.0)
        logit_grad = weights * (tl.dot(grads, values, input_precision="tf32x3") - centre[:, None])
        query_grad = tl.dot(logit_grad.to(keys.dtype), tl.trans(keys), query_grad, input_precision="tf32x3")
    return query_grad


@triton.jit(do_not_specialize=VARYING)
def _queries_kernel(
    query, key, value, grad, lse, delta, tiles, last, chosen, partial, query_out, scaling, factor, query_stride_b,
    query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h,
    value_stride_s, grad_stride_b, grad_stride_h, grad_stride_t, query_out_stride_b, query_out_stride_h,
    query_out_stride_t, first_tile, num_tokens, num_queries, first_query, num_pairs, topk, local_blocks, sink_blocks,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    C: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of queries; one program per tile and key-value head.

    It is the sum of the gradient through sink and local blocks, which this kernel computes, and of the partial
    gradients of the tile's pairs of a query and a chosen block.
    """
    tile, head = first_tile + tl.program_id(0), tl.program_id(1)
    of_tile = tiles + tile * TILE_COLUMNS
    query_row = tl.load(of_tile + TILE_QUERY_ROW)
    first = tl.load(of_tile + TILE_FIRST_TOKEN)
    count = tl.load(of_tile + TILE_NUM_TOKENS)
    key_row = tl.load(of_tile + TILE_KEY_ROW).to(tl.int64)
    slot = tl.load(of_tile + TILE_FIRST_SLOT).to(tl.int64)
    row, dim, value_dim = tl.arange(0, TOKENS * GP), tl.arange(0, DP)[None, :], tl.arange(0, EP)[None, :]
    group = row % GP
    is_token, is_row = row // GP < count, (row // GP < count) & (group < G)
    token = (first + row // GP).to(tl.int64)
    number = query_row * num_tokens + first + row // GP
    position = tl.load(last + number, mask=is_token, other=0x3FFFFFFF)
    q_head, batch = (head * G + group).to(tl.int64), query_row.to(tl.int64)
    query_mask, value_mask = is_row[:, None] & (dim < D), is_row[:, None] & (value_dim < E)
    at = batch * query_stride_b + q_head * query_stride_h + token * query_stride_t
    queries = tl.load(query + at[:, None] + dim, mask=query_mask, other=0.0)
    at = batch * grad_stride_b + q_head * grad_stride_h + token * grad_stride_t
    grads = tl.load(grad + at[:, None] + value_dim, mask=value_mask, other=0.0)
    at = (batch * tl.num_programs(1) * G + q_head) * num_tokens + token
    sums, centre = tl.load(lse + at, mask=is_row, other=0.0), tl.load(delta + at, mask=is_row, other=0.0)
    key += key_row * key_stride_b + head.to(tl.int64) * key_stride_h + slot * key_stride_s
    value += key_row * value_stride_b + head.to(tl.int64) * value_stride_h + slot * value_stride_s

    query_grad = tl.zeros([TOKENS * GP, DP], dtype=tl.float32)
    # Three ranges of keys: the sink blocks, local keys that every row sees, and the remaining local keys.
    sink_end, low, begin, unmasked_end = band_of(position, tl.min(position, axis=0), C, STEP, local_blocks, sink_blocks)
    seen = tl.where(is_token, position, -1) + 1
    end, sinks = tl.max(seen, axis=0), tl.max(tl.where(is_token, sink_end, 0), axis=0)
    query_grad = _add_keys(
        queries, grads, sums, centre, key, value, key_stride_s, value_stride_s, 0, sinks, low * 0, sink_end, scaling,
        query_grad, D, DP, E, EP, STEP, True,
    )  # fmt: skip
    query_grad = _add_keys(
        queries, grads, sums, centre, key, value, key_stride_s, value_stride_s, begin, unmasked_end, low, seen, scaling,
        query_grad, D, DP, E, EP, STEP, False,
    )  # fmt: skip
    query_grad = _add_keys(
        queries, grads, sums, centre, key, value, key_stride_s, value_stride_s, unmasked_end, end, low, seen, scaling,
        query_grad, D, DP, E, EP, STEP, True,
    )  # fmt: skip
    query_grad *= factor
    for rank in range(topk):
        is_chosen = (
            tl.load(chosen + (head.to(tl.int64) * num_queries + number) * topk + rank, mask=is_row, other=-1) >= 0
        )
        pair = (head.to(tl.int64) * num_pairs + (number - first_query).to(tl.int64) * topk + rank) * G + group
        part = tl.load(partial + pair[:, None] * D + dim, mask=is_chosen[:, None] & (dim < D), other=0.0)
        query_grad += part.to(tl.float32)
    at = batch * query_out_stride_b + q_head * query_out_stride_h + token * query_out_stride_t
    tl.store(query_out + at[:, None] + dim, query_grad.to(query_out.dtype.element_ty), mask=query_mask)


def sum_products(grad: Tensor, output: Tensor, plan: TritonPlan, tiling: Tiling) -> Tensor:
    """Sum the product of each output with its gradient over the value dimension.

    Args:
        grad (`[B, H, T, E]`), output (`[B, H, T, E]`): the gradient of the output, and the output.
        plan (`TritonPlan`): plan of the batch.
        tiling (`Tiling`): sizes of tiles.

    Returns:
        `[B, H, T]`, float32.
    """
    sums = torch.empty(grad.shape[:3], dtype=torch.float32, device=grad.device)
    constants = tiling.constants
    groups = constants["G"]
    _sum_products_kernel[(len(plan.tiles), grad.shape[1] // groups)](
        grad, output, plan.tiles, sums, *grad.stride()[:3], *output.stride()[:3], grad.shape[2],
        G=groups, GP=constants["GP"], E=constants["E"], EP=constants["EP"], TOKENS=tiling.tile_tokens, num_warps=4,
    )  # fmt: skip
    return sums


def differentiate_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    chosen: Tensor,
    partial: Tensor,
    query_grad: Tensor,
    scaling: float,
    chunk: Chunk,
    plan: TritonPlan,
    tiling: Tiling,
    settings: SparseAttentionConfig,
) -> None:
    """Compute the gradient of a chunk's queries, and write it to `query_grad`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`), grad (`[B, H, T, E]`), lse (`[B, H, T]`),
            chosen, scaling, plan, tiling, settings: as in [`differentiate`].
        delta (`[B, H, T]`, float32): products of outputs with their gradients, from [`sum_products`].
        partial (`[K, pairs, G, D]`, dtype of `query`): partial gradients of the chunk's pairs of a query and a chosen
            block.
        query_grad (`[B, H, T, D]`, dtype of `query`): where to write.
        chunk (`Chunk`): the tiles and queries to compute.
    """
    strides = [stride for each in (query, key, value, grad, query_grad) for stride in each.stride()[:3]]
    _queries_kernel[(chunk.num_tiles, key.shape[1])](
        query, key, value, grad, lse, delta, plan.tiles, plan.last, chosen, partial, query_grad,
        scaling * math.log2(math.e), scaling, *strides, chunk.first_tile, query.shape[2], chosen.shape[1],
        chunk.first_query, partial.shape[1], settings.topk_blocks, settings.local_blocks, settings.sink_blocks,
        **tiling.constants, TOKENS=tiling.tile_tokens, STEP=tiling.keys, num_warps=8, num_stages=tiling.stages,
    )  # fmt: skip
