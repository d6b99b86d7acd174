"""Massive activations: found, followed over a training, fitted by a law, and overwritten."""
