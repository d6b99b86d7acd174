"""Activation sparsity: reading fewer weights because few activations matter."""
