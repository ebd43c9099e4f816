"""Knowledge distillation: a `Trainer` that teaches a student from a larger teacher."""

from .config import DistillationConfig
from .signal_writer import write_signals
from .stored_signals import Manifest, StoredSignals
from .trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "Manifest", "StoredSignals", "write_signals"]
