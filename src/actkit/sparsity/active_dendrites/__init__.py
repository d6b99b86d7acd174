"""Sparse codes, neurons that recognise them, and how often they err (2016, arXiv:1601.00720)."""
