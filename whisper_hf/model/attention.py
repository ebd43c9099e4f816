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
"""Masked sparse attention as transformers calls it: read the layout, refuse what cannot be honoured, dispatch.

Importing this file registers `masked_sparse` in transformers' attention and mask interfaces, which makes
`AutoModelForCausalLM.from_pretrained(..., attn_implementation="masked_sparse")` work for any causal language model.
The shape legend is that of `sparse_selection.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    find_packed_sequence_indices,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.import_utils import is_tracing

from .attention_blockwise import attention_blockwise
from .attention_gathered import attention_decode
from .attention_reference import attention_reference
from .configuration_whisper_lm import SparseAttentionConfig
from .int8_rows import unpack
from .sparse_selection import content_layout, query_slots, selected_keys, visible_keys

MASKED_SPARSE = "masked_sparse"
QUERIES_PER_STEP = 512  # bounds the score matrix of the reference to this many rows
BACKENDS = ("auto", "stock", "triton")
_backend = "auto"


@contextmanager
def sparse_backend(name: str) -> Iterator[None]:
    """Choose what computes masked sparse attention in a `with` block, recomputation by gradient checkpointing included.

    Args:
        name (`str`): `"auto"`, the default, takes the Triton kernels for CUDA tensors where it can, and stock PyTorch
            operations elsewhere; `"stock"` always takes these; `"triton"` takes the kernels, or raises a `ValueError`
            that says what keeps it from them.

    Raises:
        ValueError: another name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"the backends of masked_sparse attention are {list(BACKENDS)}, got {name!r}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def masked_sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Describe a batch to [`masked_sparse_attention_forward`]; the `AttentionMaskInterface` entry.

    Costs O(S): the mask function is asked once per slot whether a token sees its predecessor, which tells where
    documents begin, instead of once per pair of tokens.

    Args:
        batch_size, q_length, kv_length (`int`): `B`, `T` and `S`.
        q_offset, kv_offset (`int`, or tensor in a static cache): index of the first query and of the first key slot.
        mask_function (`Callable`): transformers' predicate (batch, head, query index, key index) -> may attend.
        attention_mask (`[B, seen tokens]`, bool, *optional*): the padding mask.
        allow_is_causal_skip (`bool`): may return `None` for one document without hidden tokens.
        use_vmap (`bool`): the predicate is the user's own; it is then expanded to a full mask.
        device (`torch.device`): where the layout is needed.
        config (`PreTrainedConfig`, *optional*): that of the model which asks.

    Returns:
        `[B, 1, 1, S]` int32 layout, `None`, or for a custom predicate a `[B, 1, T, S]` bool mask.

    Raises:
        ValueError: the predicate lets a token see a later one, or the model would not pass the layout on.
    """
    if config is not None and not is_tracing():
        _refuse_without_interface(type(config))
    if use_vmap:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=True,
            device=device,
        )
    query_end = q_offset - kv_offset + q_length
    may_skip = allow_is_causal_skip and not isinstance(query_end, Tensor) and query_end == kv_length
    if may_skip and attention_mask is None and mask_function is causal_mask_function:
        return None
    visible = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        shown = attention_mask[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        visible = nn.functional.pad(shown, (0, kv_length - shown.shape[1]))
    starts = _document_starts(mask_function, batch_size, kv_length, kv_offset, visible.device)
    if may_skip and not is_tracing(visible) and visible.all() and not starts[:, 1:].any():
        return None
    return content_layout(visible, starts, query_end)


def _refuse_without_interface(config_class: type) -> None:
    """Raise for a model whose attention is its own: it would take the layout for a mask and attend to the future."""
    model_class = MODEL_MAPPING.get(config_class, None)
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise ValueError(
            f"masked_sparse attention needs a model that uses transformers' attention interface, got "
            f'{model_class.__name__}, which has an attention of its own; load it with attn_implementation="eager"'
        )


def _document_starts(predicate: Callable, batch_size: int, key_length: int, offset: int, device: Any) -> Tensor:
    """Return `[B, S]`, bool: slots whose token does not see its predecessor."""
    batch = torch.arange(batch_size, device=device)[:, None]
    slot = torch.arange(1, key_length, device=device)[None] + offset
    sees_previous = predicate(batch, 0, slot, slot - 1).expand(batch_size, -1)
    if not is_tracing(sees_previous) and predicate(batch, 0, slot - 1, slot).any():
        raise ValueError(
            "masked_sparse attention is causal, got a mask in which a token sees a later one; "
            'use attn_implementation="sdpa" for this model'
        )
    return nn.functional.pad(~sees_previous, (1, 0), value=True)


def layout_from_inputs(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    layer_idx: int = 0,
) -> Tensor | None:
    """Describe the inputs of a [`WhisperLMModel`], whatever its attention implementation.

    Args:
        inputs_embeds (`[B, T, hidden_size]`): only its shape and device are read.
        attention_mask (`[B, S]`, or `[B, 1, T, S]` bool or additive, or a layout, or `None`): 1 or `True` for tokens.
        cache (`Cache`, *optional*): the cache, before this forward.
        position_ids (`[B or 1, T]`, *optional*): positions that restart separate packed documents, where there is
            neither an attention mask nor a cache.
        layer_idx (`int`): a layer for which the cache holds keys.

    Returns:
        A layout, `None`, or the four-dimensional mask as it came.

    Raises:
        ValueError: a mask of another rank.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, keys] or [batch, 1, queries, keys], got {list(attention_mask.shape)}"
        )
    batch_size, query_length = inputs_embeds.shape[:2]
    query_offset, (key_length, key_offset) = 0, (query_length, 0)
    if cache is not None:
        query_offset = cache.get_query_offset(layer_idx)
        key_length, key_offset = cache.get_mask_sizes(query_length, layer_idx)
    elif attention_mask is not None:
        key_length = attention_mask.shape[1]

    predicate = causal_mask_function
    if position_ids is not None and attention_mask is None and cache is None:
        document = find_packed_sequence_indices(position_ids.expand(batch_size, -1))
        if document is not None:

            def predicate(batch: Tensor, _head: int, query: Tensor, key: Tensor) -> Tensor:
                return (document[batch, query] == document[batch, key]) & (key <= query)

    return masked_sparse_mask(
        batch_size,
        query_length,
        key_length,
        query_offset.to(inputs_embeds.device) if isinstance(query_offset, Tensor) else query_offset,
        key_offset,
        predicate,
        attention_mask,
        device=inputs_embeds.device,
    )


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
    """Masked sparse attention; the `AttentionInterface` entry.

    Where the budget covers the keys, and in layers that pass `sliding_window` or `sparse_attention=None`, this is
    scaled-dot-product attention over the plain causal (or windowed) mask.

    Args:
        module (`nn.Module`): the attention layer; its `config.sparse_attention` holds the budget, unless the layer
            passes `sparse_attention` itself.
        query (`[B, H, T, D]`), key (`[B, K, S, D]`), value (`[B, K, S, E]`): any float dtype; keys and values may be
            packed by a quantized cache.
        attention_mask: a layout, `None`, or a `[B, 1, T, S]` mask, bool or additive (0, or at most -10,000).
        scaling (`float`, *optional*): factor on the logits, `D ** -0.5` by default.
        dropout (`float`): must be 0.
        sliding_window (`int`, *optional*): exactly this window, and no selection.

    Returns:
        output (`[B, T, H, E]`, dtype of `query`) and, where `output_attentions` asks for them, weights `[B, H, T, S]`.

    Raises:
        ValueError: dropout, logit softcapping, learned sinks, a position bias, paged caches or non-causal attention.
    """
    refuse_unsupported(module, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = layer_settings(module, kwargs)
    wants_weights = kwargs.get("output_attentions", getattr(module.config, "output_attentions", False))
    if sliding_window is not None or settings is None or settings.covers(key.shape[2]):
        settings = None
    is_plain = not wants_weights and (attention_mask is None or is_layout(attention_mask))
    if settings is None or not is_plain:
        key, value = unpack(key, query.dtype), unpack(value, query.dtype)
    if settings is None and not wants_weights:
        mask = dense_mask(attention_mask, query, key, sliding_window)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling)

    if settings is not None and is_plain:
        output = _sparse_attention(query, key, value, attention_mask, scaling, settings, kwargs.get("block_means"))
        return output.transpose(1, 2).contiguous(), None

    outputs, weights = [], []
    for rows, visible in visible_rows(attention_mask, query, key, sliding_window):
        allowed = visible if settings is None else selected_keys(query[:, :, rows], key, visible, settings)
        output, weight = attention_reference(query[:, :, rows], key, value, allowed, scaling)
        outputs.append(output)
        if wants_weights:
            weights.append(weight)
    output = torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
    return output, torch.cat(weights, dim=2) if wants_weights else None


