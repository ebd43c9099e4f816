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
"""Quantize keys and values to 8 bits: each row, a head of a token, becomes `D` integers and one scale.

The scale is stored in the last two bytes of its row, so that a quantized row has `D + 2` bytes and no second tensor is
needed. A cache therefore appends, crops, reorders and selects quantized rows like any other rows.
"""

import torch
from torch import Tensor

SCALE_BYTES = 2
LARGEST = 127
SMALLEST = 1e-38  # stands in for the scale of a row of zeros in the division


def quantize_rows(states: Tensor) -> Tensor:
    """Quantize rows of floats to int8, symmetrically, with one bfloat16 scale per row.

    `scale = max |x| / 127`, rounded up to bfloat16 so that no quotient exceeds 127, and `q = round(x / scale)`.

    Args:
        states (`[..., D]`, any float): rows.

    Returns:
        `[..., D + 2]`, int8: the quotients, then the two bytes of the scale.
    """
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True) / LARGEST
    scale = (scale * (1 + 2**-8)).bfloat16()
    quotients = (states / scale.float().clamp(min=SMALLEST)).round()
    return torch.cat([quotients.to(torch.int8), scale.view(torch.int8)], dim=-1)


def dequantize_rows(states: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the floats of quantized rows, and any other tensor unchanged.

    Args:
        states (`[..., D + 2]`, int8, or any other tensor): what [`quantize_rows`] returned.
        dtype (`torch.dtype`): of the result; it is not applied to a tensor that was not quantized.

    Returns:
        `[..., D]` in `dtype`.
    """
    if states.dtype != torch.int8:
        return states
    scale = states[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return (states[..., :-SCALE_BYTES].float() * scale.float()).to(dtype)
