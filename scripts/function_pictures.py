"""Draw the pictures of docs/functions, from the functions and from what is recorded of the claims.

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
from actkit.core.univariate.fit_rational import fit_rational  # noqa: E402
from actkit.core.univariate.shifted_pairs import ShiftedPairs  # noqa: E402
from actkit.functions.crrelu.crrelu import record_at  # noqa: E402
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU  # noqa: E402
from actkit.functions.qkan.daruan import Daruan  # noqa: E402
from actkit.functions.rbfnet.radial import SHAPES, Shape  # noqa: E402
from actkit.functions.selu.selu import AlphaDropout  # noqa: E402
from actkit.functions.vanillanet.faded import FadedActivation  # noqa: E402
from actkit.kernels import rational  # noqa: E402

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


def kat() -> str:
    """SiLU by a rational, and how far it is off."""
    fits = {
        "fitted on -3 to 3": fit_rational(nn.functional.silu),
        "on -8 to 8": fit_rational(nn.functional.silu, between=(-8.0, 8.0)),
        "on -8 to 8, degrees 3 and 2": fit_rational(nn.functional.silu, (3, 2), between=(-8.0, 8.0)),
    }
    panels = [
        Panel(0, "SiLU (grey) and rationals", (-8, 8), (-1, 8), ((-8, -4, 0, 4, 8), (0, 2, 4, 6, 8))),
        Panel(1, "error, as a power of 10", (-8, 8), (-9, 1), ((-8, -4, 0, 4, 8), (-8, -6, -4, -2, 0))),
    ]
    x = torch.linspace(-8, 8, 801, dtype=torch.float64)
    silu = nn.functional.silu(x)
    panels[0].draw(x.tolist(), silu.tolist(), "#999999")
    for fit, colour in zip(fits.values(), svg.COLOURS):
        coefficients = (torch.tensor([each], dtype=torch.float64) for each in (fit.numerator, fit.denominator))
        y = rational(x[:, None], *coefficients, fit.kind)[:, 0]
        panels[0].draw(x.tolist(), y.tolist(), colour, "4 3")
        panels[1].draw(x.tolist(), (y - silu).abs().clamp(min=1e-12).log10().tolist(), colour)
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(list(fits), [""] * 3)])


def polycom() -> str:
    """PolyReLU and its derivative, and PolyNorm of rows of other sizes."""
    panels = [
        Panel(0, "PolyReLU (dashed: its derivative)", (-2, 2), (-1, 4), ((-2, -1, 0, 1, 2), (-1, 0, 1, 2, 3, 4))),
        Panel(1, "PolyNorm of evenly spread rows", (-3, 3), (-3, 3), ((-3, -1.5, 0, 1.5, 3), (-3, -1.5, 0, 1.5, 3))),
    ]
    x = torch.linspace(-2, 2, 401, dtype=torch.float64) + 1e-9
    record = PolyReLU(3).record()
    assert record is not None and record.derivative is not None
    panels[0].draw(x.tolist(), record.function(x).tolist(), svg.COLOURS[0])
    panels[0].draw(x.tolist(), record.derivative(x).tolist(), svg.COLOURS[0], "4 3")
    for size, colour in zip((0.5, 1.0, 3.0), svg.COLOURS[1:]):
        row = torch.linspace(-size, size, 401, dtype=torch.float64)
        panels[1].draw(row.tolist(), PolyNorm(3).double()(row[None])[0].tolist(), colour)
    names = ["PolyReLU", "PolyNorm, values to 0.5", "to 1", "to 3"]
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(names, [""] * 4)])


def pangu() -> str:
    """How many directions the tokens of two models lie in, and how unlike they are, block by block."""
    panels = [
        Panel(0, "components for 80 % of the variance", (1, 30), (0, 180), ((1, 6, 12, 18, 24, 30), (0, 60, 120, 180))),
        Panel(1, "diversity of the tokens", (1, 30), (0.2, 1), ((1, 6, 12, 18, 24, 30), (0.2, 0.4, 0.6, 0.8, 1))),
    ]
    names = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M"}
    for name, colour in zip(names, svg.COLOURS):
        here = next(each["here"] for each in recorded("pangu-pi") if each["subject"] == name)
        counts, diversity = (re.search(f"{what} ([\\d., ]+)", here) for what in ("by block", "diversity"))
        assert counts is not None and diversity is not None
        for panel, found in zip(panels, (counts, diversity)):
            values = [float(each) for each in found[1].strip(" ,").split(", ")]
            panel.draw(list(range(1, len(values) + 1)), values, colour)
    return svg.picture(
        2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(list(names.values()), [""] * 2)]
    )


def vanillanet() -> str:
    """A ReLU as it fades, and a series of two."""
    ticks = ((-2, -1, 0, 1, 2), (-2, -1, 0, 1, 2))
    panels = [
        Panel(0, "a ReLU as it fades", (-2, 2), (-2, 2), ticks),
        Panel(1, "a series of two ReLUs", (-2, 2), (-2, 2), ticks),
    ]
    x = torch.linspace(-2, 2, 201, dtype=torch.float64)
    strengths = (0.0, 0.5, 1.0)
    for strength, colour in zip(strengths, svg.COLOURS):
        panels[0].draw(x.tolist(), FadedActivation("relu", strength).double()(x).tolist(), colour)
    for b, colour in zip((-1.0, 1.0), svg.COLOURS[3:]):
        panels[1].draw(x.tolist(), (x.relu() - 0.8 * (x + b).relu()).tolist(), colour)
    names = [*(f"strength {strength:g}" for strength in strengths), "second one at 1", "at -1"]
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*_all(panels), *legend(names, [""] * 5)])


def af_kan() -> str:
    """The features of an input, and what was reached at what size."""
    panels = [
        Panel(0, "features of an input", (-1, 2), (0, 0.2), ((-1, 0, 1, 2), (0, 0.05, 0.1, 0.15, 0.2))),
        Panel(1, "digits, %, by thousands of parameters", (0, 18), (80, 100), ((0, 6, 12, 18), (80, 85, 90, 95, 100))),
    ]
    x = torch.linspace(-1, 2, 301, dtype=torch.float64)
    values = ShiftedPairs().double()(x[:, None]).detach()[:, 0]
    for column in range(values.shape[1]):
        panels[0].draw(x.tolist(), values[:, column].tolist(), svg.COLOURS[column % len(svg.COLOURS)])
    parts, texts = _all(panels), [each["here"] for each in recorded("af-kan")]
    found = re.findall(r"(AF-KAN|MLP|ReLU-KAN[\w ]*?) \((\d+)(?: parameters)?\) ([\d.]+)", " ".join(texts))
    for name, size, score in dict.fromkeys(found):
        at = panels[1].at(int(size) / 1000, float(score))
        parts += [svg.circle(*at, svg.COLOURS[0 if name == "AF-KAN" else 3], 4)]
        parts += [
            svg.text(at[0] + 8, at[1] + 4, name, "start") if int(size) < 9000 else svg.text(at[0], at[1] - 8, name)
        ]
    return svg.picture(2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 30, parts)


def s_kan() -> str:
    """Errors on seven functions by basis, and for the nodes that choose."""
    here = next(each["here"] for each in recorded("s-kan") if "Errors (" in each["here"])
    names = re.search(r"Errors \((.+?)\): ", here)
    assert names is not None
    functions = [part.rsplit(": ", 1) for part in here[names.end() :].split("; ")]
    panel = Panel(0, "error on each of seven functions, as a power of 10", (1, 7), (-3, 0), (range(1, 8), range(-3, 1)))
    arms = names[1].split(", ")
    shown = [name for name in arms if name != "wavelet"]
    for name, colour in zip(shown, svg.COLOURS):
        values = [math.log10(float(row.split(", ")[arms.index(name)])) for _, row in functions]
        panel.draw(list(range(1, 8)), values, colour, "" if name == "S-KAN" else "4 3")
    parts = [
        svg.text(WIDTH + 2 * LEFT, TOP + 24 + 22 * k, f"{k + 1}: {name}", "start")
        for k, (name, _) in enumerate(functions)
    ]
    return svg.picture(
        2 * (WIDTH + LEFT) + 12, TOP + HEIGHT + 50, [*panel.parts, *parts, *legend(shown, ["4 3"] * 4 + [""])]
    )


def recorded(slug: str) -> list[dict[str, Any]]:
    """What is recorded of the claims of a method."""
    record = paper(slug).evidence
    assert record is not None
    claims: list[dict[str, Any]] = record["claims"]
    return claims


def _all(panels: Sequence[Panel]) -> list[str]:
    return [part for panel in panels for part in panel.parts]


PICTURES = {
    "crrelu": crrelu,
    "selu": selu,
    "qkan": qkan,
    "rbfnet": rbfnet,
    "kat": kat,
    "polycom": polycom,
    "pangu-pi": pangu,
    "vanillanet": vanillanet,
    "af-kan": af_kan,
    "s-kan": s_kan,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
