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
"""Compute the gradient of masked sparse attention, in Triton: the launcher, and the kernels by key block.

Five kernels compute the gradient. Each sum has one owner and a fixed order, without atomic additions, so that the
results are bitwise reproducible:

1. The product of each output with its gradient is summed (`triton_backward_queries.py`).
2. For each block, the queries of a chunk that chose it are gathered. They add their share to the gradients of the
   block's keys and values, and each pair of a query and a block leaves a partial gradient of the query.
3. For each tile of queries, the partial gradients are added to the gradient through sink and local blocks
   (`triton_backward_queries.py`).
4. The many queries that see a sink block from beyond its local blocks are divided into work items. Each item computes
   its share of the gradients of the block's keys and values.
5. For each block, these shares are added to the share of the local queries.

Weights are recomputed from log-sum-exps, as FlashAttention does (https://arxiv.org/abs/2205.14135).

The shape legend of `triton_forward.py` applies here.
"""

import math

import torch
from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .triton_backward_queries import differentiate_queries, sum_products
from .triton_forward import chunks
from .triton_optional import VARYING, tl, triton
from .triton_plan import (
    BLOCK_COLUMNS,
    BLOCK_END,
    BLOCK_FIRST,
    BLOCK_FIRST_SLOT,
    BLOCK_KEY_ROW,
    BLOCK_NUM_KEYS,
    BLOCK_QUERY_ROW,
    ITEM_BLOCK,
    ITEM_COLUMNS,
    ITEM_END_QUERY,
    ITEM_FIRST_QUERY,
    TritonPlan,
)
from .triton_tiling import Tiling


@triton.jit
def weigh(queries, grads, lse, delta, keys, values, visible, scaling):
    """Return the attention weights of query rows with some keys, and the gradients of their logits.

    Args:
        queries, grads: `[R, DP]` and `[R, EP]`, queries and gradients of their outputs.
        lse, delta: `[R]`, log-sum-exps to the base 2, and products of outputs with their gradients.
        keys, values: `[DP, n]` and `[EP, n]`, transposed.
        visible: broadcastable to `[R, n]`, whether a row attends to a key.
        scaling: factor on the products of queries and keys, which gives logits to the base 2.

    Returns:
        Weights and gradients of the logits, both `[R, n]`.
    """
    logits = tl.dot(queries, keys, input_precision="tf32x3") * scaling
    # The minimum keeps weights at most 1, also for keys that a row does not see, and if the log-sum-exp was rounded.
    weights = tl.where(visible, tl.exp2(tl.minimum(logits - lse[:, None], 0.0)), 0.0)
    return weights, weights * (tl.dot(grads, values, input_precision="tf32x3") - delta[:, None])


