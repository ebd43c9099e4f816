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
"""Rules about labels and documents that the model, the objectives and the trainers share.

Legend: `B` rows of `T` tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # label of a token that no loss counts


def shift(labels: Tensor) -> Tensor:
    """Move each label to the position that predicts it.

    Args:
        labels (`[B, T]`, int64): the token at each position, or -100.

    Returns:
        `[B, T]`, int64: the label of the next position; -100 at the last one.
    """
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def items_in_batch(labels: Tensor, num_items_in_batch: Tensor | int | None, shift_labels: Tensor | None) -> Any:
    """Return the number that a sum of losses is divided by.

    It is at least 1, so that a batch with nothing to learn has a loss of 0 and not NaN.

    Args:
        labels (`[B, T]`, int64): -100 is not counted, and neither is the first label of a row, which nothing predicts.
        num_items_in_batch (`int` or 0-dim tensor, *optional*): the caller's own count, which takes precedence.
        shift_labels (`[B, T]`, int64, *optional*): labels that are shifted already; they replace `labels`.
    """
    if isinstance(num_items_in_batch, int):
        return max(num_items_in_batch, 1)
    if num_items_in_batch is None:
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        num_items_in_batch = (targets != IGNORED).sum()
    return num_items_in_batch.clamp(min=1)


def documents_from_positions(position_ids: Tensor) -> Tensor:
    """Number the packed documents of each row: a document begins where the position falls or stays.

    A position that jumps ahead does not begin a document. The rule of transformers (`find_packed_sequence_indices`)
    differs there: it begins a document at every step other than +1, but only in a forward pass without a cache and a
    mask. With its default `use_cache=True` a dense Llama therefore attends across such a gap, and so does a WhisperLM,
    in one pass and token by token.

    Args:
        position_ids (`[B, T]`, int64): positions.

    Returns:
        `[B, T]`, int64: 0 for the first document of a row, 1 for the second, and so on.
    """
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    return nn.functional.pad(restarts.to(torch.int64).cumsum(1), (1, 0))
