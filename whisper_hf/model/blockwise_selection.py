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
"""Choose the best-scoring blocks of each query for [`attention_blockwise`], a tile of queries at a time.

The shape legend of `blockwise_plan.py` applies here.
"""

import torch
from torch import Tensor

from .blockwise_plan import RowPlan
from .configuration_whisper_lm import SparseAttentionConfig
from .sparse_selection import block_scores, candidate_range, top_recent

QUERIES_PER_CHOICE = 256  # queries that are scored at once; each has a score for every head of the group and block


def choose_blocks(query: Tensor, key: Tensor, plan: RowPlan, settings: SparseAttentionConfig) -> Tensor:
    """Choose the best-scoring candidate blocks of every query, for one batch row and one key-value head.

    Args:
        query (`[Q, G, D]`, float32): queries of the heads of the group.
        key (`[M, D]`, float32): keys of the content tokens.
        plan (`RowPlan`): plan of the batch row.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `[Q, topk_blocks]`, int32: numbers of blocks, in no particular order. A query with fewer candidates than
        `topk_blocks` has the number `N`, which is no block, in the remaining places.
    """
    num_queries = len(query)
    num_blocks = len(plan.key_bounds) - 1
    topk = settings.topk_blocks
    chosen = torch.full((num_queries, topk), num_blocks, dtype=torch.int32, device=key.device)
    if not topk or not num_blocks:
        return chosen
    means = _block_means(key, plan, settings.block_size)
    begin, end = candidate_range(plan.first_block, plan.query_block, settings)
    for start in range(0, num_queries, QUERIES_PER_CHOICE):
        tile = slice(start, min(start + QUERIES_PER_CHOICE, num_queries))
        if int((end - begin)[tile].max()) <= 0:
            continue
        low = int(plan.first_block[tile].min())
        high = int(plan.query_block[tile].max())
        products = (query[tile].flatten(0, 1) @ means[low:high].T).view(-1, query.shape[1], high - low)
        _exclude(products, plan.first_block[tile, None], plan.query_block[tile, None], low)
        scores = block_scores(products)
        _exclude(scores, begin[tile], end[tile], low)
        best = top_recent(scores, topk)
        is_candidate = scores.gather(1, best) > float("-inf")
        chosen[tile, : best.shape[1]] = torch.where(is_candidate, best + low, num_blocks).int()
    return chosen


def _exclude(scores: Tensor, begin: Tensor, end: Tensor, low: int) -> None:
    """Set the scores of blocks outside a range to minus infinity, in place.

    Args:
        scores (`[..., n]`): scores of the blocks `low` to `low + n - 1`.
        begin, end (broadcastable to `[...]`, int64): each row keeps the blocks `begin <= b < end`.
        low (`int`): number of the first block.
    """
    block = torch.arange(low, low + scores.shape[-1], device=scores.device)
    # Every row keeps the columns between `kept_from` and `kept_until`. They are most columns, so they are left alone.
    kept_from = max(int(begin.max()) - low, 0)
    kept_until = max(int(end.min()) - low, 0)
    for columns in (slice(0, kept_from), slice(kept_until, None)):
        is_excluded = (block[columns] < begin[..., None]) | (block[columns] >= end[..., None])
        scores[..., columns].masked_fill_(is_excluded, float("-inf"))


def _block_means(key: Tensor, plan: RowPlan, block_size: int) -> Tensor:
    """Return the mean key of every block, `[N, D]`; means of incomplete blocks are meaningless and unused."""
    bounds = plan.key_bounds
    num_complete = len(key) // block_size
    if bounds[num_complete] == num_complete * block_size:  # only the last block may be incomplete
        means = key.new_zeros(len(bounds) - 1, key.shape[1])
        means[:num_complete] = key[: num_complete * block_size].unflatten(0, (-1, block_size)).mean(1)
        return means
    lengths = torch.tensor(bounds, device=key.device).diff()
    block = torch.repeat_interleave(torch.arange(len(lengths), device=key.device), lengths)
    return key.new_zeros(len(lengths), key.shape[1]).index_add_(0, block, key) / block_size
