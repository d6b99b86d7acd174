"""RBFNet's claims: one layer of radial neurons against MLPs behind the same grid (2025, arXiv:2503.06762).

Images: scikit-learn's china.jpg and flower.jpg at 96 x 144 pixels, a DiF-Grid of 6.7 thousand parameters (resolutions 8
to 32), 600 steps of Adam on 8,192 pixels by L1, the rate falling to a tenth, 2 seeds. Decoders: 64 radial neurons, MLPs
with ReLU of three layers (64 wide, and 40 wide with as many parameters as the neurons), of one hidden layer (113 wide,
as many), and a linear layer; each at the better of the rates 0.003 and 0.01, by the mean over both images with the
first seed. PSNR over all pixels; and, fitted to four fifths of them, over the others (first seed, not judged).
Beside them, not judged, radial neurons whose centres begin at features of the image. Shape: the union of a torus and a
sphere, a three-dimensional grid (resolutions 8 to 24, 32 neurons), 300 steps on 16,384 points at the better of both
rates by the IoU, the first seed, IoU of the insides on 64^3 cells. Radiance fields, the Stanford meshes and the timings
on the authors' GPU cannot be checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.functions.rbfnet.field import NeuralField, cells
from actkit.functions.rbfnet.fit_field import FieldFit, fit_image, fit_sdf, iou, new_field
from actkit.functions.rbfnet.radial import RadialDecoder

CPU = torch.device("cpu")
HEIGHT, WIDTH = 96, 144
RESOLUTIONS = (8, 13, 18, 22, 27, 32)
SHAPE_RESOLUTIONS = (8, 11, 14, 18, 21, 24)
FEATURES = 18
IMAGES = ("china.jpg", "flower.jpg")
OURS, WIDE, MATCHED, SHALLOW, LINEAR = (
    "64 radial neurons",
    "3 layers of 64",
    "3 layers of 40",
    "one hidden layer of 113",
    "linear",
)


@dataclass(frozen=True)
class Sizes:
    """How much is fitted.

    Attributes:
        seeds: of weights and pixels.
        rates: to choose from.
        steps: of an image.
        pixels: of a step.
        shape_steps: of the shape.
        points: of a step of the shape.
        side: cells along a side, for the IoU.
    """

    seeds: tuple[int, ...] = (0, 1)
    rates: tuple[float, ...] = (3e-3, 1e-2)
    steps: int = 600
    pixels: int = 8192
    shape_steps: int = 300
    points: int = 16384
    side: int = 64


IMAGE = Statement(
    "One layer of radial neurons decodes an image as well as a three-layer MLP, at half of its operations",
    "about 78 % of the FLOPs of a three-layer MLP at comparable quality (project page)",
    "two images, 2 seeds, mean PSNR: at least 0.5 dB above an MLP with one hidden layer of as many parameters, at "
    "least that of a three-layer MLP of as many parameters less 0.3 dB, and of one of twice as many less 0.7 dB",
    SMALL,
)
SOLID = Statement(
    "A field with 32 radial neurons holds a shape, and holds it as well as a hidden layer of ReLU",
    "3.5 million parameters, 15 s (project page)",
    "torus and sphere: IoU on 64^3 cells at least 0.97, and at least that of an MLP with one hidden layer of as many "
    "parameters",
    SYNTHETIC,
)
STATEMENTS = (IMAGE, SOLID)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [(IMAGE, partial(images, sizes)), (SOLID, partial(solid, sizes))]
    return conduct("rbfnet", experiments, sizes, subject, progress)


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


DECODERS: Mapping[str, Callable[[], nn.Module]] = {
    OURS: lambda: RadialDecoder(FEATURES, 3, 64),
    WIDE: lambda: mlp(FEATURES, 64, 64, 3),
    MATCHED: lambda: mlp(FEATURES, 40, 40, 3),
    SHALLOW: lambda: mlp(FEATURES, 113, 3),
    LINEAR: lambda: mlp(FEATURES, 3),
}


def operations(decoder: nn.Module) -> int:
    """Multiplications and additions per point, two for each weight; radial neurons have two products of their size."""
    found = sum(2 * layer.weight.numel() for layer in decoder.modules() if isinstance(layer, nn.Linear))
    return found + (4 * decoder.units.centres.numel() if isinstance(decoder, RadialDecoder) else 0)


def size(module: nn.Module) -> int:
    """Parameters."""
    return sum(each.numel() for each in module.parameters())


# -- images ------------------------------------------------------------------------------------------------------------


def picture(name: str) -> Tensor:
    """An image of scikit-learn, averaged to 96 x 144 pixels; it reads JPEG by pillow, and says so if that is missing.

    Args:
        name: china.jpg or flower.jpg.

    Returns:
        [96, 144, 3] in [0, 1].
    """
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image(name)
    image = torch.tensor(pixels).float().div(255).permute(2, 0, 1)[None]  # [1, 3, 427, 640]
    return F.interpolate(image, (HEIGHT, WIDTH), mode="area")[0].permute(1, 2, 0).contiguous()


def fitted(sizes: Sizes, image: Tensor, decoder: str, rate: float, seed: int, **more: Any) -> FieldFit:
    """Fit a new field with a decoder to an image."""
    with own_random_numbers(CPU, seed):
        field = new_field(2, 3, resolutions=RESOLUTIONS, decoder=DECODERS[decoder]())
    settings = {"steps": sizes.steps, "pixels": sizes.pixels, "rate": rate, "seed": seed}
    return fit_image(image, field, **settings, **more)  # type: ignore[arg-type]


def images(sizes: Sizes) -> Measurement:
    """PSNR of all decoders at their better rate."""
    pictures = [picture(name) for name in IMAGES]
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(HEIGHT, WIDTH, generator=generator) < 0.8
    scores: dict[str, float] = {}
    parts = []
    first, *others = sizes.seeds
    for name, make in DECODERS.items():
        by_rate = {rate: [fitted(sizes, image, name, rate, first).score for image in pictures] for rate in sizes.rates}
        rate = max(sizes.rates, key=lambda each: mean(by_rate[each]))
        found = by_rate[rate] + [fitted(sizes, image, name, rate, seed).score for seed in others for image in pictures]
        held = [fitted(sizes, image, name, rate, first, fitted=seen).held_out or 0.0 for image in pictures]
        scores[name] = mean(found)
        parts.append(
            f"{name} ({size(make())} parameters, {operations(make())} operations, rate {rate:g}) {mean(found):.2f} "
            f"({min(found):.2f} to {max(found):.2f}; held out {mean(held):.2f})"
        )
        if name == OURS:
            placed = [fitted(sizes, image, name, rate, first, centres="data").score for image in pictures]
            parts.append(f"the same with centres at features {mean(placed):.2f}")
    grid = size(new_field(2, 3, resolutions=RESOLUTIONS).encoder)
    here = f"PSNR in dB, {HEIGHT * WIDTH} pixels, a grid of {grid} parameters: {', '.join(parts)}"
    ours = scores[OURS]
    passed = ours >= scores[SHALLOW] + 0.5 and ours >= scores[MATCHED] - 0.3 and ours >= scores[WIDE] - 0.7
    return Measurement(here, passed)


# -- a shape -----------------------------------------------------------------------------------------------------------


def torus_and_sphere(x: Tensor) -> Tensor:
    """The signed distance of points [n, 3] to the union of a torus and a sphere, which do not meet: [n]."""
    ring = torch.stack((x[:, :2].norm(dim=-1) - 0.6, x[:, 2]), -1).norm(dim=-1) - 0.2
    return torch.minimum(ring, x.norm(dim=-1) - 0.3)


def solid(sizes: Sizes) -> Measurement:
    """IoU with radial neurons and with a hidden layer of ReLU."""
    expected = torus_and_sphere(cells(*[sizes.side] * 3).view(-1, 3)).view(*[sizes.side] * 3)
    neurons = RadialDecoder(FEATURES, 1, 32)
    width = -(-(size(neurons) - 1) // (FEATURES + 2))  # at least as many parameters

    def made(hidden: int | None, seed: int) -> NeuralField:
        with own_random_numbers(CPU, seed):
            decoder = RadialDecoder(FEATURES, 1, 32) if hidden is None else mlp(FEATURES, hidden, 1)
            return new_field(3, 1, resolutions=SHAPE_RESOLUTIONS, decoder=decoder)

    found: dict[str, float] = {}
    parts = []
    for name, hidden in (("32 radial neurons", None), (f"one hidden layer of {width}", width)):
        scores = []
        for rate in sizes.rates:
            field = made(hidden, sizes.seeds[0])
            settings = {"steps": sizes.shape_steps, "points": sizes.points, "rate": rate, "seed": sizes.seeds[0]}
            done = fit_sdf(torus_and_sphere, field, **settings)  # type: ignore[arg-type]
            scores.append((iou(field.to_grid(sizes.side)[..., 0], expected), done.score, rate))
        found[name], error, rate = max(scores)
        decoder = size(made(hidden, 0).decoder)
        parts.append(f"{name} ({decoder} parameters, rate {rate:g}) {found[name]:.4f}, mean error {error:.4f}")
    ours, theirs = found.values()
    return Measurement(f"IoU: {'; '.join(parts)}", ours >= 0.97 and ours >= theirs)
