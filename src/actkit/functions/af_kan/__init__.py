"""AF-KAN: pairs of shifted activations for each input, reduced to one number, before a linear layer."""
