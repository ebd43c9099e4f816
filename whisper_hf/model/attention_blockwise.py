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

This file registers the forward and the backward pass as custom operators, which are opaque to `torch.compile`. Each
pass loops over batch rows and key-value heads and extracts the visible tokens of one head from `[B, H, T, D]` tensors.
`blockwise_plan.py` does the bookkeeping, `blockwise_selection.py` chooses the blocks, and `blockwise_products.py` does
the arithmetic.

The shape legend of `blockwise_plan.py` applies here; in addition, `E` is the value dimension.
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

# Sequences of up to this many times the budget are split: fused dense attention computes the first queries.
# In longer sequences the split gains nothing.
LONGEST_SPLIT = 4


def attention_blockwise(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, scaling: float, settings: SparseAttentionConfig
) -> Tensor:
    """Attend to the sink, local and chosen blocks of each query, one key block at a time.

    Output and gradient equal those of the reference in `attention_reference.py`. Half-precision inputs are computed in
    float32, and the output is returned in their dtype; float64 inputs are computed in float64. The output of a query
    that sees no key is zero. The function is differentiable once: a second derivative raises a `RuntimeError`.

    In short sequences without gradients, PyTorch's fused attention computes the first queries, whose past the budget
    covers. It is not used with gradients, because its backward pass is less robust against huge logits.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; `K` divides `H`.
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `[B, H, T, E]` in the dtype of `query`.
    """
    sizes = (settings.block_size, settings.topk_blocks, settings.local_blocks, settings.sink_blocks)
    covered = settings.budget_blocks * settings.block_size
    length = key.shape[2]
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    is_short = query.shape[2] == length and covered < length <= LONGEST_SPLIT * covered
    if needs_grad or layout is not None or not is_short:
        return _attend(query, key, value, layout, scaling, *sizes)[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    first_query, first_key, first_value = (states[:, :, :covered].to(dtype) for states in (query, key, value))
    with maybe_autocast(query.device.type, enabled=False):
        first = sdpa(first_query, first_key, first_value, is_causal=True, scale=scaling, enable_gqa=True)
    rest = _attend(query[:, :, covered:], key, value, None, scaling, *sizes)[0]
    first = first.to(query.dtype)
    return torch.cat([first.transpose(1, 2), rest.transpose(1, 2)], dim=1).transpose(1, 2)


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
    """Attend to all keys of each query's budget, and return what the backward pass needs besides the inputs.

    Returns:
        The output (`[B, H, T, E]`), the log-sum-exp of the logits (`[B, H, T]`, nats), and the chosen blocks
        (`[B, K, T, topk_blocks]`, int32).
    """
    settings = SparseAttentionConfig(block_size, topk_blocks, local_blocks, sink_blocks)
    output, lse, chosen = _empty_outputs(query, key, value, topk_blocks)
    if layout is not None:  # the loop skips queries that see no key
        for result in (output, lse, chosen):
            result.zero_()
    with maybe_autocast(query.device.type, enabled=False):
        for head in _heads(layout, query, key, block_size):
            queries = head.of_queries(query)
            keys = head.of_keys(key)
            values = head.of_keys(value)
            head_chosen = choose_blocks(queries.float(), keys.float(), head.plan, settings)
            head_output, head_lse = forward_head(queries, keys, values, scaling, head_chosen, head.plan, settings)
            head.put_queries(output, head_output)
            head.put_queries(lse[..., None], head_lse[..., None])
            chosen[head.row, head.index, head.queries] = head_chosen
    return output, lse, chosen


def _empty_outputs(query: Tensor, key: Tensor, value: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, log-sum-exp and chosen blocks that [`_forward`] returns, uninitialised."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length = query.shape[:3]
    # In memory the output is `[B, T, H, E]`, so that the layer can merge the heads without a copy.
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
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
    query_grad, key_grad, value_grad = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with maybe_autocast(query.device.type, enabled=False):
        for head in _heads(layout, query, key, block_size):
            head_query_grad, head_key_grad, head_value_grad = backward_head(
                head.of_queries(grad),
                head.of_queries(query),
                head.of_keys(key),
                head.of_keys(value),
                head.of_queries(output),
                head.of_queries(lse[..., None])[..., 0],
                scaling,
                chosen[head.row, head.index, head.queries],
                head.plan,
                settings,
            )
            head.put_queries(query_grad, head_query_grad)
            head.put_keys(key_grad, head_key_grad)
            head.put_keys(value_grad, head_value_grad)
    return query_grad, key_grad, value_grad


_attend, _ = register_attention_op(__name__, _forward, _backward, _empty_outputs)


@dataclass(frozen=True)
class _Head:
    """Access to the visible tokens of one batch row and one key-value head in `[B, H, T, D]` tensors.

    Attributes:
        plan (`RowPlan`): where the visible tokens, blocks and queries of the batch row lie.
        row (`int`): number of the batch row.
        index (`int`): number of the key-value head.
        group (`slice`): the query heads that share this key-value head.
        dtype (`torch.dtype`): the dtype to compute in, float32 or float64.
    """

    plan: RowPlan
    row: int
    index: int
    group: slice
    dtype: torch.dtype

    @property
    def queries(self) -> Tensor | slice:
        """The queries of the row that see at least one key, as an index of the dimension `T`."""
        return slice(None) if self.plan.queries is None else self.plan.queries

    @property
    def keys(self) -> Tensor | slice:
        """The slots of the row that hold visible tokens, as an index of the dimension `S`."""
        return slice(None) if self.plan.keys is None else self.plan.keys

    def of_queries(self, states: Tensor) -> Tensor:
        """Copy this head's queries `[Q, G, D]` from `[B, H, T, D]`, in the dtype to compute in."""
        return states[self.row, self.group].transpose(0, 1)[self.queries].to(self.dtype)

    def of_keys(self, states: Tensor) -> Tensor:
        """Copy this head's keys or values `[M, D]` from `[B, K, S, D]`, in the dtype to compute in."""
        return states[self.row, self.index][self.keys].to(self.dtype)

    def put_queries(self, states: Tensor, rows: Tensor) -> None:
        """Write rows `[Q, G, D]` to the places of this head's queries in `[B, H, T, D]`."""
        states[self.row, self.group].transpose(0, 1)[self.queries] = rows.to(states.dtype)

    def put_keys(self, states: Tensor, rows: Tensor) -> None:
        """Write rows `[M, D]` to the places of this head's keys in `[B, K, S, D]`."""
        states[self.row, self.index][self.keys] = rows.to(states.dtype)


def _heads(layout: Tensor | None, query: Tensor, key: Tensor, block_size: int) -> Iterator[_Head]:
    """Yield every key-value head of every batch row."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    plans = plan_rows(layout, query.shape[0], query.shape[2], key.shape[2], block_size, query.device)
    for row, plan in enumerate(plans):
        for index in range(key.shape[1]):
            yield _Head(plan, row, index, slice(index * groups, (index + 1) * groups), dtype)
