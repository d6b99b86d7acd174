import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actkit.kernels import pack
from actkit.kernels.packing import COLUMNS, PAGE, WIDEST_TILE, in_order, tiling


@given(out_features=st.integers(1, 200_000), threads=st.integers(1, 64), itemsize=st.sampled_from([2, 4]))
def test_tiles_cover_the_outputs_and_share_them_evenly(out_features, threads, itemsize):
    n_tiles, tile = tiling(out_features, threads, itemsize)
    assert (n_tiles - 1) * tile < out_features <= n_tiles * tile
    assert tile % COLUMNS == 0 and tile <= WIDEST_TILE + 2 * COLUMNS
    assert tile * itemsize % PAGE
    if out_features >= threads * 64 * COLUMNS:
        assert n_tiles % threads == 0


@settings(deadline=None, max_examples=25)
@given(
    out_features=st.integers(1, 300),
    in_features=st.integers(1, 50),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packing_loses_nothing_and_pads_with_zeros(out_features, in_features, threads, dtype):
    weight = torch.randn(out_features, in_features).to(dtype)
    packed = pack(weight, threads)
    assert torch.equal(packed.dense(), weight)
    assert (packed.in_features, packed.dtype) == (in_features, dtype)
    assert packed.buffer.is_contiguous() and packed.buffer.data_ptr() % 64 == 0
    padding = in_order(packed.buffer).transpose(1, 2).reshape(-1, in_features)[out_features:]
    assert not padding.any()


def test_a_transposed_weight_packs_like_its_copy():
    weight = torch.randn(40, 96).t()
    assert torch.equal(pack(weight).buffer, pack(weight.contiguous()).buffer)


@pytest.mark.parametrize(
    ("weight", "threads", "match"),
    [
        (torch.ones(4), None, r"\[out, in\]"),
        (torch.ones(0, 4), None, "non-empty"),
        (torch.ones(4, 4, dtype=torch.float16), None, "bfloat16"),
        (torch.ones(4, 4, dtype=torch.int8), None, "int8"),
        (torch.ones(4, 4, device="meta"), None, "meta"),
        (torch.ones(4, 4), 0, "threads: 0"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_refused(weight, threads, match):
    with pytest.raises(ValueError, match=match):
        pack(weight, threads)
