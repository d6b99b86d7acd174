"""CATS: gated MLPs that skip what a small gate value would multiply (2024, arXiv:2404.08763)."""
