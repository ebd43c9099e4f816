"""Dense checkpoints to WhisperLM and back, without changing a bit of the weights.

    python -m whisper_hf.conversion SOURCE TARGET [--to-dense]

The four families name their weights alike, and so does WhisperLM; they differ in where they have biases and norms. That
is the whole table. RoPE, sizes and token ids carry over by name.
"""

import argparse
import copy
import os
import tempfile
from pathlib import Path

"""Objectives of training: pure functions of tensors, per token, masked and reduced in one place."""

from .chunked import TokenLosses, chunked_distillation_loss
from .divergences import DIVERGENCES, Divergence, Probabilities, weighted_divergence
from .heads import Head
from .states import relative_distance, spread_layers
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
    "relative_distance",
    "spread_layers",
    "weighted_divergence",
]