def _sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig,
    block_means: Tensor | None,
) -> Tensor:
    """Dispatch: to Triton on a GPU; else gather the blocks of each query by itself, or take each once for all."""
    if _backend == "triton" or (_backend == "auto" and query.is_cuda):
        output = _triton_attention(query, key, value, layout, scaling, settings, block_means)
        if output is not None:
            return output
    query_length = query.shape[2]
    gathered = query_length * settings.budget_blocks * settings.block_size  # keys, with repetitions
    # on a CPU, gathering wins until it reads two (at 64k keys) to ten times (at 4k, blocks of 32) as much as there is
    if query_length == 1 or (layout is None and gathered <= 2 * key.shape[2]):
        return attention_decode(query, key, value, layout, scaling, settings, block_means)
    return attention_blockwise(query, unpack(key, query.dtype), unpack(value, query.dtype), layout, scaling, settings)


def _triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    scaling: float,
    settings: SparseAttentionConfig,
    block_means: Tensor | None,
) -> Tensor | None:
    """Attend by the Triton kernels; where they cannot, return `None`, or raise if they were asked for by name."""
    from .attention_triton import attention_triton, unmet_condition  # brings triton along
    from .triton_decode import attention_triton_decode

    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    is_decoding = query.shape[2] == 1 and not needs_grad
    if not is_decoding:
        key, value = unpack(key, query.dtype), unpack(value, query.dtype)
    wanted = query.dtype
    if key.is_floating_point() and value.is_floating_point():
        query, key, value = _one_dtype(query, key, value)
    unmet = unmet_condition(query, key, value, settings)
    if unmet is None and is_decoding:
        return attention_triton_decode(query, key, value, layout, scaling, settings, block_means).to(wanted)
    if unmet is None:
        return attention_triton(query, key, value, layout, scaling, settings).to(wanted)
    if _backend == "triton":
        raise ValueError(f'the Triton kernels {unmet}; or leave it to sparse_backend("auto")')
    return None


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors in autocast's dtype where it is on (RoPE widens queries and keys there), or in the widest."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    if torch.is_autocast_enabled(query.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def explicit_mask(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, settings: SparseAttentionConfig | None
) -> Tensor | None:
    """Expand what a query may attend to into the mask that `eager` and `sdpa` take.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`): as attention sees them.
        attention_mask: as in [`masked_sparse_attention_forward`].
        settings (`SparseAttentionConfig`, *optional*): `None` for a dense layer.

    Returns:
        `[B, H or 1, T, S]`, bool, or `None` for plain causal attention without a cache or of a single query.
    """
    if settings is None or settings.covers(key.shape[2]):
        return dense_mask(attention_mask, query, key)
    groups = query.shape[1] // key.shape[1]
    allowed = [
        selected_keys(query[:, :, rows], key, visible, settings)
        for rows, visible in visible_rows(attention_mask, query, key)
    ]
    return torch.cat(allowed, dim=2).repeat_interleave(groups, dim=1)


