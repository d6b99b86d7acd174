"""Codes in bits, against the bits written out and against what compressed-tensors packs."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from actkit.core.grids.packing import pack_codes, packed_width, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 8), (5, 33), (2, 64)])
def test_codes_lie_side_by_side(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0)).byte()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], packed_width(shape[1], bits))
    for row in range(shape[0]):
        total = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        assert bytes(packed[row].tolist()) == total.to_bytes(packed.shape[1], "little")
    assert torch.equal(unpack_codes(packed, shape[1], bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_four_bytes_are_a_word_of_compressed_tensors(bits):
    codes = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(0)).byte()
    words = pack_to_int32((codes.short() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(pack_codes(codes, bits).view(torch.int32), words)
