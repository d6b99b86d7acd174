"""Agile-Quant: static activations, attention weights as powers of two, and pruned prompts (2023, arXiv:2312.05693)."""
