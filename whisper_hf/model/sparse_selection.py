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
"""Define masked sparse attention: the layout of a batch, and the blocks to which each query attends.

Legend: `B` batch, `T` query tokens, `S` key slots (`T` of them hold the queries' own keys, the rest come from a
cache), `H` query heads, `K` key-value heads, `G = H / K` heads per group, `D` head dimension, `N` blocks.

A *layout* is an int32 tensor `[B, 1, 1, S]` with one value per key slot: `d > 0` is a visible token of document `d`,
`-d` is a token of document `d` that the attention mask hides, and `0` is a slot that nothing was written to. The
queries are the last `T` written slots. `None` stands for one document without hidden tokens. A layout has four
dimensions because transformers passes four-dimensional masks on unchanged.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import SparseAttentionConfig

LEAST_TO_PARTITION = 4096  # number of scores from which on numpy's partition is faster than `topk`, up to four times


def content_layout(visible: Tensor, starts: Tensor, query_end: int | Tensor) -> Tensor:
    """Encode which tokens of a batch are visible, and to which documents they belong, as a layout.

    Args:
        visible (`[B, S]`, bool): whether the attention mask shows the token in a slot.
        starts (`[B, S]`, bool): whether a slot begins a document; the first slot always does.
        query_end (`int` or 0-dim tensor): number of written slots, including those of the queries.

    Returns:
        `[B, 1, 1, S]`, int32: the layout.
    """
    document = 1 + starts[:, 1:].int().cumsum(-1)
    document = torch.nn.functional.pad(document, (1, 0), value=1)
    slot = torch.arange(visible.shape[1], device=visible.device)
    layout = torch.where(visible, document, -document) * (slot < query_end)
    return layout.to(torch.int32)[:, None, None]


def query_slots(layout: Tensor | None, query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Return the slots that hold the queries' own keys, `[B or 1, T]`, int64."""
    offset = torch.arange(query_length, device=device)[None]
    if layout is None:
        return key_length - query_length + offset
    written = (layout[:, 0, 0] != 0).sum(-1, keepdim=True)
    return written - query_length + offset


def visible_keys(layout: Tensor | None, slots: Tensor, key_length: int, sliding_window: int | None = None) -> Tensor:
    """Expand a layout to a causal mask: a query may see the visible tokens of its own document up to itself.

    Args:
        layout (`[B, 1, 1, S]`, int32, or `None`): the layout.
        slots (`[B or 1, T]`, int64): the queries' slots, or a slice of them.
        key_length (`int`): `S`.
        sliding_window (`int`, *optional*): also hide keys that are this many slots or more in the past.

    Returns:
        `[B or 1, 1, T, S]`, bool: `True` where the query may attend.
    """
    key_slot = torch.arange(key_length, device=slots.device)
    visible = key_slot <= slots[..., None]
    if sliding_window is not None:
        visible = visible & (key_slot > slots[..., None] - sliding_window)
    if layout is not None:
        document = layout[:, 0, 0]
        own_document = document.gather(1, slots.expand(document.shape[0], -1)).abs()
        visible = visible & (document[:, None] == own_document[..., None])
    return visible[:, None]


def content_order(layout: Tensor, last: Tensor, key_length: int) -> tuple[Tensor, Tensor]:
    """List the slots of the content that the last query of each row sees, in order.

    Args:
        layout (`[B, 1, 1, S]`, int32): the layout.
        last (`[B, 1]`, int64): slot of the last query.
        key_length (`int`): `S`.

    Returns:
        The slot of each content token (`[B, S]`, int64; arbitrary beyond a row's content), and which slots hold content
        (`[B, S]`, bool).
    """
    document = layout[:, 0, 0]
    slot = torch.arange(key_length, device=layout.device)
    visible = (document == document.gather(1, last).abs()) & (slot <= last)
    target = torch.where(visible, visible.cumsum(1) - 1, key_length)  # hidden slots go to a column that is cut off
    slot_of = slot.new_zeros(len(document), key_length + 1).scatter(1, target, slot.expand_as(target))
    return slot_of[:, :-1], visible


def candidate_range(first_block: Any, current_block: Any, settings: SparseAttentionConfig) -> tuple[Any, Any]:
    """Return the blocks among which a query may choose: those after the sinks and before its local blocks.

    `begin = first_block + sink_blocks` and `end = current_block - local_blocks + 1`; block `b` is a candidate if
    `begin <= b < end`. Every candidate is complete. The Triton kernels repeat these two lines and name this function.

    Args:
        first_block (`int` or int tensor): number of the first block of the query's document.
        current_block (`int` or int tensor): number of the block of the last key that the query sees.
        settings (`SparseAttentionConfig`): the budget.

    Returns:
        `begin` and `end`, like the arguments.
    """
    return first_block + settings.sink_blocks, current_block - settings.local_blocks + 1


