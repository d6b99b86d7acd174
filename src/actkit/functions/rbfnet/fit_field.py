"""Fits neural fields to images and to signed distances, and says how close they come (2025, arXiv:2503.06762).

    image              L1 of random pixels;                                       PSNR = 10 log10(1 / mean square error)
    signed distance    mean of (f(x) - t)^2 / (|t| + 0.1), an eighth of the points on the surface;    IoU of the insides
    Adam, the rate falls to a tenth along the training

Pixels are the centres of cells of the box [-1, 1]^2, for the fit and for the export.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.train.fitting import Pair, fit
from actkit.functions.rbfnet.field import CHANNELS, FREQUENCIES, RESOLUTIONS, DifGrid, NeuralField, cells
from actkit.functions.rbfnet.radial import RadialDecoder

Centres = Literal["zeros", "data", "kmeans"]
SURFACE = 8  # one point of so many lies on the surface
SOFTEST = 0.1  # added to the distance by which an error is divided
VALIDATED = 4096  # points
PLACED = 4096  # features that centres are placed by


@dataclass(frozen=True, eq=False)
class FieldFit:
    """A field, and how close it comes.

    Attributes:
        field: as it was at the best step.
        score: PSNR in dB on the pixels it was fitted to, or the mean absolute error of distances.
        held_out: PSNR on the other pixels, None if there are none.
        steps: that were taken.
        stopped: why it ended early, or None.
    """

    field: NeuralField
    score: float
    held_out: float | None
    steps: int
    stopped: str | None


def new_field(
    dim: int,
    out_features: int,
    units: int = 64,
    *,
    resolutions: tuple[int, ...] = RESOLUTIONS,
    frequencies: tuple[float, ...] = FREQUENCIES,
    channels: tuple[int, ...] = CHANNELS,
    decoder: nn.Module | None = None,
) -> NeuralField:
    """Make a field.

    Args:
        dim: of its points.
        out_features: of its values.
        units: neurons of the decoder.
        resolutions: of the grid, by level.
        frequencies: of the grid, by level.
        channels: of the grid, by level.
        decoder: another one than radial neurons.

    Returns:
        The field.
    """
    grid = DifGrid(dim, channels, resolutions, frequencies)
    return NeuralField(grid, decoder or RadialDecoder(grid.width, out_features, units))


def fit_image(
    image: Tensor,
    field: NeuralField | None = None,
    *,
    steps: int = 600,
    pixels: int = 8192,
    rate: float = 1e-2,
    centres: Centres = "zeros",
    fitted: Tensor | None = None,
    seed: int = 0,
) -> FieldFit:
    """Fit a field to an image.

    Args:
        image: [height, width, channels] in [0, 1].
        field: changed in place; None for a new one, in the paper's sizes.
        steps: of Adam.
        pixels: of a step, drawn at random.
        rate: at first.
        centres: of the neurons: as they are, at features of the image, or at means of clusters of them.
        fitted: bool [height, width], the pixels to fit to; None for all. The others are `held_out`.
        seed: of weights and pixels.

    Returns:
        The field and its PSNR.

    Raises:
        ValueError: an image of fewer than 2 pixels a side or not in [0, 1], or no pixel to fit to.
    """
    if image.dim() != 3 or min(image.shape[:2]) < 2 or not image.is_floating_point():
        raise ValueError(
            f"image: {tuple(image.shape)} of {image.dtype} was given; give floats [height, width, channels] with at "
            f"least 2 pixels a side."
        )
    if not (bool(torch.isfinite(image).all()) and float(image.min()) >= 0 and float(image.max()) <= 1):
        raise ValueError(
            f"image: values from {float(image.min()):.3g} to {float(image.max()):.3g} were given; give them in [0, 1]."
        )
    height, width, channels = image.shape
    mask = torch.ones(height, width, dtype=torch.bool) if fitted is None else fitted
    if mask.shape != (height, width) or not bool(mask.any()):
        raise ValueError(
            f"fitted: {tuple(mask.shape)} with {int(mask.sum())} pixels was given; give {(height, width)}, one pixel "
            f"at least."
        )
    points = cells(height, width)
    x, y = points[mask], image[mask].float()
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> Pair:
        chosen = torch.randint(len(x), (pixels,), generator=generator)
        return x[chosen], y[chosen]

    some = torch.randperm(len(x), generator=generator)[:VALIDATED]
    with own_random_numbers(torch.device("cpu"), seed):
        field = field or new_field(2, channels)
    _place(field, x[some], centres, seed)
    settings = {"validation": (x[some], y[some]), "steps": steps, "rate": rate, "loss": F.l1_loss, "schedule": "tenth"}
    done = fit(field, draw, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        found = field(points)
    others = None if bool(mask.all()) else psnr(found[~mask], image[~mask])
    return FieldFit(field, psnr(found[mask], image[mask]), others, done.steps, done.stopped)


def fit_sdf(
    distance: Callable[[Tensor], Tensor],
    field: NeuralField | None = None,
    *,
    dim: int = 3,
    steps: int = 300,
    points: int = 16384,
    rate: float = 5e-3,
    centres: Centres = "zeros",
    seed: int = 0,
) -> FieldFit:
    """Fit a field to a signed distance, negative inside.

    Args:
        distance: [n, dim] -> [n], differentiable; of a shape inside of the box [-1, 1]^dim.
        field: changed in place; None for a new one, in the paper's sizes.
        dim: of the shape, 2 or 3, if the field is new.
        steps: of Adam.
        points: of a step.
        rate: at first.
        centres: as in `fit_image`.
        seed: of weights and points.

    Returns:
        The field and its mean absolute error.

    Raises:
        ValueError: a distance that is not finite, or of another shape.
    """
    generator = torch.Generator().manual_seed(seed)
    with own_random_numbers(torch.device("cpu"), seed):
        field = field or new_field(dim, 1)
    sides = field.encoder.dim

    def draw(step: int) -> Pair:
        x = 2 * torch.rand(points, sides, generator=generator) - 1
        near = x[: points // SURFACE].requires_grad_()
        with torch.enable_grad():
            t = _checked(distance(near), len(near))
            (slope,) = torch.autograd.grad(t.sum(), near)
        onto = (near - t[:, None] * slope).detach().clamp(-1, 1)  # on the surface, if distances are exact
        both = torch.cat((onto, x[points // SURFACE :].detach()))
        return both, _checked(distance(both), points).detach()[:, None]

    validation = draw(0)
    validation = validation[0][:VALIDATED], validation[1][:VALIDATED]
    _place(field, validation[0], centres, seed)
    done = fit(field, draw, validation=validation, steps=steps, rate=rate, loss=relative, schedule="tenth")
    x, t = draw(0)
    with torch.no_grad():
        error = float((field(x) - t).abs().mean())
    return FieldFit(field, error, None, done.steps, done.stopped)


def relative(found: Tensor, target: Tensor) -> Tensor:
    """The loss of distances: squared errors, those far from the surface counting less.

    Args:
        found: [n, 1].
        target: [n, 1].

    Returns:
        mean of (found - target)^2 / (|target| + 0.1).
    """
    return ((found - target) ** 2 / (target.abs() + SOFTEST)).mean()


def psnr(found: Tensor, expected: Tensor) -> float:
    """The peak signal to noise ratio in dB of values in [0, 1].

    Args:
        found: clamped to [0, 1].
        expected: of the same shape.

    Returns:
        10 log10(1 / mean square error).

    Raises:
        ValueError: other shapes.
    """
    if found.shape != expected.shape:
        raise ValueError(f"found: {tuple(found.shape)} was given for {tuple(expected.shape)}; give one shape.")
    error = float((found.clamp(0, 1).double() - expected.double()).square().mean())
    return 10 * math.log10(1 / error) if error else math.inf


def iou(found: Tensor, expected: Tensor) -> float:
    """Intersection over union of two insides.

    Args:
        found: signed distances, negative inside.
        expected: of the same shape.

    Returns:
        From 0 to 1; 1 if both are empty.

    Raises:
        ValueError: other shapes.
    """
    if found.shape != expected.shape:
        raise ValueError(f"found: {tuple(found.shape)} was given for {tuple(expected.shape)}; give one shape.")
    a, b = found < 0, expected < 0
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def _place(field: NeuralField, points: Tensor, centres: Centres, seed: int) -> None:
    """Put the centres of radial neurons where features are."""
    if centres == "zeros":
        return
    if not isinstance(field.decoder, RadialDecoder):
        raise ValueError(
            f"centres: {centres!r} was given for a {type(field.decoder).__name__}; give 'zeros', or a RadialDecoder."
        )
    with torch.no_grad():
        field.decoder.units.place(field.encoder(points[:PLACED]), centres, seed)


def _checked(t: Tensor, count: int) -> Tensor:
    if t.shape != (count,) or not bool(torch.isfinite(t).all()):
        raise ValueError(
            f"distance: it gave {tuple(t.shape)} for {count} points, finite: {bool(torch.isfinite(t).all())}; give one "
            f"finite number for each point."
        )
    return t
