"""Softplus attention, which holds on longer inputs: LSSA and LSSAR (2025, ICML 2026, arXiv:2501.13428)."""
