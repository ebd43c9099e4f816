"""Measure repetition in generated text, watch it during training, and train against it."""
