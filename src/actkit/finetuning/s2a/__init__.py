"""S2A: fine-tune structures that need no large activations, and keep 4-bit codes for the others (2025)."""
