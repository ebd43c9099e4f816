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
"""Masked sparse attention as transformers calls it: refuse what it cannot compute, choose a backend, dispatch.

Importing this file registers `masked_sparse` in transformers' attention and mask interfaces, which makes
`AutoModelForCausalLM.from_pretrained(..., attn_implementation="masked_sparse")` work for any causal language model.
The shape legend of `sparse_selection.py` applies here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention_blockwise import attention_blockwise
from .attention_gathered import attention_gathered
from .attention_masks import dense_mask, is_layout, masked_sparse_mask
from .attention_reference import masked_sparse_attention_reference
from .configuration_whisper_lm import SparseAttentionConfig
from .int8_rows import dequantize_rows

MASKED_SPARSE = "masked_sparse"
BACKENDS = ("auto", "stock", "triton")
MOST_GATHERED = 2  # times the keys there are; see `resolve_backend`
_wanted_backend: ContextVar[str] = ContextVar("wanted_backend", default="auto")


@contextmanager
def sparse_backend(name: str) -> Iterator[None]:
    """Choose the implementation of masked sparse attention for a `with` block.

    The choice holds for the calling thread and `asyncio` task alone. Run `backward` within the block, too: gradient
    checkpointing computes the forward pass again there. On a GPU that happens in a thread of PyTorch's own, which the
    choice does not reach, so that checkpointing and `"stock"` do not go together there. A compiled model keeps the
    choice under which it was compiled. A generator must not yield within the block, because whoever resumes it may do
    so in another thread or task.

    Args:
        name (`str`): `"auto"`, the default, takes the Triton kernels for CUDA tensors where they apply, and stock
            PyTorch operations elsewhere; `"stock"` always takes stock operations; `"triton"` takes the kernels, or
            raises a `ValueError` that says which condition is not met.

    Raises:
        ValueError: another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"the backends of masked_sparse attention are {list(BACKENDS)}, got {name!r}")
    previous = _wanted_backend.get()
    _wanted_backend.set(name)
    try:
        yield
    finally:
        _wanted_backend.set(previous)  # not `reset`, which raises where another thread or task leaves the block


@torch.compiler.assume_constant_result
def _wanted() -> str:
    return _wanted_backend.get()  # torch.compile cannot trace this call, so it takes the result for a constant


def resolve_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    settings: SparseAttentionConfig,
    wanted: str,
) -> str:
    """Choose the implementation that computes masked sparse attention of these tensors.

    `"triton"` and `"triton_decode"` (one query, no gradient) are for CUDA devices. Of the two implementations in stock
    operations, `"gathered"` reads the attended keys of each query, which is best for few queries, and `"blockwise"`
    reads each block once for all queries that attend to it. Gathering is chosen for a single query. For more queries
    it is chosen where it reads at most twice as many keys as there are; on a CPU it was measured to be faster up to
    twice (at 64k keys) to ten times (at 4k keys) as many.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): floats; keys and values may be quantized
            to int8 rows. Only shapes, dtypes, devices and `requires_grad` are read.
        layout (`[B, 1, 1, S]`, int32, or `None`): see `sparse_selection.py`.
        settings (`SparseAttentionConfig`): block size and budget.
        wanted (`str`): one of `BACKENDS`.

    Returns:
        `"triton"`, `"triton_decode"`, `"gathered"` or `"blockwise"`.

    Raises:
        ValueError: `wanted` is `"triton"`, and the kernels cannot compute this.
    """
    if wanted == "triton" or (wanted == "auto" and query.is_cuda):
        from .attention_triton import unmet_condition  # imports triton, where it is installed

        needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
        is_decoding = query.shape[2] == 1 and not needs_grad
        unmet = unmet_condition(query, key, value, settings, is_decoding, shared_dtype(query, key, value))
        if unmet is None:
            return "triton_decode" if is_decoding else "triton"
        if wanted == "triton":
            raise ValueError(f'the Triton kernels {unmet}; or leave it to sparse_backend("auto")')
    gathered = query.shape[2] * settings.budget_tokens  # keys, with repetitions
    if query.shape[2] == 1 or (layout is None and gathered <= MOST_GATHERED * key.shape[2]):
        return "gathered"
    return "blockwise"


