"""FlashSVD: factored blocks that never hold what is as wide as attention or MLP (2025, arXiv:2508.01506)."""
