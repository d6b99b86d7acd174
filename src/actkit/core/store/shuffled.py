"""A random order of any number of rows that takes no memory: a keyed permutation, computed where it is asked for.

    >>> Shuffle(10**9, seed=0)(torch.tensor([0, 1, 2]))     # which rows come first

Four rounds of a Feistel network over the next power of 4, with the hash of `core/watch/sample.py` as round function; a
number that falls outside is sent through again until it falls inside (cycle walking), so that it stays a permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.core.watch.sample import mix

ROUNDS = 4


class Shuffle:
    """A permutation of 0 to n - 1.

    Args:
        n: how many.
        seed: which one.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"n: {n} was given; give at least 1.")
        self.n, self.seed = n, seed
        self._bits = max(1, (max(1, (n - 1).bit_length()) + 1) // 2)  # of each half

    def __len__(self) -> int:
        return self.n

    def __call__(self, index: Tensor) -> Tensor:
        """Where these numbers go.

        Args:
            index: int64 [k], 0 to n - 1.

        Returns:
            Int64 [k].
        """
        found = self._once(index)
        while bool((outside := found >= self.n).any()):
            found[outside] = self._once(found[outside])
        return found

    def _once(self, index: Tensor) -> Tensor:
        mask = (1 << self._bits) - 1
        left, right = index >> self._bits, index & mask
        for turn in range(ROUNDS):
            key = mix(torch.tensor(self.seed * ROUNDS + turn))
            left, right = right, left ^ (mix(mix(right) ^ key) & mask)
        return (left << self._bits) | right
