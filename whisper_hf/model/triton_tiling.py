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
"""Choose the sizes of the tiles of the Triton kernels, and the constants that the kernels are compiled for.

The shape legend of `sparse_selection.py` applies here; in addition, `E` is the value dimension.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .configuration_whisper_lm import SparseAttentionConfig
from .triton_optional import power_of_two

NARROW = 256  # bytes of one head of a token, such as 128 numbers of 16 bits; tiles of wider rows have fewer rows
ROWS = 128  # rows of a tile of queries: query tokens times heads of the group
PAIR_ROWS = 64  # rows of a gathered tile, whose queries chose one block: query tokens times heads of the group
KEYS_PER_STEP = 64  # keys that a loop over keys multiplies at once
BLOCKS_PER_STEP = 32  # blocks that are scored at once
SMALLEST = 16  # smallest dimension of a matrix product


@dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of the Triton kernels.

    Attributes:
        tile_tokens (`int`): query tokens of a tile of consecutive queries.
        pair_tokens (`int`): query tokens of a gathered tile, whose queries chose one block.
        keys (`int`): keys that a loop over keys multiplies at once.
        blocks (`int`): block means that are multiplied at once.
        stages (`int`): stages of the software pipeline that loads ahead (`num_stages` of Triton).
        constants: numbers that the kernels are compiled for. `G` is the number of heads per group, `D` the dimension of
            queries and keys, `E` the dimension of values, and `C` the number of tokens per block. `GP`, `DP` and `EP`
            are `G`, `D` and `E`, padded to powers of two; `DP` and `EP` are at least `SMALLEST`.
    """

    tile_tokens: int
    pair_tokens: int
    keys: int
    blocks: int
    stages: int
    constants: dict[str, Any]


def row_bytes(widths: tuple[int, int], itemsize: int) -> int:
    """Return the bytes of the wider of a key's and a value's row, padded to a power of two.

    Args:
        widths (pair of `int`): the dimensions `D` and `E`.
        itemsize (`int`): bytes of a number.
    """
    return power_of_two(max(*widths, SMALLEST)) * itemsize


def tiling_for(query: Tensor, key: Tensor, value: Tensor, settings: SparseAttentionConfig) -> Tiling:
    """Choose the sizes of the tiles for some queries, keys and values.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): of one dtype. Only shapes and the dtype
            are read.
        settings (`SparseAttentionConfig`): block size and budget.
    """
    groups = query.shape[1] // key.shape[1]
    width = query.shape[3]
    value_width = value.shape[3]
    # Tiles of rows that are `share` times wider than NARROW have `share` times fewer rows.
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
    rows = max(ROWS // share, SMALLEST)
    pair_rows = max(PAIR_ROWS // share, SMALLEST)
    return Tiling(
        tile_tokens=max(rows // padded, 1),
        pair_tokens=max(pair_rows // padded, 1),
        keys=max(KEYS_PER_STEP // share, SMALLEST),
        blocks=max(BLOCKS_PER_STEP // share, SMALLEST),
        stages=3 if share == 1 else 1,
        constants=constants,
    )
