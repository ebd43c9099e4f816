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
"""Masked sparse attention computed from its definition: the oracle that every faster path must equal.

For each query `t` and each group of query heads `h` that share a key head:

    content   =  the visible keys of t's document up to t, numbered 0, 1, 2, ...
    block b   =  content b * block_size to (b + 1) * block_size - 1;  c = the block of the last content
    e_h(b)    =  q_h . mean of the keys of b,  for the complete blocks b < c
    score(b)  =  max_h (e_h(b) - max_b' e_h(b'))
    attended  =  the first sink_blocks blocks, the last local_blocks blocks, and between them
                 the topk_blocks blocks with the highest scores (among equals, the later block)
    output_h  =  sum over the attended keys j of softmax_j(scaling * q_h . k_j) v_j

The shape legend of `sparse_selection.py` applies here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .attention_masks import visible_rows
from .configuration_whisper_lm import SparseAttentionConfig
from .sparse_selection import selected_keys


def masked_sparse_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig | None,
    sliding_window: int | None = None,
    needs_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the sink, local and chosen blocks of each query, by the definition at the top of this file.

    The cost is O(T * S). Half-precision inputs are computed in float32 and returned in their own dtype; float64 stays
    float64. The result is differentiable; the choice of blocks carries no gradient.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; `K` divides `H`.
        attention_mask: a layout, `None`, or a `[B, 1 or H, T, S]` mask, bool or additive.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`, *optional*): block size and budget; `None` for all visible keys.
        sliding_window (`int`, *optional*): also hide keys that are this many slots or more in the past.
        needs_weights (`bool`): whether to return the weights, which take O(T * S) memory.

    Returns:
        output (`[B, H, T, E]`) and attention weights (`[B, H, T, S]`, or `None`), in the dtype of `query`.
    """
    steps = _allowed_keys(query, key, attention_mask, settings, sliding_window)
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    if needs_weights and needs_grad:  # in one step, so that gradients flow through the weights that are returned
        allowed = torch.cat([allowed for _, allowed in steps], dim=2)
        return attention_reference(query, key, value, allowed, scaling)
    outputs, weights = [], []
    for rows, allowed in steps:
        output, weight = attention_reference(query[:, :, rows], key, value, allowed, scaling)
        outputs.append(output)
        if needs_weights:
            weights.append(weight)
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=2) if needs_weights else None


def _allowed_keys(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    settings: SparseAttentionConfig | None,
    sliding_window: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a slice of queries and the keys that they attend to, `[B or 1, 1 or K or H, rows, S]` bool."""
    for rows, visible in visible_rows(attention_mask, query, key, sliding_window):
        if settings is None or settings.covers(key.shape[2]):
            yield rows, visible
        else:
            yield rows, selected_keys(query[:, :, rows], key, visible, settings)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a given set of keys; a query without any allowed key returns zeros.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; `H // K` query heads
            share a key head.
        allowed (`[B or 1, 1 or K or H, T, S]`, bool): which keys each query attends to.
        scaling (`float`): factor on the logits.

    Returns:
        output (`[B, H, T, E]`) and attention weights (`[B, H, T, S]`), in the dtype of `query`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    if allowed.shape[1] == key.shape[1]:
        allowed = allowed.repeat_interleave(groups, dim=1)
    with maybe_autocast(query.device.type, enabled=False):
        key, value = (states.to(dtype).repeat_interleave(groups, dim=1) for states in (key, value))
        logits = query.to(dtype) @ key.transpose(2, 3) * scaling
        # the finite fill and the product keep rows without any allowed key at zero, in value and in gradient
        weights = logits.masked_fill(~allowed, torch.finfo(dtype).min).softmax(-1) * allowed
        return (weights @ value).to(query.dtype), weights.to(query.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sparse_attention: SparseAttentionConfig | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Apply the reference as the `eager` attention implementation of a model.

    Args:
        module (`nn.Module`): the attention layer.
        query, key, value, attention_mask, scaling: as in [`masked_sparse_attention_reference`].
        dropout (`float`): probability with which a weight is dropped in training.
        sparse_attention (`SparseAttentionConfig`, *optional*): the layer's budget; `None` for a dense layer.

    Returns:
        output (`[B, T, H, E]`) and weights (`[B, H, T, S]`), in the dtype of `query`.
    """
    output, weights = masked_sparse_attention_reference(query, key, value, attention_mask, scaling, sparse_attention)
    if dropout and weights is not None:
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        output = weights @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return output.transpose(1, 2).contiguous(), weights
