"""Training objectives: pure functions of tensors, whose values per token are masked and reduced in one place."""

from ..model.repetition_loss import contrast_loss, repeating_tokens
from .chunked import TokenLosses, chunked_distillation_loss
from .divergences import DIVERGENCES, Divergence, Probabilities, weighted_divergence
from .layer_distance import relative_distance, spread_layers
from .lm_head import Head
from .targets import StoredSamples, StoredTop, Target, TeacherTarget

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "Head",
    "Probabilities",
    "StoredSamples",
    "StoredTop",
    "Target",
    "TeacherTarget",
    "TokenLosses",
    "chunked_distillation_loss",
    "contrast_loss",
    "relative_distance",
    "repeating_tokens",
    "spread_layers",
    "weighted_divergence",
]
