"""SELU networks against torch, quadrature, samples and what hooks see."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from actkit.core.ground.errors import CoverageError, EditError, RecipeError
from actkit.core.layers import moments
from actkit.core.layers.activations import Activation, activation_function, name_of, record_of
from actkit.core.layers.nothing import PassThrough
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.functions.selu.self_normalize import SelfNormalize
from actkit.functions.selu.self_normalizing import self_normalizing
from actkit.functions.selu.selu import (
    ALPHA,
    SCALE,
    AlphaDropout,
    ScaledElu,
    constants,
    lecun_normal_,
    moment_map,
    record_at,
)
from actkit.functions.swap import swap
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_function, check_transform, tiny_batches, tiny_model

POINTS = [(0.0, 1.0), (0.0, 2.0), (0.3, 1.0), (-0.2, 0.5), (0.5, 1.0)]


# -- constants and the map ---------------------------------------------------------------------------------------------


def test_the_constants_are_torchs() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert constants() == pytest.approx((ALPHA, SCALE), abs=1e-12)
    assert torch.equal(ScaledElu()(x), nn.SELU()(x)) and name_of(ScaledElu()) == "selu"
    torch.testing.assert_close(ScaledElu(*constants())(x), nn.SELU()(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("mean", "variance"), POINTS)
def test_constants_of_any_fixed_point(mean: float, variance: float) -> None:
    """By quadrature: a layer hands that mean and variance on."""
    alpha, scale = constants(mean, variance)
    mapped = moments.moment_map(record_at(alpha, scale), mean, variance)
    assert (mapped.mean, mapped.variance) == pytest.approx((mean, variance), abs=1e-12)
    check_function(record_at(alpha, scale))
    assert record_of(ScaledElu(alpha, scale)).name.startswith("scaled_elu" if (mean, variance) != (0, 1) else "")
    rounded = ScaledElu(alpha, scale)(torch.tensor([-1.0, 2.0]).bfloat16())
    assert rounded.dtype == torch.bfloat16


def test_fixed_points_that_no_selu_has() -> None:
    for mean, variance, message in ((1.0, 1.0, "which no SELU hands on"), (0.0, 0.0, "variance: 0.0")):
        with pytest.raises(ValueError, match=message):
            constants(mean, variance)
    for settings in ({"alpha": 0.0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="give a number above 0"):
            ScaledElu(**settings)


def test_the_closed_map_is_the_quadrature() -> None:
    """On and far outside of the paper's box, also at other constants; and no overflow at a variance of 1000."""
    cases = list(product((-1.0, 0.0, 0.1), (0.05, 1.0, 16.0), (-0.1, 0.0, 1.0), (0.8, 1.1)))
    for (mean, variance, omega, tau), pair in product(cases, ((ALPHA, SCALE), constants(0.3, 1.0))):
        record = record_at(*pair)
        expected = moments.moment_map(record, mean, variance, omega=omega, tau=tau)
        assert moment_map(mean, variance, omega, tau, *pair) == pytest.approx(
            (expected.mean, expected.variance), abs=1e-9, rel=1e-9
        )
    assert all(map(math.isfinite, moment_map(0.0, 1000.0)))
    with pytest.raises(ValueError, match="tau: -1"):
        moment_map(0.0, 1.0, tau=-1)


def test_theorems_2_and_3() -> None:
    """The variance falls if it is above 3 and rises if it is below 0.16, so that it neither explodes nor vanishes."""
    small = [-0.1, 0.0, 0.1]
    for mean, omega, tau in product([-1.0, 0.0, 1.0], small, [0.8, 1.0, 1.25]):
        assert all(moment_map(mean, variance, omega, tau)[1] < variance for variance in (3.0, 8.0, 16.0))
    for mean, omega, tau in product(small, small, [0.8, 1.0, 1.25]):
        assert all(moment_map(mean, variance, omega, tau)[1] > variance for variance in (0.02, 0.08, 0.16))
        assert tau < 0.9 or moment_map(mean, 0.24, omega, tau)[1] > 0.24


# -- dropout and weights -----------------------------------------------------------------------------------------------


