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
"""Describe which tokens of a batch are visible: make layouts from a model's inputs, and expand them to masks.

A *layout* takes O(S) memory, and all fast paths read it. A mask takes O(T * S), and `sdpa` and the reference read it.
The shape legend of `sparse_selection.py` applies here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import SparseAttentionConfig
from .labels import documents_from_positions
from .sparse_selection import content_layout, query_slots, selected_keys, visible_keys

QUERIES_PER_STEP = 512  # bounds how many rows of a [T, S] mask exist at once


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
    """Describe a batch to masked sparse attention; this is the entry of transformers' `AttentionMaskInterface`.

    The cost is O(S): the mask function is asked once per slot whether a token sees its predecessor, which tells where
    documents begin, and not once per pair of tokens.

    Args:
        batch_size, q_length, kv_length (`int`): `B`, `T` and `S`.
        q_offset, kv_offset (`int`, or tensor in a static cache): index of the first query and of the first key slot.
        mask_function (`Callable`): transformers' predicate (batch, head, query index, key index) -> may attend.
        attention_mask (`[B, seen tokens]`, bool, *optional*): the padding mask.
        allow_is_causal_skip (`bool`): whether `None` may be returned for one document without hidden tokens.
        use_vmap (`bool`): whether the predicate is the user's own; it is then expanded to a full mask.
        device (`torch.device`): where the layout is needed.
        config (`PreTrainedConfig`, *optional*): the config of the calling model.

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
    """Raise a `ValueError` for a model with attention code of its own: it would read the layout as an additive mask."""
    model_class = MODEL_MAPPING.get(config_class, None)
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise ValueError(
            f"masked_sparse attention needs a model that uses transformers' attention interface, got "
            f'{model_class.__name__}, which has an attention of its own; load it with attn_implementation="eager"'
        )


def _document_starts(predicate: Callable, batch_size: int, key_length: int, offset: int, device: Any) -> Tensor:
    """Return which slots begin a document, `[B, S]` bool: those whose token does not see its predecessor."""
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
    """Describe the inputs of a [`WhisperLMModel`] in the same way for every attention implementation.

    Args:
        inputs_embeds (`[B, T, hidden_size]`): the embeddings, of which only shape and device are read.
        attention_mask (`[B, S]`, or `[B, 1, T, S]` bool or additive, or a layout, or `None`): 1 or `True` for tokens.
        cache (`Cache`, *optional*): the cache, before this forward.
        position_ids (`[B or 1, T]`, *optional*): positions. They separate packed documents where they restart (see
            [`documents_from_positions`]), if there is neither an attention mask nor a cache.
        layer_idx (`int`): a layer for which the cache holds keys.

    Returns:
        A layout, `None` (one document, nothing hidden), or a four-dimensional mask unchanged.

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
        document = documents_from_positions(position_ids).expand(batch_size, -1)
        if is_tracing(document) or document[:, -1].any():

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


def explicit_mask(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, settings: SparseAttentionConfig | None
) -> Tensor | None:
    """Return the mask of everything that masked sparse attention attends to, for `sdpa`.

    Args:
        query (`[B, H, T, D]`), key (`[B, K, S, D]`): as attention sees them.
        attention_mask: a layout, `None`, or a `[B, 1, T, S]` mask, bool or additive.
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
    """Return the plain causal mask, `[B or 1, 1, T, S]` bool, or `None` where SDPA's `is_causal` is equivalent."""
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
    """Yield the plain causal mask for a few queries at a time: their slice, and `[B or 1, 1, rows, S]` bool."""
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
    """Return whether a four-dimensional tensor is a layout (int32) and not a mask (bool or float)."""
    return attention_mask.dtype == torch.int32


def bool_mask(attention_mask: Tensor) -> Tensor:
    """Convert a `[B, 1, T, S]` mask, bool or additive, to bool: `True` where a token is visible.

    Raises:
        ValueError: an additive mask with values other than 0 and at most -10,000, or a mask of integers.
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
