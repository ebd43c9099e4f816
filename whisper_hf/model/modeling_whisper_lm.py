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
"""The Whisper language model: a decoder-only transformer with masked sparse self-attention.

It has RMSNorm before each sublayer, RoPE, grouped-query attention and a gated MLP, and is written like transformers'
own models. The shape legend is `B` batch, `T` tokens, `S` key slots, `H` query heads, `K` key-value heads, `D` head
dimension, `V` tokens in the vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MASKED_SPARSE, cache_kwargs, refuse_unsupported
from .attention_masks import explicit_mask, layout_from_inputs
from .attention_reference import eager_attention_forward
from .cache import DynamicMaskedSparseLayer, StaticMaskedSparseLayer  # noqa: F401 (the import registers them)
from .cache_quantized import QuantizedSparseCache
from .configuration_whisper_lm import (
    FULL_ATTENTION,
    LAYER_TYPES,
    MASKED_SPARSE_ATTENTION,
    SparseAttentionConfig,
    WhisperLMConfig,
)
from .int8_rows import dequantize_rows
from .labels import items_in_batch
from .model_inputs import embed, refuse_empty, warn_beyond, without_padding
from .pretrained_base import CheckedPreTrainedModel
from .repetition_loss import use_diversity

INT8_CACHE = {"backend": "int8"}  # the `cache_config` with which generate takes the quantized cache of this package


@use_kernel_forward_from_hub("RMSNorm")
class WhisperLMRMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., hidden_size]`, and return the same shape and dtype."""
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Show size and epsilon when printed."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class WhisperLMRotaryEmbedding(nn.Module):
    """Rotary position embedding (RoPE) of every type in transformers (https://arxiv.org/abs/2104.09864)."""

    def __init__(self, config: WhisperLMConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        is_default = self.rope_type == "default"
        rope_init_fn = self.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, attention_scaling = rope_init_fn(config)
        self.attention_scaling: float = attention_scaling
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: WhisperLMConfig, **_: Any) -> tuple[Tensor, float]:
        """Return the inverse frequencies, `[D / 2]` float32, and the factor on cosine and sine."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each `[B, T, D]` in the dtype of `x`, for `position_ids` `[B, T]`."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def apply_rotary_pos_emb(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads, `[B, H, T, D]`, by the angles of `cos` and `sin`, `[B, T, D]`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class WhisperLMMLP(nn.Module):
    """Gated MLP (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: WhisperLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[..., hidden_size]` to the same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class WhisperLMAttention(nn.Module):
    """Grouped-query attention to the selected blocks (in a sparse layer) or to the whole past (in a full layer)."""

    def __init__(self, config: WhisperLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.is_sparse = config.layer_types[layer_idx] == MASKED_SPARSE_ATTENTION

        query_size, key_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            self.q_norm = WhisperLMRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = WhisperLMRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states`, `[B, T, hidden_size]`; `attention_mask` is what `layout_from_inputs` returns.

        Returns:
            output (`[B, T, hidden_size]`) and, under `eager` or with `output_attentions`, weights (`[B, H, T, S]`).
        """
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        refuse_unsupported(self, 0.0, kwargs)
        sparse_attention = SparseAttentionConfig.from_value(self.config.sparse_attention) if self.is_sparse else None
        block_means = None
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, **cache_kwargs(attention_mask, sparse_attention))
            block_means = getattr(cache.layers[self.layer_idx], "block_means", None)

        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation != MASKED_SPARSE:  # masked_sparse dequantizes only the rows that it reads
            key, value = dequantize_rows(key, query.dtype), dequantize_rows(value, query.dtype)
        if implementation == "sdpa":
            attention_mask = explicit_mask(query, key, attention_mask, sparse_attention)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sparse_attention=sparse_attention,
            block_means=block_means,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class WhisperLMDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: WhisperLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = WhisperLMAttention(config, layer_idx)
        self.mlp = WhisperLMMLP(config)
        self.input_layernorm = WhisperLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = WhisperLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Map `hidden_states`, `[B, T, hidden_size]`, to the same shape."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class WhisperLMPreTrainedModel(CheckedPreTrainedModel):
    """Base class of all Whisper language model classes."""

    config: WhisperLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["WhisperLMDecoderLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": WhisperLMDecoderLayer,
        "attentions": WhisperLMAttention,
    }


class WhisperLMModel(WhisperLMPreTrainedModel):
    """The decoder without a head: it maps token ids to hidden states."""

    def __init__(self, config: WhisperLMConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([WhisperLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = WhisperLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = WhisperLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def first_layer(self) -> int:
        """Index of the first layer that exists: a later stage of a pipeline, and its cache, lack the first layers."""
        return next((i for i, layer in enumerate(self.layers) if isinstance(layer, WhisperLMDecoderLayer)), 0)

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of the last layer.

        Args:
            input_ids (`[B, T]`, int64): token ids; or else
            inputs_embeds (`[B, T, hidden_size]`): embeddings in their place.
            attention_mask (`[B, S]`, *optional*): 1 for tokens, 0 for padding and holes; or a `[B, 1, T, S]` mask.
            position_ids (`[B or 1, T]`, int64, *optional*): positions for RoPE. Without an attention mask and a cache,
                positions that restart separate packed documents.
            cache (`Cache`, *optional*): keys and values of earlier tokens.
            use_cache (`bool`, *optional*): return the cache; `config.use_cache` by default.

        Returns:
            `last_hidden_state` (`[B, T, hidden_size]`), `cache`; on request `hidden_states`, `attentions`.

        Raises:
            ValueError: `input_ids` and `inputs_embeds` are both given or both missing, they hold no token, or (on a
                CPU) an id lies outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "both" if input_ids is not None else "neither"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {got}")
        if inputs_embeds is None:
            inputs_embeds = embed(self.embed_tokens, input_ids, self.vocab_size)
        else:
            inputs_embeds = without_padding(inputs_embeds, attention_mask)
        refuse_empty(inputs_embeds)

        # the layout is made before the cache, since packed documents are separated only where there is no cache
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            layout = layout_from_inputs(inputs_embeds, attention_mask, cache, position_ids, self.first_layer)
            masks = dict.fromkeys(LAYER_TYPES, layout)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen_tokens = cache.get_seq_length(self.first_layer) if cache is not None else 0
            warn_beyond(self.config.max_position_embeddings, seen_tokens, inputs_embeds.shape[1])
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen_tokens

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer_type, layer in zip(self.config.layer_types, self.layers, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            cache=cache if use_cache else None,
        )


class WhisperLMForCausalLM(WhisperLMPreTrainedModel, GenerationMixin):
    """The decoder with a language modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: WhisperLMConfig) -> None:
        super().__init__(config)
        self.model = WhisperLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.diversity is not None:
            use_diversity(self, config.diversity)
        self.post_init()

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict the next token at each position; [`WhisperLMModel`] documents the arguments that are not below.

        Args:
            labels (`[B, T]`, int64, *optional*): the token at each position, shifted inside; -100 is ignored.
            logits_to_keep (`int` or `Tensor`): compute logits only for this many last positions (0: all positions), or
                for the positions in a tensor.

        Returns:
            `loss` (mean nats per token, or their sum divided by `num_items_in_batch` where given; 0 if every label is
            ignored), `logits` (`[B, T, V]`), `cache`, and on request `hidden_states` and `attentions`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            count = items_in_batch(labels, kwargs.pop("num_items_in_batch", None), kwargs.get("shift_labels"))
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=count, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def create_masks_for_generate(
        self,
        config: WhisperLMConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor | None:
        """Make the layout of the next forward pass of `generate`, outside of the part that is compiled."""
        return layout_from_inputs(inputs_embeds, attention_mask, cache, position_ids, self.model.first_layer)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation == "quantized":
            options = generation_config.cache_config or {}
            if options == INT8_CACHE and model_kwargs.get("cache") is None:
                generation_config.cache_implementation = None
                model_kwargs["cache"] = QuantizedSparseCache(self.config)
            # transformers' quantized caches accept only full-attention layers; they return plain keys and values, from
            # which blocks can be selected
            config = copy.copy(self.config)
            config.layer_types = [FULL_ATTENTION] * config.num_hidden_layers
            generation_config.cache_config = {"config": config, **options}
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class WhisperLMForSequenceClassification(GenericForSequenceClassification, WhisperLMPreTrainedModel):
    """The decoder with a classifier on the last token that is not padding."""

    _may_be_new = ("score.",)

    # the mixin builds its decoder by AutoModel, which does not know a class that was loaded as remote code
    def __init__(self, config: WhisperLMConfig) -> None:
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = WhisperLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class WhisperLMForTokenClassification(GenericForTokenClassification, WhisperLMPreTrainedModel):
    """The decoder with a classifier on every token."""

    _may_be_new = ("score.",)

    def __init__(self, config: WhisperLMConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = WhisperLMModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "WhisperLMForCausalLM",
    "WhisperLMForSequenceClassification",
    "WhisperLMForTokenClassification",
    "WhisperLMModel",
    "WhisperLMPreTrainedModel",
]
