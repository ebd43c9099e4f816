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
"""Exact masked sparse attention in stock PyTorch operations, at a cost proportional to length times budget.

This file holds the operator, its gradient and the way between `[B, H, T, D]` tensors and the content of one head; the
arithmetic is in `blockwise_products.py`, the bookkeeping in `blockwise_plan.py`, whose legend holds here too, with `G`
query heads per key-value head and `E` value dimension. Both are custom operators, opaque to `torch.compile`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.utils.generic import maybe_autocast

from .attention_operator import register_attention_op
from .blockwise_plan import RowPlan, plan_rows
from .blockwise_products import backward_head, forward_head
from .blockwise_selection import choose_blocks
from .configuration_whisper_lm import SparseAttentionConfig

LONGEST_SPLIT = 4  # times the budget; in longer sequences dense attention for the first queries gains nothing


def attention_blockwise(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, scaling: float, settings: SparseAttentionConfig
) -> Tensor:
    """Attend to the sink, local and chosen blocks; equals the reference in value and gradient.

    Without gradients, short sequences leave the first queries, whose past the budget covers, to PyTorch's own fused
    attention, whose backward pass is less safe against huge logits.

    Half-precision inputs are computed in float32 and returned in their own dtype; float64 stays float64. Where a query
    sees nothing its output is zero. Differentiable once: a second derivative raises a `RuntimeError`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; `K` divides `H`.
        layout (`[B, 1, 1, S]`, int32, or `None`): see `sparse_selection.py`.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `[B, H, T, E]` in the dtype of `query`.
    """
    sizes = (settings.block_size, settings.topk_blocks, settings.local_blocks, settings.sink_blocks)
    covered, length = settings.budget_blocks * settings.block_size, key.shape[2]
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    is_short = query.shape[2] == length and covered < length <= LONGEST_SPLIT * covered
    if needs_grad or layout is not None or not is_short:
        return _attend(query, key, value, layout, scaling, *sizes)[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (states[:, :, :covered].to(dtype) for states in (query, key, value))
    with maybe_autocast(query.device.type, enabled=False):
        start = sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).to(query.dtype)
    rest = _attend(query[:, :, covered:], key, value, None, scaling, *sizes)[0]
    return torch.cat([start.transpose(1, 2), rest.transpose(1, 2)], dim=1).transpose(1, 2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    block_size: int,
    topk_blocks: int,
    local_blocks: int,
    sink_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output (`[B, H, T, E]`), log-sum-exp (`[B, H, T]`, nats) and chosen blocks (`[B, K, T, topk]`, int32)."""
    settings = SparseAttentionConfig(block_size, topk_blocks, local_blocks, sink_blocks)
    output, lse, chosen = _empty_outputs(query, key, value, topk_blocks)
    if layout is not None:  # some queries may see nothing
        for empty in (output, lse, chosen):
            empty.zero_()
    with maybe_autocast(query.device.type, enabled=False):
        for head in _heads(layout, query, key, value, block_size):
            queries, keys, values = head.of_queries(query), head.of_keys(key), head.of_keys(value)
            picked = choose_blocks(queries.float(), keys.float(), head.plan, settings)
            result, sums = forward_head(queries, keys, values, scaling, picked, head.plan, settings)
            head.put_queries(output, result)
            head.put_queries(lse[..., None], sums[..., None])
            chosen[head.row, head.index, head.queries] = picked
    return output, lse, chosen


def _empty_outputs(query: Tensor, key: Tensor, value: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length = query.shape[:3]
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # as the layer wants it, uncopied
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    chosen = query.new_empty((*key.shape[:2], query.shape[2], topk), dtype=torch.int32)
    return output, lse, chosen


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    chosen: Tensor,
    layout: Tensor | None,
    scaling: float,
    block_size: int,
    topk_blocks: int,
    local_blocks: int,
    sink_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, in their shapes and dtypes."""
    settings = SparseAttentionConfig(block_size, topk_blocks, local_blocks, sink_blocks)
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with maybe_autocast(query.device.type, enabled=False):
        for head in _heads(layout, query, key, value, block_size):
            upstream, queries, result, sums = (head.of_queries(x) for x in (grad, query, output, lse[..., None]))
            query_grad, key_grad, value_grad = backward_head(
                upstream,
                queries,
                head.of_keys(key),
                head.of_keys(value),
                result,
                sums[..., 0],
                scaling,
                chosen[head.row, head.index, head.queries],
                head.plan,
                settings,
            )
            head.put_queries(grads[0], query_grad)
            head.put_keys(grads[1], key_grad)
            head.put_keys(grads[2], value_grad)
    return grads


_attend, _ = register_attention_op(__name__, _forward, _backward, _empty_outputs)


@dataclass(frozen=True)
class _Head:
    """One batch row and key head: its content in rows of float32 (or float64), and the way back."""

    plan: RowPlan
    row: int
    index: int
    group: slice
    dtype: torch.dtype

    @property
    def queries(self) -> Tensor | slice:
        """Which of the row's queries see anything."""
        return slice(None) if self.plan.queries is None else self.plan.queries

    @property
    def keys(self) -> Tensor | slice:
        """Which of the row's slots hold content."""
        return slice(None) if self.plan.keys is None else self.plan.keys

    def of_queries(self, states: Tensor) -> Tensor:
        """Take `[Q, G, D]` from `[B, H, T, D]`."""
        return states[self.row, self.group].transpose(0, 1)[self.queries].to(self.dtype)

    def of_keys(self, states: Tensor) -> Tensor:
        """Take `[M, D]` from `[B, K, S, D]`."""
        return states[self.row, self.index][self.keys].to(self.dtype)

    def put_queries(self, states: Tensor, rows: Tensor) -> None:
        """Write `[Q, G, D]` to `[B, H, T, D]`."""
        states[self.row, self.group].transpose(0, 1)[self.queries] = rows.to(states.dtype)

    def put_keys(self, states: Tensor, rows: Tensor) -> None:
        """Write `[M, D]` to `[B, K, S, D]`."""
        states[self.row, self.index][self.keys] = rows.to(states.dtype)


def _heads(layout: Tensor | None, query: Tensor, key: Tensor, value: Tensor, block_size: int) -> Iterator[_Head]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    plans = plan_rows(layout, query.shape[0], query.shape[2], key.shape[2], block_size, query.device)
    for row, plan in enumerate(plans):
        for index in range(key.shape[1]):
            yield _Head(plan, row, index, slice(index * groups, (index + 1) * groups), dtype)
