"""CRReLU and the analysis that it comes from (2024, arXiv:2405.12954)."""
