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
"""Keys and values in 8 bits: each head of each token is a row of `D` integers and one scale, symmetric.

They are packed into `D + 2` bytes, so that all that a cache does with rows (append, crop, reorder, select) and all that
decoding does (gather) needs no second tensor.
"""

import torch
from torch import Tensor

SCALE_BYTES = 2
LARGEST = 127
SMALLEST = 1e-38  # scale of a row of zeros


def pack(states: Tensor) -> Tensor:
    """Quantize `[..., D]`, any float dtype, to `[..., D + 2]` int8: rounded quotients by a bfloat16 scale, and that."""
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True) / LARGEST
    scale = (scale * (1 + 2**-8)).bfloat16()  # never rounded down, which would cut off the largest
    quotients = (states / scale.float().clamp(min=SMALLEST)).round()
    return torch.cat([quotients.to(torch.int8), scale.view(torch.int8)], dim=-1)


def unpack(states: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what was packed, `[..., D]`; tensors that are not packed as they are."""
    if not is_packed(states):
        return states
    scale = states[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return (states[..., :-SCALE_BYTES].float() * scale.float()).to(dtype)


def is_packed(states: Tensor) -> bool:
    """Tell packed keys or values from plain ones."""
    return states.dtype == torch.int8
