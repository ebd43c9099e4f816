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
"""The arithmetic of [`attention_blockwise`] for one batch row and one key-value head.

The loop runs over key blocks, and each block is multiplied once with all the queries that attend to it: those of its
own block, those of the following `local_blocks - 1` blocks (and for a sink block, all later ones), which are
contiguous, and those that chose it, which are gathered. Where the queries are the last tokens of one document and
begin a block, own and local blocks are multiplied first, as one band. Sums are kept against a reference logit per
query, the largest in its own block (or band), which is raised only where a later logit exceeds it by so much that the
exponential could overflow. The backward pass walks the same pairs, from the merged log-sum-exp and the product of
output and its gradient, as FlashAttention does (https://arxiv.org/abs/2205.14135): no probabilities are stored.

The appended column: queries carry minus their reference logit (backwards, minus their log-sum-exp) and keys a one, so
that their product is the logit against the reference; values carry a one, so that the weighted sum also sums the
weights; output gradients carry minus their product with the output, so that their product with values is the weight's
centred gradient.

Legend: that of `blockwise_plan.py`; also `G` query heads, `E` value dimension, `W` local blocks of `C` tokens.
"""

import torch
from torch import Tensor

from .blockwise_plan import RowPlan, attending_tiles, hidden_in_own_block
from .configuration_whisper_lm import SparseAttentionConfig

OVERFLOW_MARGIN = 60.0  # exp(60) times thousands of keys is far from float32's maximum
UNDERFLOW = -80.0  # exp of less is denormal, which is many times slower and contributes nothing
BLOCKS_PER_BAND = 8  # of queries, in one product with their windows of keys


def augmented(
    states: Tensor, factor: float = 1.0, last: Tensor | float = 1.0, before: int = 0, after: int = 0
) -> Tensor:
    """Multiply `[M, ..., D]` by a factor, append a column, and add rows of zeros before and after.

    Returns:
        `[before + M + after, ..., D + 1]`, contiguous.
    """
    rows = len(states)
    output = states.new_empty(before + rows + after, *states.shape[1:-1], states.shape[-1] + 1)
    output[:before], output[before + rows :] = 0.0, 0.0
    torch.mul(states, factor, out=output[before : before + rows, ..., :-1])
    output[before : before + rows, ..., -1] = last
    return output


