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
"""Exact masked sparse attention on CUDA devices, in Triton.

This file states what the kernels require, and registers the forward and the backward pass as custom operators, which
are opaque to `torch.compile`. `triton_plan.py` plans a batch and `triton_tiling.py` sets the sizes of tiles. The
kernels of the forward pass are in `triton_selection.py`, `triton_choosers.py` and `triton_forward.py`; the kernels of
the backward pass are in `triton_backward_keys.py` and `triton_backward_queries.py`.

The shape legend of `triton_plan.py` applies here; in addition, `E` is the value dimension.
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

LARGEST_HEAD = 256  # largest head dimension
LARGEST_GROUP = 32  # most query heads per key-value head
MOST_KEYS = 128  # most tokens per block
# Most bytes of a block's keys, whose rows are padded to a power of two, by the bytes of a number: a kernel keeps the
# keys of a block on the chip.
LARGEST_BLOCK = {2: 32768, 4: 16384}


def unmet_condition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: SparseAttentionConfig,
    is_decoding: bool,
    dtype: torch.dtype,
) -> str | None:
    """Check whether the Triton kernels can compute the attention of these tensors.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): queries, keys and values. Only shapes,
            dtypes and devices are read.
        settings (`SparseAttentionConfig`): block size and budget.
        is_decoding (`bool`): whether there is one query per row and no gradient. The kernels for this case cannot read
            a quantized cache.
        dtype (`torch.dtype`): the dtype to which the tensors will be cast.

    Returns:
        `None` if they can. Otherwise the first condition that is not met, as the end of a sentence that begins with
        "the Triton kernels".
    """
    if not HAS_TRITON:
        return "need the package triton, got none; pip install triton"
    if not query.is_cuda and not IS_INTERPRETED:
        return (
            f"need CUDA tensors, got {query.device.type}; move the model to a GPU, or set TRITON_INTERPRET=1 before "
            "the program starts, which is slow"
        )
    if is_decoding and torch.int8 in (key.dtype, value.dtype):
        return "need unquantized keys and values for decoding, got int8 rows of a quantized cache; use another cache"
    widths = (query.shape[3], value.shape[3])
    groups = query.shape[1] // key.shape[1]
    if dtype not in PARTS:
        return f"need bfloat16, float16 or float32, got {str(dtype).removeprefix('torch.')}; use another dtype"
    if max(widths) > LARGEST_HEAD or min(widths) < 1:
        return (
            f"need positive head dimensions of at most {LARGEST_HEAD}, got {widths[0]} for queries and keys and "
            f"{widths[1]} for values"
        )
    largest_size = min(LARGEST_BLOCK[dtype.itemsize] // row_bytes(widths, dtype.itemsize), MOST_KEYS)
    if settings.block_size > largest_size:
        return (
            f"need blocks of at most {largest_size} tokens of this width and dtype, got {settings.block_size}; "
            "set a smaller block_size"
        )
    if groups > LARGEST_GROUP:
        return f"need at most {LARGEST_GROUP} query heads per key-value head, got {groups}"
    return None


def attention_triton(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, scaling: float, settings: SparseAttentionConfig
) -> Tensor:
    """Attend to the sink, local and chosen blocks of each query, with Triton kernels.

    Output and gradient equal those of the reference in `attention_reference.py`. Matrix products are accumulated in
    float32; the attention weights are rounded to the dtype of the inputs before they are multiplied with the values.
    The output of a query that sees no key is zero. Results are bitwise reproducible. The function is differentiable
    once: a second derivative raises a `RuntimeError`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): one dtype, bfloat16, float16 or float32;
            `K` divides `H`. The caller must have checked that [`unmet_condition`] returns `None`.
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it.
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
    """Attend to all keys of each query's budget, and return what the backward pass needs besides the inputs.

    Returns:
        The output (`[B, H, T, E]`), the log-sum-exp of the logits to the base 2 (`[B, H, T]`, float32), and the chosen
        blocks (`[K, X, topk_blocks]`, int32).
    """
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
    """Return the plan of a batch and the sizes of its tiles."""
    tiling = tiling_for(query, key, value, settings)
    shape = (query.shape[0], query.shape[2], key.shape[2])
    return plan_tiles(layout, shape, settings, tiling.tile_tokens, query.device), tiling


def _gather(states: Tensor, plan: TritonPlan) -> Tensor:
    """Gather the keys or values of visible tokens, if hidden tokens interrupt a document.

    Args:
        states (`[B, K, S, D]`): keys or values.
        plan (`TritonPlan`): plan of the batch.

    Returns:
        `states`, or `[1, K, M, D]`, where `M` is the number of visible tokens of the batch.
    """
    if plan.gather is None:
        return states
    rows = states.transpose(1, 2).flatten(0, 1)
    return rows.index_select(0, plan.gather).transpose(0, 1)[None]


def _scatter(grad: Tensor, states: Tensor, slots: Tensor | None) -> Tensor:
    """Convert the gradient of gathered states to the gradient of `states`, in the strides of `empty_like(states)`.

    Args:
        grad (`[1, K, M, D]`, or the shape of `states` if `slots` is `None`): gradient of what [`_gather`] returned.
        states (`[B, K, S, D]`): what [`_gather`] was given.
        slots (`[M]`, int64, or `None`): flat slots of the gathered tokens; the gradient of other slots is zero.
    """
    if slots is not None:
        batch, heads, length, width = states.shape
        rows = grad.new_zeros(batch * length, heads, width).index_copy_(0, slots, grad[0].transpose(0, 1))
        grad = rows.view(batch, length, heads, width).transpose(1, 2)
    # The operator's fake implementation returns `empty_like(states)`, so that the strides must be the same here.
    expected_strides = torch.empty_like(states, device="meta").stride()
    return grad if grad.stride() == expected_strides else torch.empty_like(states).copy_(grad)


def _empty_outputs(query: Tensor, key: Tensor, value: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, log-sum-exp and chosen blocks that [`_forward`] returns, uninitialised."""
    batch, heads, length = query.shape[:3]
    # In memory the output is `[B, T, H, E]`, so that the layer can merge the heads without a copy.
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
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
    queries, keys, values, grad = (contiguous_rows(states) for states in (query, key, value, grad))
    with torch.cuda.device_of(queries):
        plan, tiling = _plan(queries, keys, values, layout, settings)
        keys, values = _gather(keys, plan), _gather(values, plan)
        # No kernel writes the gradients of hidden and of empty slots, which exist only with a layout.
        allocate = torch.empty_like if layout is None else torch.zeros_like
        grads = torch.empty_like(queries), allocate(keys), allocate(values)
        differentiate(grad, queries, keys, values, output, lse, chosen, grads, scaling, plan, tiling, settings)
        query_grad, key_grad, value_grad = grads
        return (
            _scatter(query_grad, query, None),  # queries are never gathered
            _scatter(key_grad, key, plan.gather),
            _scatter(value_grad, value, plan.gather),
        )


_attend, _attend_backward = register_attention_op(__name__, _forward, _backward, _empty_outputs)
