"""Measure repetition in generated text, monitor it during training, and train against it."""
