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
"""Cache layers for masked sparse attention, which keep keys, values, and the mean key of each block.

With the means, a decoding step scores all blocks without reading all keys. The classes register themselves under their
layer type, so that `DynamicCache(config=...)` and `StaticCache(config=...)` build them for a [`WhisperLMConfig`]. A
mean depends only on the keys of its block, and an update recomputes the means of the blocks that it writes to.
Therefore cropping, reordering, repeating and selecting rows need no further bookkeeping. Other caches give the same
attention, but the means are recomputed from all keys at every step.

The shape legend of `sparse_selection.py` applies here; in addition, `C` is the number of tokens per block.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import MASKED_SPARSE_ATTENTION
from .sparse_selection import content_order, query_slots

SPARE_TOKENS = 256  # a new buffer has room for at least this many further tokens
SPARE_RATIO = 8  # and for at least its length divided by this number


def refresh_block_means(
    means: Tensor,
    keys: Tensor,
    layout: Tensor | None,
    num_new: int,
    num_seen: int | Tensor,
    block_size: int,
    read: Callable[[Tensor], Tensor] = Tensor.float,
) -> None:
    """Recompute the mean keys of the blocks that the newest tokens belong to, in place.

    Only the means of complete blocks are valid afterwards; nothing reads the other ones.

    Args:
        means (`[B, K, N, D]`, float32): means to update; `N` must be at least `S // C + 1`.
        keys (`[B, K, S, D]`, any float): all keys, including the new ones.
        layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
            `sparse_selection.py` defines it.
        num_new (`int`): number of new slots; they are the last slots that have been written.
        num_seen (`int` or 0-dim tensor): number of slots that had been written before.
        block_size (`int`): `C`.
        read (`Callable`): converts keys, in the form in which the cache holds them, to float32 `[B, K, tokens, D]`.
    """
    num_touched = (num_new - 1) // block_size + 2  # blocks that the new tokens can belong to, at most
    if layout is None and isinstance(num_seen, int):
        first = num_seen // block_size
        complete = keys[:, :, first * block_size : (num_seen + num_new) // block_size * block_size]
        if complete.shape[2]:
            blocks = read(complete).unflatten(2, (-1, block_size)).mean(3)
            means[:, :, first : first + blocks.shape[2]] = blocks
        return
    slot_of = None
    seen = num_seen
    if layout is not None:
        last = query_slots(layout, 1, keys.shape[2], keys.device)
        slot_of, visible = content_order(layout, last, keys.shape[2])
        is_old = torch.arange(keys.shape[2], device=keys.device) <= last - num_new
        seen = (visible & is_old).sum(1, keepdim=True)  # visible tokens before the new ones, [B, 1]
    block = (seen // block_size + torch.arange(num_touched, device=keys.device)).expand(len(keys), -1)
    content = block[..., None] * block_size + torch.arange(block_size, device=keys.device)
    slots = content.flatten(1).clamp(max=keys.shape[2] - 1)
    if slot_of is not None:
        slots = slot_of.gather(1, slots)
    index = slots[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    blocks = read(keys.gather(2, index)).unflatten(2, (num_touched, block_size)).mean(3)
    means.scatter_(2, block[:, None, :, None].expand_as(blocks).clamp(max=means.shape[2] - 1), blocks)


class DynamicMaskedSparseLayer(DynamicLayer):
    """Cache layer that grows with the sequence, and keeps the mean key of each block.

    `keys` and `values` (`[B, K, S, D]`) are views of larger buffers. When a buffer is full, a new one with room for at
    least an eighth more tokens replaces it.

    `block_means` (`[B, K, N, D]`, float32) is `None` until the first update, and after an update without a block size.
    It stays on its device when keys and values are offloaded.
    """

    _layer_type = MASKED_SPARSE_ATTENTION

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Tensor
        self.values: Tensor
        self.block_means: Tensor | None = None
        self._buffers: dict[str, Tensor] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        layout: Tensor | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and update the block means.

        Args:
            key_states, value_states (`[B, K, T, D]`, any float): keys and values of the new tokens.
            layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
                `sparse_selection.py` defines it; the new tokens are included.
            block_size (`int`, *optional*): tokens per block. An update without it drops the means until the cache is
                reset, because the cache then does not know which tokens are visible.

        Returns:
            All keys and all values, `[B, K, S, D]`.
        """
        seen = self.get_seq_length()
        if is_tracing(key_states) or (torch.is_grad_enabled() and key_states.requires_grad):
            super().update(key_states, value_states)  # concatenates: autograd's saved tensors must not be overwritten
        else:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = self._append("keys", self.keys, key_states)
            self.values = self._append("values", self.values, value_states)
        self._update_means(layout, seen, block_size)
        return self.keys, self.values

    def _append(self, name: str, states: Tensor, new: Tensor) -> Tensor:
        """Append new states in the buffer, or in a larger buffer that replaces it.

        Args:
            name (`str`): name of the buffer, `"keys"` or `"values"`.
            states (`[B, K, S, D]`, or the empty tensor of an empty cache): the present states.
            new (`[B, K, T, D]`): the states to append.

        Returns:
            `[B, K, S + T, D]`, a view of the buffer.
        """
        length = states.shape[2] if states.dim() == 4 else 0
        end = length + new.shape[2]
        buffer = self._buffers.get(name)
        # After reordering, selecting or offloading, the states are no longer the beginning of the buffer.
        is_in_buffer = buffer is not None and length > 0 and buffer.data_ptr() == states.data_ptr()
        if buffer is None or not is_in_buffer or end > buffer.shape[2]:
            capacity = end + max(SPARE_TOKENS, end // SPARE_RATIO)
            capacity = math.ceil(capacity / SPARE_TOKENS) * SPARE_TOKENS  # a buffer of whole blocks is gathered faster
            buffer = self._buffers[name] = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if length:
                buffer[:, :, :length] = states
        buffer[:, :, length:end] = new
        return buffer[:, :, :end]

    def _update_means(self, layout: Tensor | None, seen: int, block_size: int | None) -> None:
        """Update the block means for all tokens but the first `seen`; drop the means if no block size is given."""
        length = self.keys.shape[2]
        if block_size is None or (seen and self.block_means is None):
            self.block_means = None
            return
        needed = length // block_size + 2
        if self.block_means is None or self.block_means.shape[2] < needed:
            shape = (*self.keys.shape[:2], needed + needed // SPARE_RATIO, self._read(self.keys[:, :, :0]).shape[3])
            grown = self.keys.new_zeros(shape, dtype=torch.float32)
            if self.block_means is not None:
                grown[:, :, : self.block_means.shape[2]] = self.block_means
            self.block_means = grown
        with torch.no_grad():
            keys = self.keys.detach()
            refresh_block_means(self.block_means, keys, layout, length - seen, seen, block_size, self._read)

    @staticmethod
    def _read(keys: Tensor) -> Tensor:
        """Convert keys, in the form in which the cache holds them, to float32 `[B, K, T, D]`."""
        return keys.float()

    def offload(self) -> None:
        """Move keys and values to the CPU, but leave the block means on their device."""
        super().offload()
        self._buffers.clear()

    def reset(self) -> None:
        """Empty the cache, and release the buffers and the block means."""
        super().reset()
        self.block_means = None
        self._buffers.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch rows by the rows `beam_idx` (`[B]`, int64), for beam search."""
        super().reorder_cache(beam_idx)
        if self.block_means is not None:
            self.block_means = self.block_means.index_select(0, beam_idx.to(self.block_means.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.block_means is not None:
            self.block_means = self.block_means.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the batch rows `indices` (int64), in this order."""
        super().batch_select_indices(indices)
        if self.block_means is not None:
            self.block_means = self.block_means[indices]


class StaticMaskedSparseLayer(StaticLayer):
    """Cache layer of a fixed size for `torch.compile`, which keeps the mean key of each block.

    `keys` and `values` are `[B, K, S, D]`, where `S` is `max_cache_len`, and `block_means` is `[B, K, S // C + 2, D]`
    (float32), or `None` until an update passes a block size.
    """

    _layer_type = MASKED_SPARSE_ATTENTION

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.block_means: Tensor | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        layout: Tensor | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values behind the present ones, and update the block means.

        Args:
            key_states, value_states (`[B, K, T, D]`, any float): keys and values of the new tokens.
            layout (`[B, 1, 1, S]`, int32, or `None`): the document and the visibility of each key slot, as
                `sparse_selection.py` defines it; the new tokens are included.
            block_size (`int`, *optional*): tokens per block; an update without it does not update the means.

        Returns:
            All keys and all values, `[B, K, S, D]`, including the slots that are still empty.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if block_size is not None and self.block_means is None:
            shape = (*self.keys.shape[:2], self.max_cache_len // block_size + 2, self.keys.shape[3])
            self.block_means = self.keys.new_zeros(shape, dtype=torch.float32)
        seen = self.cumulative_length.clone()
        keys, values = super().update(key_states, value_states)
        if block_size is not None and self.block_means is not None:
            with torch.no_grad():
                num_new = key_states.shape[2]
                refresh_block_means(self.block_means, keys.detach(), layout, num_new, seen, block_size)
        return keys, values

    def reset(self) -> None:
        """Empty the cache, in place."""
        super().reset()
        if self.block_means is not None:
            self.block_means.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch rows by the rows `beam_idx` (`[B]`, int64), for beam search."""
        super().reorder_cache(beam_idx)
        if self.block_means is not None:
            self.block_means = self.block_means.index_select(0, beam_idx.to(self.block_means.device))
