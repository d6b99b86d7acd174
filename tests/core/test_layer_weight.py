"""Code that reads `layer.weight` from outside gets the values that the layer multiplies by, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.layer_weight import LayerWeight
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.functions.swap import swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal

GRID = IntegerGrid(4, 8)
WIDTH = 16


def encoder(activation: str | nn.Module = "relu") -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, activation=activation)
    return nn.TransformerEncoder(layer, 2).eval()


def x() -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def quantized(**slots) -> ActLinear:
    torch.manual_seed(2)
    linear = nn.Linear(WIDTH, 6)
    return ActLinear.of(linear, weight=IntegerWeight.quantize(linear.weight, GRID), **slots)


def low_rank() -> LowRank:
    return LowRank(torch.ones(6, 1), torch.ones(1, WIDTH))


def test_an_encoder_of_torch_runs_in_evaluation_mode_after_rounding() -> None:
    model, expected = encoder(), encoder().double()
    for layer in expected.layers:
        for linear in (layer.linear1, layer.linear2):
            linear.weight.data = GRID.fake(linear.weight.detach().float()).double()
    apply(model, [RoundToNearest(bits=4, group_size=8, scale_dtype="float32")], [x()], min_coverage=0.0, progress=False)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        torch.testing.assert_close(model(x()).double(), expected(x().double()), rtol=1e-5, atol=1e-5)
        padded = model(x(), src_key_padding_mask=mask)[~mask]
        exact = expected(x().double(), src_key_padding_mask=mask)
        torch.testing.assert_close(padded.double(), exact[: len(mask)][~mask], rtol=1e-5, atol=1e-5)


def test_an_encoder_of_torch_selects_in_evaluation_mode() -> None:
    model = encoder()
    apply(model, [Teal(sparsity=0.5)], [x()], min_coverage=0.0, progress=False)
    thresholds = [float(m.select.threshold) for m in model.modules() if isinstance(m, ActLinear)]
    expected = encoder().double()
    threshold = iter(thresholds)
    for layer in expected.layers:
        for linear in (layer.linear1, layer.linear2):
            limit = next(threshold)
            linear.register_forward_pre_hook(
                lambda _, args, limit=limit: (torch.where(args[0].abs() > limit, args[0], 0),)
            )
    assert max(thresholds) > 0.5
    with torch.no_grad():
        torch.testing.assert_close(model(x()).double(), expected(x().double()), rtol=1e-4, atol=1e-4)


def test_a_swapped_activation_of_an_encoder_is_computed_in_evaluation_mode(tmp_path) -> None:
    model, expected = encoder(nn.ReLU()), encoder(nn.SiLU())
    before = encoder(nn.ReLU())
    with torch.no_grad():
        done = swap(model, "relu", "silu")
        torch.testing.assert_close(model(x()), expected(x()), rtol=1e-5, atol=1e-6)
        save(model, tmp_path / "swapped")
        again = load(tmp_path / "swapped", base=lambda: encoder(nn.ReLU())).eval()
        torch.testing.assert_close(again(x()), expected(x()), rtol=1e-5, atol=1e-6)
        done.undo()
        assert torch.equal(model(x()), before(x()))


def test_what_describes_the_weight_costs_no_dequantizing(monkeypatch) -> None:
    layer = quantized(select=Threshold(0.1), correction=low_rank())
    monkeypatch.setattr(IntegerWeight, "dequantize", lambda self: pytest.fail("it was dequantized"))
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.shape == (6, WIDTH) and weight.dtype == torch.float32
    assert weight.device.type == "cpu" and weight.numel() == len(weight) * WIDTH and not weight.requires_grad
    assert weight.size(1) == WIDTH and weight.dim() == 2 and weight.nbytes == 6 * WIDTH * 4
    assert "LayerWeight((6, 16)" in repr(weight)
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "read",
    [
        lambda w: nn.functional.linear(x(), w),
        lambda w: x() @ w.T,
        lambda w: x() @ w.t(),
        lambda w: w.detach() * 2,
        lambda w: w.float().norm(),
        lambda w: w.data[0],
        lambda w: torch.cat([w, w]),
        lambda w: w.clone(),
    ],
)
def test_who_computes_with_it_gets_the_values_or_is_refused(read) -> None:
    layer = quantized()
    found = read(layer.weight)
    assert type(found) is Tensor and torch.equal(found, read(layer.dequantized()))
    for slots in ({"select": Threshold(0.1)}, {"correction": low_rank()}):
        with pytest.raises(UnsupportedModelError, match="the result would leave out"):
            read(quantized(**slots).weight)
        with pytest.raises(UnsupportedModelError, match="the result would leave out"):
            read(ActLinear.of(nn.Linear(WIDTH, 6), **slots).weight)


def test_a_dense_layer_answers_its_parameter() -> None:
    linear = nn.Linear(WIDTH, 6)
    layer = ActLinear.of(linear)
    assert layer.weight is linear.weight
    assert not isinstance(layer.weight, LayerWeight)


class Reader(nn.Module):
    """Asks for the weight's dtype before the call, as T5 does."""

    def __init__(self, layer: ActLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, given: Tensor) -> Tensor:
        if isinstance(self.layer.weight, Tensor) and given.dtype != self.layer.weight.dtype:
            given = given.to(self.layer.weight.dtype)
        return self.layer(given)


@pytest.mark.parametrize("slots", [{}, {"select": Threshold(0.1)}], ids=["plain", "selecting"])
def test_readers_compile_and_export(slots) -> None:
    model = Reader(quantized(**slots))
    with torch.no_grad():
        expected = model(x())
        assert torch.equal(torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(x()), expected)
        assert torch.equal(torch.export.export(model, (x(),)).module()(x()), expected)


def test_tensors_of_earlier_versions_load(tmp_path) -> None:
    """Until the weight slot was called `storage`, its tensors were called `weight.codes` and so on."""
    layer = quantized(select=Threshold(0.1))
    old = {name.replace("storage.", "weight."): value for name, value in layer.state_dict().items()}
    assert "weight.codes" in old
    model = nn.Sequential(nn.ReLU(), ActLinear.from_spec(layer.spec()))
    model.load_state_dict({f"1.{name}": value for name, value in old.items()})
    with torch.no_grad():
        assert torch.equal(model[1](x()), layer(x()))
