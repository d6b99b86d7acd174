"""Draw the pictures of docs/functions (crrelu, selu, qkan, rbfnet), from the functions and the recorded claims.

python scripts/function_pictures.py   # half a minute
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import svg  # noqa: E402
from actkit.catalogue import paper  # noqa: E402
from actkit.claims.selu import Sizes, _moments  # noqa: E402
from actkit.core.ground.random_numbers import own_random_numbers  # noqa: E402
from actkit.functions.crrelu.crrelu import record_at  # noqa: E402
from actkit.functions.qkan.daruan import Daruan  # noqa: E402
from actkit.functions.rbfnet.radial import SHAPES, Shape  # noqa: E402
from actkit.functions.selu.selu import AlphaDropout  # noqa: E402

FOLDER = ROOT / "docs" / "functions"
WIDTH, HEIGHT, LEFT, TOP = 300, 200, 46, 26
Bounds = tuple[float, float]


class Panel:
    """Axes at a place, with lines."""

    def __init__(self, column: int, title: str, x: Bounds, y: Bounds, ticks: tuple[Sequence[float], Sequence[float]]):
        self.left, self.x, self.y = LEFT + column * (WIDTH + LEFT), x, y
        self.parts = [svg.text(self.left + WIDTH / 2, TOP - 10, title)]
        for value in ticks[0]:
            at = self.at(value, y[0])
            self.parts += [svg.line([at, self.at(value, y[1])], "#e4e4e4", width=0.8)]
            self.parts += [svg.text(at[0], at[1] + 15, f"{value:g}")]
        for value in ticks[1]:
            at = self.at(x[0], value)
            self.parts += [svg.line([at, self.at(x[1], value)], "#e4e4e4", width=0.8)]
            self.parts += [svg.text(at[0] - 6, at[1] + 4, f"{value:g}", "end")]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is in the picture."""
        share = [(value - low) / (high - low) for value, (low, high) in ((x, self.x), (y, self.y))]
        return self.left + share[0] * WIDTH, TOP + (1 - share[1]) * HEIGHT

    def draw(self, x: Sequence[float], y: Sequence[float], colour: str, dashes: str = "") -> None:
        """A line, as far as it lies in the panel."""
        kept = [(a, b) for a, b in zip(x, y, strict=True) if self.y[0] <= b <= self.y[1]]
        self.parts.append(svg.line([self.at(*point) for point in kept], colour, dashes))


def legend(names: Sequence[str], dashes: Sequence[str]) -> list[str]:
    """Names under the panels, each with its line."""
    parts, left = [], float(LEFT)
    for name, colour, dash in zip(names, svg.COLOURS, dashes):
        y = TOP + HEIGHT + 38
        parts += [svg.line([(left, y - 4), (left + 22, y - 4)], colour, dash), svg.text(left + 28, y, name, "start")]
        left += 52 + 7 * len(name)
    return parts


def crrelu() -> str:
    """The function and its derivative at four epsilons."""
    epsilons = (-0.4, -0.1, 0.01, 0.5)
    x = torch.linspace(-4, 4, 401, dtype=torch.float64) + 1e-9
    panels = [
        Panel(0, "CRReLU", (-4, 4), (-0.5, 2), ((-4, -2, 0, 2, 4), (-0.5, 0, 0.5, 1, 1.5, 2))),
        Panel(1, "its derivative", (-4, 4), (-0.5, 2), ((-4, -2, 0, 2, 4), (-0.5, 0, 0.5, 1, 1.5, 2))),
    ]
    for epsilon, colour in zip(epsilons, svg.COLOURS):
        record = record_at(epsilon)
        assert record.derivative is not None
        panels[0].draw(x.tolist(), record.function(x).tolist(), colour)
        for side in (x < 0, x > 0):  # it jumps at 0
            panels[1].draw(x[side].tolist(), record.derivative(x[side]).tolist(), colour)
    names = [f"epsilon = {epsilon:g}" for epsilon in epsilons]
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(names, [""] * 4)])


