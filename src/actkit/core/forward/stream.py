"""Endless, seeded data: batch after batch, each made when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch


class Stream:
    """Endless batches, of which each follows from the seed and its number alone.

        def pairs(generator):  # a fresh regression task
            x = torch.randn(32, 4, generator=generator)
            return {"input": x, "labels": x.sum(1, keepdim=True)}

        train(model, Stream(pairs, seed=1), validation=Stream(pairs, seed=2).take(4), steps=1000)

    So a training that is resumed goes on with the batches that it would have had: its position is the number of the
    next batch.

    Args:
        make: makes a batch; it draws from the generator that it is given and from nothing else.
        seed: of all batches; another seed gives other data.
        description: one line for reports.
    """

    def __init__(self, make: Callable[[torch.Generator], Any], seed: int = 0, description: str = "a stream") -> None:
        if seed < 0:
            raise ValueError(f"seed: {seed} was given, allowed is 0 or more.")
        self.make, self.seed, self.description = make, seed, description

    def __getitem__(self, number: int) -> Any:
        """The batch of a number, from 0 on."""
        if number < 0:
            raise IndexError(f"number: {number} was given; a stream has no end, so count from 0.")
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()  # seeds and numbers side by side share none
        return self.make(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))

    def __iter__(self) -> Iterator[Any]:
        return self.start(0)

    def start(self, position: int) -> Iterator[Any]:
        """The batches from a position on, without end."""
        return (self[number] for number in count(position))

    def take(self, batches: int, start: int = 0) -> list[Any]:
        """The batches from a position on.

        Args:
            batches: how many.
            start: the number of the first.

        Raises:
            ValueError: fewer than 1.
        """
        if batches < 1:
            raise ValueError(f"batches: {batches} was given, allowed is 1 or more.")
        return list(islice(self.start(start), batches))

    def __repr__(self) -> str:
        return f"Stream({self.description}, seed={self.seed})"
