"""Sparse autoencoders: module kinds, training, files, and what their error holds."""