@triton.jit
def _add_rows(
    query, grad, lse, delta, at_query, at_grad, at_row, is_row, keys, values, visible, scaling, key_grad, value_grad,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Load rows of queries by their offsets, and add their share to the gradients of a block's keys and values.

    Args:
        query, grad, lse, delta: pointers to queries, gradients of outputs, log-sum-exps, and products of outputs with
            their gradients.
        at_query, at_grad, at_row: `[R]`, offsets of the rows in `query`, in `grad`, and in `lse` and `delta`.
        is_row: `[R]`, whether the row holds a query.
        keys, values: `[DP, C]` and `[EP, C]`, transposed.
        key_grad, value_grad: `[C, DP]` and `[C, EP]`, gradients so far; the factor on the logits is applied later.

    Returns:
        The new `key_grad` and `value_grad`, and the gradients of the logits, `[R, C]`.
    """
    dim, value_dim = tl.arange(0, DP), tl.arange(0, EP)
    queries = tl.load(query + at_query[:, None] + dim[None, :], mask=is_row[:, None] & (dim[None, :] < D), other=0.0)
    grad_mask = is_row[:, None] & (value_dim[None, :] < E)
    grads = tl.load(grad + at_grad[:, None] + value_dim[None, :], mask=grad_mask, other=0.0)
    sums = tl.load(lse + at_row, mask=is_row, other=0.0)
    centre = tl.load(delta + at_row, mask=is_row, other=0.0)
    weights, logit_grad = weigh(queries, grads, sums, centre, keys, values, visible, scaling)
    logit_grad = logit_grad.to(queries.dtype)
    value_grad = tl.dot(tl.trans(weights.to(grads.dtype)), grads, value_grad, input_precision="tf32x3")
    key_grad = tl.dot(tl.trans(logit_grad), queries, key_grad, input_precision="tf32x3")
    return key_grad, value_grad, logit_grad


@triton.jit
def _add_range(
    query, grad, lse, delta, last, begin, end, query_row, position, keys, values, scaling, key_grad, value_grad,
    query_stride_b, query_stride_h, query_stride_t, grad_stride_b, grad_stride_h, grad_stride_t, num_tokens,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Add the share of the queries `begin <= number < end` to the gradients of a block's keys and values.

    The queries must belong to the document of the block; each attends to the keys up to its last key.
    """
    head = tl.program_id(1)
    row = tl.arange(0, TOKENS * GP)
    group = row % GP
    q_head = (head * G + group).to(tl.int64)
    lse_base = (query_row.to(tl.int64) * tl.num_programs(1) * G + q_head) * num_tokens
    query_base = query_row.to(tl.int64) * query_stride_b + q_head * query_stride_h
    grad_base = query_row.to(tl.int64) * grad_stride_b + q_head * grad_stride_h
    for start in range(begin, end, TOKENS):
        number = start + row // GP
        is_row = (number < end) & (group < G)
        token = (number - query_row * num_tokens).to(tl.int64)
        seen = tl.load(last + number, mask=is_row, other=-1)
        key_grad, value_grad, _ = _add_rows(
            query, grad, lse, delta, query_base + token * query_stride_t, grad_base + token * grad_stride_t,
            lse_base + token, is_row, keys, values, position[None, :] <= seen[:, None], scaling, key_grad, value_grad,
            D, DP, E, EP,
        )  # fmt: skip
    return key_grad, value_grad


@triton.jit
def _load_block(
    key, value, blocks, block, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Load the keys and values of a block, `[DP, C]` and `[EP, C]`, with zeros where it is incomplete."""
    head, dim, value_dim = tl.program_id(1).to(tl.int64), tl.arange(0, DP), tl.arange(0, EP)
    of_block = blocks + block * BLOCK_COLUMNS
    key_row = tl.load(of_block + BLOCK_KEY_ROW).to(tl.int64)
    slot = tl.load(of_block + BLOCK_FIRST_SLOT).to(tl.int64) + tl.arange(0, C)
    is_key = tl.arange(0, C) < tl.load(of_block + BLOCK_NUM_KEYS)
    key += key_row * key_stride_b + head * key_stride_h
    value += key_row * value_stride_b + head * value_stride_h
    key_mask, value_mask = is_key[None, :] & (dim[:, None] < D), is_key[None, :] & (value_dim[:, None] < E)
    keys = tl.load(key + slot[None, :] * key_stride_s + dim[:, None], mask=key_mask, other=0.0)
    return keys, tl.load(value + slot[None, :] * value_stride_s + value_dim[:, None], mask=value_mask, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def _pairs_grad_kernel(
    query, key, value, grad, lse, delta, blocks, starts, pairs, partial, key_sums, value_sums, scaling, factor,
    query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_s, value_stride_b,
    value_stride_h, value_stride_s, grad_stride_b, grad_stride_h, grad_stride_t, num_tokens, first_query, num_pairs,
    topk, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    C: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Add the share of the queries that chose a block to its gradients, and write partial gradients of the queries.

    There is one program per block and key-value head. It handles the queries of one chunk.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    list_number = head * tl.num_programs(0) + block
    begin, end = tl.load(starts + list_number), tl.load(starts + list_number + 1)
    if begin == end:
        return
    keys, values = _load_block(
        key, value, blocks, block, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h,
        value_stride_s, D, DP, E, EP, C,
    )  # fmt: skip
    query_row = tl.load(blocks + block * BLOCK_COLUMNS + BLOCK_QUERY_ROW)
    row, dim, value_dim = tl.arange(0, TOKENS * GP), tl.arange(0, DP), tl.arange(0, EP)
    group = row % GP
    q_head = (head * G + group).to(tl.int64)
    lse_base = (query_row.to(tl.int64) * tl.num_programs(1) * G + q_head) * num_tokens
    query_base = query_row.to(tl.int64) * query_stride_b + q_head * query_stride_h
    grad_base = query_row.to(tl.int64) * grad_stride_b + q_head * grad_stride_h
    sums = (list_number.to(tl.int64) * C + tl.arange(0, C))[:, None]
    key_at, key_mask = key_sums + sums * D + dim[None, :], (dim < D)[None, :]
    value_at, value_mask = value_sums + sums * E + value_dim[None, :], (value_dim < E)[None, :]
    key_grad = tl.load(key_at, mask=key_mask & (sums >= 0), other=0.0)
    value_grad = tl.load(value_at, mask=value_mask & (sums >= 0), other=0.0)
    for start in range(begin, end, TOKENS):
        place = start + row // GP
        is_row = (place < end) & (group < G)
        pair = tl.load(pairs + place, mask=is_row, other=first_query * topk)
        token = (pair // topk - query_row * num_tokens).to(tl.int64)
        key_grad, value_grad, logit_grad = _add_rows(
            query, grad, lse, delta, query_base + token * query_stride_t, grad_base + token * grad_stride_t,
            lse_base + token, is_row, keys, values, is_row[:, None], scaling, key_grad, value_grad, D, DP, E, EP,
        )  # fmt: skip
        query_grad = tl.dot(logit_grad, tl.trans(keys), input_precision="tf32x3") * factor
        out = (head.to(tl.int64) * num_pairs + pair - first_query * topk) * G + group
        at = partial + out[:, None] * D + dim[None, :]
        tl.store(at, query_grad.to(partial.dtype.element_ty), mask=is_row[:, None] & key_mask)
    tl.store(key_at, key_grad, mask=key_mask & (sums >= 0))
    tl.store(value_at, value_grad, mask=value_mask & (sums >= 0))


@triton.jit(do_not_specialize=VARYING)
def _sink_kernel(
    query, key, value, grad, lse, delta, last, blocks, items, key_shares, value_shares, scaling, query_stride_b,
    query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h,
    value_stride_s, grad_stride_b, grad_stride_h, grad_stride_t, num_tokens, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write a work item's share of the gradients of a sink block; one program per item and key-value head."""
    item, head = tl.program_id(0), tl.program_id(1)
    of_item = items + item * ITEM_COLUMNS
    block = tl.load(of_item + ITEM_BLOCK)
    begin = tl.load(of_item + ITEM_FIRST_QUERY)
    end = tl.load(of_item + ITEM_END_QUERY)
    keys, values = _load_block(
        key, value, blocks, block, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h,
        value_stride_s, D, DP, E, EP, C,
    )  # fmt: skip
    of_block = blocks + block * BLOCK_COLUMNS
    position = (block - tl.load(of_block + BLOCK_FIRST)) * C + tl.arange(0, C)
    key_grad, value_grad = tl.zeros([C, DP], dtype=tl.float32), tl.zeros([C, EP], dtype=tl.float32)
    key_grad, value_grad = _add_range(
        query, grad, lse, delta, last, begin, end, tl.load(of_block + BLOCK_QUERY_ROW), position, keys, values, scaling,
        key_grad, value_grad, query_stride_b, query_stride_h, query_stride_t, grad_stride_b, grad_stride_h,
        grad_stride_t, num_tokens, G, GP, D, DP, E, EP, TOKENS,
    )  # fmt: skip
    dim, value_dim = tl.arange(0, DP), tl.arange(0, EP)
    out = ((item * tl.num_programs(1) + head).to(tl.int64) * C + tl.arange(0, C))[:, None]
    tl.store(key_shares + out * D + dim[None, :], key_grad, mask=(dim[None, :] < D) & (out >= 0))
    tl.store(value_shares + out * E + value_dim[None, :], value_grad, mask=(value_dim[None, :] < E) & (out >= 0))


@triton.jit(do_not_specialize=VARYING)
def _blocks_kernel(
    query, key, value, grad, lse, delta, last, blocks, query_start, item_start, key_shares, value_shares, key_sums,
    value_sums, key_out, value_out, scaling, factor, query_stride_b, query_stride_h, query_stride_t, key_stride_b,
    key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s, grad_stride_b, grad_stride_h,
    grad_stride_t, key_out_stride_b, key_out_stride_h, key_out_stride_s, value_out_stride_b, value_out_stride_h,
    value_out_stride_s, num_tokens, local_blocks, HAS_SUMS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block's keys and values; one program per block and key-value head.

    They are the sum of the shares of the queries that chose the block, of the work items of a sink block, and of the
    local queries, which this kernel computes.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    keys, values = _load_block(
        key, value, blocks, block, key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h,
        value_stride_s, D, DP, E, EP, C,
    )  # fmt: skip
    offset, dim, value_dim = tl.arange(0, C)[:, None], tl.arange(0, DP)[None, :], tl.arange(0, EP)[None, :]
    of_block = blocks + block * BLOCK_COLUMNS
    is_key = offset < tl.load(of_block + BLOCK_NUM_KEYS)
    key_mask, value_mask = is_key & (dim < D), is_key & (value_dim < E)
    key_grad, value_grad = tl.zeros([C, DP], dtype=tl.float32), tl.zeros([C, EP], dtype=tl.float32)
    if HAS_SUMS:
        at = (head.to(tl.int64) * tl.num_programs(0) + block) * C + offset
        key_grad += tl.load(key_sums + at * D + dim, mask=key_mask, other=0.0)
        value_grad += tl.load(value_sums + at * E + value_dim, mask=value_mask, other=0.0)
    for item in range(tl.load(item_start + block), tl.load(item_start + block + 1)):
        at = (item * tl.num_programs(1) + head).to(tl.int64) * C + offset
        key_grad += tl.load(key_shares + at * D + dim, mask=key_mask, other=0.0)
        value_grad += tl.load(value_shares + at * E + value_dim, mask=value_mask, other=0.0)

    end = tl.minimum(block + local_blocks, tl.load(of_block + BLOCK_END))
    position = (block - tl.load(of_block + BLOCK_FIRST)) * C + tl.arange(0, C)
    key_grad, value_grad = _add_range(
        query, grad, lse, delta, last, tl.load(query_start + block), tl.load(query_start + end),
        tl.load(of_block + BLOCK_QUERY_ROW), position, keys, values, scaling, key_grad, value_grad,
        query_stride_b, query_stride_h, query_stride_t, grad_stride_b, grad_stride_h, grad_stride_t, num_tokens,
        G, GP, D, DP, E, EP, TOKENS,
    )  # fmt: skip
    key_row = tl.load(of_block + BLOCK_KEY_ROW).to(tl.int64)
    slot = tl.load(of_block + BLOCK_FIRST_SLOT).to(tl.int64) + offset
    key_out += key_row * key_out_stride_b + head.to(tl.int64) * key_out_stride_h + slot * key_out_stride_s
    value_out += key_row * value_out_stride_b + head.to(tl.int64) * value_out_stride_h + slot * value_out_stride_s
    tl.store(key_out + dim, (key_grad * factor).to(key_out.dtype.element_ty), mask=key_mask)
    tl.store(value_out + value_dim, value_grad.to(value_out.dtype.element_ty), mask=value_mask)


def differentiate(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    chosen: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    plan: TritonPlan,
    tiling: Tiling,
    settings: SparseAttentionConfig,
) -> None:
    """Compute the gradients of query, key and value, and write them to `grads`.

    Args:
        grad (`[B, H, T, E]`, dtype of `query`): gradient of the output.
        output (`[B, H, T, E]`), lse (`[B, H, T]`, float32, contiguous): what [`attend`] wrote.
        grads: where to write the gradients, in the shapes and dtypes of `query`, `key` and `value`. Gradients of keys
            and values that belong to no block (hidden tokens and empty slots) are not written.
        query, key, value, chosen, scaling, plan, tiling, settings: the arguments of [`attend`].
    """
    tokens, kv_heads, topk = query.shape[2], key.shape[1], settings.topk_blocks
    constants = tiling.constants
    factor = scaling * math.log2(math.e)  # the kernels compute exponentials to the base 2
    options = {**constants, "TOKENS": tiling.pair_tokens, "num_warps": 8, "num_stages": tiling.stages}
    delta = sum_products(grad, output, plan, tiling)
    states = (query, key, value, grad, lse, delta)
    strides = [stride for each in (query, key, value, grad) for stride in each.stride()[:3]]

    def zeros(count: int, width: int) -> Tensor:
        """Return zeros for the gradients of `count` blocks, `[count, C, width]`, float32."""
        return torch.zeros(count, settings.block_size, width, dtype=torch.float32, device=query.device)

    num_sums = kv_heads * plan.num_blocks if topk else 0
    sums = zeros(num_sums, constants["D"]), zeros(num_sums, constants["E"])
    for chunk in chunks(query, chosen, plan, constants["D"]):
        num_pairs = chunk.num_queries * topk
        partial = query.new_empty(kv_heads, num_pairs, constants["G"], constants["D"])
        if topk:
            _pairs_grad_kernel[(plan.num_blocks, kv_heads)](
                *states, plan.blocks, chunk.starts, chunk.pairs, partial, *sums, factor, scaling, *strides, tokens,
                chunk.first_query, num_pairs, topk, **options,
            )  # fmt: skip
        differentiate_queries(*states, chosen, partial, grads[0], scaling, chunk, plan, tiling, settings)

    num_items = len(plan.items)
    shares = zeros(num_items * kv_heads, constants["D"]), zeros(num_items * kv_heads, constants["E"])
    _sink_kernel[(num_items, kv_heads)](
        *states, plan.last, plan.blocks, plan.items, *shares, factor, *strides, tokens, **options,
    )  # fmt: skip
    _blocks_kernel[(plan.num_blocks, kv_heads)](
        *states, plan.last, plan.blocks, plan.query_start, plan.item_start, *shares, *sums, *grads[1:], factor, scaling,
        *strides, *grads[1].stride()[:3], *grads[2].stride()[:3], tokens, settings.local_blocks, HAS_SUMS=topk > 0,
        **options,
    )  # fmt: skip
