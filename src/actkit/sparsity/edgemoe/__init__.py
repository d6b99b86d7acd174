"""EdgeMoE: experts that do not fit into memory (2023, arXiv:2308.14352)."""
