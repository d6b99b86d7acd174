"""RBFNet against direct distances, the release's decoder, and shapes and images that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import zoo
from actkit.core.ground.errors import NonFiniteError, RecipeError
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.train.fitting import fit
from actkit.functions.rbfnet.field import DifGrid, NeuralField, cells
from actkit.functions.rbfnet.fit_field import fit_image, fit_sdf, iou, new_field, psnr, relative
from actkit.functions.rbfnet.radial import SHAPES, RadialDecoder, RadialUnits
from actkit.functions.rbfnet.replace import ReplaceByRadial
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

DOUBLE = torch.float64
THEIRS = json.loads(Path(__file__).with_name("gnf.json").read_text())
SMALL: dict[str, Any] = {"resolutions": (4, 6), "frequencies": (1.0, 1.6), "channels": (4, 2)}


def drawn(units: RadialUnits) -> RadialUnits:
    with torch.no_grad():
        units.centres.copy_(torch.randn(units.centres.shape))
        units.beta.copy_(torch.randn(units.beta.shape))
    return units.double()


# -- neurons -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_neurons_are_their_formula(shape: Any) -> None:
    torch.manual_seed(0)
    units = drawn(RadialUnits(5, 7, shape))
    f = torch.randn(3, 4, 5, dtype=DOUBLE)
    d = (units.beta.exp() * (f[..., None, :] - units.centres) ** 2).sum(-1)
    torch.testing.assert_close(units.distances(f), d, atol=1e-10, rtol=0)
    r = d.sqrt()
    expected = {
        "gaussian": torch.exp(-d / 2),
        "multiquadric": torch.sqrt(d + 1),
        "inverse_multiquadric": 1 / torch.sqrt(d + 1),
        "cubic": r**3,
        "thin_plate": r**2 * r.log(),
        "wendland": (1 - r).clamp(min=0) ** 4 * (4 * r + 1),
    }[shape]
    torch.testing.assert_close(units(f), expected, atol=1e-9, rtol=1e-9)
    at = units.centres.detach().clone().float().requires_grad_()  # a distance of 0, where rounding falls below it
    units.float()(at).sum().backward()
    assert at.grad is not None and bool(torch.isfinite(at.grad).all()), shape


def test_the_release_s_decoder_gives_the_same() -> None:
    """Of GNF at the commit that the file names, a single level, in float32 with its values."""
    decoder = RadialDecoder(THEIRS["features"], THEIRS["out"], THEIRS["units"])
    with torch.no_grad():
        for name, into in (
            ("centres", decoder.units.centres),
            ("beta", decoder.units.beta),
            ("weight", decoder.weights.weight),
            ("bias", decoder.weights.bias),
        ):
            into.copy_(torch.tensor(THEIRS[name]))
    x, expected = torch.tensor(THEIRS["x"]), torch.tensor(THEIRS["output"])
    torch.testing.assert_close(decoder(x), expected, atol=1e-6, rtol=0)


def test_widths_are_bounded_and_neurons_begin_as_released() -> None:
    units = RadialUnits(3, 50)
    assert units.centres.abs().max().item() <= 1e-4 and not units.beta.any()
    with torch.no_grad():
        units.beta.fill_(1000.0)
    assert bool(torch.isfinite(units(torch.randn(4, 3))).all())


@pytest.mark.parametrize("how", ["data", "kmeans"])
def test_centres_are_placed_where_features_are(how: Any) -> None:
    torch.manual_seed(0)
    features = torch.cat([torch.randn(50, 4) * 0.01 + centre for centre in (-3.0, 0.0, 3.0)])
    units = RadialUnits(4, 3).place(features, how)
    assert float(units.distances(features).mean()) == pytest.approx(2.0, rel=1e-3)
    nearest = torch.cdist(features, units.centres).amin(0)
    assert float(nearest.max()) < 1.5 if how == "kmeans" else not nearest.any()
    with pytest.raises(ValueError, match="how, features: 'data' and 2 rows were given for 3 units"):
        units.place(features[:2])


def test_a_table_of_neurons() -> None:
    decoder = RadialDecoder(4, 2, 5)
    assert decoder.units_table(3).row_count == 3
    with torch.no_grad():
        decoder.units.beta[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match="units: number 2 of 5 holds NaN or Inf"):
        decoder.units_table()


# -- grids and fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_grid_is_read_by_interpolation(dim: int) -> None:
    """The corners' mean with their distances as weights, by hand."""
    torch.manual_seed(0)
    grid = DifGrid(dim, (2,), (5,), (1.0,)).double()
    x = (2 * torch.rand(6, dim, dtype=DOUBLE) - 1) * 0.7  # a period of 2: within it
    places = (x + 1) / 2 * 5 - 0.5
    expected = torch.zeros(6, 2, dtype=DOUBLE)
    for corner in range(2**dim):
        index, weight = [], torch.ones(6, dtype=DOUBLE)
        for axis in range(dim):
            low = places[:, axis].floor()
            share = places[:, axis] - low
            high = corner >> axis & 1
            index.append((low.long() + high).clamp(0, 4))
            weight = weight * (share if high else 1 - share)
        expected += weight[:, None] * grid.grids[0][(slice(None), *index[::-1])].T  # x is the last side
    torch.testing.assert_close(grid(x), expected)


