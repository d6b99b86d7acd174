"""Rotations by Hadamard matrices: every value of a vector is spread over all of them, at little cost.

    x R = (x * signs) H / sqrt(n),   H [n, n] of +1 and -1 with H H^T = n I

n = 2^k: Sylvester's matrix, H_2n = H_2 (x) H_n. n = 2^k m: H_2^k (x) H_m with a matrix of Paley's of order m <= 256,

    q = m - 1, a prime = 3 mod 4:        H_m = I + S,   S = [[0, 1], [-1, Q]]
    q = m / 2 - 1, a prime = 1 mod 4:    H_m = S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],
                                         S = [[0, 1], [1, Q]]

where Q[i, j] is 1 if i - j is a square mod q, -1 if it is none, 0 on the diagonal. So m = 12, 20, 28, 36, 44, 60 ...
are made, not looked up (576 = 16 x 36, 640 = 32 x 20, 1536 = 128 x 12). A vector is multiplied by one small factor
after the other, n (m + 64 + ...) products in place of n^2.

The signs follow from a text by SHAKE-256, so that no version of any library draws others; they are kept all the same.
"""

from __future__ import annotations

import hashlib
from functools import cache
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.layers.keeps_dtype import KeepsDtype

LARGEST = 256  # order of a matrix that is no power of two: it is multiplied as it is
FACTOR = 64  # order of the largest power of two that is multiplied at once


class Rotation(KeepsDtype):
    """A rotation of the last dimension by signs and a Hadamard matrix, computed in float32 or wider.

    Args:
        signs: +1 or -1 for each channel.
        inverse: multiply by R^T, which takes the rotation back.

    Raises:
        ValueError: there is no Hadamard matrix of so many channels here.
    """

    decodes_as: ClassVar[str] = "rotation"
    signs: Tensor

    def __init__(self, signs: Tensor, inverse: bool = False) -> None:
        super().__init__()
        self.size, self.inverse = signs.numel(), inverse
        self.register_buffer("signs", signs.detach().to(torch.int8))
        self._orders = orders(self.size)
        for index, order in enumerate(self._orders):
            self.register_buffer(f"factor{index}", hadamard(order).float(), persistent=False)

    @classmethod
    def drawn(cls, size: int, text: str) -> Rotation:
        """Draw the signs from a text, the same ones for ever.

        Args:
            size: channels.
            text: such as a seed and the place that is rotated.
        """
        stream = hashlib.shake_256(text.encode()).digest(-(-size // 8))
        signs = [1 if stream[i // 8] >> i % 8 & 1 else -1 for i in range(size)]
        return cls(torch.tensor(signs, dtype=torch.int8))

    def inverted(self) -> Rotation:
        """Return the rotation that takes this one back."""
        return Rotation(self.signs, not self.inverse)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x [..., channels]; the result has its dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        y = wide if self.inverse else wide * self.signs
        after = self.size
        for index, order in enumerate(self._orders):
            after //= order  # channels that go through this factor side by side
            factor = getattr(self, f"factor{index}").to(wide)
            factor = factor if self.inverse else factor.mT
            y = (y.reshape(-1, order) @ factor.mT) if after == 1 else factor @ y.reshape(-1, order, after)
        y = y.reshape(x.shape) * self.size**-0.5
        return (y * self.signs if self.inverse else y).to(x.dtype)

    def rows(self, weight: Tensor) -> Tensor:
        """Rotate what a weight [channels, in] gives: R^T W.

        Args:
            weight: [channels, ...]; more dimensions may stand before these two.
        """
        return self(weight.mT).mT

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"size": self.size, "inverse": self.inverse}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Rotation:
        """One of the right structure whose signs come from a file."""
        return cls(torch.ones(spec["size"]), spec["inverse"])

    def extra_repr(self) -> str:
        return f"{self.size}{', inverse' if self.inverse else ''}"


def hadamard(size: int) -> Tensor:
    """Return a Hadamard matrix: int8 [size, size] of +1 and -1, whose rows are orthogonal.

    Args:
        size: its order.

    Raises:
        ValueError: none of that order is made here.
    """
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for order in orders(size):
        matrix = torch.kron(matrix, _paley(order) if order & (order - 1) else _sylvester(order))
    return matrix


@cache
def orders(size: int) -> tuple[int, ...]:
    """Return the orders of the factors of the Hadamard matrix of a size, powers of two first.

    Args:
        size: the product of the orders.

    Raises:
        ValueError: there is no such matrix here.
    """
    odd = size // (size & -size) if size > 0 else 0
    last = next((odd << k for k in range(9) if odd << k <= LARGEST and _paley_prime(odd << k)), 0) if odd != 1 else 1
    if not last or size % last:
        raise ValueError(
            f"size: {size} channels were given, of which no Hadamard matrix is made here; sizes are 2^k and 2^k x "
            f"{', '.join(map(str, odd_orders()))}."
        )
    found, rest = [], size // last
    while rest > 1:
        found.append(min(rest, FACTOR))
        rest //= found[-1]
    return (*found, last) if last > 1 or not found else tuple(found)


@cache
def odd_orders() -> tuple[int, ...]:
    """The orders up to `LARGEST` that are made here, each with the least power of two for its odd part."""
    smallest: dict[int, int] = {}
    for order in range(12, LARGEST + 1, 4):
        odd = order // (order & -order)
        if odd > 1 and _paley_prime(order):
            smallest.setdefault(odd, order)
    return tuple(sorted(smallest.values()))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _paley_prime(order: int) -> int:
    """The prime of Paley's construction of an order, 0 if there is none."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    prime = order // 2 - 1
    return prime if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime) else 0


def _sylvester(order: int) -> Tensor:
    matrix, two = torch.ones(1, 1, dtype=torch.int8), torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(two, matrix)
    return matrix


def _paley(order: int) -> Tensor:
    prime = _paley_prime(order)
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0, *(1 if i in squares else -1 for i in range(1, prime))], dtype=torch.int8)
    at = torch.arange(prime)
    border = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    border[1:, 1:] = character[(at[:, None] - at) % prime]
    border[0, 1:] = 1
    identity = torch.eye(prime + 1, dtype=torch.int8)
    if prime == order - 1:
        border[1:, 0] = -1
        return identity + border
    border[1:, 0] = 1
    one, other = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(border, one.to(torch.int8)) + torch.kron(identity, other.to(torch.int8))
