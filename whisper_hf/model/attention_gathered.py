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
"""Masked sparse attention for a few queries at the end of a long sequence, which reads only the attended keys.

The keys and values of the attended blocks are gathered for each query. If a cache keeps the mean key of each block, the
cost grows with the length of the sequence only by one product of the query with each mean.

The shape legend of `sparse_selection.py` applies here; in addition, `C` is the number of tokens per block, `E` the
value dimension, and `P` the number of blocks that are gathered per query (sink, local and chosen ones).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import SparseAttentionConfig
from .int8_rows import dequantize_rows
from .sparse_selection import block_scores, candidate_range, content_order, query_slots, top_recent


def attention_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig,
    block_means: Tensor | None = None,
) -> Tensor:
    """Attend to the sink, local and chosen blocks of each query, after gathering their keys and values.

    The output equals the output of the reference in `attention_reference.py`. Half-precision inputs are scored and
    normalised in float32. The shapes of intermediate results do not depend on the contents of tensors, so that a
    decoding step can be compiled.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; keys and values may be
            quantized to int8 rows (see `int8_rows.py`), of which only the gathered ones are dequantized.
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it; it must be `None` if `T > 1`.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.
        block_means (`[B, K, N, D]`, float32, *optional*): mean key of each block of visible tokens, if a cache keeps
            them; they are computed from the keys otherwise. Only the means of complete blocks are read.

    Returns:
        `[B, H, T, E]` in the dtype of `query`.
    """
    if layout is None and query.shape[2] == 1 and not settings.covers(key.shape[2]) and not is_tracing(query):
        return _attend_last(query, key, value, scaling, settings, block_means)
    slot_of, last = _order_content(layout, query.shape[2], key.shape[2], key.device)
    if block_means is None:
        block_means = mean_blocks(key, slot_of, settings.block_size)
    grouped = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)  # [B, K, T, G, D]
    blocks, is_attended = _attended_blocks(grouped.float(), block_means, last, settings)
    content, allowed = _tokens_of_blocks(blocks, is_attended, last, settings.block_size)  # [B, K, T, P * C]
    slots = content if slot_of is None else slot_of[:, None, None].expand(*content.shape[:3], -1).gather(3, content)

    dtype = torch.promote_types(query.dtype, torch.float32)
    with maybe_autocast(query.device.type, enabled=False):
        logits = (grouped.to(dtype) * scaling) @ dequantize_rows(_gather(key, slots)).to(dtype).transpose(3, 4)
        logits = logits.masked_fill(~allowed[..., None, :], torch.finfo(dtype).min)
        weights = logits.softmax(-1) * allowed[..., None, :]
        output = weights @ dequantize_rows(_gather(value, slots)).to(dtype)
    return output.transpose(2, 3).flatten(1, 2).to(query.dtype)


def _attend_last(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, settings: SparseAttentionConfig, means: Tensor | None
) -> Tensor:
    """Attend from the last token of a sequence that is longer than the budget and has no hidden tokens.

    In this case the sink, local and candidate blocks are known from the length alone, and no key needs a mask: the
    gathered keys and values go through PyTorch's fused attention.

    Args:
        query (`[B, H, 1, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): as in [`attention_gathered`].
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.
        means (`[B, K, N, D]`, float32, or `None`): mean key of each block, if a cache keeps them.

    Returns:
        `[B, H, 1, E]` in the dtype of `query`.
    """
    batch, kv_heads, length = key.shape[:3]
    size = settings.block_size
    current = (length - 1) // size
    begin, end = candidate_range(0, current, settings)
    grouped = query.view(batch, kv_heads, -1, query.shape[3])  # [B, K, G, D]
    sink_and_local = torch.tensor([*range(begin), *range(end, current + 1)], device=key.device)
    blocks = sink_and_local.expand(batch, kv_heads, -1)  # the current block is last, because it may be incomplete
    with maybe_autocast(query.device.type, enabled=False):
        if settings.topk_blocks:
            means = mean_blocks(key, None, size) if means is None else means
            past = means[:, :, :current].detach()
            scores = block_scores(grouped.detach().float() @ past.transpose(2, 3))[..., begin:end]
            blocks = torch.cat([top_recent(scores, settings.topk_blocks) + begin, blocks], dim=2)
        num_attended = blocks.shape[2] * size - ((current + 1) * size - length)
        gathered = (_gather_blocks(states, blocks, size)[:, :, :num_attended] for states in (key, value))
        # Under autocast the dtypes may differ, because RoPE widens queries and keys to float32.
        keys, values = (dequantize_rows(states).to(query.dtype) for states in gathered)
        output = scaled_dot_product_attention(grouped, keys, values, scale=scaling)
    return output.view(batch, -1, 1, output.shape[3])


def _gather_blocks(states: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Gather the rows `[B, K, P * C, D]` of blocks `[B, K, P]` from `[B, K, S, D]`; rows beyond `S` are arbitrary."""
    batch, heads, length, width = states.shape
    head_stride = states.stride(1)
    numbers_per_block = size * width
    is_buffer_of_blocks = (
        states.stride() == (heads * head_stride, head_stride, width, 1)
        and length * width <= head_stride
        and head_stride % numbers_per_block == 0
    )
    end = (states.storage_offset() + batch * heads * head_stride) * states.element_size()
    if not is_buffer_of_blocks or end > states.untyped_storage().nbytes():
        slots = blocks[..., None] * size + torch.arange(size, device=blocks.device)
        return _gather(states, slots.flatten(2).clamp(max=length - 1))
    # The states are the beginning of a buffer of whole blocks: view it as a matrix with one row per block.
    blocks_per_head = head_stride // numbers_per_block
    first = torch.arange(0, batch * heads * blocks_per_head, blocks_per_head, device=blocks.device)
    rows = states.as_strided((batch * heads * blocks_per_head, numbers_per_block), (numbers_per_block, 1))
    return rows.index_select(0, (blocks + first.view(batch, heads, 1)).flatten()).view(batch, heads, -1, width)


def mean_blocks(key: Tensor, slot_of: Tensor | None, block_size: int) -> Tensor:
    """Compute the mean key of every complete block of visible tokens.

    Args:
        key (`[B, K, S, D]`): any float dtype, or quantized to int8 rows.
        slot_of (`[B, S]`, int64, or `None`): slot of each visible token, in order; `None`: the token's own number.
        block_size (`int`): `C`.

    Returns:
        `[B, K, S // C, D]`, float32. Where hidden tokens leave a row fewer complete blocks, the last means are
        arbitrary.
    """
    num_complete = key.shape[2] // block_size
    if slot_of is not None:
        key = key.gather(2, slot_of[:, None, :, None].expand_as(key))
    complete = dequantize_rows(key[:, :, : num_complete * block_size]).float()
    return complete.unflatten(2, (num_complete, block_size)).mean(3)


def _order_content(
    layout: Tensor | None, query_length: int, key_length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Number the visible tokens, and find the last one that each query sees.

    Returns:
        The slot of each visible token (`[B, S]`, or `None` if slots and tokens have the same numbers), and the number
        of the last visible token that each query sees (`[B or 1, T]`).
    """
    slots = query_slots(layout, query_length, key_length, device)
    if layout is None:
        return None, slots
    slot_of, visible = content_order(layout, slots, key_length)
    return slot_of, visible.sum(1, keepdim=True) - 1


@torch.no_grad()
def _attended_blocks(
    query: Tensor, block_means: Tensor, last: Tensor, settings: SparseAttentionConfig
) -> tuple[Tensor, Tensor]:
    """List the sink, local and chosen blocks of every query.

    Args:
        query (`[B, K, T, G, D]`, float32): queries by group.
        block_means (`[B, K, N, D]`, float32): mean key of each block.
        last (`[B or 1, T]`, int64): number of the last visible token that each query sees.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        Numbers of blocks (`[B, K, T, P]`, int64), and whether the query attends to each of them (`[B, K, T, P]`,
        bool): near the beginning of a sequence some of the listed blocks do not exist or are listed twice.
    """
    current = last.div(settings.block_size, rounding_mode="floor")[:, None, :, None]  # [B or 1, 1, T, 1]
    block = torch.arange(block_means.shape[2], device=last.device)
    begin, end = candidate_range(0, current, settings)
    is_candidate = (block >= begin) & (block < end)
    scores = block_scores(query @ block_means[:, :, None].transpose(3, 4), block < current)
    scores = scores.masked_fill(~is_candidate, float("-inf"))
    chosen = top_recent(scores, settings.topk_blocks)
    local = current - torch.arange(settings.local_blocks, device=last.device)
    sink = torch.arange(settings.sink_blocks, device=last.device)
    parts = (
        (sink, sink < end),  # a sink block from `end` on is already listed as a local block, or lies in the future
        (local, local >= 0),
        (chosen, scores.gather(3, chosen) > float("-inf")),
    )
    shape = (*query.shape[:3], -1)
    blocks = torch.cat([part.expand(shape) for part, _ in parts], dim=3)
    is_attended = torch.cat([is_valid.expand(shape) for _, is_valid in parts], dim=3)
    return blocks, is_attended


def _tokens_of_blocks(blocks: Tensor, is_attended: Tensor, last: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the tokens in blocks, `[B, K, T, P * C]`, and whether the query attends to each token."""
    content = blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)
    allowed = is_attended[..., None] & (content <= last[:, None, :, None, None])
    return torch.where(allowed, content, 0).flatten(3), allowed.flatten(3)


def _gather(states: Tensor, slots: Tensor) -> Tensor:
    """Gather the rows `[B, K, ..., D]` of slots `[B, K, ...]` from `[B, K, S, D]`."""
    batch, heads, length, width = states.shape
    row = torch.arange(batch * heads, device=states.device).view(batch, heads, *[1] * (slots.dim() - 2))
    head_stride = states.stride(1)
    if states.stride() != (heads * head_stride, head_stride, width, 1) or head_stride % width:
        return states[row // heads, row % heads, slots]
    # The states are the beginning of a buffer: view it as a matrix with one row per slot, because selecting rows of a
    # matrix is several times faster than indexing.
    slots_per_head = head_stride // width
    rows = states.as_strided(((batch * heads - 1) * slots_per_head + length, width), (width, 1))
    return rows.index_select(0, (row * slots_per_head + slots).flatten()).view(*slots.shape, width)
