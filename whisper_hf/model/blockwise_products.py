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
"""Compute [`attention_blockwise`] and its gradient for one batch row and one key-value head.

The loop runs over key blocks, and multiplies each block once with all the queries that attend to it:

1. the queries in the block itself,
2. the queries in the next `local_blocks - 1` blocks, or all later queries if it is a sink block; they are contiguous,
3. the queries that chose the block; they are gathered.

If the queries are the last tokens of the only document and begin a block, own and local blocks are computed first, as
one banded product. Each query keeps its weighted sum relative to a reference, `sum_j exp(logit_j - reference) value_j`,
where the reference is the largest logit in its own block (or in the band). The reference is raised only when a later
logit exceeds it by so much that the exponential could overflow.

The backward pass visits the same pairs of queries and blocks. It recomputes the weights from the log-sum-exp instead
of storing them, as FlashAttention does (https://arxiv.org/abs/2205.14135). The gradient of `logit_j` is
`weight_j * (grad . value_j - grad . output)`.

A column that is appended to each tensor saves separate subtractions and sums.

- Queries `[q, -reference]` (backward: `[q, -log-sum-exp]`) times keys `[k, 1]` give the logit minus the reference.
- Weights times values `[v, 1]` give the weighted sum of the values and, in the last column, the sum of the weights.
- Output gradients `[g, -(g . output)]` times values `[v, 1]` give `g . v - g . output`.

The shape legend of `blockwise_plan.py` applies here; in addition, `E` is the value dimension, `W` the number of local
blocks, and `C` the number of tokens per block.
"""

import torch
from torch import Tensor

from .blockwise_plan import RowPlan, attending_tiles, hidden_in_own_block
from .configuration_whisper_lm import SparseAttentionConfig

OVERFLOW_MARGIN = 60.0  # exp(60), summed over thousands of keys, is far below the largest float32
UNDERFLOW = -80.0  # exp of a smaller number is denormal, which is many times slower and contributes nothing
BLOCKS_PER_BAND = 8  # query blocks of the band that are multiplied at once, each with its window of keys


def augmented(
    states: Tensor, factor: float = 1.0, last: Tensor | float = 1.0, before: int = 0, after: int = 0
) -> Tensor:
    """Multiply rows by a factor, append a column, and add rows of zeros before and after.

    Args:
        states (`[M, ..., D]`, float32 or float64): the rows.
        factor (`float`): factor on the rows; it does not apply to the appended column.
        last (`float` or `[M, ...]`): the appended column.
        before, after (`int`): numbers of rows of zeros to add.

    Returns:
        `[before + M + after, ..., D + 1]` in the dtype of `states`, contiguous.
    """
    rows = len(states)
    output = states.new_empty(before + rows + after, *states.shape[1:-1], states.shape[-1] + 1)
    output[:before] = 0.0
    output[before + rows :] = 0.0
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
    """Compute masked sparse attention for one batch row and one key-value head.

    Args:
        query (`[Q, G, D]`), key (`[M, D]`), value (`[M, E]`): float32 or float64.
        scaling (`float`): factor on the logits.
        chosen (`[Q, topk_blocks]`, int32): blocks that each query chose, as [`choose_blocks`] returns them.
        plan (`RowPlan`): plan of the batch row.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        The output (`[Q, G, E]`) and the log-sum-exp of the logits (`[Q, G]`, nats), in the dtype of `query`.
    """
    before, after = _padding(plan, settings)
    queries = augmented(query, scaling, last=0.0, after=after)
    keys = augmented(key, before=before, after=after)
    values = augmented(value, before=before, after=after)
    totals = queries.new_empty(*queries.shape[:2], values.shape[1])  # weighted sums; the last column sums the weights
    if plan.band is not None:
        _forward_band(queries, keys, values, totals, plan.band, settings)
    keys, values = keys[before:], values[before:]
    query_rows, total_rows = queries.flatten(1), totals.flatten(1)  # views: writing to `queries` changes `query_rows`

    for block, own, tiles in attending_tiles(chosen, plan, settings):
        bounds = slice(plan.key_bounds[block], plan.key_bounds[block + 1])
        block_keys = keys[bounds].T
        block_values = values[bounds]
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
    output = totals[..., :-1].div_(totals[..., -1:])
    lse = totals[..., -1].log() - queries[..., -1]  # the last column of the queries is minus the reference
    return output, lse


def _padding(plan: RowPlan, settings: SparseAttentionConfig) -> tuple[int, int]:
    """Return how many rows of zeros give every query block of the band a full window of keys.

    Returns:
        The number of rows to add before the keys, and after keys and queries; both are 0 without a band.
    """
    if plan.band is None:
        return 0, 0
    missing_blocks = max(settings.local_blocks - 1 - plan.band, 0)
    return missing_blocks * settings.block_size, -plan.key_bounds[-1] % settings.block_size


def _exp_(logits: Tensor) -> Tensor:
    """Replace logits by their exponentials, in place, without denormal numbers."""
    return logits.clamp_(min=UNDERFLOW).exp_()


def _weights_(logits: Tensor) -> Tensor:
    """Replace `logit - log-sum-exp` by the attention weight, in place; keys that a query does not see get at most 1."""
    return logits.clamp_(UNDERFLOW, 0.0).exp_()


def _rows(states: Tensor, tile: slice | Tensor) -> Tensor:
    """Take the rows of a tile: a view for a slice, a copy for indices."""
    return states[tile] if isinstance(tile, slice) else states.index_select(0, tile)


