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
"""Configuration of the Whisper language model (a decoder-only text model, not the speech model `whisper`)."""

import functools
import json
import os
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import configuration_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .config_checks import (
    check_dtype,
    check_fractions,
    check_labels,
    check_names,
    check_quantization,
    check_rope,
    check_sizes,
    check_token_ids,
    is_number,
)

FULL_ATTENTION = "full_attention"
MASKED_SPARSE_ATTENTION = "masked_sparse_attention"
LAYER_TYPES = (FULL_ATTENTION, MASKED_SPARSE_ATTENTION)

# a Trainer that resumes reads a checkpoint's config through the base class, which accepts only the names in this tuple
if MASKED_SPARSE_ATTENTION not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES:
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES += (MASKED_SPARSE_ATTENTION,)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """The budget of masked sparse attention: how many blocks of its own document each token attends to.

    A block holds `block_size` consecutive tokens. A query in block `c` attends to the first `sink_blocks` blocks, to
    the `local_blocks` blocks that end with `c`, and to those `topk_blocks` of the remaining past blocks that have the
    highest scores. Sequences of at most `budget_blocks * block_size` tokens are attended densely.

    Args:
        block_size (`int`, defaults to 32): tokens per block; a power of two, at least 16.
        topk_blocks (`int`, defaults to 32): blocks chosen by score, per token and key-value head; at least 0.
        local_blocks (`int`, defaults to 16): most recent blocks, the query's own included; at least 1.
        sink_blocks (`int`, defaults to 2): first blocks of the document; at least 0.

    Raises:
        ValueError: a value outside its range, or an unknown field name (`from_value`).
    """

    block_size: int = 32
    topk_blocks: int = 32
    local_blocks: int = 16
    sink_blocks: int = 2

    MINIMUM: ClassVar[dict[str, int]] = {"block_size": 16, "topk_blocks": 0, "local_blocks": 1, "sink_blocks": 0}
    MAXIMUM: ClassVar[int] = 2**20

    def __post_init__(self) -> None:
        for name, minimum in self.MINIMUM.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= self.MAXIMUM:
                raise ValueError(
                    f"sparse_attention.{name} must be an integer of at least {minimum} and at most {self.MAXIMUM}, got "
                    f"{value!r}; the default is {type(self).__dataclass_fields__[name].default}"
                )
        if self.block_size & (self.block_size - 1):
            lower = 1 << (self.block_size.bit_length() - 1)
            raise ValueError(
                f"sparse_attention.block_size must be a power of two, got {self.block_size}; "
                f"the nearest are {lower} and {2 * lower}"
            )

    @property
    def budget_blocks(self) -> int:
        """The largest number of blocks that one query attends to."""
        return self.sink_blocks + self.local_blocks + self.topk_blocks

    @property
    def budget_tokens(self) -> int:
        """The length up to which sequences are attended densely, in tokens."""
        return self.budget_blocks * self.block_size

    def covers(self, length: int) -> bool:
        """Return whether every query of a sequence of `length` tokens attends to its whole past."""
        return length <= self.budget_tokens

    @classmethod
    def from_value(cls, value: Any) -> "SparseAttentionConfig":
        """Build from `None` (the defaults), a dict of fields, or a `SparseAttentionConfig`.

        Raises:
            ValueError: `value` is none of these, or names a field that does not exist.
        """
        return cls() if value is None else _settings(cls, "sparse_attention", value)


@dataclass(frozen=True)
class DiversityConfig:
    """The training objective against repetition; evaluation remains plain cross-entropy.

    Args:
        contrast_weight (`float`, defaults to 0.5): weight of `log(1 + sum_c exp(z_c - z_y))`, where `y` is the true
            token and `c` runs over the tokens that would continue a repetition of two tokens or more; at least 0.
        window (`int`, defaults to 512): how far back a repetition is searched for, in tokens; at least 1.
        gem_beta (`float`, *optional*): temperature of GEM, which replaces cross-entropy and preserves variety across
            answers in supervised fine-tuning; above 0, and 0.7 in the paper (Li et al., ICLR 2025,
            https://arxiv.org/abs/2408.16673).

    Raises:
        ValueError: a value outside its range, or an unknown field name (`from_value`).
    """

    contrast_weight: float = 0.5
    window: int = 512
    gem_beta: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.contrast_weight) or not 0 <= self.contrast_weight < inf:
            raise ValueError(f"diversity.contrast_weight must be finite, 0 or more, got {self.contrast_weight!r}")
        if not isinstance(self.window, int) or isinstance(self.window, bool) or not 1 <= self.window <= 2**20:
            raise ValueError(
                f"diversity.window must be an integer of at least 1 and at most {2**20}, got {self.window!r}; the "
                "default is 512"
            )
        if self.gem_beta is not None and (not is_number(self.gem_beta) or not 0 < self.gem_beta < inf):
            raise ValueError(
                f"diversity.gem_beta must be finite and above 0, got {self.gem_beta!r}; None is cross-entropy"
            )

    @classmethod
    def from_value(cls, value: Any) -> "DiversityConfig | None":
        """Build from `None` (off), a dict of fields, or a `DiversityConfig`.

        Raises:
            ValueError: `value` is none of these, or names a field that does not exist.
        """
        return None if value is None else _settings(cls, "diversity", value)


