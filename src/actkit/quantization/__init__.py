"""Quantization: weights (and later activations) in fewer bits."""
