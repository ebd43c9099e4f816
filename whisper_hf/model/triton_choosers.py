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
"""List, for each block, the queries that chose it (its *choosers*), by a counting sort in Triton.

With these lists, one program can compute everything that belongs to a block, such as its gradient, without atomic
additions. A *pair* is a query and a block that it chose. Queries are divided into runs of consecutive queries:

1. A first kernel counts how often each run chose each block.
2. The cumulative sum of these counts, block by block and run by run, is the place of each run's first pair in the list.
3. A second kernel writes the pairs of each run to these places, in the order of the queries.

The shape legend of `triton_plan.py` applies here.
"""

import torch
from torch import Tensor

from .triton_optional import VARYING, ceil_divide, power_of_two, tl, triton

ENTRIES_PER_RUN = 512  # queries of a run times blocks that each may choose, padded to a power of two


@triton.jit(do_not_specialize=VARYING)
def _count_kernel(
    chosen, counts, num_queries, first_query, end_query, num_blocks, num_runs, topk, KP: tl.constexpr, RUN: tl.constexpr
):
    """Count how often a run chose each block; one program per run and key-value head.

    Counts are shifted by one place, so that their cumulative sum says where each list begins.
    """
    run, head = tl.program_id(0), tl.program_id(1)
    query = first_query + run * RUN + tl.arange(0, RUN)[:, None]
    rank = tl.arange(0, KP)[None, :]
    at = chosen + (head.to(tl.int64) * num_queries + query) * topk + rank
    block = tl.load(at, mask=(query < end_query) & (rank < topk), other=-1)
    place = 1 + (head * num_blocks + block).to(tl.int64) * num_runs + run
    tl.atomic_add(counts + place, 1, mask=block >= 0)  # a sum of integers does not depend on the order


@triton.jit(do_not_specialize=VARYING)
def _list_kernel(
    chosen, offsets, pairs, num_queries, first_query, end_query, num_blocks, num_runs, topk, KP: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Write the pairs of a run to the lists of their blocks; one program per run and key-value head."""
    run, head = tl.program_id(0), tl.program_id(1)
    first = first_query + run * RUN
    entry, rank = tl.arange(0, RUN * KP), tl.arange(0, KP)
    base = chosen + (head.to(tl.int64) * num_queries + first) * topk
    query, own_rank = entry // KP, entry % KP  # `query` counts from the first query of the run
    is_entry = (first + query < end_query) & (own_rank < topk)
    block = tl.load(base + query * topk + own_rank, mask=is_entry, other=-1)
    earlier = tl.zeros([RUN * KP], dtype=tl.int32)  # how many earlier queries of the run chose the same block
    for other in range(0, tl.minimum(RUN, end_query - first)):
        others = tl.load(base + other * topk + rank, mask=rank < topk, other=-1)
        is_same = (block[:, None] == others[None, :]) & (query > other)[:, None]
        earlier += tl.sum(is_same.to(tl.int32), axis=1)
    start = tl.load(offsets + (head * num_blocks + block).to(tl.int64) * num_runs + run, mask=block >= 0, other=0)
    tl.store(pairs + start + earlier, (first + query) * topk + own_rank, mask=block >= 0)


def list_choosers(chosen: Tensor, first_query: int, num_queries: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """List the pairs of some queries and the blocks that they chose, by key-value head and block.

    Args:
        chosen (`[K, X, topk_blocks]`, int32): blocks that each query chose; -1 in places that it did not use.
        first_query, num_queries (`int`): the consecutive queries to list.
        num_blocks (`int`): `N`.

    Returns:
        The beginning of the list of each key-value head and block (`[K * N + 1]`, int32), which is also the end of the
        previous list, and the pairs (`[K * num_queries * topk_blocks]`, int32). A pair is the number of the query times
        `topk_blocks` plus the place of the block in `chosen`. Each list has its queries in ascending order; what lies
        behind the last list is arbitrary.
    """
    heads, all_queries, topk = chosen.shape
    padded = power_of_two(topk)
    run = max(ENTRIES_PER_RUN // padded, 1)
    num_runs = ceil_divide(num_queries, run)
    counts = torch.zeros(1 + heads * num_blocks * num_runs, dtype=torch.int32, device=chosen.device)
    pairs = chosen.new_empty(heads * num_queries * topk)
    sizes = (all_queries, first_query, first_query + num_queries, num_blocks, num_runs, topk)
    constants = {"KP": padded, "RUN": run}
    _count_kernel[(num_runs, heads)](chosen, counts, *sizes, **constants, num_warps=4)
    offsets = counts.cumsum(0, dtype=torch.int32)
    _list_kernel[(num_runs, heads)](chosen, offsets, pairs, *sizes, **constants, num_warps=4)
    return offsets[::num_runs].contiguous(), pairs
