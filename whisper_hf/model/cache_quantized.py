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
"""A key-value cache in 8 bits, which needs about half the memory of bfloat16 and a quarter of float32.

Sparse layers dequantize only the keys and values of the blocks that they attend to. The mean keys of blocks stay in
float32.

The shape legend of `sparse_selection.py` applies here.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .cache import DynamicMaskedSparseLayer
from .int8_rows import dequantize_rows, quantize_rows


class QuantizedMaskedSparseLayer(DynamicMaskedSparseLayer):
    """Cache layer that holds `keys` and `values` quantized to int8 rows, `[B, K, S, D + 2]` (see `int8_rows.py`).

    `block_means` (`[B, K, N, D]`) stays in float32.
    """

    _layer_type = None  # type: ignore[assignment]  # not registered: users build QuantizedSparseCache on request

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        layout: Tensor | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Quantize and append keys and values, and update the block means.

        Args:
            key_states, value_states (`[B, K, T, D]`, any float): keys and values of the new tokens.
            layout, block_size: as in [`DynamicMaskedSparseLayer.update`]. Sparse layers pass a block size, dense layers
                do not.

        Returns:
            Keys and values. If the cache was empty: the arguments, unchanged. Later, for a sparse layer: all keys and
            values as quantized rows, `[B, K, S, D + 2]` (int8). Later, for a dense layer: all keys and values
            dequantized, `[B, K, S, D]`, in the dtype of the arguments.

        Raises:
            ValueError: `key_states` requires a gradient.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError(
                "a quantized cache has no gradient, expected keys that need none, got keys with requires_grad=True; "
                "call the model under torch.no_grad(), or use another cache"
            )
        seen = self.get_seq_length()
        super().update(quantize_rows(key_states), quantize_rows(value_states), layout=layout, block_size=block_size)
        if not seen:
            return key_states, value_states
        if block_size is None:
            return dequantize_rows(self.keys, key_states.dtype), dequantize_rows(self.values, value_states.dtype)
        return self.keys, self.values

    @staticmethod
    def _read(keys: Tensor) -> Tensor:
        """Dequantize keys from `[B, K, T, D + 2]` (int8) to float32 `[B, K, T, D]`."""
        return dequantize_rows(keys)


class QuantizedSparseCache(Cache):
    """Cache that holds the keys and values of all layers in 8 bits.

    Pass it to `generate(..., cache=QuantizedSparseCache(model.config))`; for a [`WhisperLMForCausalLM`],
    `generate(..., cache_implementation="quantized", cache_config={"backend": "int8"})` is equivalent. Keys and values
    become int8 rows of `D + 2` bytes per token and key-value head, as `int8_rows.py` describes.

    Args:
        config (`PreTrainedConfig`): configuration of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[QuantizedMaskedSparseLayer() for _ in range(num_layers)])


__all__ = ["QuantizedSparseCache"]
