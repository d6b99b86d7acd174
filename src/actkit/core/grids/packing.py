"""Codes of fewer than 8 bits, several in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes below 16 per byte: uint8 [out, in] -> uint8 [out, ceil(in / 2)], the first in the low half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [out, in_features]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :in_features]
