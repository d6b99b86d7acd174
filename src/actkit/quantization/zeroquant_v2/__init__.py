"""ZeroQuant-V2: which rounding a model bears, and a low-rank part of the error added back (2023, arXiv:2303.08302)."""
