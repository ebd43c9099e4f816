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
"""How large the tiles of the Triton kernels are, and the constants that they are compiled for.

The shape legend is that of `sparse_selection.py`.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .triton_optional import power_of_two

NARROW = 256  # bytes of a head's row, such as 128 numbers of 16 bits; tiles of wider rows have fewer of them
ROWS = 128  # queries of a tile times heads of their group
PAIR_ROWS = 64  # the same, of the queries that chose a block and are gathered for one product with it
KEYS_PER_STEP = 64
BLOCKS_PER_STEP = 32  # scored at once
SMALLEST = 16  # side of a matrix product


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles.

    Attributes:
        tile_tokens (`int`): query tokens of a tile.
        pair_tokens (`int`): gathered query tokens.
        keys (`int`): keys at once.
        blocks (`int`): block means at once.
        stages (`int`): loads in flight.
        constants: what the kernels are compiled for: heads per group, head dimensions (padded to powers of two, too),
            and block size.
    """

    tile_tokens: int
    pair_tokens: int
    keys: int
    blocks: int
    stages: int
    constants: dict[str, Any]


def row_bytes(widths: tuple[int, int], itemsize: int) -> int:
    """Return the bytes of the wider of a query's row and a value's row, padded to a power of two."""
    return power_of_two(max(*widths, SMALLEST)) * itemsize


def tiling_for(query: Tensor, key: Tensor, value: Tensor, settings: SparseAttentionConfig) -> Tiling:
    """Return the sizes for queries `[B, H, T, D]`, keys `[B, K, S, D]` and values `[B, K, S, E]` of one dtype."""
    groups, width, value_width = query.shape[1] // key.shape[1], query.shape[3], value.shape[3]
    share = max(row_bytes((width, value_width), query.element_size()) // NARROW, 1)
    padded = power_of_two(groups)
    constants = {
        "G": groups,
        "GP": padded,
        "D": width,
        "DP": max(power_of_two(width), SMALLEST),
        "E": value_width,
        "EP": max(power_of_two(value_width), SMALLEST),
        "C": settings.block_size,
    }
    rows, pair_rows = (max(count // share, SMALLEST) for count in (ROWS, PAIR_ROWS))
    return Tiling(
        max(rows // padded, 1),
        max(pair_rows // padded, 1),
        max(KEYS_PER_STEP // share, SMALLEST),
        max(BLOCKS_PER_STEP // share, SMALLEST),
        3 if share == 1 else 1,
        constants,
    )
