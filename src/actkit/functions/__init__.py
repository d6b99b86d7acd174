"""Activation functions: replacing those of a model (layers that learn theirs come here)."""
