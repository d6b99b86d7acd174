"""Models in folders: checkpoints of changed models, transformers' own, and their tensors."""
