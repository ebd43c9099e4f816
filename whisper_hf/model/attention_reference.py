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
"""Attention over a given set of keys, written as the equation reads: the oracle for every faster path."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the allowed keys; a query that is allowed none returns zeros.

    Half-precision inputs are computed in float32 and returned in their own dtype; float64 stays float64.

    Args:
        query (`[B, H, T, D]`, any float): queries.
        key (`[B, K, S, D]`, any float): keys; `K` divides `H`, and `H // K` query heads share a key head.
        value (`[B, K, S, E]`, any float): values.
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
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with explicit weights; `attention_mask` is `[B, H or 1, T, S]` bool, or `None` for plain causal.

    Returns:
        output (`[B, T, H, D]`) and weights (`[B, H, T, S]`), in the dtype of `query`.
    """
    if attention_mask is None:
        query_length, key_length = query.shape[2], key.shape[2]
        attention_mask = query.new_ones(query_length, key_length, dtype=torch.bool)
        attention_mask = attention_mask.tril(key_length - query_length)[None, None]
    output, weights = attention_reference(query, key, value, attention_mask, scaling)
    if dropout:
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        output = weights @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return output.transpose(1, 2).contiguous(), weights
