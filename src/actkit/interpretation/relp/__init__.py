"""RelP: what the parts of a model do to an answer, for two forward passes and one backward pass."""
