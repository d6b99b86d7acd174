"""Ways to run a model other than its own forward pass."""
