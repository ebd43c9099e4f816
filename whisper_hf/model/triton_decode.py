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
"""Compute masked sparse attention of one new token per row, in Triton.

A step reads the mean key of every block, and the keys and values of the attended blocks. The past is divided into
splits, and the attended blocks into parts, so that many programs share the work of one row. Four kernels compute a
step:

1. Multiply the queries of a group with the block means of a split.
2. Find the best blocks of a split.
3. Attend to a part of the blocks. Each program first merges the best blocks of all splits.
4. Merge the outputs of the parts.

The host never waits for the device, and the shapes do not depend on the contents of tensors, so that a step can be
captured in a CUDA graph.

The shape legend of `sparse_selection.py` applies here; in addition, `C` is the number of tokens per block, `E` the
value dimension, and `M` the number of heads of a group, padded to a power of two of at least `SMALLEST`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from .attention_gathered import mean_blocks
from .attention_operator import operator_namespace
from .configuration_whisper_lm import SparseAttentionConfig
from .sparse_selection import content_order, query_slots
from .triton_optional import VARYING, contiguous_rows, power_of_two, tl, triton
from .triton_plan import remembered
from .triton_selection import sortable
from .triton_tiling import SMALLEST

BLOCKS_PER_STEP = 64  # block means that a program multiplies at once
MOST_SPLITS = 16  # largest number of splits of the past
PROGRAMS = 512  # enough programs to occupy a large GPU; beyond that, a program attends to several blocks


@triton.jit
def _range_of_split(lengths, num_keys, split_blocks, K, C: tl.constexpr, HAS_LAYOUT: tl.constexpr):
    """Find the newest token of this program's row, and the past blocks of its split.

    Returns:
        The block of the newest token, its position, and the first and one past the last past block of the split.
    """
    position = tl.load(lengths + tl.program_id(0) // K) - 1 if HAS_LAYOUT else num_keys - 1
    current = tl.maximum(position, 0) // C
    begin = tl.program_id(1) * split_blocks
    return current, position, begin, tl.minimum(begin + split_blocks, current)


@triton.jit
def _merge_best(best, new, KP: tl.constexpr):
    """Return the `KP` largest numbers of each row of two tensors, in descending order.

    Args:
        best: `[rows, KP]`, in descending order.
        new: `[rows, n]`, where `n >= KP`, in any order.
    """
    # The element-wise maximum of a descending and an ascending sequence of length KP holds the KP largest of both.
    new = tl.flip(tl.topk(new, KP), 1)
    return tl.sort(tl.maximum(best, new), descending=True)


@triton.jit(do_not_specialize=VARYING)
def _products_kernel(
    query, means, lengths, products, largest, query_stride_b, query_stride_h, means_stride_b, means_stride_h,
    means_stride_n, num_keys, num_blocks, split_blocks, K, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, HAS_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Write the products of a group's queries with the block means of a split, and each head's largest product.

    There is one program per batch row and key-value head (together the first dimension of the grid), and split.
    """
    row, head = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    _, _, begin, end = _range_of_split(lengths, num_keys, split_blocks, K, C, HAS_LAYOUT)
    group, dim = tl.arange(0, M), tl.arange(0, DP)
    base = query + row * query_stride_b + (head * G + group).to(tl.int64)[:, None] * query_stride_h
    queries = tl.load(base + dim[None, :], mask=(group < G)[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
    means += row * means_stride_b + head.to(tl.int64) * means_stride_h
    out = products + (tl.program_id(0).to(tl.int64) * G + group)[:, None] * num_blocks
    largest_product = tl.full([M], float("-inf"), dtype=tl.float32)
    for start in range(begin, end, STEP):
        block = start + tl.arange(0, STEP)
        is_past = (block < end)[None, :]
        from_block = means + block.to(tl.int64)[None, :] * means_stride_n + dim[:, None]
        mean = tl.load(from_block, mask=is_past & (dim < D)[:, None], other=0.0)
        product = tl.dot(queries, mean, input_precision="tf32x3")
        tl.store(out + block[None, :], product, mask=is_past & (group < G)[:, None])
        largest_product = tl.maximum(largest_product, tl.max(tl.where(is_past, product, float("-inf")), axis=1))
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * G + group
    tl.store(largest + at, largest_product, mask=group < G)


@triton.jit(do_not_specialize=VARYING)
def _best_kernel(
    products, largest, lengths, best_blocks, num_keys, num_blocks, split_blocks, K, local_blocks, sink_blocks,
    G: tl.constexpr, GP: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Write the best candidate blocks of a split, packed with their scores as [`sortable`] does.

    There is one program per batch row and key-value head (together the first dimension of the grid), and split.
    """
    LOWEST: tl.constexpr = -(2**63)
    current, _, begin, end = _range_of_split(lengths, num_keys, split_blocks, K, C, HAS_LAYOUT)
    # the split's candidates, by `candidate_range` of sparse_selection.py: the first block of the document is 0
    begin, end = tl.maximum(begin, sink_blocks), tl.minimum(end, current - local_blocks + 1)
    group, split = tl.arange(0, GP), tl.arange(0, SPLITS)
    at = (tl.program_id(0) * tl.num_programs(1) + split[None, :]) * G + group[:, None]
    is_split = (group < G)[:, None] & (split < tl.num_programs(1))[None, :]
    largest_product = tl.max(tl.load(largest + at, mask=is_split, other=float("-inf")), axis=1)
    best = tl.full([1, KP], LOWEST, dtype=tl.int64)
    for start in range(begin, end, STEP):
        block = start + tl.arange(0, STEP)
        from_block = products + (tl.program_id(0).to(tl.int64) * G + group)[:, None] * num_blocks + block[None, :]
        is_candidate = (block < end)[None, :] & (group < G)[:, None]
        product = tl.load(from_block, mask=is_candidate, other=0.0)
        scores = tl.max(tl.where(is_candidate, product - largest_product[:, None], float("-inf")), axis=0)
        packed = tl.where(block < end, sortable(scores, block), LOWEST)
        best = _merge_best(best, packed[None, :], KP)
    rank = tl.arange(0, KP)[None, :]
    tl.store(best_blocks + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * KP + rank, best)


@triton.jit(do_not_specialize=VARYING)
def _attend_kernel(
    query, key, value, best_blocks, slot_of, lengths, partial, partial_lse, scaling, query_stride_b, query_stride_h,
    key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s, num_keys, num_splits, K,
    topk, local_blocks, sink_blocks, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr,
    HAS_LAYOUT: tl.constexpr, HAS_CHOSEN: tl.constexpr,
):  # fmt: skip
    """Attend from a group's queries to a part of their blocks, and write the normalised output and its log-sum-exp.

    There is one program per batch row and key-value head (together the first dimension of the grid), and part. The
    chosen blocks come first, then the local blocks, then the sinks; a part takes `SHARE` consecutive blocks of them.
    """
    LOWEST: tl.constexpr = -(2**63)
    row, head = tl.program_id(0) // K, (tl.program_id(0) % K).to(tl.int64)
    current, position, _, _ = _range_of_split(lengths, num_keys, 0, K, C, HAS_LAYOUT)
    group, dim, value_dim = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, EP)
    base = query + row.to(tl.int64) * query_stride_b + (head * G + group)[:, None] * query_stride_h
    queries = tl.load(base + dim[None, :], mask=(group < G)[:, None] & (dim < D)[None, :], other=0.0)
    key += row.to(tl.int64) * key_stride_b + head * key_stride_h
    value += row.to(tl.int64) * value_stride_b + head * value_stride_h
    rank = tl.arange(0, KP)
    best = tl.full([1, KP], LOWEST, dtype=tl.int64)
    if HAS_CHOSEN:
        split = tl.arange(0, SPLITS * KP)
        from_split = best_blocks + tl.program_id(0) * num_splits * KP + split
        best = tl.topk(tl.load(from_split, mask=split < num_splits * KP, other=LOWEST)[None, :], KP)

    largest = tl.full([M], float("-inf"), dtype=tl.float32)
    total, output = tl.zeros([M], dtype=tl.float32), tl.zeros([M, EP], dtype=tl.float32)
    for index in range(tl.program_id(1) * SHARE, tl.program_id(1) * SHARE + SHARE):
        packed = tl.max(tl.where((rank == index) & (index < topk), best, LOWEST))
        # The number of the block, or -1 if the block does not exist, or if a sink is also a local block.
        local, sink = current + topk - index, index - topk - local_blocks
        block = tl.where(index < topk + local_blocks, local, tl.where(sink <= current - local_blocks, sink, -1))
        block = tl.where(sink < sink_blocks, block, -1)
        block = tl.where(index < topk, tl.where(packed == LOWEST, -1, packed & 0xFFFFFFFF).to(tl.int32), block)
        content = block * C + tl.arange(0, C)
        is_key = (content <= position) & (content >= 0)
        slot = content.to(tl.int64)
        if HAS_LAYOUT:
            slot = tl.load(slot_of + row.to(tl.int64) * num_keys + content, mask=is_key, other=0)
        from_key = key + slot[None, :] * key_stride_s + dim[:, None]
        keys = tl.load(from_key, mask=is_key[None, :] & (dim < D)[:, None], other=0.0)
        logits = tl.dot(queries, keys, input_precision="tf32x3") * scaling
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        lifted = tl.maximum(largest, tl.max(logits, axis=1))
        reference = tl.where(lifted == float("-inf"), 0.0, lifted)
        weights, shrink = tl.exp2(logits - reference[:, None]), tl.exp2(largest - reference)
        from_value = value + slot[:, None] * value_stride_s + value_dim[None, :]
        values = tl.load(from_value, mask=is_key[:, None] & (value_dim < E)[None, :], other=0.0)
        output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision="tf32x3")
        total = total * shrink + tl.sum(weights, axis=1)
        largest = lifted
    out = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * G + group
    total = tl.where(total == 0.0, 1.0, total)  # if there was no key, the log-sum-exp becomes minus infinity
    tl.store(partial_lse + out, largest + tl.log2(total), mask=group < G)
    at = partial + out[:, None] * E + value_dim[None, :]
    output = output / total[:, None]
    tl.store(at, output, mask=(group < G)[:, None] & (value_dim < E)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _merge_kernel(
    partial, partial_lse, output, num_parts, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the outputs of a group's parts; one program per batch row and key-value head."""
    group, part, dim = tl.arange(0, GP), tl.arange(0, PARTS), tl.arange(0, EP)
    at = (tl.program_id(0).to(tl.int64) * num_parts + part[None, :]) * G + group[:, None]
    mask = (group < G)[:, None] & (part < num_parts)[None, :]
    sums = tl.load(partial_lse + at, mask=mask, other=float("-inf"))
    largest = tl.max(sums, axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(sums - largest[:, None]), axis=1)
    result = tl.zeros([GP, EP], dtype=tl.float32)
    out_mask = (group < G)[:, None] & (dim < E)[None, :]
    for index in range(num_parts):
        head = (tl.program_id(0).to(tl.int64) * num_parts + index) * G + group
        weight = tl.exp2(tl.load(partial_lse + head, mask=group < G, other=float("-inf")) - largest)
        result += tl.load(partial + head[:, None] * E + dim[None, :], mask=out_mask, other=0.0) * weight[:, None]
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    at = (tl.program_id(0).to(tl.int64) * G + group)[:, None] * E + dim[None, :]
    tl.store(output + at, result.to(output.dtype.element_ty), mask=out_mask)


def attention_triton_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig,
    block_means: Tensor | None = None,
) -> Tensor:
    """Attend from one new token per row to its sink, local and chosen blocks, with Triton kernels.

    The output equals the output of [`attention_triton`]. There is no gradient. The output of a query that sees no key
    is zero.

    Args:
        query (`[B, H, 1, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): one dtype, bfloat16, float16 or float32.
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.
        block_means (`[B, K, N, D]`, float32, *optional*): mean key of each block of visible tokens, if a cache keeps
            them; they are computed from the keys otherwise. Only the means of complete blocks are read.

    Returns:
        `[B, H, 1, E]` in the dtype of `query`.
    """
    slot_of = lengths = None
    if layout is not None:
        # A compiled or captured step must compute the slots itself, because later calls run it with other layouts.
        is_recorded = is_tracing(layout) or (layout.is_cuda and torch.cuda.is_current_stream_capturing())
        slot_of, lengths = _visible_slots(layout) if is_recorded else remembered(layout, "visible", _visible_slots)
    if block_means is None and settings.topk_blocks:
        block_means = mean_blocks(key, None if slot_of is None else slot_of.long(), settings.block_size)
    sizes = (settings.block_size, settings.topk_blocks, settings.local_blocks, settings.sink_blocks)
    return _decode(query, key, value, slot_of, lengths, block_means, scaling, *sizes)


def _visible_slots(layout: Tensor) -> tuple[Tensor, Tensor]:
    """List the slots of the tokens that the newest token of each row sees.

    Args:
        layout (`[B, 1, 1, S]`, int32): the document and the visibility of each key slot.

    Returns:
        The slots, in ascending order (`[B, S]`, int32; arbitrary behind the last one), and their number (`[B]`, int32).
    """
    key_length = layout.shape[3]
    slot_of, visible = content_order(layout, query_slots(layout, 1, key_length, layout.device), key_length)
    return slot_of.int(), visible.sum(1).int()


@torch.library.custom_op(f"{operator_namespace(__name__)}::decode", mutates_args=())
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_of: Tensor | None,
    lengths: Tensor | None,
    block_means: Tensor | None,
    scaling: float,
    block_size: int,
    topk_blocks: int,
    local_blocks: int,
    sink_blocks: int,
) -> Tensor:
    """Launch the kernels of one decoding step, and return the output `[B, H, 1, E]` in the dtype of `query`.

    Args:
        query, key, value, block_means, scaling: as in [`attention_triton_decode`].
        slot_of, lengths: what [`_visible_slots`] returned, or `None` without a layout.
        block_size, topk_blocks, local_blocks, sink_blocks (`int`): the settings.
    """
    query, key, value = (contiguous_rows(states) for states in (query, key, value))
    batch, heads, _, width = query.shape
    _, kv_heads, num_keys, value_width = value.shape
    groups = heads // kv_heads
    rows = batch * kv_heads
    padded = max(power_of_two(groups), SMALLEST)
    padded_topk = power_of_two(max(topk_blocks, 2))
    widths = {"D": width, "DP": max(power_of_two(width), SMALLEST)}
    layout: dict[str, Any] = {"C": block_size, "HAS_LAYOUT": lengths is not None}
    output = query.new_empty(batch, heads, 1, value_width)
    best_blocks = query.new_empty(0, dtype=torch.int64)
    splits = 1
    with torch.cuda.device_of(query):
        if topk_blocks and block_means is not None:
            num_blocks = max(num_keys // block_size, 1)
            step = max(BLOCKS_PER_STEP, padded_topk)
            split_blocks = step * math.ceil(math.ceil(num_blocks / MOST_SPLITS) / step)
            splits = math.ceil(num_blocks / split_blocks)
            block_means = contiguous_rows(block_means)
            products = query.new_empty(rows, groups, num_blocks, dtype=torch.float32)
            largest = query.new_empty(rows, splits, groups, dtype=torch.float32)
            best_blocks = query.new_empty(rows, splits, padded_topk, dtype=torch.int64)
            _products_kernel[(rows, splits)](
                query, block_means, lengths, products, largest, *query.stride()[:2], *block_means.stride()[:3],
                num_keys, num_blocks, split_blocks, kv_heads, G=groups, M=padded, STEP=step, **widths,
                **layout, num_warps=4,
            )  # fmt: skip
            _best_kernel[(rows, splits)](
                products, largest, lengths, best_blocks, num_keys, num_blocks, split_blocks, kv_heads, local_blocks,
                sink_blocks, G=groups, GP=power_of_two(groups), KP=padded_topk, STEP=step,
                SPLITS=power_of_two(splits), **layout, num_warps=4,
            )  # fmt: skip
        num_attended = topk_blocks + local_blocks + sink_blocks
        share = power_of_two(math.ceil(rows * num_attended / PROGRAMS))  # blocks of a part
        num_parts = math.ceil(num_attended / share)
        partial = query.new_empty(rows, num_parts, groups, value_width, dtype=torch.float32)
        partial_lse = query.new_empty(rows, num_parts, groups, dtype=torch.float32)
        sizes = {"E": value_width, "EP": max(power_of_two(value_width), SMALLEST)}
        _attend_kernel[(rows, num_parts)](
            query, key, value, best_blocks, slot_of, lengths, partial, partial_lse, scaling * math.log2(math.e),
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], num_keys, splits, kv_heads, topk_blocks,
            local_blocks, sink_blocks, G=groups, M=padded, KP=padded_topk, **widths,
            SPLITS=power_of_two(splits), SHARE=share, HAS_CHOSEN=topk_blocks > 0, **sizes, **layout, num_warps=4,
        )  # fmt: skip
        _merge_kernel[(rows,)](
            partial, partial_lse, output, num_parts, G=groups, GP=power_of_two(groups),
            PARTS=power_of_two(num_parts), **sizes, num_warps=4,
        )  # fmt: skip
    return output


@_decode.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Allocate the output of [`_decode`], without computing it."""
    return query.new_empty(*query.shape[:3], value.shape[3])
