"""Interpretation: what is inside a model, and which of it causes what it answers."""
