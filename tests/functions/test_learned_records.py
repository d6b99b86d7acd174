"""Learned functions answer `record()` at their present coefficients, and `record(group)` if they hold several."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from actkit.core.layers.activations import Thresholded, flops_of, gives_zeros, groups_of, mixes_of, record_of
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.gr_kan import function_of
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.pangu_pi.collapse import lipschitz_of
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.polycom.polynomials import PolyReLU
from actkit.functions.vanillanet.faded import FadedActivation
from actkit.testing import check_function

CHANNELS = 8
X = torch.linspace(-4, 4, 15 * CHANNELS, dtype=torch.float64).view(15, CHANNELS)
SEVERAL: dict[str, Callable[[], nn.Module]] = {
    "numerator shared": lambda: GroupRational(CHANNELS, 4),
    "nothing shared": lambda: GroupRational(CHANNELS, 2, kind="B", share="none"),
    "series": lambda: SeriesActivation("gelu", 2, CHANNELS, "paper", normalize=True),
    "faded series": lambda: FadedActivation(SeriesActivation("silu", 2, CHANNELS, "paper"), 0.25),
    "thresholded": lambda: Thresholded(SeriesActivation("silu", 2, CHANNELS, "paper"), 0.1),
    "crrelu": lambda: CRReLU(per_channel=True, channels=CHANNELS),
    "poly_relu": lambda: PolyReLU(per_channel=True, channels=CHANNELS),
    "prelu": lambda: nn.PReLU(CHANNELS),
}


def learned(name: str, by: float = 0.05) -> nn.Module:
    """A module after some learning, other coefficients in each group."""
    torch.manual_seed(0)
    module = SEVERAL[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn_like(parameter)
    return module.double()


@pytest.mark.parametrize("name", SEVERAL)
def test_every_group_has_a_record(name: str) -> None:
    module = learned(name)
    groups = groups_of(module)
    assert groups > 1 and record_of(module) is None and mixes_of(module) == ()
    with torch.no_grad():
        output = module(X)
    for group in range(groups):
        record = record_of(module, group)
        assert record is not None
        x, y = (each.chunk(groups, -1)[group] for each in (X, output))
        torch.testing.assert_close(record.function(x), y, rtol=1e-6, atol=1e-7)
    assert flops_of(module) is not None
    with pytest.raises(ValueError, match=f"give 0 to {groups - 1}"):
        record_of(module, groups)


@pytest.mark.parametrize("name", ["numerator shared", "series", "faded series"])
def test_records_of_groups_are_true(name: str) -> None:
    record = record_of(learned(name), 1)
    assert record is not None
    check_function(record)


@pytest.mark.parametrize("name", [name for name in SEVERAL if "series" not in name and name != "thresholded"])
def test_groups_that_are_the_same_have_one_record(name: str) -> None:
    """As they have it before they learn."""
    module = learned(name, 0.0)
    record = record_of(module)
    assert record is not None
    torch.testing.assert_close(record.function(X), module(X).detach(), rtol=1e-6, atol=1e-7)


def test_the_record_follows_the_coefficients() -> None:
    module = GroupRational(4, 1, (3, 2), start="silu")
    with torch.no_grad():
        module.numerator.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
        module.denominator.copy_(torch.tensor([[0.0, 1.0]]))
    record = record_of(module)  # x / (1 + x^2)
    assert record is not None and record.inflections == pytest.approx((-math.sqrt(3), 0, math.sqrt(3)))
    with torch.no_grad():
        module.numerator.mul_(2)
    again = record_of(module)
    assert again is not None and again.at(1.0) == 1.0 and again.moments() != record.moments()


def test_what_reads_records_reads_these() -> None:
    rational, series = GroupRational(CHANNELS, 4, start="silu"), SeriesActivation("relu", 1)
    function = function_of(rational)
    assert function is not None and abs(float(function(torch.tensor([1.0], dtype=torch.float64))) - 0.7311) < 1e-3
    assert lipschitz_of(rational) == pytest.approx(1.1, abs=0.05) and gives_zeros(series)
    assert record_of(FadedActivation("relu", 1.0)).pieces[0].direction == 1  # type: ignore[union-attr]
    assert record_of(SeriesActivation(nn.RReLU(), 2, None, "paper")) is None
