"""VanillaNet (2023, arXiv:2305.12972): plain nets that are trained with more layers than they keep."""
