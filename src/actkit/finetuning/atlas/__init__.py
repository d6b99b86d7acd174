"""aTLAS: task vectors and a coefficient for each of their blocks (2024, arXiv:2407.02880)."""
