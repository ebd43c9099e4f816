"""Convert dense checkpoints to WhisperLM and back, without changing a bit of the weights.

    whisper-hf convert SOURCE TARGET [--to-dense]

The four dense families and WhisperLM have the same names of weights. The families differ only in where they have biases
and norms, which the table `FAMILIES` states. RoPE parameters, sizes and token ids are copied by name.
"""

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoint_io import has_checksums, load_causal_lm, load_config, new_folder, save_tokenizer
from .model.checkpoint_integrity import weight_shapes
from .model.configuration_whisper_lm import SparseAttentionConfig, WhisperLMConfig
from .model.modeling_whisper_lm import WhisperLMForCausalLM

# WhisperLM's config field -> the family's config field with this meaning, or the value that holds for all its models
FAMILIES: dict[str, dict[str, str | bool]] = {
    "llama": {
        "attention_bias": "attention_bias",
        "attention_out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "use_qk_norm": False,
    },
    "mistral": {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False, "use_qk_norm": False},
    "qwen2": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "use_qk_norm": False},
    "qwen3": {
        "attention_bias": "attention_bias",
        "attention_out_bias": "attention_bias",
        "mlp_bias": False,
        "use_qk_norm": True,
    },
}

# config fields with the same name and meaning in all families and in WhisperLM
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)


def from_dense(
    source: PreTrainedModel | str | os.PathLike,
    sparse_attention: SparseAttentionConfig | dict | None = None,
    **from_pretrained_kwargs: Any,
) -> WhisperLMForCausalLM:
    """Turn a dense causal language model into a WhisperLM with the same weights, bit for bit.

    Args:
        source: a model of a family in `FAMILIES`, whose weights are copied; or the folder or Hub id of a checkpoint.
        sparse_attention: block size and budget of every layer; the defaults of [`SparseAttentionConfig`] if left out.
        from_pretrained_kwargs: options for loading from a folder or the Hub, such as `revision`, `dtype` (by default
            the dtype of the checkpoint) or `verify_checksums`.

    Returns:
        The model, with the device, the dtype, the mode (training or evaluation) and the generation config of the
        source. For sequences within the sparse budget, its logits equal the logits of the source.

    Raises:
        ValueError: an unsupported architecture, an option that WhisperLM cannot represent, quantized weights, options
            for loading with a model that is loaded already, or weights that are damaged, missing or not finite.
    """
    if isinstance(source, PreTrainedModel):
        if from_pretrained_kwargs:
            raise ValueError(
                f"a model that is loaded already takes no {sorted(from_pretrained_kwargs)}; leave these options out"
            )
        config = sparse_config(source.config, sparse_attention)
        weights = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    else:
        only_weights = ("dtype", "device_map", "verify_checksums")
        hub_kwargs = {k: v for k, v in from_pretrained_kwargs.items() if k not in only_weights}
        config = sparse_config(load_config(source, **hub_kwargs), sparse_attention)
        source = load_causal_lm(
            source,
            shapes=lambda: weight_shapes(WhisperLMForCausalLM, config),  # names and shapes are the same
            finite=True,
            **{"dtype": "auto", **from_pretrained_kwargs},
        )
        config = sparse_config(source.config, sparse_attention)
        weights = source.state_dict()
    return rebuild(source, WhisperLMForCausalLM, config, weights)


def to_dense(model: WhisperLMForCausalLM, family: str | None = None) -> PreTrainedModel:
    """Turn a WhisperLM back into a model of a dense family with the same weights, bit for bit.

    The result attends densely. It is for software that supports only the dense families, such as vLLM.

    Args:
        model: the model; its weights are copied.
        family: `"llama"`, `"mistral"`, `"qwen2"` or `"qwen3"`; by default the family from which the model was
            converted, or else the first family that can represent it.

    Returns:
        An instance of the family's causal language model class, with the generation config of the model.

    Raises:
        ValueError: a model that is not a WhisperLM, an unknown family, or a family that cannot represent the model.
    """
    if getattr(model.config, "model_type", None) != WhisperLMConfig.model_type or not isinstance(
        model, PreTrainedModel
    ):
        raise ValueError(f"to_dense takes a WhisperLMForCausalLM, got {type(model).__name__}; merge adapters first")
    config = dense_config(model.config, family)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return rebuild(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, weights)


def sparse_config(dense: PreTrainedConfig, sparse_attention: SparseAttentionConfig | dict | None) -> WhisperLMConfig:
    """Translate the config of a dense model to a WhisperLM config.

    Raises:
        ValueError: an unsupported architecture, or an option that WhisperLM cannot represent.
    """
    family = FAMILIES.get(dense.model_type)
    if family is None:
        raise ValueError(
            f"cannot convert model_type {dense.model_type!r}; supported are {list(FAMILIES)} (SmolLM and SmolLM2 are "
            'llama); any other causal LM can run attn_implementation="masked_sparse" unconverted'
        )
    _refuse_unsupported(dense)
    switches = {ours: getattr(dense, theirs) if isinstance(theirs, str) else theirs for ours, theirs in family.items()}
    shared = {name: copy.deepcopy(getattr(dense, name, None)) for name in SHARED_FIELDS}
    if shared["pad_token_id"] == -1:  # early Llama configs mean "no padding token" by -1
        shared["pad_token_id"] = None
    return WhisperLMConfig(**shared, **switches, sparse_attention=sparse_attention, converted_from=dense.model_type)


