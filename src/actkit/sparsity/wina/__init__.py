"""WINA: inputs chosen by their size and their column's norm, and the rotation before it (2025, arXiv:2505.19427)."""
