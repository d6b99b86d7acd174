"""S-KAN: layers that choose the basis of each node from a pool, in training."""