def _settings(cls: Any, name: str, value: Any) -> Any:
    """Build a settings dataclass from a dict of its fields, or from an instance of it."""
    if isinstance(value, cls):
        return value
    if hasattr(value, "__dataclass_fields__"):  # an instance of the same class, loaded a second time as remote code
        value = asdict(value)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict or a {cls.__name__}, got {type(value).__name__}: {value!r}")
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(map(repr, unknown))}; the fields are {known}")
    return cls(**value)


def _explained(config_class: Any) -> Any:
    """Make the constructor of a `strict` config class raise `ValueError` where a field is wrong."""
    build = config_class.__init__

    @functools.wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except (StrictDataclassError, KeyError) as error:  # transformers' validation of RoPE raises KeyError
            raise ValueError(f"the config must have all fields, of the right types: {error}") from error

    config_class.__init__ = init
    return config_class


@_explained
@strict
class WhisperLMConfig(PreTrainedConfig):
    r"""Configuration of [`WhisperLMModel`] and its heads; the defaults are those of SmolLM2-135M.

    With the bias and norm switches it describes the Llama, Mistral, Qwen2, Qwen3 and SmolLM families exactly.

    Args:
        vocab_size (`int`): number of token ids.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width inside the gated MLP.
        num_hidden_layers (`int`): number of decoder layers.
        num_attention_heads (`int`): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads, 3 by default; it must divide
            `num_attention_heads`, and `None` means `num_attention_heads`.
        head_dim (`int`, *optional*): size of one head, even; `hidden_size // num_attention_heads` by default.
        hidden_act (`str`): activation of the MLP's gate.
        max_position_embeddings (`int`): longest sequence, in tokens.
        initializer_range (`float`): standard deviation of newly initialised weights.
        rms_norm_eps (`float`): added to the mean square in RMSNorm.
        use_cache (`bool`): return a key-value cache.
        tie_word_embeddings (`bool`): the output head is the embedding matrix.
        rope_parameters (`dict`, *optional*): RoPE of any type in transformers, with `rope_type` and `rope_theta`.
        attention_bias (`bool`): biases on the query, key and value projections.
        attention_out_bias (`bool`, *optional*): bias on the output projection; `attention_bias` by default.
        mlp_bias (`bool`): biases in the MLP.
        use_qk_norm (`bool`): RMSNorm over each query and key head, before RoPE.
        attention_dropout (`float`): dropout on attention weights in training; only `eager` and `sdpa` can apply it.
        sparse_attention (`SparseAttentionConfig` or `dict`, *optional*): see [`SparseAttentionConfig`].
        diversity (`DiversityConfig` or `dict`, *optional*): the training objective against repetition, off by default;
            see [`DiversityConfig`].
        layer_types (`list[str]`, *optional*): per layer, `"masked_sparse_attention"` (default) or `"full_attention"`.
        converted_from (`str`, *optional*): `model_type` of the dense family this checkpoint was converted from.

    Raises:
        ValueError: a value that cannot work; the message names the field, the value and the remedy.
    """

    model_type = "whisper_lm"
    keys_to_ignore_at_inference = ["cache"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int | None = 3
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    use_qk_norm: bool = False
    attention_dropout: float | int = 0.0
    sparse_attention: SparseAttentionConfig | dict | None = None
    diversity: DiversityConfig | dict | None = None
    layer_types: list[str] | None = None
    converted_from: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        check_sizes(self)  # first, since the next lines build a list with one entry per layer
        if self.layer_types is None:
            self.layer_types = [MASKED_SPARSE_ATTENTION] * self.num_hidden_layers
        check_dtype(self.dtype if kwargs.get("torch_dtype") is None else kwargs["torch_dtype"])
        check_labels(kwargs.get("num_labels"))
        check_quantization(kwargs.get("quantization_config"))
        self.sparse_attention = SparseAttentionConfig.from_value(self.sparse_attention)
        self.diversity = DiversityConfig.from_value(self.diversity)
        # `strict` wraps the errors of its validators in another class, so they also run here and raise ValueError
        self.validate_architecture()
        self.validate_layer_type()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Validate the values, and that the sizes are consistent."""
        check_sizes(self)
        check_fractions(self)
        check_names(self)
        check_token_ids(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({heads}), got {kv_heads}; use one of {divisors}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads, got {heads}; "
                "change one of them or set head_dim"
            )
        head_dim = self.hidden_size // heads if self.head_dim is None else self.head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs) and at least 2, got {head_dim}")
        check_rope(self.rope_parameters or {}, head_dim)

    def validate_layer_type(self) -> None:
        """Validate `layer_types`: one known name per layer."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types holds {', '.join(map(repr, unknown))}; the types are {list(LAYER_TYPES)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name one type per layer (num_hidden_layers={self.num_hidden_layers}), "
                f"got {len(self.layer_types)} names; leave it out to make every layer sparse"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can represent."""
        output = super().to_dict()
        output["sparse_attention"] = asdict(SparseAttentionConfig.from_value(self.sparse_attention))
        diversity = DiversityConfig.from_value(self.diversity)
        output["diversity"] = None if diversity is None else asdict(diversity)
        return output

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the config file of a checkpoint.

        `layer_types` is left out if all layers are sparse, which is the default: transformers without this package
        does not know the type, and reads this file for `AutoTokenizer`.
        """
        saved = json.loads(self.to_json_string(use_diff))
        if set(self.layer_types) == {MASKED_SPARSE_ATTENTION}:
            saved.pop("layer_types", None)
        Path(json_file_path).write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["DiversityConfig", "SparseAttentionConfig", "WhisperLMConfig"]