def _add_rows(states: Tensor, tile: slice | Tensor, update: Tensor) -> None:
    """Add an update to the rows of a tile, in place."""
    if isinstance(tile, slice):
        states[tile] += update
    else:
        states.index_add_(0, tile, update)


def _raise_reference(logits: Tensor, queries: Tensor, totals: Tensor, tile: slice | Tensor) -> Tensor:
    """Raise the reference of a tile's queries to their largest logit, and rescale their sums accordingly.

    Args:
        logits (`[tile * G, keys of a block]`): logits minus the old reference; overwritten.
        queries (`[Q, G, D + 1]`): queries, whose last column holds minus the reference.
        totals (`[Q, G, E + 1]`): weighted sums relative to the old reference.
        tile (`slice` or int64 tensor): the queries.

    Returns:
        The logits minus the new reference.
    """
    excess = logits.amax(-1).clamp_(min=0.0).unflatten(0, (-1, queries.shape[1]))
    queries[tile, :, -1] -= excess
    totals[tile] *= (-excess).exp_()[..., None]  # not clamped at UNDERFLOW: the sums may be as large as exp(60)
    return logits.sub_(excess.flatten()[:, None])


def _skipped(band: int, settings: SparseAttentionConfig) -> int:
    """Count the key blocks that lie before the local blocks of every query in the band."""
    return max(band - settings.local_blocks + 1, 0)


def _windows(states: Tensor, band: int, settings: SparseAttentionConfig) -> Tensor:
    """View padded key or value rows as overlapping windows, one per query block: `[query blocks, W * C, D]`."""
    size = settings.block_size
    width = settings.local_blocks * size
    return states[_skipped(band, settings) * size :].unfold(0, width, size).transpose(1, 2)


def _band_steps(queries: Tensor, settings: SparseAttentionConfig) -> tuple[list[slice], Tensor]:
    """Return slices of query blocks to multiply at once, and the causal mask of a block (`[C, 1, C]`, 1.0 or 0.0)."""
    size = settings.block_size
    num_blocks = len(queries) // size
    steps = [slice(i, min(i + BLOCKS_PER_BAND, num_blocks)) for i in range(0, num_blocks, BLOCKS_PER_BAND)]
    return steps, queries.new_ones(size, size).tril_()[:, None]


def _forward_band(
    queries: Tensor, keys: Tensor, values: Tensor, totals: Tensor, band: int, settings: SparseAttentionConfig
) -> None:
    """Attend to own and local blocks; fill `totals`, and write minus the reference to the queries' last column.

    Args:
        queries (`[query blocks * C, G, D + 1]`), keys (`[rows, D + 1]`), values (`[rows, E + 1]`): padded as
            [`_padding`] says, with the appended column.
        totals (`[query blocks * C, G, E + 1]`): where to write the weighted sums.
        band (`int`): block of the first query.
        settings (`SparseAttentionConfig`): block size and budget.
    """
    size = settings.block_size
    groups, width = queries.shape[1:]
    key_windows, value_windows = _windows(keys, band, settings), _windows(values, band, settings)
    missing_blocks = settings.local_blocks - 1 - band
    query_blocks = queries.view(-1, size * groups, width)
    total_blocks = totals.view(-1, size * groups, totals.shape[-1])
    steps, seen = _band_steps(queries, settings)
    hidden = seen == 0
    for step in steps:
        logits = query_blocks[step] @ key_windows[step].transpose(1, 2)
        own = logits[..., -size:].unflatten(1, (size, groups))
        own.masked_fill_(hidden, float("-inf"))
        for block in range(step.start, min(step.stop, missing_blocks)):  # the window begins in the padding
            logits[block - step.start, :, : (missing_blocks - block) * size] = float("-inf")
        reference = logits.amax(-1, keepdim=True)
        weights = _exp_(logits.sub_(reference))
        own *= seen  # hidden keys have the weight exp(UNDERFLOW) so far
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
    """Compute the gradient of [`forward_head`].

    Args:
        grad (`[Q, G, E]`): gradient of the output.
        output (`[Q, G, E]`), lse (`[Q, G]`, nats): what [`forward_head`] returned.
        query, key, value, scaling, chosen, plan, settings: the arguments of [`forward_head`].

    Returns:
        The gradients of the query (`[Q, G, D]`), the key (`[M, D]`) and the value (`[M, E]`), in their dtype.
    """
    before, after = _padding(plan, settings)
    queries = augmented(query, scaling, last=-lse, after=after)
    grads = augmented(grad, last=-(grad * output).sum(-1), after=after)
    keys = augmented(key, before=before, after=after)
    values = augmented(value, before=before, after=after)
    grad_query = queries.new_zeros(len(queries), queries.shape[1] * query.shape[2])
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    if plan.band is not None:
        _backward_band(grads, queries, keys, values, (grad_query, grad_key, grad_value), plan.band, settings)
    keys, values = keys[before:], values[before:]
    grad_key, grad_value = grad_key[before:], grad_value[before:]
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
    """Compute the gradient of [`_forward_band`].

    The padding needs no mask. Padded queries have zero output gradients, so they add nothing to the gradients of keys
    and values. Padded keys and values are zero, so they add nothing to the gradients of queries, and their own
    gradients are cut off later.

    Args:
        grads (`[query blocks * C, G, E + 1]`): gradients of the output, with the appended column.
        queries, keys, values, band, settings: as in [`_forward_band`].
        results: where to write the gradient of the queries (`[query blocks * C, G * D]`), and what to add the gradients
            of keys and values to (in their padded shapes).
    """
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
