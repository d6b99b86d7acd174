"""What a forward pass keeps for the backward pass, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from actkit.core.measure.saved_tensors import saved_tensors

FLOAT = 4


def test_a_linear_layer_keeps_its_input_and_no_weight() -> None:
    layer, x = nn.Linear(10, 20), torch.randn(8, 10)
    with saved_tensors(layer) as saved:
        y = layer(x)
    assert (saved.bytes, saved.count) == (8 * 10 * FLOAT, 1)
    del y


def test_an_mlp_is_counted_by_hand() -> None:
    x = torch.randn(8, 10)
    relu = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    with saved_tensors(relu) as saved:
        y = relu(x)
    assert saved.bytes == (8 * 10 + 8 * 20) * FLOAT  # the input, and the ReLU's output, which two operations keep
    silu = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 5))
    with saved_tensors(silu) as saved:
        y = silu(x)
    assert saved.bytes == (8 * 10 + 2 * 8 * 20) * FLOAT  # SiLU keeps its input, the layer behind it its output
    del y


def test_views_count_once_and_whole() -> None:
    model = nn.Linear(1, 1)
    x = torch.randn(6, 4, requires_grad=True)
    with saved_tensors(model) as saved:
        y = (x[:3] * x[3:]).sum() + (x.T * 2).square().sum()
    assert saved.bytes == (6 * 4 + 6 * 4) * FLOAT  # x once, and twice x
    del y


def test_what_is_computed_again_and_what_needs_no_gradient_is_not_kept() -> None:
    model, x = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 5)), torch.randn(8, 10)
    with saved_tensors(model) as saved:
        y = checkpoint(model, x, use_reentrant=False)
    assert saved.bytes <= 8 * 10 * FLOAT
    y.sum().backward()
    with saved_tensors(model) as saved, torch.no_grad():
        model(x)
    assert saved.bytes == 0


def test_buffers_are_left_out_and_gradients_are_those_without_the_meter() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).eval(), torch.randn(5, 4)
    model(x).sum().backward()
    plain = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    with saved_tensors(model) as saved:
        y = model(x).sum()
    y.backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, model.parameters(), strict=True) if b.grad is not None)
    held = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    assert saved.count and not held & set(saved._storages)
