"""Self-normalizing networks: SELU, alpha dropout, and what keeps mean and variance (2017, arXiv:1706.02515)."""