@torch.no_grad()
def selected_keys(query: Tensor, key: Tensor, visible: Tensor, settings: SparseAttentionConfig) -> Tensor:
    """Restrict a causal mask to the sink, local and best-scoring blocks of each query.

    Each query numbers the keys it sees 0, 1, 2, … (their *content positions*); block `b` holds the content positions
    `[b * block_size, (b + 1) * block_size)`. Blocks are scored by [`block_scores`], in float32, from the products of
    queries with the mean of the block's keys; ties go to the more recent block. No gradient flows through.

    Args:
        query (`[B, H, T, D]`, any float): queries as attention sees them.
        key (`[B, K, S, D]`, any float): keys as attention sees them; `K` divides `H`.
        visible (`[B or 1, 1, T, S]`, bool): the causal mask.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `[B, K, T, S]`, bool: `True` where the query attends.
    """
    num_blocks = math.ceil(key.shape[2] / settings.block_size)
    position = (visible.cumsum(-1) - 1).clamp(min=0)
    block_of_key = position // settings.block_size  # [B, 1, T, S]
    current = block_of_key[..., -1:]

    grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, K, G, T, D]
    with maybe_autocast(query.device.type, enabled=False):
        products = (grouped @ key.float()[:, :, None].transpose(3, 4)).masked_fill(~visible[:, :, None], 0.0)
    sums = products.new_zeros(*products.shape[:4], num_blocks)
    # the product with a block's mean key is the mean of the products with its keys, as every candidate is complete
    sums = sums.scatter_add(-1, block_of_key[:, :, None].expand_as(products), products)

    block = torch.arange(num_blocks, device=key.device)
    begin, end = candidate_range(0, current, settings)
    is_candidate = (block >= begin) & (block < end)
    is_fixed = (block < begin) | (block >= end)
    scores = block_scores((sums / settings.block_size).transpose(2, 3), past=block < current)
    chosen = is_fixed | top_blocks(scores, is_candidate, settings.topk_blocks)
    return chosen.gather(-1, block_of_key.expand(*chosen.shape[:3], -1)) & visible


def block_scores(products: Tensor, past: Tensor | None = None) -> Tensor:
    """Reduce the products of each head of a group with the blocks to one score per block.

    `score(b) = max_h (e_h(b) - max_b' e_h(b'))`, where `b'` runs over all complete blocks of the past, sinks and local
    blocks included. A head with large logits therefore does not outvote the other heads, and a head that attends to a
    sink or a local block anyway has little influence.

    Args:
        products (`[..., G, N]`, float32): `e_h(b)`, each head's query times the blocks' mean keys; may be overwritten.
        past (broadcastable to `[..., N]`, bool): the complete blocks of the query's past; `None` for all blocks.

    Returns:
        `[..., N]`, float32: at most 0, which the best block of each head has; arbitrary outside the past.
    """
    if past is not None:
        products = products.masked_fill(~past[..., None, :], float("-inf"))
    return products.sub_(products.amax(-1, keepdim=True)).amax(-2)


def top_blocks(scores: Tensor, candidate: Tensor, topk: int) -> Tensor:
    """Mark the `topk` best-scoring candidates of each row; among equals, the more recent (larger index) wins.

    Args:
        scores (`[..., N]`, float32): one score per block.
        candidate (broadcastable to `[..., N]`, bool): blocks that may be chosen.
        topk (`int`): how many to mark; all candidates, where there are fewer.

    Returns:
        `[..., N]`, bool.
    """
    best = _top_by_sort(scores.masked_fill(~candidate, float("-inf")), topk)
    marked = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    return marked & candidate


def top_recent(scores: Tensor, topk: int) -> Tensor:
    """Return the indices of the `topk` largest of each row of `[..., N]`; among equals the larger index wins.

    A stable sort breaks the ties. It is slow, so eager calls use it only for the rows with a tie at the boundary.
    """
    num_blocks = scores.shape[-1]
    if num_blocks <= topk:
        return torch.arange(num_blocks, device=scores.device).expand_as(scores)
    if not topk or is_tracing(scores):
        return _top_by_sort(scores, topk)
    values, indices = _top_and_next(scores, topk)
    indices = indices[..., :topk]
    tied = values[..., :topk].amin(-1) == values[..., topk]
    if tied.any():  # which of the tied indices is among the first `topk` is arbitrary so far
        tied &= values[..., topk] > float("-inf")
        indices[tied] = _top_by_sort(scores[tied], topk)
    return indices


def _top_and_next(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return values and indices, `[..., topk + 1]`, of the `topk` largest in any order, and of the next largest."""
    if scores.device.type != "cpu" or scores.numel() < LEAST_TO_PARTITION:
        return scores.topk(topk + 1)
    following = scores.shape[-1] - 1 - topk
    indices = torch.from_numpy(scores.numpy().argpartition(following)[..., following:]).flip(-1)
    return scores.gather(-1, indices), indices


def _top_by_sort(scores: Tensor, topk: int) -> Tensor:
    """Return the indices of the `topk` largest, `[..., topk]`, in falling order; among equals the larger is first."""
    recent_first = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return scores.shape[-1] - 1 - recent_first
