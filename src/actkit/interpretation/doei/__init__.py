"""A vision transformer with class tokens, its class activation maps, and the optimisation of its embeddings."""
