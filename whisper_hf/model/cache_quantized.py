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
"""A cache that holds keys and values in 8 bits: about half the memory of bfloat16, a quarter of float32.

Sparse layers decode from the rows of the blocks that they attend to, and read no others; means of blocks stay float32.

Legend: that of `sparse_selection.py`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .cache import DynamicMaskedSparseLayer
from .int8_rows import dequantize_rows, quantize_rows


class QuantizedMaskedSparseLayer(DynamicMaskedSparseLayer):
    """`keys` and `values` are packed, `[B, K, S, D + 2]` int8; `block_means` are not."""

    _layer_type = None  # type: ignore[assignment]  # is asked for, not found by the type of a layer

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        layout: Tensor | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, `[B, K, T, D]`.

        Returns:
            the first ones as they came; later all of them, packed if the layer says by `block_size` that it is sparse.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("a quantized cache has no gradient, got keys that need one; use torch.no_grad()")
        seen = self.get_seq_length()
        super().update(quantize_rows(key_states), quantize_rows(value_states), layout=layout, block_size=block_size)
        if not seen:
            return key_states, value_states
        if block_size is None:
            return dequantize_rows(self.keys, key_states.dtype), dequantize_rows(self.values, value_states.dtype)
        return self.keys, self.values

    @staticmethod
    def _read(keys: Tensor) -> Tensor:
        return dequantize_rows(keys)


class QuantizedSparseCache(Cache):
    """Keys and values of all layers in 8 bits: `generate(..., cache=QuantizedSparseCache(model.config))`.

    The same as `generate(cache_implementation="quantized", cache_config={"backend": "int8"})`.

    Args:
        config (`PreTrainedConfig`): of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[QuantizedMaskedSparseLayer() for _ in range(count)])


__all__ = ["QuantizedSparseCache"]