def test_alpha_dropout_is_torchs_at_0_and_1() -> None:
    """The same two numbers, by what is dropped and what is kept; in evaluation mode nothing."""
    for p, affine in ((0.05, (0.954844, 0.083936)), (0.1, (0.921285, 0.161971))):
        assert AlphaDropout(p).affine == pytest.approx(affine, abs=1e-6)
        torch.manual_seed(0)
        ours = AlphaDropout(p).train()(torch.full((1000,), 2.0, dtype=torch.float64)).unique()
        theirs = nn.AlphaDropout(p).train()(torch.full((1000,), 2.0, dtype=torch.float64)).unique()
        torch.testing.assert_close(ours, theirs)
    x = torch.randn(5, 4)
    assert torch.equal(AlphaDropout(0.5).eval()(x), x) and torch.equal(AlphaDropout(0.0).train()(x), x)
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"p: {p}"):
            AlphaDropout(p)


@pytest.mark.parametrize(("mean", "variance"), POINTS)
@pytest.mark.parametrize("channels", [False, True])
def test_alpha_dropout_keeps_mean_and_variance(mean: float, variance: float, channels: bool) -> None:
    """Within 3 standard errors of as many independent values as are dropped by themselves."""
    torch.manual_seed(0)
    alpha, scale = constants(mean, variance)
    x = ScaledElu(alpha, scale)(mean * 0 + math.sqrt(variance) * torch.randn(400, 500, 2, dtype=torch.float64))
    drop = AlphaDropout(0.1, mean=mean, variance=variance, alpha=alpha, scale=scale, channels=channels).train()
    y = drop(x)
    count = y.numel() / (2 if channels else 1)
    error = math.sqrt(variance / count)
    assert abs(float(y.mean()) - mean) < 4 * error
    fourth = float(((y - y.mean()) ** 4).mean())
    assert abs(float(y.var()) - variance) < 4 * math.sqrt((fourth - variance**2) / count)
    dropped = (y - (drop.affine[1] - drop.affine[0] * scale * alpha)).abs() < 1e-12
    assert float(dropped.double().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[..., 0], dropped[..., 1]) == channels
    assert drop(torch.randn(3, 4, 5).bfloat16()).dtype == torch.bfloat16


def test_weights_are_of_variance_1_over_inputs() -> None:
    for module, inputs in ((nn.Linear(400, 500), 400), (nn.Conv2d(40, 60, 3), 360)):
        lecun_normal_(module, torch.Generator().manual_seed(0))
        assert float(module.weight.var()) * inputs == pytest.approx(1, abs=0.03)
        assert abs(float(module.weight.mean())) < 0.002 and not module.bias.any()
    gain = nn.init.calculate_gain("selu")
    assert moment_map(0.0, 1.0, tau=gain**2)[1] < 0.7  # what torch calls SELU's gain halves the variance, and again


# -- the network -------------------------------------------------------------------------------------------------------


def network(**more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(128, 3), nn.Softmax(-1)).eval()


def test_a_network_is_made_self_normalizing(tmp_path: Path) -> None:
    model, x = network(), torch.randn(400, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(x)
    applied = apply(model, SelfNormalize(), [x], progress=False)
    kinds = [type(module) for module in model]
    assert kinds == [nn.Linear, PassThrough, Activation, AlphaDropout] * 4 + [nn.Linear, nn.Softmax]
    assert {name_of(model[at]) for at in (2, 6, 10, 14)} == {"selu"} and model[3].p == 0.1
    weights = torch.cat([model[at].weight.flatten() for at in (0, 4, 8, 12)])
    assert float(weights.var()) * 128 == pytest.approx(1, abs=0.03) and not model[0].bias.any()
    report = self_normalizing(model, [x], progress=False)
    assert report.error < 0.05 and len(report.layers) == 4
    again = apply(network(), SelfNormalize(), [x], progress=False).model
    assert torch.equal(again[0].weight, model[0].weight)
    other = apply(network(), SelfNormalize(seed=1, dropout="keep", remove_norms=False), [x], progress=False).model
    assert not torch.equal(other[0].weight, model[0].weight)
    assert isinstance(other[3], nn.Dropout) and isinstance(other[1], nn.BatchNorm1d)
    apply(model, RoundToNearest(bits=8, group_size=-1), [x], progress=False)
    checkpoint.save(model, tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "net", base=network)(x), model(x))
    restored = apply(network(), SelfNormalize(), [x], progress=False).undo()
    with torch.no_grad():
        assert torch.equal(restored(x), before)
    assert applied.edits


