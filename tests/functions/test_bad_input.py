"""Bad input of functions, layers, posets, attention and comparisons: each has an error that says what to give."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actkit.comparison.compare import compare_functions
from actkit.core.ground.errors import ActkitError, RecipeError
from actkit.core.layers import known_functions as known
from actkit.core.layers.activations import activation_function
from actkit.core.layers.moments import Density
from actkit.core.univariate.bases import BSplines, Polynomials, Waves
from actkit.core.univariate.fit_rational import fit_rational
from actkit.core.univariate.kan_linear import KanLinear
from actkit.functions.af_kan.af_kan_layer import AfKanLayer
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.crrelu.eafo import correct
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU
from actkit.functions.posets.pooling import PosetPool2d
from actkit.functions.posets.poset import Poset
from actkit.functions.posets.tropical import poset_eval
from actkit.functions.qkan.daruan import Daruan
from actkit.functions.qkan.network import Qkan
from actkit.functions.rbfnet.field import DifGrid
from actkit.functions.rbfnet.radial import RadialUnits
from actkit.functions.s_kan.s_kan_layer import SKanLayer
from actkit.functions.selu.selu import AlphaDropout, ScaledElu
from actkit.functions.softplus_attention.weights import softplus_attention
from actkit.functions.swap import swap
from actkit.functions.vanillanet.faded import FadedActivation
from actkit.functions.vanillanet.folding import DeepPair
from actkit.testing import tiny_model


def whole(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


INTEGERS: dict[str, nn.Module] = {
    "crrelu": CRReLU(),
    "series": SeriesActivation("silu", 2),
    "scaled elu": ScaledElu(),
    "selu": ScaledElu(1.5, 1.1),
    "alpha dropout": AlphaDropout(0.1),
    "faded": FadedActivation("relu", 0.5),
    "poly_norm": PolyNorm(),
    "poly_relu": PolyReLU(),
    "rational": GroupRational(8, 4),
    "daruan": Daruan(8),
    "kan": KanLinear(8, 4, BSplines()),
    "af_kan": AfKanLayer(8, 4),
    "s_kan": SKanLayer(8, 4),
    "rbf": RadialUnits(8, 4),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    with pytest.raises(ValueError, match=r"^[xf]: torch\.int64 was given; .*float"):
        INTEGERS[name](whole(2, 8))


@pytest.mark.parametrize("name", ["rational", "daruan", "kan", "af_kan", "s_kan", "rbf"])
def test_another_last_dimension(name: str) -> None:
    with pytest.raises(ValueError, match="7"):
        INTEGERS[name](torch.ones(2, 7))


def chain(n: int) -> Poset:
    return Poset(n, frozenset((low, low + 1) for low in range(n - 1)))


def faded(strength: float) -> DeepPair:
    return DeepPair(nn.Linear(3, 4), nn.Linear(4, 2), "relu", strength)


def zigzag(n: int) -> Poset:
    """One that is not series-parallel."""
    pairs = ((low, high) for low in range(0, n, 2) for high in (low - 1, low + 1) if 0 <= high < n)
    return Poset(n, frozenset(pairs))


vectors = (torch.rand(1, 1, 3, 1),) * 3
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown name": (lambda: activation_function("gelo"), ActkitError, "Did you mean gelu"),
    "groups": (lambda: GroupRational(10, 4), ValueError, "groups: 4 were given for 10 channels"),
    "channels": (lambda: CRReLU(per_channel=True), ValueError, "channels: None was given"),
    "no terms": (lambda: SeriesActivation("silu", 0), ValueError, "terms: 0 was given"),
    "no order": (lambda: PolyNorm(0), ValueError, "order: 0 was given"),
    "no inverse": (
        lambda: correct(known.SILU, Density.normal(0, 1)),
        ValueError,
        r"does not rise from -9.176 to -1.283",
    ),
    "constant samples": (
        lambda: fit_rational(torch.tanh, points=torch.ones(99)),
        ValueError,
        "points: 1 different ones were given",
    ),
    "constant density": (lambda: Density.measured(torch.ones(9)), ValueError, "values: from 1 to 1 were given"),
    "p": (lambda: AlphaDropout(1.0), ValueError, "p: 1.0 was given"),
    "grid": (lambda: BSplines(0), ValueError, "grid: 0 was given"),
    "combination": (lambda: AfKanLayer(4, 3, combine="cube"), ValueError, "combine: 'cube' was given, allowed are"),
    "constant features": (
        lambda: RadialUnits(3, 2).place(torch.ones(9, 3)),
        ValueError,
        "features: all rows are the same",
    ),
    "pool": (lambda: SKanLayer(3, 4, ()), ValueError, r"pool: \[\] was given"),
    "prune": (lambda: SKanLayer(3, 4).pruned(), ValueError, "hard: the nodes have not chosen"),
    "extend": (lambda: Qkan((2, 1), reps=3).extended(2), ValueError, "reps: 2 was given to extend"),
    "fold": (lambda: faded(0.9999).merged(), ValueError, "strength: the activation is at 0.9999"),
    "dimension": (lambda: DifGrid(4), ValueError, "dim: 4 was given; give 1, 2 or 3"),
    "box": (lambda: DifGrid(2)(torch.full((3, 2), 1.5)), ValueError, r"x: coordinates up to 1.5 were given; the box"),
    "circle": (lambda: Poset(3, frozenset({(0, 1), (1, 2), (2, 0)})), ValueError, "they go around in a circle"),
    "many points": (lambda: zigzag(22).upsets(), ValueError, "n: 22 points may have"),
    "pooling": (lambda: PosetPool2d("chain")(torch.rand(3, 4, 4)), ValueError, r"x: shape \[3, 4, 4\] was given"),
    "head size": (lambda: softplus_attention(*vectors), ValueError, r"log\(1\) = 0"),
    "integer queries": (lambda: softplus_attention(*(whole(1, 1, 3, 4),) * 3), ValueError, "query: torch.int64 was"),
    "power": (lambda: softplus_attention(*(torch.rand(1, 1, 3, 4),) * 3, power=0.5), ValueError, "power: 0.5 was"),
    "mask": (
        lambda: softplus_attention(*(torch.rand(1, 1, 3, 4),) * 3, mask=torch.full((3, 3), -1e4)),
        ActkitError,
        "adds other numbers",
    ),
    "one seed": (lambda: compare_functions("silu,relu", on="digits-mlp", seeds=1), ValueError, "seeds: 1 was given"),
    "a name twice": (lambda: compare_functions("silu,silu", on="digits-mlp"), ValueError, "silu and silu are the same"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_what_is_allowed(name: str) -> None:
    make, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        make()


def test_large_series_parallel_posets_are_evaluated() -> None:
    """A chain's largest is the best sum of its upper ends."""
    x = torch.rand(2, 22, generator=torch.Generator().manual_seed(0)) - 0.5
    ends = torch.cat((torch.zeros(2, 1), x.flip(1).cumsum(1)), 1)
    torch.testing.assert_close(poset_eval(x, chain(22)), ends.amax(1))