def test_mappings_within_a_period() -> None:
    x = torch.tensor([[-1.0], [-0.75], [-0.5], [-0.25], [0.0], [0.3]])
    expected = {
        "sawtooth": [-1.0, -0.5, 0.0, 0.5, -1.0, -0.4],
        "triangle": [-1.0, -0.5, 0.0, 0.5, 1.0, 0.4],
        "cosine": [-1.0, -math.sqrt(0.5), 0.0, math.sqrt(0.5), 1.0, -math.cos(1.3 * math.pi)],
        "none": x.flatten().tolist(),
    }
    for mapping, values in expected.items():
        grid = DifGrid(1, (1,), (3,), (2.0,), mapping)  # type: ignore[arg-type]
        torch.testing.assert_close(grid.within(x, 2.0).flatten(), torch.tensor(values), atol=1e-6, rtol=0)


def test_sizes_are_those_of_the_paper() -> None:
    field = new_field(2, 3)
    assert field.encoder.width == 18
    assert sum(each.numel() for each in field.encoder.parameters()) == sum(
        c * r * r for c, r in zip((4, 4, 4, 2, 2, 2), (32, 51, 70, 89, 108, 128), strict=True)
    )
    assert sum(each.numel() for each in field.decoder.parameters()) == 2499


def test_an_image_is_fitted_and_exported(tmp_path: Path) -> None:
    height, width = 20, 30
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack((x, y, (x - y).abs()), -1)
    done = fit_image(image, new_field(2, 3, 16, **SMALL), steps=300, pixels=512, rate=3e-2)
    found = done.field.to_image(height, width)
    assert found.shape == image.shape and done.held_out is None and done.score > 28
    assert psnr(found, image) == pytest.approx(done.score, abs=1e-4)
    assert done.field.to_grid(4).shape == (4, 4, 3)
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < 0.8
    part = fit_image(
        image, new_field(2, 3, 16, **SMALL), steps=100, pixels=512, rate=3e-2, fitted=mask, centres="kmeans"
    )
    assert part.held_out is not None and 12 < part.held_out < part.score + 3
    save(done.field, tmp_path / "field")
    torch.testing.assert_close(load(tmp_path / "field").to_image(7, 9), done.field.to_image(7, 9), rtol=0, atol=0)


def test_a_shape_is_fitted() -> None:
    def ball(x: Tensor) -> Tensor:
        return x.norm(dim=-1) - 0.6

    field = new_field(2, 1, 16, **SMALL)
    done = fit_sdf(ball, field, steps=400, points=1024, rate=3e-2)
    expected = ball(cells(40, 40).view(-1, 2)).view(40, 40)
    assert iou(field.to_grid(40)[..., 0], expected) > 0.95 and done.score < 0.04
    t = torch.tensor([[0.0], [1.0]])
    assert float(relative(t + 0.1, t)) == pytest.approx((0.01 / 0.1 + 0.01 / 1.1) / 2)


def test_a_fit_may_draw_its_points_and_its_rate_falls_to_a_tenth() -> None:
    model, seen = nn.Linear(1, 1), []

    def draw(step: int) -> tuple[Tensor, Tensor]:
        seen.append(step)
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(step))
        return x, 3 * x

    x = torch.randn(8, 1)
    done = fit(model, draw, validation=(x, 3 * x), steps=300, rate=0.1, schedule="tenth", evaluate_every=100)
    assert seen == list(range(1, 301)) and done.validation < 1e-3


