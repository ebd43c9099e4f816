"""Knowledge distillation: a `Trainer` that teaches a student from a larger teacher."""

from .config import DistillationConfig
from .signals import Manifest, StoredSignals
from .signals_writing import write_signals
from .trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "Manifest", "StoredSignals", "write_signals"]