def test_a_row_that_reads_no_key_is_zero() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    query, key, value = (torch.rand(1, 1, 2, 4) for _ in range(3))
    with pytest.warns(UserWarning, match="some rows read no key"):
        found: Any = softplus_attention(query, key, value, mask=mask)
    assert not found[0, 0, 1].any() and bool(found[0, 0, 0].any())


def test_inputs_outside_of_the_domain_are_said_once() -> None:
    layer, x = KanLinear(4, 2, BSplines()), 3 * torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"x: \d\d% of the inputs are outside of -1 to 1, the domain of BSplines"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        KanLinear(4, 2, BSplines())(x / 3)
        KanLinear(4, 2, Polynomials(outside="squashed"))(x)
        KanLinear(4, 2, Waves(2))(x)


def test_constant_features_of_af_kan_are_said_once():
    layer = AfKanLayer(3, 2, act="relu")
    x = torch.full((4, 3), 7.0)  # beyond the grid, where all values are 0
    with pytest.warns(UserWarning, match="x: 100% of the samples give one value in all features"):
        assert torch.isfinite(layer(x)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_a_name_that_swap_does_not_know_gets_its_neighbours():
    with pytest.raises(RecipeError, match=r"swap: new: .*Did you mean .*poly_norm"):
        swap(tiny_model("llama"), "silu", "polynorm")