def _refuse_unsupported(dense: PreTrainedConfig) -> None:
    """Raise a `ValueError` for a dense config with an option that WhisperLM cannot represent."""
    if getattr(dense, "quantization_config", None) is not None:
        raise ValueError(
            "cannot convert quantized weights without loss, got a quantization_config; convert the full-precision "
            "checkpoint (or model.dequantize()) and quantize the result"
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[dense.model_type]
    if dense.architectures and dense.architectures != [architecture]:
        raise ValueError(
            f"cannot convert architectures={dense.architectures}; supported for {dense.model_type!r} is {architecture}"
        )
    window = getattr(dense, "sliding_window", None)
    slides = "sliding_attention" in (getattr(dense, "layer_types", None) or ["sliding_attention"])
    if window is not None and slides and window < dense.max_position_embeddings:
        raise ValueError(
            f"cannot convert sliding_window={window} (of {dense.max_position_embeddings} positions); supported are "
            "models without a window: set config.sliding_window = None if the model may attend further, or run it "
            'unconverted with attn_implementation="masked_sparse", which honours the window'
        )


def dense_config(config: WhisperLMConfig, family: str | None = None) -> PreTrainedConfig:
    """Translate a WhisperLM config to the config of a dense family.

    Raises:
        ValueError: an unknown family, or a family that cannot represent the config.
    """
    family = family or config.converted_from
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; supported are {list(FAMILIES)}; name one of these")
    conflicts = {}
    for name in [family] if family else FAMILIES:
        fields, conflicts[name] = _dense_fields(config, name)
        if not conflicts[name]:
            shared = {field: copy.deepcopy(getattr(config, field)) for field in SHARED_FIELDS}
            dense = CONFIG_MAPPING[name](**shared, **fields, sliding_window=None)
            dense.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]]
            return dense
    raise ValueError(
        f"no dense family can represent this model, got fields in conflict with each family: {conflicts}; change these "
        "fields, or keep the WhisperLM"
    )


def _dense_fields(config: WhisperLMConfig, family: str) -> tuple[dict[str, bool], list[str]]:
    """Return the config fields of a dense family, and the WhisperLM fields that it cannot represent.

    The latter are strings of the form `field=value`.
    """
    fields: dict[str, bool] = {}
    conflicts = []
    for ours, theirs in FAMILIES[family].items():
        value = getattr(config, ours)
        represented = fields.setdefault(theirs, value) if isinstance(theirs, str) else theirs
        if represented != value:
            conflicts.append(f"{ours}={value}")
    return fields, conflicts


def rebuild(
    source: PreTrainedModel, model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Any]
) -> Any:
    """Make a model of another class with the given weights.

    Args:
        source: the model whose device, mode and generation config the new model gets.
        model_class: class of the new model.
        config: config of the new model.
        weights: tensors of the new model by name; they are not copied.

    Raises:
        ValueError: the source is on several devices, or on the meta device.
    """
    devices = {parameter.device for parameter in source.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(
            f"the model to convert must be on one device, got {sorted(map(str, devices))}; load it on 'cpu'"
        )
    with no_init_weights():
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(devices.pop()).train(source.training)


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    sparse_attention: SparseAttentionConfig | dict | None = None,
    *,
    dense: bool = False,
    max_shard_size: str | int = "50GB",
) -> None:
    """Convert a checkpoint, and write it to a folder with its tokenizer and its generation config.

    The weights of the source are verified against its `SHA256SUMS`, if it has this file. The target folder is written
    completely, or not at all.

    Args:
        source: folder or Hub id of the checkpoint to convert.
        target: the folder to write; it must not exist, or be empty.
        sparse_attention: as in [`from_dense`].
        dense: convert a WhisperLM checkpoint to its dense family, instead of the other way.
        max_shard_size: largest size of one file of weights.

    Raises:
        ValueError: the errors of [`from_dense`] and [`to_dense`], weights that have changed since they were saved, a
            target folder that is not empty, or a tokenizer with ids beyond the vocabulary.
    """
    with new_folder(target) as folder:
        verify = has_checksums(source)
        if dense:
            model = to_dense(load_causal_lm(source, finite=True, dtype="auto", verify_checksums=verify))
        else:
            model = from_dense(source, sparse_attention, verify_checksums=verify)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        save_tokenizer(source, folder, model.config.vocab_size)