def forward_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    chosen: Tensor,
    plan: RowPlan,
    settings: SparseAttentionConfig,
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query (`[Q, G, D]`), key (`[M, D]`), value (`[M, E]`): float32 or float64.
        scaling (`float`): factor on the logits.
        chosen (`[Q, topk_blocks]`, int32): from [`choose_blocks`].
        plan, settings: of the row.

    Returns:
        output (`[Q, G, E]`) and log-sum-exp of the logits (`[Q, G]`, nats).
    """
    before, after = _padding(plan, settings)
    queries = augmented(query, scaling, last=0.0, after=after)
    keys, values = augmented(key, before=before, after=after), augmented(value, before=before, after=after)
    totals = queries.new_empty(*queries.shape[:2], values.shape[1])  # the last column sums the weights
    if plan.band is not None:
        _forward_band(queries, keys, values, totals, plan.band, settings)
    keys, values = keys[before:], values[before:]
    query_rows, total_rows = queries.flatten(1), totals.flatten(1)

    for block, own, tiles in attending_tiles(chosen, plan, settings):
        bounds = slice(plan.key_bounds[block], plan.key_bounds[block + 1])
        block_keys, block_values = keys[bounds].T, values[bounds]
        if own is not None:
            hidden = hidden_in_own_block(plan, block, own)
            logits = (queries[own] @ block_keys).masked_fill_(hidden, float("-inf"))
            reference = logits.amax(-1, keepdim=True)
            queries[own, :, -1:] = -reference
            totals[own] = _exp_(logits.sub_(reference)).masked_fill_(hidden, 0.0) @ block_values
        for tile in tiles:
            logits = _rows(query_rows, tile).view(-1, keys.shape[1]) @ block_keys
            if logits.amax() > OVERFLOW_MARGIN:
                logits = _raise_reference(logits, queries, totals, tile)
            _add_rows(total_rows, tile, (_exp_(logits) @ block_values).view(-1, total_rows.shape[1]))

    queries, totals = queries[: len(query)], totals[: len(query)]
    return totals[..., :-1].div_(totals[..., -1:]), totals[..., -1].log() - queries[..., -1]


def _padding(plan: RowPlan, settings: SparseAttentionConfig) -> tuple[int, int]:
    """Return rows of zeros to put before and after the content, so that every query block has a full window."""
    if plan.band is None:
        return 0, 0
    missing = max(settings.local_blocks - 1 - plan.band, 0)
    return missing * settings.block_size, -plan.key_bounds[-1] % settings.block_size


def _exp_(logits: Tensor) -> Tensor:
    return logits.clamp_(min=UNDERFLOW).exp_()


def _weights_(logits: Tensor) -> Tensor:
    """Weights from logits less their log-sum-exp: at most 1, also for keys that the query does not see."""
    return logits.clamp_(UNDERFLOW, 0.0).exp_()


def _rows(states: Tensor, tile: slice | Tensor) -> Tensor:
    return states[tile] if isinstance(tile, slice) else states.index_select(0, tile)


def _add_rows(states: Tensor, tile: slice | Tensor, update: Tensor) -> None:
    if isinstance(tile, slice):
        states[tile] += update
    else:
        states.index_add_(0, tile, update)


def _raise_reference(logits: Tensor, queries: Tensor, totals: Tensor, tile: slice | Tensor) -> Tensor:
    """Lift the reference of the queries in a tile to their largest logit; return the logits against it."""
    excess = logits.amax(-1).clamp_(min=0.0).unflatten(0, (-1, queries.shape[1]))
    queries[tile, :, -1] -= excess
    totals[tile] *= (-excess).exp_()[..., None]  # not clamped: what is scaled down may be as large as exp(60)
    return logits.sub_(excess.flatten()[:, None])


def _skipped(band: int, settings: SparseAttentionConfig) -> int:
    """Return the blocks of keys before those that the band attends to."""
    return max(band - settings.local_blocks + 1, 0)


def _windows(states: Tensor, band: int, settings: SparseAttentionConfig) -> Tensor:
    """View padded rows as overlapping windows `[query blocks, W * C, D]`."""
    size, width = settings.block_size, settings.local_blocks * settings.block_size
    return states[_skipped(band, settings) * size :].unfold(0, width, size).transpose(1, 2)


def _band_steps(queries: Tensor, settings: SparseAttentionConfig) -> tuple[list[slice], Tensor]:
    """Return slices of query blocks, and which keys of its own block a query sees (`[C, 1, C]`, 1 or 0)."""
    size = settings.block_size
    num_blocks = len(queries) // size
    steps = [slice(i, min(i + BLOCKS_PER_BAND, num_blocks)) for i in range(0, num_blocks, BLOCKS_PER_BAND)]
    return steps, queries.new_ones(size, size).tril_()[:, None]


def _forward_band(
    queries: Tensor, keys: Tensor, values: Tensor, totals: Tensor, band: int, settings: SparseAttentionConfig
) -> None:
    """Attend to own and local blocks; fill `totals` and the queries' last column."""
    size, (groups, width) = settings.block_size, queries.shape[1:]
    key_windows, value_windows = _windows(keys, band, settings), _windows(values, band, settings)
    missing = settings.local_blocks - 1 - band
    query_blocks, total_blocks = (
        queries.view(-1, size * groups, width),
        totals.view(-1, size * groups, totals.shape[-1]),
    )
    steps, seen = _band_steps(queries, settings)
    hidden = seen == 0
    for step in steps:
        logits = query_blocks[step] @ key_windows[step].transpose(1, 2)
        own = logits[..., -size:].unflatten(1, (size, groups))
        own.masked_fill_(hidden, float("-inf"))
        for block in range(step.start, min(step.stop, missing)):  # the window begins in the padding
            logits[block - step.start, :, : (missing - block) * size] = float("-inf")
        reference = logits.amax(-1, keepdim=True)
        weights = _exp_(logits.sub_(reference))
        own *= seen
        query_blocks[step][..., -1:] = -reference
        torch.matmul(weights, value_windows[step], out=total_blocks[step])


