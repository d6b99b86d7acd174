"""PolyCom (2024, arXiv:2411.03884): learnable polynomials as activation functions, and MLPs without a gate for them."""
