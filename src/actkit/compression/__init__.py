"""Compression: models that are smaller as they lie, without codes: narrower layers, factors, folds."""
