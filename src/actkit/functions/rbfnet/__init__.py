"""Gaussian RBFNet: radial basis neurons on learned features, for images and shapes as functions of a coordinate."""
