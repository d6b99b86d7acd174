"""How a model is trained: rules, the loop, its objective."""
