"""ActConv: what torch's convolutions compute with the rounded weight, saved, loaded, undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actkit
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.conv import ActConv
from actkit.core.layers.weights import DenseWeight, IntegerWeight
from actkit.core.measure.cost import measure_cost
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.quantization.rtn import RoundToNearest
from actkit.zoo.cnn import DigitsCNN

CONVOLUTIONS = [
    nn.Conv2d(4, 8, 3, padding=1),
    nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding="valid", bias=False),
    nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding="same"),
    nn.Conv1d(6, 4, 5, stride=2, padding=2),
    nn.Conv1d(6, 6, 4, groups=6),
]


def images(layer: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    size = (12, 10) if isinstance(layer, nn.Conv2d) else (20,)
    return torch.randn(3, layer.in_channels, *size)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_it_computes_what_torch_does_with_the_rounded_weight(layer):
    x = images(layer)
    assert torch.equal(ActConv.of(layer)(x), layer(x))
    grid = IntegerGrid(4, -1)
    found = ActConv.of(layer, weight=IntegerWeight.quantize(layer.weight.flatten(1), grid))
    # by hand, in float64: each output's kernel between its smallest and largest value (0 included), in 15 steps
    weight = layer.weight.detach().double().flatten(1)
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).float().double()
    zero = (-low / step).round()
    rounded = (((weight / step).round() + zero).clamp(0, 15) - zero) * step
    convolve = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
    bias = None if layer.bias is None else layer.bias.double()
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    expected = convolve(x.double(), rounded.reshape(layer.weight.shape), bias, *settings)
    torch.testing.assert_close(found(x).double(), expected, rtol=1e-4, atol=1e-5)
    again = ActConv.from_spec(found.spec())
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(x), found(x))


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return DigitsCNN().eval()


def test_rounding_a_traced_model_takes_its_convolutions_saves_and_undoes_them(cnn, tmp_path):
    x = torch.rand(5, 1, 8, 8)
    plain = cnn(x)
    bytes_before = measure_cost(cnn, [x], progress=False).weight_bytes
    applied = apply(cnn, [RoundToNearest(bits=8, group_size=-1)], [x], progress=False)
    kinds = {name: type(module).__name__ for name, module in cnn.named_children()}
    assert kinds["conv1"] == kinds["conv2"] == "ActConv" and kinds["fc1"] == "ActLinear"
    assert not applied.report.skipped and applied.report.plan.coverage["RoundToNearest"] > 0.99
    cost = measure_cost(cnn, [x], progress=False)
    assert cost.weight_bytes < 0.35 * bytes_before
    held = {layer.path: layer.weight_bytes for layer in cost.layers}
    assert held["conv2"] == 32 * 16 * 9 + 32 * (2 + 1) + 32 * 4  # codes, scales and zero points, biases
    rounded = cnn(x)
    torch.testing.assert_close(rounded, plain, rtol=0.05, atol=0.05)
    assert not torch.equal(rounded, plain)
    folder = checkpoint.save(cnn, tmp_path / "rounded")
    assert torch.equal(checkpoint.load(folder, base=DigitsCNN)(x), rounded)
    applied.undo()
    assert torch.equal(cnn(x), plain) and isinstance(cnn.conv1, nn.Conv2d)


def test_groups_that_do_not_divide_a_kernel_leave_it_with_a_line(cnn):
    applied = apply(cnn, [RoundToNearest(bits=4, group_size=64)], [torch.rand(2, 1, 8, 8)], progress=False)
    assert type(cnn.conv1) is nn.Conv2d and type(cnn.fc1).__name__ == "ActLinear"
    reasons = {path: reason for path, _, reason in applied.report.skipped}
    assert set(reasons) == {"conv1", "conv2"}
    assert "64 does not divide the 9 inputs" in reasons["conv1"] and "group_size=-1" in reasons["conv2"]


def test_sites_of_a_rounded_convolution_are_read_as_before(cnn):
    x = torch.rand(5, 1, 8, 8)
    before = actkit.record(cnn, {"layer.output:conv1": actkit_moments()}, [x], progress=False)
    apply(cnn, [RoundToNearest(bits=8, group_size=-1)], [x], progress=False)
    after = actkit.record(cnn, {"layer.output:conv1": actkit_moments()}, [x], progress=False)
    means = [seen["layer.output:conv1"].mean for seen in (before, after)]
    assert means[0].shape == means[1].shape == (16,)
    torch.testing.assert_close(means[0], means[1], rtol=0.05, atol=0.01)
    assert len(anatomy(cnn, x).block(0).convolutions()) == 2


def actkit_moments():
    from actkit.core.watch.statistics import Moments

    return Moments()


def test_what_is_no_plain_convolution_is_left_alone():
    hooked = nn.Conv2d(2, 2, 3)
    hooked.register_forward_hook(lambda *_: None)
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))
    for module, reason in (
        (nn.Conv2d(2, 2, 3, padding_mode="reflect"), "pads by 'reflect'"),
        (nn.ConvTranspose2d(2, 2, 3), "ConvTranspose2d"),
        (hooked, "hook"),
        (weighted, "no plain Conv1d|computed"),
    ):
        with pytest.raises(CoverageError, match=reason):
            ActConv.of(module)
    with pytest.raises(ValueError, match=r"weight: \(2, 2\) was given, the layer has \(2, 18\)"):
        ActConv.of(nn.Conv2d(2, 2, 3), weight=DenseWeight(torch.zeros(2, 2)))
