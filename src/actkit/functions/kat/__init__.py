"""Kolmogorov-Arnold Transformer: rational functions that groups of channels learn, in front of linear layers."""
