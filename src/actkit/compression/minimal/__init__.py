"""Transformers reduced to a minimum: without MLP, with fewer attention matrices (2024, arXiv:2410.13732)."""
