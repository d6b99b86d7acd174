"""Sparsing Law: PPL-p% sparsity, how it is found and applied, and the laws it follows (2024, arXiv:2411.02335)."""
