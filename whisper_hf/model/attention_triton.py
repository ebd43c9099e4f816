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
"""Masked sparse attention on CUDA devices, in Triton: the operators and their gradient.

The kernels are in `triton_selection.py`, `triton_forward.py` and `triton_backward_keys.py`, the plan of a batch, whose
legend holds here too, in `triton_plan.py`. Both operators are opaque to `torch.compile`.
"""

import torch
from torch import Tensor

from .attention_operator import register_attention_op
from .configuration_whisper_lm import SparseAttentionConfig
from .triton_backward_keys import differentiate
from .triton_forward import attend
from .triton_optional import HAS_TRITON, IS_INTERPRETED, contiguous_rows
from .triton_plan import TritonPlan, plan_tiles
from .triton_selection import PARTS, choose
from .triton_tiling import Tiling, row_bytes, tiling_for

LARGEST_HEAD, LARGEST_GROUP, MOST_KEYS = 256, 32, 128
LARGEST_BLOCK = {2: 32768, 4: 16384}  # bytes of a block's keys, padded, by bytes of a number: they stay on the chip


def unmet_condition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: SparseAttentionConfig,
    is_decoding: bool,
    dtype: torch.dtype,
) -> str | None:
    """Return the first condition of the Triton kernels that is not met, as the middle of an error message, or `None`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): as attention sees them.
        settings (`SparseAttentionConfig`): block size and budget.
        is_decoding (`bool`): whether there is one query and no gradient: that kernel reads no quantized cache.
        dtype (`torch.dtype`): the dtype to which the tensors will be cast.
    """
    if not HAS_TRITON:
        return "need the package triton, got none; pip install triton"
    if not query.is_cuda and not IS_INTERPRETED:
        return (
            f"need CUDA tensors, got {query.device.type}; move the model to a GPU, or set TRITON_INTERPRET=1 before "
            "the program starts, which is slow"
        )
    if is_decoding and torch.int8 in (key.dtype, value.dtype):
        return "need plain keys and values to decode from, got those of a quantized cache (int8); use another cache"
    widths, groups = (query.shape[3], value.shape[3]), query.shape[1] // key.shape[1]
    if dtype not in PARTS:
        return f"need bfloat16, float16 or float32, got {str(dtype).removeprefix('torch.')}; use another dtype"
    if max(widths) > LARGEST_HEAD or min(widths) < 1:
        return f"need head dimensions of at most {LARGEST_HEAD}, got {max(widths)}"
    most = min(LARGEST_BLOCK[dtype.itemsize] // row_bytes(widths, dtype.itemsize), MOST_KEYS)
    if settings.block_size > most:
        return f"need blocks of at most {most} tokens of this width and dtype, got {settings.block_size}"
    if groups > LARGEST_GROUP:
        return f"need at most {LARGEST_GROUP} query heads per key-value head, got {groups}"
    return None


def attention_triton(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, scaling: float, settings: SparseAttentionConfig
) -> Tensor:
    """Attend to the sink, local and chosen blocks; equals the reference in value and gradient.

    Products are summed in float32; weights enter them in the dtype of the inputs. Where a query sees nothing its output
    is zero. Bitwise reproducible. Differentiable once: a second derivative raises a `RuntimeError`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): one dtype, bfloat16, float16 or float32;
            `K` divides `H`. Anything else that [`unmet_condition`] names must have been ruled out.
        layout (`[B, 1, 1, S]`, int32, or `None`): see `sparse_selection.py`.
        scaling (`float`): factor on the logits.
        settings (`SparseAttentionConfig`): block size and budget.

    Returns:
        `[B, H, T, E]` in the dtype of `query`.
    """
    sizes = (settings.block_size, settings.topk_blocks, settings.local_blocks, settings.sink_blocks)
    return _attend(query, key, value, layout, scaling, *sizes)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    block_size: int,
    topk_blocks: int,
    local_blocks: int,
    sink_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output (`[B, H, T, E]`), log-sum-exp (`[B, H, T]`, base 2) and chosen blocks (`[K, X, topk]`, int32)."""
    settings = SparseAttentionConfig(block_size, topk_blocks, local_blocks, sink_blocks)
    output, lse, _ = _empty_outputs(query, key, value, 0)
    query, key, value = (contiguous_rows(states) for states in (query, key, value))
    with torch.cuda.device_of(query):
        plan, tiling = _plan(query, key, value, layout, settings)
        key, value = _gather(key, plan), _gather(value, plan)
        chosen = choose(query, key, plan, tiling, settings)
        attend(query, key, value, chosen, output, lse, scaling, plan, tiling, settings)
    return output, lse, chosen


def _plan(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, settings: SparseAttentionConfig
) -> tuple[TritonPlan, Tiling]:
    tiling = tiling_for(query, key, value, settings)
    shape = (query.shape[0], query.shape[2], key.shape[2])
    return plan_tiles(layout, shape, settings, tiling.tile_tokens, query.device), tiling


def _gather(states: Tensor, plan: TritonPlan) -> Tensor:
    """Return `[B, K, S, D]` as it is, or where hidden tokens interrupt documents, their content: `[1, K, M, D]`."""
    if plan.gather is None:
        return states
    rows = states.transpose(1, 2).flatten(0, 1)
    return rows.index_select(0, plan.gather).transpose(0, 1)[None]


def _scatter(grad: Tensor, states: Tensor, slots: Tensor | None) -> Tensor:
    """Undo [`_gather`]: return the gradient of `states`, zero where nothing was taken, in their memory layout."""
    if slots is not None:
        batch, heads, length, width = states.shape
        rows = grad.new_zeros(batch * length, heads, width).index_copy_(0, slots, grad[0].transpose(0, 1))
        grad = rows.view(batch, length, heads, width).transpose(1, 2)
    promised = torch.empty_like(states, device="meta")
    return grad if grad.stride() == promised.stride() else torch.empty_like(states).copy_(grad)


def _empty_outputs(query: Tensor, key: Tensor, value: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length = query.shape[:3]
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # as the layer wants it, uncopied
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return output, lse, query.new_empty((key.shape[1], batch * length, topk), dtype=torch.int32)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    chosen: Tensor,
    layout: Tensor | None,
    scaling: float,
    block_size: int,
    topk_blocks: int,
    local_blocks: int,
    sink_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, in their shapes and dtypes."""
    settings = SparseAttentionConfig(block_size, topk_blocks, local_blocks, sink_blocks)
    states = (query, key, value)
    grad, query, key, value = (contiguous_rows(each) for each in (grad, *states))
    with torch.cuda.device_of(query):
        plan, tiling = _plan(query, key, value, layout, settings)
        keys, values = _gather(key, plan), _gather(value, plan)
        empty = torch.empty_like if layout is None else torch.zeros_like  # slots that hold no content get no gradient
        grads = torch.empty_like(query), empty(keys), empty(values)
        differentiate(grad, query, keys, values, output, lse, chosen, grads, scaling, plan, tiling, settings)
        slots = (None, plan.gather, plan.gather)  # queries are never gathered
        result = [_scatter(*each) for each in zip(grads, states, slots, strict=True)]
        return result[0], result[1], result[2]


_attend, _attend_backward = register_attention_op(__name__, _forward, _backward, _empty_outputs)
