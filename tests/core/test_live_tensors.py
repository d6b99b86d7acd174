"""The meter of live tensors against sums by hand."""

from __future__ import annotations

import torch
from torch import nn

from actkit.core.measure.live_tensors import live_tensors

KB = 4 * 256  # bytes of 256 float32


def test_the_peak_is_what_is_alive_at_once() -> None:
    x = torch.ones(256)
    with torch.no_grad(), live_tensors(nn.Identity()) as live:
        y = x + 1
        z = y * 2
        assert live.bytes == live.peak == 2 * KB
        del y
        w = z.view(2, 128).t()
        del z  # its storage lives in the view
        assert live.bytes == KB
        w = w.contiguous()
        assert live.bytes == KB
    assert live.peak == 2 * KB


def test_views_parameters_and_results_in_place_cost_nothing() -> None:
    layer, x = nn.Linear(16, 16), torch.ones(16, 16)
    with torch.no_grad(), live_tensors(layer, x) as live:
        for each in (x.t(), layer.weight[2:], x.view(4, 64), x.add_(1)):
            assert each is not None
        assert live.peak == 0
        y = layer(x)
        assert live.bytes == live.peak == y.nbytes
    assert layer.weight.nbytes == KB


def test_what_a_network_holds() -> None:
    network = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.ones(32, 8)
    with torch.no_grad(), live_tensors(network, x) as live:
        network(x)
    assert live.bytes == 0 and live.peak == 2 * 4 * 32 * 64  # before and behind the nonlinearity
