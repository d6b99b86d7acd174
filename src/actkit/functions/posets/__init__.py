"""Posets as units: pooling and activations from order polytopes (2024, arXiv:2412.06097)."""