def test_it_keeps_the_promises_of_a_transform() -> None:
    check_transform(SelfNormalize(), tiny_model("mlp"), tiny_batches("mlp"))
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout1d(0.2), nn.Linear(6, 2)).eval()
    check_transform(SelfNormalize(initialise=False), model, [torch.randn(5, 6)])


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Called(Shortcut):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_models_that_it_does_not_fit_are_refused() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(EditError, match="adds two activations"):
        apply(Shortcut(), SelfNormalize(), [x], progress=False)
    forced = apply(Shortcut(), SelfNormalize(force=True), [x], progress=False).model
    assert name_of(forced.act) == "selu"
    with pytest.raises(EditError, match="'relu' is called as a function"):
        apply(Called(), SelfNormalize(), [x], progress=False)
    with pytest.raises(EditError, match="has attention"):
        apply(tiny_model("bert"), SelfNormalize(), tiny_batches("bert"), progress=False)
    with pytest.raises(RecipeError, match="draws the weights anew"):
        Recipe([RoundToNearest(bits=8), SelfNormalize()]).check()


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_is_what_the_network_computes() -> None:
    """Weights, moments over the units and over the inputs by hand, for a convolution too; and the theory by samples."""
    torch.manual_seed(0)
    x = torch.randn(300, 200)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 4)).eval()
    (row,) = self_normalizing(model, [x[:100], x[100:]], progress=False).layers
    with torch.no_grad():
        weight, hidden = model[0].weight.double(), model[:2](x).double()
    assert (row.layer, row.function) == ("0", "tanh") and not row.in_box
    assert row.omega == pytest.approx(float(weight.sum(1).mean()))
    assert row.tau == pytest.approx(float((weight**2).sum(1).mean()))
    assert row.measured_mean == pytest.approx(float(hidden.mean()), abs=1e-7)
    assert row.measured_variance == pytest.approx(float(hidden.var(1, correction=0).mean()), abs=1e-6)
    assert row.variance_over_inputs == pytest.approx(float(hidden.var(0, correction=0).mean()), rel=1e-2)
    assert row.predicted_variance == pytest.approx(row.measured_variance, rel=0.05)
    images = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.SELU(), nn.Conv2d(8, 8, 3), nn.SELU(), nn.Flatten(), nn.Linear(128, 2)
    )
    rows = self_normalizing(lecun_normal_(images).eval(), [torch.randn(64, 1, 8, 8)], progress=False).layers
    assert [each.layer for each in rows] == ["0", "2"] and rows[1].tau == pytest.approx(1, abs=0.3)


def test_biases_and_shifted_inputs_are_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 600), nn.ReLU(), nn.Linear(600, 4)).eval()
    with torch.no_grad():
        model[0].bias.normal_(0.5, 0.7)
    with pytest.warns(UserWarning, match=r"mean 0\.[67]\d* and deviation 1\.[45]"):
        (row,) = self_normalizing(model, [0.7 + 1.5 * torch.randn(500, 400)], progress=False).layers
    assert row.predicted_mean == pytest.approx(row.measured_mean, rel=0.06)
    assert row.predicted_variance == pytest.approx(row.measured_variance, rel=0.1)


def test_what_the_report_leaves_out() -> None:
    report = self_normalizing(tiny_model("bert"), tiny_batches("bert"), progress=False)
    assert [layer.layer for layer in report.layers] and not report.holds
    with pytest.raises(CoverageError, match="no layer with a known function"):
        self_normalizing(tiny_model("llama"), tiny_batches("llama"), progress=False)
    unequal = nn.PReLU(3)  # a function for each channel, of which there is no one record
    nn.init.uniform_(unequal.weight)
    unknown = nn.Sequential(nn.Linear(3, 3), unequal, nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    report = self_normalizing(unknown, [torch.full((4, 3), 5.0)], progress=False)  # too few features for a warning
    assert report.skipped == (("0", "left out: nothing is known of 1"),)


def test_by_swap_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    swap(model, "relu", lambda: ScaledElu(*constants(0.3, 1.0)))
    assert record_of(model[1]).name.startswith("scaled_elu") and activation_function("selu").name == "selu"
