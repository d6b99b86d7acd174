"""Token merging and PYRA: a vision transformer that is adapted and made faster at once (2024, arXiv:2403.09192)."""
