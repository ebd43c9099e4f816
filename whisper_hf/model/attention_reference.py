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

import torch
from torch import Tensor


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
    with torch.autocast(query.device.type, enabled=False):
        key, value = (states.to(dtype).repeat_interleave(groups, dim=1) for states in (key, value))
        logits = query.to(dtype) @ key.transpose(2, 3) * scaling
        # the finite fill and the product keep rows without any allowed key at zero, in value and in gradient
        weights = logits.masked_fill(~allowed, torch.finfo(dtype).min).softmax(-1) * allowed
        return (weights @ value).to(query.dtype), weights.to(query.dtype)