def dense_mask(
    attention_mask: Tensor | None, query: Tensor, key: Tensor, sliding_window: int | None = None
) -> Tensor | None:
    """Return the plain causal mask, `[B or 1, 1, T, S]` bool, or `None` where SDPA's own causality says the same."""
    query_length, key_length = query.shape[2], key.shape[2]
    is_windowed = sliding_window is not None and sliding_window < key_length
    if attention_mask is None and not is_windowed and query_length in (1, key_length):
        return None
    if attention_mask is not None and not is_layout(attention_mask):
        return bool_mask(attention_mask)
    slots = query_slots(attention_mask, query_length, key_length, key.device)
    return visible_keys(attention_mask, slots, key_length, sliding_window)


def visible_rows(
    attention_mask: Tensor | None, query: Tensor, key: Tensor, sliding_window: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the plain causal mask a few queries at a time: a slice of them and its `[B or 1, 1, rows, S]` bool mask."""
    query_length, key_length = query.shape[2], key.shape[2]
    steps = [slice(start, start + QUERIES_PER_STEP) for start in range(0, query_length, QUERIES_PER_STEP)]
    if attention_mask is None or is_layout(attention_mask):
        slots = query_slots(attention_mask, query_length, key_length, key.device)
        for rows in steps:
            yield rows, visible_keys(attention_mask, slots[:, rows], key_length, sliding_window)
    else:
        for rows in steps:
            yield rows, bool_mask(attention_mask[:, :, rows])


def is_layout(attention_mask: Tensor) -> bool:
    """Tell a layout from a four-dimensional mask."""
    return attention_mask.dtype == torch.int32


def bool_mask(attention_mask: Tensor) -> Tensor:
    """Turn a `[B, 1, T, S]` mask, bool or additive, into a bool one.

    Raises:
        ValueError: an additive mask that holds a bias, or a mask of integers.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if not attention_mask.is_floating_point():
        raise ValueError(f"a four-dimensional attention_mask must be bool or additive, got {attention_mask.dtype}")
    visible = attention_mask == 0
    if not is_tracing(visible) and not (visible | (attention_mask <= -1e4)).all():
        raise ValueError(
            "an additive attention_mask for masked_sparse attention holds 0 (visible) or at most -10,000 (hidden), "
            "got other values; masked sparse attention has no position bias"
        )
    return visible


def cache_kwargs(attention_mask: Tensor | None, settings: SparseAttentionConfig | None) -> dict[str, Any]:
    """Return what a cache layer needs to keep block means: layout and block size, unless the mask is not a layout."""
    if settings is None or (attention_mask is not None and not is_layout(attention_mask)):
        return {}
    return {"layout": attention_mask, "block_size": settings.block_size}


def layer_settings(module: nn.Module, kwargs: dict[str, Any]) -> SparseAttentionConfig | None:
    """Return the budget a layer passes (`None`: dense), or that of its model's config (by default the defaults)."""
    if "sparse_attention" in kwargs:
        return kwargs["sparse_attention"]
    return SparseAttentionConfig.from_value(getattr(module.config, "sparse_attention", None))


def refuse_unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` for what masked sparse attention cannot honour, with the remedy."""
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
