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
"""Cache layers of masked sparse layers: keys, values, and the mean key of each block, so that decoding need not reread.

They register themselves under their layer type, so that `DynamicCache(config=...)` and `StaticCache(config=...)` build
them for a [`WhisperLMConfig`]. A mean depends on the keys of its block alone: an update recomputes those of the blocks
that it touches, so that cropping, reordering, repeating and selecting need no bookkeeping. Any other cache gives the
same attention, from means that are recomputed at every step.

Legend: that of `sparse_selection.py`; also `C` tokens per block and `N` blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils.import_utils import is_tracing

from .configuration_whisper_lm import MASKED_SPARSE_ATTENTION
from .sparse_selection import content_order, query_slots

SPARE_TOKENS = 256  # room for this many tokens more, at least, whenever a buffer is moved
SPARE_RATIO = 8  # and for an eighth of its length


def refresh_block_means(
    means: Tensor,
    keys: Tensor,
    layout: Tensor | None,
    num_new: int,
    num_seen: int | Tensor,
    block_size: int,
    read: Callable[[Tensor], Tensor] = Tensor.float,
) -> None:
    """Recompute, in place, the means of the blocks that the newest tokens fall into; only complete ones are of use.

    Args:
        means (`[B, K, N, D]`, float32): room for one block more than the keys fill.
        keys (`[B, K, S, D]`, any float): all keys, the new ones included.
        layout (`[B, 1, 1, S]`, int32, or `None`): see `sparse_selection.py`.
        num_new (`int`): number of new slots, the last ones written.
        num_seen (`int` or 0-dim tensor): number of slots written before them.
        block_size (`int`): `C`.
        read (`Callable`): turns some keys into float32.
    """
    touched = (num_new - 1) // block_size + 2
    if layout is None and isinstance(num_seen, int):
        first = num_seen // block_size
        complete = keys[:, :, first * block_size : (num_seen + num_new) // block_size * block_size]
        if complete.shape[2]:
            blocks = read(complete).unflatten(2, (-1, block_size)).mean(3)
            means[:, :, first : first + blocks.shape[2]] = blocks
        return
    slot_of, seen = None, num_seen
    if layout is not None:
        last = query_slots(layout, 1, keys.shape[2], keys.device)
        slot_of, visible = content_order(layout, last, keys.shape[2])
        is_old = torch.arange(keys.shape[2], device=keys.device) <= last - num_new
        seen = (visible & is_old).sum(1, keepdim=True)
    block = (seen // block_size + torch.arange(touched, device=keys.device)).expand(len(keys), -1)
    content = block[..., None] * block_size + torch.arange(block_size, device=keys.device)
    slots = content.flatten(1).clamp(max=keys.shape[2] - 1)
    if slot_of is not None:
        slots = slot_of.gather(1, slots)
    index = slots[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    blocks = read(keys.gather(2, index)).unflatten(2, (touched, block_size)).mean(3)
    means.scatter_(2, block[:, None, :, None].expand_as(blocks).clamp(max=means.shape[2] - 1), blocks)


class DynamicMaskedSparseLayer(DynamicLayer):
    """Grows with the sequence: keys and values `[B, K, S, D]`, views of buffers that grow by an eighth at a time.

    `block_means` (`[B, K, N, D]`, float32) is `None` until tokens arrive, and again where an update does not say which
    tokens are content. It stays on its device when keys and values are offloaded.
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
        """Append keys and values, `[B, K, T, D]`; return all of them, `[B, K, S, D]`.

        Args:
            layout (`[B, 1, 1, S]`, int32, or `None`), block_size (`int`, *optional*): say which tokens are content;
                without a block size no means are kept from here on.
        """
        seen = self.get_seq_length()
        if is_tracing(key_states) or (torch.is_grad_enabled() and key_states.requires_grad):
            super().update(key_states, value_states)  # what autograd has saved must not be written over
        else:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = self._append("keys", self.keys, key_states)
            self.values = self._append("values", self.values, value_states)
        self._update_means(layout, seen, block_size)
        return self.keys, self.values

    def _append(self, name: str, states: Tensor, new: Tensor) -> Tensor:
        """Write new states behind the present ones, where these are the beginning of the buffer; else move them."""
        length = states.shape[2] if states.dim() == 4 else 0
        end = length + new.shape[2]
        buffer = self._buffers.get(name)
        if buffer is None or not length or buffer.data_ptr() != states.data_ptr() or end > buffer.shape[2]:
            capacity = end + max(SPARE_TOKENS, end // SPARE_RATIO)
            capacity += -capacity % SPARE_TOKENS  # whole blocks are gathered faster
            buffer = self._buffers[name] = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if length:
                buffer[:, :, :length] = states
        buffer[:, :, length:end] = new
        return buffer[:, :, :end]

    def _update_means(self, layout: Tensor | None, seen: int, block_size: int | None) -> None:
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
            keys, new = self.keys.detach(), length - seen
            refresh_block_means(self.block_means, keys, layout, new, seen, block_size, self._read)

    @staticmethod
    def _read(keys: Tensor) -> Tensor:
        """Return keys as they are held, `[B, K, T, ...]`, in float32, `[B, K, T, D]`."""
        return keys.float()

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        super().offload()
        self._buffers.clear()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.block_means = None
        self._buffers.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        super().reorder_cache(beam_idx)
        if self.block_means is not None:
            self.block_means = self.block_means.index_select(0, beam_idx.to(self.block_means.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.block_means is not None:
            self.block_means = self.block_means.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        if self.block_means is not None:
            self.block_means = self.block_means[indices]


class StaticMaskedSparseLayer(StaticLayer):
    """Preallocated keys and values, `[B, K, max_cache_len, D]`, and block means, for `torch.compile`."""

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
        """Write keys and values, `[B, K, T, D]`; return the whole cache. Arguments as in the dynamic layer."""
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
        """Forget everything, in place."""
        super().reset()
        if self.block_means is not None:
            self.block_means.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, for beam search."""
        super().reorder_cache(beam_idx)
        if self.block_means is not None:
            self.block_means = self.block_means.index_select(0, beam_idx.to(self.block_means.device))
