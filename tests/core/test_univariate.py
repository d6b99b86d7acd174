"""Bases, layers on them, functions of edges and rationals, against scipy, closed forms and float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from scipy.interpolate import BSpline
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.known_functions import GELU, SILU
from actkit.core.train.fitting import fit
from actkit.core.univariate import edge_functions, kan_linear
from actkit.core.univariate.bases import BASES, Bells, BSplines, Bumps, Polynomials, Waves, basis_of, name_of_basis
from actkit.core.univariate.basis import Basis
from actkit.core.univariate.edge_functions import Wavelets
from actkit.core.univariate.fit_rational import fit_rational, rational_like
from actkit.core.univariate.kan_linear import KanLinear
from actkit.kernels.rationals import Kind, rational

MADE: dict[str, Callable[[], Basis]] = {
    "cubic splines": BSplines,
    "linear splines": lambda: BSplines(4, 1, (-2.0, 1.0)),
    "squashed splines": lambda: BSplines(outside="squashed"),
    "Gaussians": Bells,
    "tanh bells": lambda: Bells(8, (-1.2, 0.2), 2.0, "tanh"),
    "clamped bells": lambda: Bells(outside="clamped"),
    "Chebyshev": Polynomials,
    "squashed Jacobi": lambda: Polynomials(5, (1.0, 0.5), "squashed"),
    "bumps": Bumps,
    "waves": Waves,
}


def points(count: int = 61, reach: float = 2.6) -> Tensor:
    return torch.linspace(-reach, reach, count, dtype=torch.float64) + 1e-3  # no knot is met


# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "order"), [(5, 3), (3, 2), (4, 1), (2, 0), (1, 5)])
def test_b_splines_are_scipy_s(grid: int, order: int) -> None:
    basis = BSplines(grid, order, (-1.0, 2.0))
    step = 3 / grid
    knots = -1.0 + step * np.arange(-order, grid + order + 1)
    x = torch.linspace(-0.999, 1.997, 101, dtype=torch.float64)
    expected = BSpline.design_matrix(x.numpy(), knots, order).toarray()
    torch.testing.assert_close(basis(x[:, None])[:, 0], torch.from_numpy(expected), atol=1e-12, rtol=0)
    torch.testing.assert_close(basis(x).sum(-1), torch.ones_like(x), atol=1e-12, rtol=0)
    far = torch.tensor([-1 - 3.1 * (order + 1), 2 + 3.1 * (order + 1)], dtype=torch.float64)
    assert not basis(far).any()


def test_polynomials_are_scipy_s() -> None:
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for n, values in enumerate(Polynomials(6)(x).unbind(-1)):
        torch.testing.assert_close(values, torch.from_numpy(scipy.special.eval_chebyt(n, x.numpy())))
    for a, b in ((0.0, 0.0), (1.0, 1.0), (0.5, -0.3)):
        for n, values in enumerate(Polynomials(6, (a, b))(x).unbind(-1)):
            torch.testing.assert_close(values, torch.from_numpy(scipy.special.eval_jacobi(n, a, b, x.numpy())))
    assert bool(torch.isfinite(Polynomials(8).derivative(torch.tensor([-1.0, 1.0]))).all())  # arccos' would not be


def test_bells_and_bumps_are_their_formulas() -> None:
    x = points()[:, None]
    centres = torch.linspace(-2, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(Bells()(x[:, 0]), torch.exp(-(((x - centres) / (4 / 7)) ** 2)))
    tanh = Bells(8, (-1.2, 0.2), 2.0, "tanh")(x[:, 0])
    torch.testing.assert_close(tanh, 1 - torch.tanh((x - torch.linspace(-1.2, 0.2, 8).double()) / 2) ** 2)
    low = (torch.arange(8).double() - 3) / 5
    high, r = low + 4 / 5, 4 * 5**2 / 4**2
    torch.testing.assert_close(Bumps()(x[:, 0]), (F.relu(x - low) * F.relu(high - x) * r) ** 2)


@pytest.mark.parametrize("name", MADE)
def test_derivatives_are_those_of_autograd(name: str) -> None:
    basis, x = MADE[name](), points().requires_grad_()
    expected = [torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in basis(x).unbind(-1)]
    torch.testing.assert_close(basis.derivative(x.detach()), torch.stack(expected, -1), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", MADE)
def test_kernels_compute_the_same_in_float32(name: str) -> None:
    basis, x = MADE[name](), points()[:, None].expand(-1, 3).contiguous()
    narrow = copy.deepcopy(basis).float()
    expected = basis(x)
    torch.testing.assert_close(narrow.values(x.float()).double(), expected, atol=2e-5, rtol=2e-5)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pulled = (gradient * basis.derivative(x)).sum(-1)
    torch.testing.assert_close(narrow.pulled(gradient.float(), x.float()).double(), pulled, atol=5e-4, rtol=5e-4)
    broken = torch.tensor([[0.1, math.nan, -0.2]])
    assert bool(narrow.values(broken)[0, 1].isnan().all()) and not narrow.values(broken)[0, ::2].isnan().any()
    assert narrow.pulled(torch.ones(1, 3, basis.size), broken).isnan().tolist() == [[False, True, False]]
    assert narrow.values(torch.zeros(0, 3)).shape == (0, 3, basis.size)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("autocast", [False, True])
def test_values_of_sixteen_bits_are_those_of_float32_rounded_once(name: str, autocast: bool) -> None:
    """Powers of a bfloat16 would be off by many roundings; what is learned of a basis stays float32."""
    x = points().bfloat16()
    for dtype in (torch.bfloat16, torch.float16):
        basis, exact = MADE[name]().to(dtype), MADE[name]()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for found, expected in (
                (basis(x.to(dtype)), exact(x.float())),
                (basis.derivative(x.to(dtype)), exact.derivative(x.float())),
            ):
                assert torch.equal(found, expected.to(dtype))
        assert {each.dtype for each in basis.parameters()} <= {torch.float32}


@pytest.mark.parametrize("name", MADE)
def test_fits_find_what_is_in_the_basis_and_say_how_far_off_others_are(name: str) -> None:
    basis = MADE[name]()
    wanted = torch.randn(basis.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = basis.fit(lambda x: basis(x) @ wanted)
    assert found.largest_error < 1e-7
    low, high = basis.domain
    x = torch.linspace(low, high, 400, dtype=torch.float64)
    samples = basis.fit((x, torch.sin(3 * x)))
    errors = (basis(x) @ samples.coefficients - torch.sin(3 * x)).abs()
    assert samples.largest_error == pytest.approx(float(errors.max())) and samples.at in x.tolist()


def test_waves_are_a_fourier_series() -> None:
    basis, x = Waves(3, (0.0, 2.0)), points()[:, None]
    expected = [f(k * math.pi * (x[:, 0] - 1)) for f in (torch.cos, torch.sin) for k in (1, 2, 3)]
    torch.testing.assert_close(basis(x)[:, 0], torch.stack(expected, -1))
    torch.testing.assert_close(basis(x + 2), basis(x))  # its period is the domain
    with pytest.raises(ValueError, match="waves: 0 was given"):
        Waves(0)


@pytest.mark.parametrize("name", MADE)
def test_a_basis_is_made_again_from_its_settings(name: str) -> None:
    basis = MADE[name]()
    again = basis_of(name_of_basis(basis), **basis.settings())
    torch.testing.assert_close(again(points()), basis(points()), rtol=0, atol=0)
    assert again.settings() == basis.settings()


def test_inputs_outside() -> None:
    clamped, x = Bells(outside="clamped"), torch.tensor([-3.0, 0.0, 5.0, 1.0])
    assert torch.equal(clamped(x)[2], clamped(torch.tensor([2.0]))[0]) and clamped.share_outside(x) == 0.5
    assert not clamped.derivative(x)[0].any()
    assert Polynomials(outside="squashed").share_outside(x) == 0.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: BSplines(grid=0), r"grid: 0 was given; give at least 1"),
        (lambda: Bumps(order=-1), r"order: -1 was given"),
        (lambda: BSplines(domain=(1.0, 1.0)), r"domain: \(1.0, 1.0\) was given"),
        (lambda: Polynomials(outside="vanish"), r"outside: 'vanish' was given, allowed are clamped, squashed"),
        (lambda: Polynomials(-1), r"degree: -1"),
        (lambda: Polynomials(2, (-1.0, 0.0)), r"jacobi: \(-1.0, 0.0\)"),
        (lambda: Bells(1), r"count: 1"),
        (lambda: Bells(width=0.0), r"width: 0.0"),
        (lambda: Bells(shape="square"), r"shape: 'square'"),
        (lambda: basis_of("spline"), r"basis: 'spline' was given, allowed are bspline, bells, polynomials, bumps"),
        (lambda: basis_of("bumps", size=3), r"basis bumps: .*unexpected keyword"),
        (lambda: BSplines().fit((torch.zeros(20), torch.zeros(20))), r"function: 20 inputs \(1 different\)"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
    assert set(BASES) == {"bspline", "bells", "polynomials", "bumps", "waves", "shifted_pairs"}


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_a_kan_layer_is_the_double_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    basis = MADE[name]()
    layer = KanLinear(3, 4, basis, base="silu").double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = layer.coefficients.weight.view(4, 3, basis.size)
    expected = torch.einsum("bnim,oim->bno", basis(x), weight) + layer.coefficients.bias
    assert layer.base is not None
    expected = expected + F.silu(x) @ layer.base.weight.T
    torch.testing.assert_close(layer(x), expected)
    edges = sum(layer.edge(1, i, x[0, :, i]) for i in range(3)) + layer.coefficients.bias[1]
    torch.testing.assert_close(edges + F.silu(x[0]) @ layer.base.weight[1], expected[0, :, 1])
    monkeypatch.setattr(kan_linear, "CHUNK", 1)
    monkeypatch.setattr(kan_linear, "ROWS", 1)
    torch.testing.assert_close(layer(x), expected)


def test_basis_values_are_not_kept_and_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = KanLinear(8, 8, BSplines()), torch.randn(256, 8).requires_grad_()

    def saved(layer: nn.Module) -> tuple[int, list[Tensor]]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            output = layer(x)
        return sum(sizes), list(torch.autograd.grad(output.square().sum(), list(layer.parameters())))

    monkeypatch.setattr(kan_linear, "CHUNK", 64 * 8 * 8)
    monkeypatch.setattr(kan_linear, "ROWS", 1)
    few, gradients = saved(layer)
    layer.coefficients.register_forward_hook(lambda module, args, output: None)  # called once, as it stands
    many, expected = saved(layer)
    assert few <= 2 * x.numel() and many > 10 * x.numel()
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", MADE)
def test_a_kan_layer_has_gradients_and_these_have_gradients(name: str) -> None:
    layer = KanLinear(3, 2, MADE[name]()).double()
    x = (0.9 * torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("name", MADE)
def test_a_kan_layer_of_float32_is_that_of_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KanLinear(16, 5, MADE[name]())
    exact = copy.deepcopy(layer).double()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    monkeypatch.setattr(kan_linear, "CHUNK", 1)
    monkeypatch.setattr(kan_linear, "ROWS", 16)  # three chunks, the last one shorter
    gradient = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    y, expected = layer(x), exact(wide)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], gradient)
    theirs = torch.autograd.grad(expected, [wide, *exact.parameters()], gradient.double())
    for found, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), other, atol=1e-3, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16  # the layer is called as it stands


@pytest.mark.parametrize("shape", ["mexican_hat", "morlet", "dog"])
def test_wavelets_are_their_formulas(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Wavelets(3, 5, shape).double()
    with torch.no_grad():
        layer.shift.normal_()
        layer.width.uniform_(0.5, 2)
        layer.width[0, 0] = 0.0
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    u = (x.unsqueeze(-2) - layer.shift) / layer.width.clamp(min=1e-3)
    psi = {
        "mexican_hat": 2 / (math.sqrt(3) * math.pi**0.25) * (u**2 - 1),
        "morlet": torch.cos(5 * u),
        "dog": -u,
    }[shape] * torch.exp(-(u**2) / 2)
    expected = (layer.weight * psi).sum(-1)
    torch.testing.assert_close(layer(x), expected)
    gradients = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    monkeypatch.setattr(edge_functions, "CHUNK", 2 * x.numel())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())), gradients)
    torch.testing.assert_close(layer.edge(2, 1, x[0, :, 1]), (layer.weight * psi)[0, :, 2, 1])
    assert bool(torch.isfinite(layer(torch.zeros(1, 3, dtype=torch.float64))).all())


def test_a_wavelet_keeps_its_coefficients_and_its_exponential_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = Wavelets(6, 5), torch.randn(7, 6).bfloat16()
    expected = layer(x.float()).bfloat16()
    assert torch.equal(layer.bfloat16()(x), expected)


def test_layers_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="x: its last dimension is 4; this layer reads 3 channels"):
        KanLinear(3, 2, Bells())(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="x: its last dimension is 4; this layer reads 3 channels"):
        Wavelets(3, 2)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="in_features, out_features: 0 and 2"):
        KanLinear(0, 2, Bells())
    with pytest.raises(ValueError, match="in_features, out_features: 2 and 0"):
        Wavelets(2, 0)
    with pytest.raises(ValueError, match="shape: 'haar'"):
        Wavelets(2, 2, "haar")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation: 'no' was given"):
        KanLinear(2, 2, Bells(), base="no")


# -- rationals ---------------------------------------------------------------------------------------------------------


def formula(x: Tensor, a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    """Written out, for channels of which each has a row of coefficients."""
    top = sum(a[..., i] * x**i for i in range(a.shape[-1]))
    if kind == "A":
        return top / (1 + sum(b[..., i].abs() * x.abs() ** (i + 1) for i in range(b.shape[-1])))
    return top / (1 + sum(b[..., i] * x ** (i + 1) for i in range(b.shape[-1])).abs())


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize(("tops", "bottoms"), [(1, 4), (4, 1), (4, 4), (1, 1)])
def test_a_rational_is_its_formula_with_gradients_of_autograd(kind: Kind, tops: int, bottoms: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tops, 6, dtype=torch.float64, generator=generator).requires_grad_()
    b = torch.randn(bottoms, 4, dtype=torch.float64, generator=generator).requires_grad_()
    x = (2 * torch.randn(3, 7, 8, dtype=torch.float64, generator=generator)).requires_grad_()
    groups = max(tops, bottoms)
    rows = [each.expand(groups, -1).repeat_interleave(8 // groups, 0) for each in (a, b)]
    expected, found = formula(x, *rows, kind), rational(x, a, b, kind)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(3, 7, 8, dtype=torch.float64, generator=generator)
    theirs = torch.autograd.grad(expected, (x, a, b), upstream)
    for ours, other in zip(torch.autograd.grad(found, (x, a, b), upstream), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_a_denominator_that_begins_at_zero_is_learned(kind: Kind) -> None:
    a, b = torch.tensor([[0.0, 1.0, 0, 0, 0, 0]]), torch.zeros(1, 4, requires_grad=True)
    x = torch.linspace(-2, 3, 64).unsqueeze(-1)
    rational(x, a, b, kind).square().sum().backward()
    assert b.grad is not None and bool((b.grad != 0).all())


def test_only_the_input_is_kept_and_sixteen_bits_are_widened() -> None:
    fitted = rational_like("silu")
    a, b = torch.tensor([fitted.numerator], requires_grad=True), torch.tensor([fitted.denominator] * 4)
    x = torch.randn(16, 8).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        rational(x, a, b)
    assert sum(kept) == x.numel() + a.numel() + b.numel()
    for dtype in (torch.bfloat16, torch.float16):
        large = torch.tensor([[-1e4, 50.0, 1e4, 3.0]], dtype=dtype)
        found = rational(large, a, b)
        assert found.dtype == dtype and bool(torch.isfinite(found[:, 1:2]).all())
        near = torch.linspace(-3, 3, 32).to(dtype).view(-1, 4)
        torch.testing.assert_close(rational(near, a, b), F.silu(near.float()).to(dtype), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"x: torch.int64 was given; a rational function needs floats"):
        rational(torch.arange(8), a, b)
    with pytest.raises(ValueError, match="groups: 4 were given for 6 channels"):
        rational(torch.zeros(6), a, b)


def test_fits_are_as_good_as_a_search_over_denominators() -> None:
    """The oracle: for each denominator the best numerator is linear; Nelder and Mead search the denominators."""
    x = np.cos(np.linspace(np.pi, 0, 401))
    for function, reach in ((GELU.function, 3.0), (SILU.function, 8.0)):
        y = function(torch.from_numpy(reach * x)).numpy()
        powers = x[:, None] ** np.arange(6)

        def loss(logarithms: Any, powers: Any = powers, y: Any = y) -> float:
            bottom = 1 + np.abs(x)[:, None] ** np.arange(1, 5) @ np.exp(logarithms)
            matrix = powers / bottom[:, None]
            return float(((matrix @ np.linalg.lstsq(matrix, y, rcond=None)[0] - y) ** 2).mean())

        rng = np.random.default_rng(0)
        starts = [rng.uniform(-6, 4, 4) for _ in range(6)]
        best = min(minimize(loss, each, method="Nelder-Mead", options={"maxiter": 400}).fun for each in starts)
        found = fit_rational(function, points=torch.from_numpy(reach * x))
        assert found.error**2 <= 1.01 * best


def test_presets_are_fitted() -> None:
    """The figures of the released presets and of refits, from the notes on the paper."""
    x = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    for name, most in (("silu", 1.3e-6), ("gelu", 0.0031)):
        fitted = rational_like(name)
        assert float((fitted(x) - {"silu": F.silu, "gelu": F.gelu}[name](x)).abs().max()) <= most
        assert all(value >= 0 for value in fitted.denominator)
    assert rational_like("gelu", between=(-8.0, 8.0)).largest_error <= 0.0039
    assert rational_like("silu", between=(-8.0, 8.0)).largest_error <= 0.0012
    assert rational_like("identity")(x).equal(x)
    of_b = fit_rational(GELU.function, kind="B")
    assert float((of_b(x) - F.gelu(x)).abs().max()) <= 0.002


def test_weights_decide_where_a_fit_is_good() -> None:
    x = torch.linspace(-20, 20, 801, dtype=torch.float64)
    centre = (x.abs() < 3).double()
    errors = [(fit_rational(SILU.function, points=x, weights=w)(x) - F.silu(x)).abs() for w in (None, centre + 1e-3)]
    assert errors[1][x.abs() < 3].max() < 0.5 * errors[0][x.abs() < 3].max()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"degrees": (5, 0)}, r"degrees: \(5, 0\) was given"),
        ({"kind": "C"}, "kind: 'C' was given"),
        ({"between": (3.0, -3.0)}, r"between: \(3.0, -3.0\) was given"),
        ({"points": torch.ones(100)}, "points: 1 different ones were given for 10 coefficients"),
        ({"points": torch.arange(20.0), "weights": torch.zeros(20)}, "weights: give one of 0 or more"),
        ({"points": torch.linspace(-1000, 1000, 50)}, "function: it is not finite"),
    ],
)
def test_fits_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit_rational(torch.exp, **settings)
    with pytest.raises(ValueError, match="function: 'softmax' mixes channels"):
        rational_like("softmax")


# -- fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_a_fit_finds_the_least_squares_and_keeps_the_best_step(method: Any) -> None:
    torch.manual_seed(0)
    x = torch.rand(200, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) + x[:, 1:] ** 2
    model = KanLinear(2, 1, BSplines())
    more: dict[str, Any] = {"steps": 800, "rate": 0.05} if method == "adam" else {"steps": 30}
    fitted = fit(model, (x, y), validation=(x[:50], y[:50]), method=method, **more)
    matrix = torch.cat([model.basis(x).flatten(-2), torch.ones(200, 1)], -1).double()
    rest = torch.linalg.lstsq(matrix, y.double(), driver="gelsd").solution
    least = float((matrix @ rest - y).square().mean())
    assert fitted.loss <= 1.5 * least + (1e-3 if method == "adam" else 1e-5) and fitted.best_step > 0
    now = float(F.mse_loss(model(x[:50]), y[:50]).detach())
    assert now == pytest.approx(fitted.validation, rel=1e-4) == pytest.approx(min(v for *_, v in fitted.history))


def test_a_fit_that_diverges_keeps_what_it_had() -> None:
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    x = torch.ones(4, 1)
    fitted = fit(model, (x, x * math.inf), validation=(x, x), steps=5)
    assert fitted.stopped is not None and torch.equal(model.weight, before) and fitted.best_step == 0
    with pytest.raises(ValueError, match="validation: 0 inputs and 0 targets"):
        fit(model, (x, x), validation=(x[:0], x[:0]))
    with pytest.raises(ValueError, match="method: 'sgd'"):
        fit(model, (x, x), validation=(x, x), method="sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps, evaluate_every: 0 and 50"):
        fit(model, (x, x), validation=(x, x), steps=0)
