"""Neural codes: which units are on at a sample, as a binary code that names its linear region."""
