"""Codes of fewer than 8 bits, one after the other in the bits of a row, from the lowest bit of the first byte up.

4 bits are two codes in a byte, the first in the low half; 3 bits are eight codes in three bytes. A row ends with a
whole byte. A run of codes that ends with a whole byte (two, four or eight) moves as one word: halves of it to where
they belong, then quarters, then codes.
"""

from __future__ import annotations

from math import ceil, gcd

import torch
from torch import Tensor
from torch.nn import functional as F

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the codes of a run, which takes a byte for each


def packed_width(in_features: int, bits: int) -> int:
    """Return the bytes of a row of so many codes."""
    return ceil(in_features * bits / 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Put codes side by side.

    Args:
        codes: uint8 [out, in], below 2^bits.
        bits: 1 to 8, of each.

    Returns:
        uint8 [out, ceil(in * bits / 8)].
    """
    if bits == 8:
        return codes
    run, size = _run(bits)
    words = F.pad(codes, (0, -codes.shape[1] % run)).contiguous().view(WORDS[run])
    lane, width = 8, bits
    while width < size * 8:  # two neighbours move together
        low = _fields(width, 2 * lane, run)
        words = (words & low) | ((words & (low << lane)) >> (lane - width))
        lane, width = 2 * lane, 2 * width
    packed = words.view(torch.uint8).unflatten(1, (-1, run))[..., :size].flatten(1)
    return packed[:, : packed_width(codes.shape[1], bits)].contiguous()


def unpack_codes(packed: Tensor, in_features: int, bits: int) -> Tensor:
    """Invert `pack_codes`.

    Args:
        packed: uint8 [out, ceil(in * bits / 8)].
        in_features: codes of a row.
        bits: of each.

    Returns:
        uint8 [out, in].
    """
    if bits == 8:
        return packed
    run, size = _run(bits)
    parts = F.pad(packed, (0, -packed.shape[1] % size)).unflatten(1, (-1, size))
    words = parts[..., 0].to(WORDS[run])
    for byte in range(1, size):
        words |= parts[..., byte].to(WORDS[run]) << (8 * byte)
    lane, width = 8 * run, bits * run
    while lane > 8:  # the upper half moves to where it belongs
        lane, width = lane // 2, width // 2
        low = _fields(width, 2 * lane, run)
        words = (words & low) | ((words & (low << width)) << (lane - width))
    return words.view(torch.uint8)[:, :in_features]


def _run(bits: int) -> tuple[int, int]:
    """The codes of the shortest run that ends with a whole byte, and its bytes."""
    return 8 // gcd(8, bits), bits // gcd(8, bits)


def _fields(width: int, lane: int, run: int) -> int:
    """The bits of fields so wide, one in each lane of a word of `run` bytes."""
    return sum(((1 << width) - 1) << start for start in range(0, 8 * run, lane))
