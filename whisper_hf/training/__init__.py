"""Parts for training with the stock `Trainer`: packed rows, checkpoints, finite gradients, generation."""
