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
"""Validate the inputs of a model, as far as this is possible without waiting for a GPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


def embed(embeddings: nn.Module, input_ids: Tensor, vocabulary: int) -> Tensor:
    """Look up token ids, `[B, T]`, and return embeddings, `[B, T, hidden_size]`.

    Raises:
        ValueError: an id outside the vocabulary, on a CPU; a GPU stops with an assertion of its own.
    """
    try:
        return embeddings(input_ids)
    except IndexError as error:
        raise ValueError(
            f"input_ids must be at least 0 and below vocab_size ({vocabulary}), got {int(input_ids.min())} to "
            f"{int(input_ids.max())}; use the tokenizer that belongs to the model, or "
            "model.resize_token_embeddings(len(tokenizer))"
        ) from error


def without_padding(inputs_embeds: Tensor, attention_mask: Any) -> Tensor:
    """Return embeddings, `[B, T, hidden_size]`, with zeros at padding, since a NaN there would reach visible tokens."""
    if isinstance(attention_mask, Tensor) and attention_mask.shape == inputs_embeds.shape[:2]:
        return inputs_embeds.masked_fill((attention_mask == 0)[..., None], 0.0)
    return inputs_embeds


def refuse_empty(inputs_embeds: Tensor) -> None:
    """Raise a `ValueError` for inputs, `[B, T, hidden_size]`, without a row or without a token."""
    if 0 in inputs_embeds.shape[:2]:
        raise ValueError(
            f"inputs must have at least one row and one token, got shape {tuple(inputs_embeds.shape[:2])}; leave empty "
            "batches out, or begin a text with bos_token_id"
        )


def warn_beyond(positions: int, seen_tokens: Any, length: int) -> None:
    """Warn once about a sequence that is longer than `max_position_embeddings`.

    Args:
        positions (`int`): `max_position_embeddings`.
        seen_tokens (`int` or tensor): number of tokens in the cache. A tensor, as a static cache has, is not read.
        length (`int`): number of new tokens.
    """
    if torch.compiler.is_compiling() or not isinstance(seen_tokens, int) or seen_tokens + length <= positions:
        return
    logger.warning_once(
        f"a sequence of {seen_tokens + length} tokens is longer than max_position_embeddings={positions}, for which "
        "the model was made: expect worse predictions; cut it, or set rope_parameters for more (such as yarn)"
    )
