"""Grids that values are rounded to: what a code stands for, and how codes are stored. No method rounds by itself."""
