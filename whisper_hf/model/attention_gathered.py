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
"""Masked sparse attention of a few queries at the end of a long sequence: only what they attend to is read.

The shape legend is that of `sparse_selection.py`; also `C` tokens per block and `P` blocks picked per query.
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
    """Attend to the sink, local and chosen blocks, gathered per query; equals the reference.

    Half-precision inputs are scored and normalised in float32. Nothing depends on data but values, so that a decoding
    step can be compiled.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; keys and values may be
            quantized (see `int8_rows.py`), and only what is read is dequantized.
        layout (`[B, 1, 1, S]`, int32, or `None`): must be `None` where `T > 1`.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.
        block_means (`[B, K, N, D]`, float32, *optional*): mean keys of the blocks of content, where a cache keeps them;
            only complete blocks count.

    Returns:
        `[B, H, T, E]` in the dtype of `query`.
    """
    if layout is None and query.shape[2] == 1 and not settings.covers(key.shape[2]) and not is_tracing(query):
        return _attend_last(query, key, value, scaling, settings, block_means)
    slot_of, last = _content(layout, query.shape[2], key.shape[2], key.device)
    if block_means is None:
        block_means = mean_blocks(key, slot_of, settings.block_size)
    grouped = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)  # [B, K, T, G, D]
    picked, is_picked = _pick_blocks(grouped.float(), block_means, last, settings)
    content, allowed = _tokens(picked, is_picked, last, settings.block_size)  # [B, K, T, P * C]
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
    """Attend from one query behind more keys than the budget: which blocks exist is known, and nothing is masked."""
    batch, kv_heads, length = key.shape[:3]
    size = settings.block_size
    current = (length - 1) // size
    first, end = candidate_range(0, current, settings)
    packed = query.view(batch, kv_heads, -1, query.shape[3])
    fixed = torch.tensor([*range(first), *range(end, current + 1)], device=key.device)
    blocks = fixed.expand(batch, kv_heads, -1)  # the last one may be incomplete
    with maybe_autocast(query.device.type, enabled=False):
        if settings.topk_blocks:
            means = mean_blocks(key, None, size) if means is None else means
            past = means[:, :, :current].detach()
            scores = block_scores(packed.detach().float() @ past.transpose(2, 3))[..., first:end]
            blocks = torch.cat([top_recent(scores, settings.topk_blocks) + first, blocks], dim=2)
        attended = blocks.shape[2] * size - -length % size
        gathered = (_gather_blocks(states, blocks, size)[:, :, :attended] for states in (key, value))
        # under autocast, RoPE widens keys and queries
        keys, values = (dequantize_rows(states).to(query.dtype) for states in gathered)
        output = scaled_dot_product_attention(packed, keys, values, scale=scaling)
    return output.view(batch, -1, 1, output.shape[3])


def _gather_blocks(states: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Take `[B, K, P * C, D]` from `[B, K, S, D]`, by blocks `[B, K, P]`; what a block has beyond `S` is arbitrary."""
    batch, heads, length, width = states.shape
    stride, whole = states.stride(1), size * width
    is_whole = states.stride() == (heads * stride, stride, width, 1) and length * width <= stride and not stride % whole
    end = (states.storage_offset() + batch * heads * stride) * states.element_size()
    if not is_whole or end > states.untyped_storage().nbytes():
        slots = blocks[..., None] * size + torch.arange(size, device=blocks.device)
        return _gather(states, slots.flatten(2).clamp(max=length - 1))
    # a buffer of whole blocks, seen as one row per block
    first = torch.arange(0, batch * heads * (stride // whole), stride // whole, device=blocks.device)
    rows = states.as_strided((batch * heads * (stride // whole), whole), (whole, 1))
    return rows.index_select(0, (blocks + first.view(batch, heads, 1)).flatten()).view(batch, heads, -1, width)


def mean_blocks(key: Tensor, slot_of: Tensor | None, block_size: int) -> Tensor:
    """Return the mean keys of the complete blocks of content, `[B, K, S // C, D]`, float32, from all keys."""
    complete = key.shape[2] // block_size
    if slot_of is not None:
        key = key.gather(2, slot_of[:, None, :, None].expand_as(key))
    return dequantize_rows(key[:, :, : complete * block_size]).float().unflatten(2, (complete, block_size)).mean(3)


def _content(
    layout: Tensor | None, query_length: int, key_length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return the slot of each content token (`[B, S]`; `None`: its index) and each query's last one (`[B or 1, T]`)."""
    slots = query_slots(layout, query_length, key_length, device)
    if layout is None:
        return None, slots
    slot_of, visible = content_order(layout, slots, key_length)
    return slot_of, visible.sum(1, keepdim=True) - 1


@torch.no_grad()
def _pick_blocks(
    query: Tensor, block_means: Tensor, last: Tensor, settings: SparseAttentionConfig
) -> tuple[Tensor, Tensor]:
    """Return sink, local and chosen blocks, `[B, K, T, P]`, of queries `[B, K, T, G, D]`, and which it attends to."""
    current = (last.div(settings.block_size, rounding_mode="floor"))[:, None, :, None]  # [B or 1, 1, T, 1]
    block = torch.arange(block_means.shape[2], device=last.device)
    begin, end = candidate_range(0, current, settings)
    is_candidate = (block >= begin) & (block < end)
    scores = block_scores(query @ block_means[:, :, None].transpose(3, 4), block < current)
    scores = scores.masked_fill(~is_candidate, float("-inf"))
    chosen = top_recent(scores, settings.topk_blocks)
    local = current - torch.arange(settings.local_blocks, device=last.device)
    sink = torch.arange(settings.sink_blocks, device=last.device)
    parts = (
        (sink, sink < end),  # later blocks are local
        (local, local >= 0),
        (chosen, scores.gather(3, chosen) > float("-inf")),
    )
    shape = (*query.shape[:3], -1)
    picked = torch.cat([blocks.expand(shape) for blocks, _ in parts], dim=3)
    is_picked = torch.cat([is_attended.expand(shape) for _, is_attended in parts], dim=3)
    return picked, is_picked


def _tokens(picked: Tensor, is_picked: Tensor, last: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return content indices of the tokens of blocks, `[B, K, T, P * C]`, and which of them the query sees."""
    content = picked[..., None] * block_size + torch.arange(block_size, device=picked.device)
    allowed = is_picked[..., None] & (content <= last[:, None, :, None, None])
    return torch.where(allowed, content, 0).flatten(3), allowed.flatten(3)


def _gather(states: Tensor, slots: Tensor) -> Tensor:
    """Take `[B, K, ..., D]` from `[B, K, S, D]`, by slots `[B, K, ...]`."""
    batch, heads, length, width = states.shape
    row = torch.arange(batch * heads, device=states.device).view(batch, heads, *[1] * (slots.dim() - 2))
    head_stride = states.stride(1)
    if states.stride() != (heads * head_stride, head_stride, width, 1) or head_stride % width:
        return states[row // heads, row % heads, slots]
    # a buffer with room to spare, seen as rows: selecting whole rows is several times faster than indexing
    rows = states.as_strided(((batch * heads - 1) * (head_stride // width) + length, width), (width, 1))
    return rows.index_select(0, (row * (head_stride // width) + slots).flatten()).view(*slots.shape, width)
