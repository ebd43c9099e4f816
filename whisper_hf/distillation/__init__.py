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

"""Knowledge distillation: a `Trainer` that teaches a student from a larger teacher."""

from .config import DistillationConfig
from .signals import Manifest, StoredSignals
from .signals_writing import write_signals
from .trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "Manifest", "StoredSignals", "write_signals"]
