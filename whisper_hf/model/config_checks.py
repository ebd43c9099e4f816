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
"""Validate the numbers and names in a config, before anything is built or allocated from them."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# far above every existing model, and far below what would exhaust memory or never end
LARGEST = {
    "vocab_size": 2**27,
    "hidden_size": 2**20,
    "intermediate_size": 2**23,
    "num_hidden_layers": 2**13,
    "num_attention_heads": 2**13,
    "num_key_value_heads": 2**13,
    "head_dim": 2**15,
    "max_position_embeddings": 2**40,
}
MOST_LABELS = 2**20
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def check_sizes(config: Any) -> None:
    """Raise a `ValueError` for a size of the model that is not positive, or larger than any model needs."""
    for name, largest in LARGEST.items():
        _check_size(name, getattr(config, name), largest)


def check_labels(count: Any) -> None:
    """Raise a `ValueError` for a number of labels that is not positive, or larger than any task needs."""
    _check_size("num_labels", count, MOST_LABELS)


def _check_size(name: str, value: Any, largest: int) -> None:
    if value is not None and not (isinstance(value, int) and 1 <= value <= largest):  # None: derived from other fields
        raise ValueError(f"{name} must be at least 1 and at most {largest}, got {value!r}; fix the config")


def check_fractions(config: Any) -> None:
    """Raise a `ValueError` for a float field that is not a number or outside its range."""
    if not 0 < config.rms_norm_eps < math.inf:
        raise ValueError(f"rms_norm_eps must be above 0 and finite, got {config.rms_norm_eps}; 1e-5 is usual")
    if not 0 <= config.initializer_range < math.inf:
        raise ValueError(f"initializer_range must be finite and at least 0, got {config.initializer_range}")
    if not 0 <= config.attention_dropout < 1:
        raise ValueError(f"attention_dropout must be at least 0 and below 1, got {config.attention_dropout}")


def check_names(config: Any) -> None:
    """Raise a `ValueError` for an activation function that transformers does not have."""
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {config.hidden_act!r}")


def check_token_ids(config: Any) -> None:
    """Raise a `ValueError` for a special token outside the vocabulary, which could never be read or written."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        if value == []:
            raise ValueError(f"{name} must be one or more token ids, got []; leave it out if the model has none")
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if not 0 <= index < config.vocab_size:
                raise ValueError(
                    f"{name} must be at least 0 and below vocab_size ({config.vocab_size}), got {value}; fix it, or "
                    "leave it out if the model has none"
                )


def check_rope(parameters: Mapping[str, Any], head_dim: int) -> None:
    """Raise a `ValueError` for RoPE parameters of an unknown type, or with values that make no sense."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type in rope_parameters must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    rotated = parameters.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise ValueError(f"partial_rotary_factor in rope_parameters must be 1.0 or left out, got {rotated}")
    for name, value in parameters.items():
        if value is None and name != "rope_theta":  # transformers derives it
            continue
        lengthwise = name in ("short_factor", "long_factor")
        if lengthwise and (not isinstance(value, list) or len(value) != head_dim // 2):
            raise ValueError(f"{name} in rope_parameters must list {head_dim // 2} numbers (head_dim / 2), got {value}")
        smallest = 1 if name == "factor" else 0  # a factor below 1 would shorten the context instead of extending it
        if lengthwise or name.endswith(("theta", "factor", "_embeddings")):
            for number in value if lengthwise else [value]:
                if not is_number(number) or not max(smallest, 5e-324) <= number < math.inf:
                    what = "at least 1" if smallest else "above 0"
                    raise ValueError(f"{name} in rope_parameters must be finite and {what}, got {value!r}")


def check_dtype(dtype: Any) -> None:
    """Raise a `ValueError` for a dtype that is not a floating one."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype such as 'bfloat16', got {dtype!r}; fix it or leave it out")


def check_quantization(settings: Any) -> None:
    """Raise a `ValueError` for a quantization config of the wrong type; its method is looked up later."""
    method = settings.get("quant_method", "") if isinstance(settings, dict) else ""
    if not isinstance(method, str) or not (
        settings is None or isinstance(settings, dict) or hasattr(settings, "to_dict")
    ):
        raise ValueError(f"quantization_config must be a dict with the name of a quant_method, got {settings!r}")


def is_number(value: Any) -> bool:
    """Return whether a value is an integer or a float, possibly infinite or NaN."""
    return isinstance(value, Real) and not isinstance(value, bool)
