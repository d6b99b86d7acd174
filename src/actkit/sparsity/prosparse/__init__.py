"""ProSparse: ReLU models trained to be sparser, thresholds after it, and a predictor (2024, arXiv:2402.13516)."""
