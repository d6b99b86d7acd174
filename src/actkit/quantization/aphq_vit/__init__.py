"""APHQ-ViT (2025): blocks that learn their rounding, weighted by what matters to the output."""
