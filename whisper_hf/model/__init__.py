"""The files that travel with a checkpoint: flat siblings that import one another by one-level relative imports only."""
