"""Knowledge distillation: train a student model to predict what a larger teacher model predicts."""

from .config import DistillationConfig
from .signal_writer import write_signals
from .stored_signals import Manifest, StoredSignals
from .trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "Manifest", "StoredSignals", "write_signals"]
