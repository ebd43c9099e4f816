"""Functions that several examples share: models, texts, resuming, pictures of the attention."""