def shared_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    """Return the dtype in which the Triton kernels compute: autocast's dtype, or else the widest of the floats.

    Under autocast, RoPE widens queries and keys to float32; float64 is never narrowed.
    """
    dtype = query.dtype
    for states in (key, value):
        if states.is_floating_point():
            dtype = torch.promote_types(dtype, states.dtype)
    if torch.is_autocast_enabled(query.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
    return dtype


def masked_sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute masked sparse attention; this is the entry of transformers' `AttentionInterface`.

    Where the budget covers the keys, and in layers that pass `sliding_window` or `sparse_attention=None`, this is
    scaled-dot-product attention over the plain causal (or windowed) mask.

    Args:
        module (`nn.Module`): the attention layer; its `config.sparse_attention` holds the budget, unless the layer
            passes `sparse_attention` itself.
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; keys and values may be
            int8 rows of a quantized cache.
        attention_mask: a layout, `None`, or a `[B, 1, T, S]` mask, bool or additive (0, or at most -10,000).
        scaling (`float`, *optional*): factor on the logits, `D ** -0.5` by default.
        dropout (`float`): must be 0.
        sliding_window (`int`, *optional*): exactly this window, and no selection.

    Returns:
        output (`[B, T, H, E]`, dtype of `query`) and, if `output_attentions` asks for them, weights `[B, H, T, S]`.

    Raises:
        ValueError: dropout, logit softcapping, learned sinks, a position bias, paged caches or non-causal attention.
    """
    refuse_unsupported(module, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = layer_settings(module, kwargs)
    if sliding_window is not None or settings is None or settings.covers(key.shape[2]):
        settings = None
    needs_weights = kwargs.get("output_attentions", getattr(module.config, "output_attentions", False))
    is_fast = not needs_weights and (attention_mask is None or is_layout(attention_mask))
    if settings is not None and is_fast:
        output = sparse_attention(query, key, value, attention_mask, scaling, settings, kwargs.get("block_means"))
        return output.transpose(1, 2).contiguous(), None

    key, value = dequantize_rows(key, query.dtype), dequantize_rows(value, query.dtype)
    if settings is None and not needs_weights:
        mask = dense_mask(attention_mask, query, key, sliding_window)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling)
    output, weights = masked_sparse_attention_reference(
        query, key, value, attention_mask, scaling, settings, sliding_window, needs_weights
    )
    return output.transpose(1, 2).contiguous(), weights


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig,
    block_means: Tensor | None = None,
) -> Tensor:
    """Attend to the sink, local and chosen blocks, by the backend that [`sparse_backend`] and the tensors call for.

    Args:
        query, key, value, layout, settings: as in [`resolve_backend`].
        scaling (`float`): factor on the logits.
        block_means (`[B, K, N, D]`, float32, *optional*): mean keys of the blocks of content, if a cache keeps them.

    Returns:
        `[B, H, T, E]` in the dtype of `query`.

    Raises:
        ValueError: as in [`resolve_backend`].
    """
    backend = resolve_backend(query, key, value, layout, settings, _wanted())
    if backend == "gathered":  # dequantizes only what it reads
        return attention_gathered(query, key, value, layout, scaling, settings, block_means)
    if backend == "blockwise":
        key, value = dequantize_rows(key, query.dtype), dequantize_rows(value, query.dtype)
        return attention_blockwise(query, key, value, layout, scaling, settings)
    from .attention_triton import attention_triton
    from .triton_decode import attention_triton_decode

    dtype = shared_dtype(query, key, value)
    queries, keys, values = (dequantize_rows(states, dtype).to(dtype) for states in (query, key, value))
    if backend == "triton_decode":
        output = attention_triton_decode(queries, keys, values, layout, scaling, settings, block_means)
    else:
        output = attention_triton(queries, keys, values, layout, scaling, settings)
    return output.to(query.dtype)


def cache_kwargs(attention_mask: Tensor | None, settings: SparseAttentionConfig | None) -> dict[str, Any]:
    """Return the arguments that a cache layer needs to keep block means: none, where the mask is not a layout."""
    if settings is None or (attention_mask is not None and not is_layout(attention_mask)):
        return {}
    return {"layout": attention_mask, "block_size": settings.block_size}


def layer_settings(module: nn.Module, kwargs: dict[str, Any]) -> SparseAttentionConfig | None:
    """Return the budget that a layer passes (`None`: dense), or else the budget in its model's config."""
    if "sparse_attention" in kwargs:
        return kwargs["sparse_attention"]
    return SparseAttentionConfig.from_value(getattr(module.config, "sparse_attention", None))


def refuse_unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError`, with a remedy, for options that masked sparse attention cannot honour."""
    if kwargs.get("read_index") is not None:
        raise ValueError(
            "masked_sparse attention does not read paged caches (continuous batching), got one in "
            f"{type(module).__name__}; use generate with a batch, or a dense model, which whisper_hf.to_dense gives"
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"masked_sparse attention is causal, got is_causal=False from {type(module).__name__}; "
            'use attn_implementation="sdpa" for encoders and cross-attention'
        )
    if dropout:
        raise ValueError(
            f"masked_sparse attention has no dropout, got dropout={dropout}; set config.attention_dropout = 0.0"
        )
    for name, what in (
        ("softcap", "logit softcapping"),
        ("s_aux", "learned attention sinks"),
        ("position_bias", "position biases"),
    ):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"masked_sparse attention does not support {what}, which {type(module).__name__} uses ({name}); "
                'load the model with attn_implementation="eager"'
            )


AttentionInterface.register(MASKED_SPARSE, masked_sparse_attention_forward)
AttentionMaskInterface.register(MASKED_SPARSE, masked_sparse_mask)