def backward_head(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scaling: float,
    chosen: Tensor,
    plan: RowPlan,
    settings: SparseAttentionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate [`forward_head`].

    Args:
        grad (`[Q, G, E]`): gradient of the output.
        output (`[Q, G, E]`), lse (`[Q, G]`): what the forward pass returned.
        query, key, value, scaling, chosen, plan, settings: as there.

    Returns:
        gradients of the query (`[Q, G, D]`), the key (`[M, D]`) and the value (`[M, E]`).
    """
    before, after = _padding(plan, settings)
    queries = augmented(query, scaling, last=-lse, after=after)
    grads = augmented(grad, last=-(grad * output).sum(-1), after=after)
    keys, values = augmented(key, before=before, after=after), augmented(value, before=before, after=after)
    grad_query = queries.new_zeros(len(queries), queries.shape[1] * query.shape[2])
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    if plan.band is not None:
        _backward_band(grads, queries, keys, values, (grad_query, grad_key, grad_value), plan.band, settings)
    keys, values, grad_key, grad_value = (rows[before:] for rows in (keys, values, grad_key, grad_value))
    query_rows, grad_rows = queries.flatten(1), grads.flatten(1)

    for block, own, tiles in attending_tiles(chosen, plan, settings):
        bounds = slice(plan.key_bounds[block], plan.key_bounds[block + 1])
        for tile in tiles if own is None else [own, *tiles]:
            tile_queries = _rows(query_rows, tile).view(-1, keys.shape[1])
            tile_grads = _rows(grad_rows, tile).view(-1, values.shape[1])
            weights = _weights_(tile_queries @ keys[bounds].T)
            if tile is own:
                weights.unflatten(0, (-1, query.shape[1])).masked_fill_(hidden_in_own_block(plan, block, tile), 0.0)
            grad_value[bounds].addmm_(weights.T, tile_grads)
            logits_grad = (tile_grads @ values[bounds].T).mul_(weights)
            grad_key[bounds].addmm_(logits_grad.T, tile_queries)
            _add_rows(grad_query, tile, (logits_grad @ keys[bounds, :-1]).view(-1, grad_query.shape[1]))
    grad_query = grad_query[: len(query)].mul_(scaling).view_as(query)
    return grad_query, grad_key[: len(key), :-1], grad_value[: len(value), :-1]


def _backward_band(
    grads: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    results: tuple[Tensor, ...],
    band: int,
    settings: SparseAttentionConfig,
) -> None:
    """Differentiate [`_forward_band`]; the padding's zeros make their own part of the gradients vanish."""
    size, groups = settings.block_size, queries.shape[1]
    key_windows, value_windows = _windows(keys, band, settings), _windows(values, band, settings)
    query_blocks, grad_blocks = (rows.view(-1, size * groups, rows.shape[-1]) for rows in (queries, grads))
    grad_query = results[0].view(len(query_blocks), size * groups, -1)
    grad_key, grad_value = (rows.view(-1, size, rows.shape[-1])[_skipped(band, settings) :] for rows in results[1:])
    steps, seen = _band_steps(queries, settings)
    for step in steps:
        weights = _weights_(query_blocks[step] @ key_windows[step].transpose(1, 2))
        own = weights[..., -size:].unflatten(1, (size, groups))
        own *= seen
        logits_grad = (grad_blocks[step] @ value_windows[step].transpose(1, 2)).mul_(weights)
        torch.matmul(logits_grad, key_windows[step][..., :-1], out=grad_query[step])
        for total, part in (
            (grad_key, logits_grad.transpose(1, 2) @ query_blocks[step]),
            (grad_value, weights.transpose(1, 2) @ grad_blocks[step]),
        ):
            for offset, rows in enumerate(part.split(size, dim=1)):
                total[step.start + offset : step.stop + offset] += rows
