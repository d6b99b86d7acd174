"""PLM: latent attention with a small cache, and an MLP whose squared ReLU gives zeros."""
