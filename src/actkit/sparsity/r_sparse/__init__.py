"""R-Sparse: a sparse full weight and a low-rank copy, with ranks that a search chooses (2025, arXiv:2504.19449)."""