def test_measures() -> None:
    image = torch.full((4, 4, 3), 0.5)
    assert psnr(image + 0.1, image) == pytest.approx(20.0, abs=1e-4) and psnr(image, image) == math.inf
    a = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert iou(a, torch.tensor([-1.0, 1.0, -1.0, 1.0])) == pytest.approx(1 / 3) and iou(a.abs(), a.abs()) == 1.0
    assert torch.equal(cells(2, 3)[1, 2], torch.tensor([2 / 3, 0.5])) or torch.allclose(
        cells(2, 3)[1, 2], torch.tensor([2 / 3, 0.5])
    )


IMAGE = torch.rand(4, 4, 3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RadialUnits(3, 0), "in_features, units: 3 and 0"),
        (lambda: RadialUnits(3, 2, "cone"), "shape: 'cone' was given, allowed are gaussian"),
        (lambda: RadialUnits(3, 2, beta=math.nan), "beta, reach: nan and"),
        (lambda: RadialUnits(3, 2)(torch.ones(4, 5)), "f: its last dimension is 5; this layer reads 3"),
        (lambda: RadialDecoder(3, 0), "out_features: 0"),
        (lambda: DifGrid(4), "dim: 4 was given; give 1, 2 or 3"),
        (lambda: DifGrid(2, (4,), (8, 9), (2.0,)), "channels, resolutions, frequencies"),
        (lambda: DifGrid(2, mapping="wave"), "mapping: 'wave'"),  # type: ignore[arg-type]
        (lambda: DifGrid(2)(torch.zeros(4, 3)), "x: its last dimension is 3; the points of this grid have 2"),
        (lambda: DifGrid(2)(torch.full((4, 2), 1.2)), r"x: coordinates up to 1.2 were given; the box is \[-1, 1\]"),
        (lambda: DifGrid(2)(torch.full((4, 2), math.nan)), "x: coordinates up to nan"),
        (lambda: new_field(3, 1).to_image(4, 4), "field: its points have 3 coordinates"),
        (lambda: new_field(2, 1).to_grid(4, 4, 4), "sizes: "),
        (lambda: fit_image(IMAGE[:1]), r"image: \(1, 4, 3\) of torch.float32"),
        (lambda: fit_image(IMAGE * 255), "image: values from"),
        (lambda: fit_image(IMAGE, fitted=torch.zeros(4, 4, dtype=torch.bool)), "fitted: .* with 0 pixels"),
        (
            lambda: fit_image(IMAGE, NeuralField(DifGrid(2), nn.Linear(18, 3)), centres="data"),
            "centres: 'data' was given for a Linear",
        ),
        (lambda: fit_sdf(lambda x: x, points=64), r"distance: it gave \(8, 3\) for 8 points"),
        (lambda: psnr(IMAGE, IMAGE[:2]), "found: "),
        (lambda: iou(IMAGE, IMAGE[:2]), "found: "),
    ],
)
def test_bad_input(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(("llama", "gpt2", "vit")))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    rtn = RoundToNearest(bits=4, group_size=8)
    check_transform(ReplaceByRadial(units=8), tiny_model(kind), tiny_batches(kind), conflicting=(), repeatable=True)
    with pytest.raises(RecipeError, match="slot was filled for; put rbf first"):
        apply(tiny_model(kind), [rtn, ReplaceByRadial()], tiny_batches(kind), progress=False)


def test_a_head_of_a_model_answers_and_learns() -> None:
    cnn, images = zoo.load("cnn"), torch.rand(16, 1, 8, 8)
    apply(cnn, ReplaceByRadial(where=("fc1",), units=32), [images], progress=False)
    head: Any = cnn.get_submodule("fc1")
    with torch.no_grad():
        features = torch.cat([head.units(F.relu(torch.randn(16, 512)) * scale) for scale in (0.3, 1.0)])
    assert float(features.median()) > 1e-3  # no neuron is silent from the beginning
    cnn(images).logsumexp(-1).sum().backward()
    assert float(head.units.centres.grad.abs().max()) > 0
