"""Codes of fewer than 8 bits, one after the other in the bits of a row, from the lowest bit of the first byte up.

4 bits are two codes in a byte, the first in the low half; 3 bits are eight codes in three bytes. A row ends with a
whole byte.
"""

from __future__ import annotations

from math import ceil, lcm

import torch
from torch import Tensor
from torch.nn import functional as F


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
    parts = F.pad(codes, (0, -codes.shape[1] % run)).unflatten(1, (-1, run))
    packed = torch.zeros(*parts.shape[:2], size, dtype=torch.uint8, device=codes.device)
    for place in range(run):
        byte, shift = divmod(place * bits, 8)
        packed[..., byte] |= parts[..., place] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= parts[..., place] >> (8 - shift)
    return packed.flatten(1)[:, : packed_width(codes.shape[1], bits)].contiguous()


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
    codes = []
    for place in range(run):
        byte, shift = divmod(place * bits, 8)
        code = parts[..., byte] >> shift
        if shift + bits > 8:
            code = code | (parts[..., byte + 1] << (8 - shift))
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, dim=-1).flatten(1)[:, :in_features]


def _run(bits: int) -> tuple[int, int]:
    """The codes of the shortest run that ends with a whole byte, and its bytes."""
    return lcm(8, bits) // bits, lcm(8, bits) // 8
