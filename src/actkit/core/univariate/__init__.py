"""Functions of one variable whose coefficients are learned or fitted: bases, rationals, and layers made of them."""
