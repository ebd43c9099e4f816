"""A plugin for transformers with the Whisper language model, a decoder-only text model (not the speech model).

Importing this package registers the model in transformers' Auto classes, and the `masked_sparse` attention in its
attention interfaces.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .model.attention import masked_sparse_attention_forward, sparse_backend
from .model.cache_quantized import QuantizedSparseCache
from .model.configuration_whisper_lm import DiversityConfig, SparseAttentionConfig, WhisperLMConfig
from .model.modeling_whisper_lm import (
    WhisperLMForCausalLM,
    WhisperLMForSequenceClassification,
    WhisperLMForTokenClassification,
    WhisperLMModel,
    WhisperLMPreTrainedModel,
)
from .model.repetition_loss import use_diversity
from .quantization.int8_cpu import Int8CpuConfig

if TYPE_CHECKING:
    from .calibration import layer_importance
    from .cards.model_card import model_card
    from .conversion import convert_checkpoint, from_dense, to_dense
    from .distillation import DistillationConfig, DistillationTrainer
    from .distillation.student import student_from
    from .repetition.monitor_callback import DiversityCallback
    from .repetition.unlikelihood_callback import SequenceUnlikelihoodCallback
    from .training.finite_gradients import FiniteGradientsCallback
    from .training.last_checkpoint import last_checkpoint
    from .training.packed_stream import PackedStream
    from .training.packing import packed_rows

__version__ = "0.1.0"

# public names -> files that are imported only when the name is used, so that running a model imports little
_LAZY = {
    "convert_checkpoint": "conversion",
    "from_dense": "conversion",
    "to_dense": "conversion",
    "DistillationConfig": "distillation",
    "DistillationTrainer": "distillation",
    "DiversityCallback": "repetition.monitor_callback",
    "FiniteGradientsCallback": "training.finite_gradients",
    "PackedStream": "training.packed_stream",
    "SequenceUnlikelihoodCallback": "repetition.unlikelihood_callback",
    "last_checkpoint": "training.last_checkpoint",
    "layer_importance": "calibration",
    "model_card": "cards.model_card",
    "packed_rows": "training.packing",
    "student_from": "distillation.student",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (called for names that the module does not have)."""
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    """Register the classes in transformers' Auto classes, and mark them to be saved with their code."""
    AutoConfig.register(WhisperLMConfig.model_type, WhisperLMConfig, exist_ok=True)
    WhisperLMConfig.register_for_auto_class()
    for auto_class, model_class in (
        (AutoModel, WhisperLMModel),
        (AutoModelForCausalLM, WhisperLMForCausalLM),
        (AutoModelForSequenceClassification, WhisperLMForSequenceClassification),
        (AutoModelForTokenClassification, WhisperLMForTokenClassification),
    ):
        auto_class.register(WhisperLMConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
    # the Trainer's label smoother shifts labels only for models whose class name is in this table
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[WhisperLMConfig.model_type] = WhisperLMForCausalLM.__name__


_register()

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "DiversityCallback",
    "DiversityConfig",
    "FiniteGradientsCallback",
    "Int8CpuConfig",
    "PackedStream",
    "QuantizedSparseCache",
    "SequenceUnlikelihoodCallback",
    "SparseAttentionConfig",
    "WhisperLMConfig",
    "WhisperLMForCausalLM",
    "WhisperLMForSequenceClassification",
    "WhisperLMForTokenClassification",
    "WhisperLMModel",
    "WhisperLMPreTrainedModel",
    "convert_checkpoint",
    "from_dense",
    "last_checkpoint",
    "layer_importance",
    "masked_sparse_attention_forward",
    "model_card",
    "packed_rows",
    "sparse_backend",
    "student_from",
    "to_dense",
    "use_diversity",
]
