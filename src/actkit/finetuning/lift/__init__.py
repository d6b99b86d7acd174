"""LIFT: train the entries that are largest once a weight is reduced in rank (2025, arXiv:2506.00772)."""
