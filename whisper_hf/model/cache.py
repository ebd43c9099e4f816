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
"""Cache layers of masked sparse layers.

They register themselves under their layer type, so that `DynamicCache(config=...)` and `StaticCache(config=...)` build
them for a [`WhisperLMConfig`]. They keep what their parents keep; blocks are scored from the cached keys.
"""

from transformers.cache_utils import DynamicLayer, StaticLayer

from .configuration_whisper_lm import MASKED_SPARSE_ATTENTION


class DynamicMaskedSparseLayer(DynamicLayer):
    """Grows with the sequence: keys and values `[B, K, S, D]`."""

    _layer_type = MASKED_SPARSE_ATTENTION


class StaticMaskedSparseLayer(StaticLayer):
    """Preallocated keys and values, `[B, K, max_cache_len, D]`, for `torch.compile`."""

    _layer_type = MASKED_SPARSE_ATTENTION
