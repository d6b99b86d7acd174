"""Spark Transformer: neurons and keys chosen by a slice, by a statistical top-k (2025, arXiv:2506.06644)."""
