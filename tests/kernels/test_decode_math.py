"""What a decoding step computes beside products, against scipy and torch in float64."""

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from actkit.core.layers.activations import activation_function
from actkit.kernels import decode_math
from actkit.kernels.rationals import reference


def test_normal_quantile():
    shares = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 999), [1e-12, 1e-9, 0.02425, 0.97575, 1 - 1e-9]])
    found = np.array([decode_math.normal_quantile(share) for share in shares])
    np.testing.assert_allclose(found, ndtri(shares), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["silu", "relu", "gelu", "gelu_tanh", "relu2"])
def test_activations(name):
    x = torch.cat([torch.linspace(-20, 20, 1001), torch.tensor([0.0, 1e-40, -1e-40, 100.0])])
    found = x.clone()
    decode_math.activate(getattr(decode_math, name.upper()), found.numpy(), np.zeros((1, 10), np.float32), 1, 0)
    torch.testing.assert_close(found.double(), activation_function(name).function(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rational_a", "rational_b"])
def test_rationals_by_group(kind):
    """Units 3 to 12 of groups of 4, against the operator's formula in float64."""
    x = torch.linspace(-3, 3, 10)
    rows = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    found = x.clone()
    decode_math.activate(getattr(decode_math, kind.upper()), found.numpy(), rows.numpy(), 4, 3)
    whole = torch.zeros(1, 16, dtype=torch.float64)
    whole[0, 3:13] = x.double()
    expected = reference(whole, rows[:, :6].double(), rows[:, 6:].double(), kind == "rational_a")[0, 3:13]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["silu", "relu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize(("groups", "width"), [(1, 16), (4, 4), (16, 1)])
def test_series_by_group(name, groups, width):
    """Units 3 to 12 of 16, three terms and half of their sum; what no term reads is not read."""
    x = torch.linspace(-3, 3, 10)
    rows = torch.randn(groups, 10, generator=torch.Generator().manual_seed(0))
    rows[:, 8:] = torch.tensor([0.5, 3.0])
    rows[:, 6:8] = torch.nan
    found = x.clone()
    decode_math.activate(getattr(decode_math, f"SERIES_{name.upper()}"), found.numpy(), rows.numpy(), width, 3)
    pairs = rows[:, :6].double().repeat_interleave(width, 0)[3:13].view(10, 3, 2)
    terms = pairs[..., 0] * x.double()[:, None] + pairs[..., 1]
    expected = activation_function(name).function(terms).sum(-1) / 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_dropped():
    x = np.array([-2, -1, -0.5, 0, 0.5, 1, np.nan], np.float32)
    decode_math.drop_below(np.float32(1.0), x)
    np.testing.assert_array_equal(x, np.array([-2, -1, 0, 0, 0, 1, np.nan], np.float32))
    indices = np.zeros(x.size + 1, np.int32)
    assert decode_math.active_ones(x, indices) == 4
    assert indices[:4].tolist() == [0, 1, 5, 6]
