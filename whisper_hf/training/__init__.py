"""Tools for training with the stock `Trainer`: packed rows, complete checkpoints, finite gradients, generation."""