def selu() -> str:
    """Mean and variance behind each layer of random networks."""
    arms = {
        "SELU": (nn.SELU, nn.Identity),
        "alpha dropout": (nn.SELU, partial(AlphaDropout, 0.1)),
        "dropout": (nn.SELU, partial(nn.Dropout, 0.1)),
        "tanh": (nn.Tanh, nn.Identity),
        "ELU": (nn.ELU, nn.Identity),
    }
    panels = [
        Panel(0, "mean behind a layer", (1, 64), (-0.1, 0.6), ((1, 16, 32, 48, 64), (-0.1, 0, 0.2, 0.4, 0.6))),
        Panel(1, "variance, as a power of 10", (1, 64), (-3, 1), ((1, 16, 32, 48, 64), (-3, -2, -1, 0, 1))),
    ]
    layers = list(range(1, 65))
    for (function, dropout), colour in zip(arms.values(), svg.COLOURS):
        moments = _moments(function, dropout, 0.5, 2.0, 0, Sizes(inputs=256))
        panels[0].draw(layers, [mean for mean, _ in moments], colour)
        panels[1].draw(layers, [math.log10(variance) for _, variance in moments], colour)
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(list(arms), [""] * 5)])


def qkan() -> str:
    """Functions of an edge by how often it reads its input, and the frequencies that it has."""
    panels = [
        Panel(0, "an edge at random angles", (-6, 6), (-1, 1), ((-6, -3, 0, 3, 6), (-1, -0.5, 0, 0.5, 1))),
        Panel(
            1,
            "frequencies by learned numbers, as a power of 10",
            (8, 28),
            (0, 3),
            ((8, 12, 16, 20, 24, 28), (0, 1, 2, 3)),
        ),
    ]
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    readings = (1, 3, 6)
    for count, colour in zip(readings, svg.COLOURS):
        with own_random_numbers(torch.device("cpu"), 1):
            edge = Daruan(1, count).double()
            edge.frequency.data += torch.rand_like(edge.frequency)
            edge.theta.data += torch.randn_like(edge.theta)
        panels[0].draw(x.tolist(), edge(x[:, None]).detach()[:, 0].tolist(), colour)
    here = next(found for found in (each["here"] for each in recorded("qkan")) if "a series" in found)
    rows = [tuple(map(int, row)) for row in re.findall(r"(\d+) from (\d+) \(a series: (\d+)\)", here)]
    numbers = [learned for _, learned, _ in rows]
    panels[1].draw(numbers, [math.log10(many) for many, _, _ in rows], svg.COLOURS[3])
    panels[1].draw(numbers, [math.log10(few) for _, _, few in rows], svg.COLOURS[4])
    names = [*(f"{count} reading{'s' * (count > 1)}" for count in readings), "QKAN", "Fourier series"]
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(names, [""] * 5)])


def rbfnet() -> str:
    """Neurons by distance, and what decoders behind the same grid reached."""
    panels = [
        Panel(0, "a neuron by its distance", (0, 3), (0, 2), ((0, 1, 2, 3), (0, 0.5, 1, 1.5, 2))),
        Panel(1, "PSNR, dB, by thousands of operations", (0, 12), (10, 22), ((0, 3, 6, 9, 12), (10, 13, 16, 19, 22))),
    ]
    distance = torch.linspace(0, 3, 151, dtype=torch.float64)
    shapes: tuple[Shape, ...] = ("gaussian", "inverse_multiquadric", "wendland")
    for shape, colour in zip(shapes, svg.COLOURS):
        panels[0].draw(distance.tolist(), SHAPES[shape](distance**2).tolist(), colour)
    parts, here = _all(panels), next(each["here"] for each in recorded("rbfnet") if "PSNR" in each["here"])
    pattern = r"(?:: |, )([^:,]+?) \(\d+ parameters, (\d+) operations, rate [\d.]+\) ([\d.]+)"
    for name, operations, score in re.findall(pattern, here):
        x, y = panels[1].at(int(operations) / 1000, float(score))
        parts += [svg.circle(x, y, svg.COLOURS[0 if "radial" in name else 3], 4)]
        below = name == "3 layers of 40"  # which lies where another does
        parts += [svg.text(x + 8, y + 4, name, "start") if x < 500 else svg.text(x, y + (18 if below else -8), name)]
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*parts, *legend(list(shapes), [""] * 3)])


def recorded(slug: str) -> list[dict[str, Any]]:
    """What is recorded of the claims of a method."""
    record = paper(slug).evidence
    assert record is not None
    claims: list[dict[str, Any]] = record["claims"]
    return claims


def _all(panels: Sequence[Panel]) -> list[str]:
    return [part for panel in panels for part in panel.parts]


if __name__ == "__main__":
    for name, draw in (("crrelu", crrelu), ("selu", selu), ("qkan", qkan), ("rbfnet", rbfnet)):
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
