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
"""Import Triton where it is installed, and stand-ins that let the kernels' files be imported where it is not."""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda function: function))
    tl = SimpleNamespace(constexpr=lambda value: value)

VARYING = [  # arguments that vary from call to call: kernels are not compiled again for values that 16 divides
    *("num_tokens", "num_queries", "num_keys", "num_blocks", "num_pairs", "num_parts", "num_splits"),
    *("first_tile", "first_query", "end_query", "num_runs", "split_blocks"),
]
HAS_TRITON = not isinstance(triton, SimpleNamespace)


@triton.jit
def _probe() -> None:
    pass


# whether Triton's interpreter runs the kernels, on any device: TRITON_INTERPRET was 1 when this file was imported
IS_INTERPRETED = HAS_TRITON and not isinstance(_probe, triton.JITFunction)


def ceil_divide(number: Any, divisor: int) -> Any:
    """Divide an `int` or an int tensor by a positive number, and round up."""
    return (number + divisor - 1) // divisor


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def contiguous_rows(states: Any) -> Any:
    """Return a tensor whose last dimension is contiguous, as kernels need it; the same one if it is."""
    return states if states.stride(-1) == 1 else states.contiguous()
