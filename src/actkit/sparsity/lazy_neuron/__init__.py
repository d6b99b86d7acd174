"""The lazy neuron phenomenon, measured, and made a top-k (2022, arXiv:2210.06313)."""
