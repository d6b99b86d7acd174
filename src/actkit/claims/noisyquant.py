"""NoisyQuant's claims: a fixed noise vector before the quantizer lowers the error of a layer's output.

The theorem on random numbers; the method on the digits ViT of the zoo and on MiniLM (no pretrained vision transformer
is at hand). Weights and inputs of 4, 5 and 6 bits, weights symmetric with a scale per row, inputs by one static scale,
256 images or sentences for calibration, the test split for all that is judged. Arms: the largest value as the range,
the searched range (EasyQuant), the same with the best constant shift (the control), with uniform noise, and with both;
at 4 bits with 5 seeds of the noise. The error of a layer is that of its output against the rounded weight with exact
inputs, over its square. ImageNet and COCO cannot be checked here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import Subject, spread
from actkit.core.edit.edits import get_module
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.data.images import digits
from actkit.quantization.noisyquant import NoisyQuant, noisy_gain
from actkit.quantization.rtn import RoundToNearest

LARGEST, CLIPPED, SHIFTED, NOISY, BOTH = "largest", "EasyQuant", "with a shift", "with noise", "with shift and noise"
MEASURED = 1024  # rows that a layer's error is measured on


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the noise, at 4 bits.
        calibration: images or sentences.
        sentences: of MiniLM that are judged.
        rows: tokens that a search runs on.
        clip_grid: ranges tried.
        n_grid: strengths tried, and twice as many shifts.
        draws: of the theorem, for each pair.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    calibration: int = 256
    sentences: int = 400
    rows: int = 256
    clip_grid: int = 50
    n_grid: int = 50
    draws: int = 1_000_000


THEOREM = Statement(
    "Noise up to n lowers the expected error of a value whose distance to the border is below n (1 - sqrt(n / 3b))",
    "Theorem 1 (a histogram shows it; no figure)",
    "over a grid of distances and strengths with n at most 2 b - distance, 1,000,000 draws each: the measured gain "
    "differs from n^2 / 3 - (b / n) (n - distance)^2 by less than 3e-3 b^2; the sign is right for 200 random pairs",
    SYNTHETIC,
)
METHOD = Statement(
    "Shift and noise lower the error of layers, of those behind GELU most, and harm no output",
    "6-bit ViT-B: 64.6 % top-1 without, 83.3 % with it, of 85.1 % (repository); the inputs behind GELU gain most, "
    "about 19 %",
    "4-bit weights and inputs, test data: the relative squared error with shift and noise is at most 0.95 x "
    "EasyQuant's on the mean over the second layers of MLPs and at most 1.0 x over all layers, in at least 4 of 5 "
    "seeds; {quality} is not worse than EasyQuant's by more than 0.2 % on the mean",
    "vit",
)
STATEMENTS = tuple(
    [THEOREM]
    + [
        Statement(METHOD.statement, METHOD.paper, METHOD.condition.format(quality=quality), subject)
        for subject, quality in (("vit", "accuracy"), ("minilm", "the cosine of sentence embeddings to the model's"))
    ]
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [
        (THEOREM, partial(theorem, sizes)),
        (STATEMENTS[1], partial(on_a_model, "vit", sizes)),
        (STATEMENTS[2], partial(on_a_model, "minilm", sizes)),
    ]
    return conduct("noisyquant", experiments, sizes, subject, progress)


# -- the theorem -------------------------------------------------------------------------------------------------------


def theorem(sizes: Sizes) -> Measurement:
    """The gain on random numbers against the closed form, for b = 1."""
    generator = torch.Generator().manual_seed(0)

    def gain(distance: float, n: float) -> float:
        x = 1.0 - distance  # between the level 0 and the border 1
        moved = x + (2 * torch.rand(sizes.draws, generator=generator, dtype=torch.float64) - 1) * n
        return float((2 * torch.round(moved / 2) - moved).square().mean()) - x**2

    def expected(distance: float, n: float) -> float:
        return float(noisy_gain(torch.tensor(distance), torch.tensor(n), 1.0))

    grid = [(d / 10, n / 10) for d in range(0, 11, 2) for n in range(2, 21, 3) if n <= 20 - d]
    worst = max(abs(gain(*pair) - expected(*pair)) for pair in grid)
    pairs = torch.rand(200, 2, generator=generator, dtype=torch.float64).tolist()
    right = 0
    for distance, share in pairs:
        n = max(0.05, share * (2 - distance))
        predicted = distance < n * (1 - (n / 3) ** 0.5)
        right += (expected(distance, n) < 0) == predicted
    here = f"largest difference {worst:.1e} b^2 over {len(grid)} pairs; the sign is right for {right} of {len(pairs)}"
    return Measurement(here, worst < 3e-3 and right == len(pairs))


# -- the method --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What an arm was measured to be.

    Attributes:
        second: mean relative squared error of the second layers of MLPs.
        every: of all layers.
        quality: accuracy, or cosine to the exact model's embeddings.
    """

    second: float
    every: float
    quality: float


class Bench:
    """A model, its calibration and test data, and how its arms are judged.

    Args:
        name: 'vit' or 'minilm'.
        sizes: how much is measured.
    """

    def __init__(self, name: str, sizes: Sizes) -> None:
        self.name, self.sizes = name, sizes
        if name == "vit":
            self.exact: nn.Module = zoo.load("vit")
            (train, _), (test, labels) = digits("train"), digits("test")
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
            self.calibration: Any = [{"pixel_values": train[order[: sizes.calibration]]}]
            self.test: Any = [{"pixel_values": test, "labels": labels}]
        else:
            subject = Subject("minilm", calibration=sizes.calibration, split="train", held_out=sizes.sentences)
            self.exact, self.calibration, self.test = subject.model, subject.calibration(0), subject.held_out
        self._inputs: dict[int, tuple[nn.Module, Mapping[str, Tensor]]] = {}

    def judge(self, bits: int, arm: str, seed: int = 0) -> Judged:
        """Round weights and inputs, and measure on the test data."""
        sizes, weights = self.sizes, RoundToNearest(bits=bits, group_size=-1, symmetric=True)
        method = NoisyQuant(
            bits=bits,
            noise="uniform" if arm in (NOISY, BOTH) else "none",
            shift=arm in (SHIFTED, BOTH),
            clip_grid=1 if arm == LARGEST else sizes.clip_grid,
            n_grid=sizes.n_grid,
            rows=sizes.rows,
            fold=False,  # so that each layer can be measured alone
            seed=seed,
        )
        rounded, inputs = self._rounded(bits, weights)
        model = apply(copy.deepcopy(rounded), method, self.calibration, undo="off", progress=False).model
        errors = {path: self._error(model, rounded, path, x) for path, x in inputs.items()}
        blocks = anatomy(model).blocks
        second = [linear.path for block in blocks for linear in block.linears() if linear.role == "down"]
        return Judged(mean(errors[path] for path in second), mean(errors.values()), self._quality(model))

    def _rounded(self, bits: int, weights: RoundToNearest) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """The model with rounded weights, and the test inputs of each of its layers."""
        if bits not in self._inputs:
            model = apply(copy.deepcopy(self.exact), weights, undo="off", progress=False).model
            sites = {
                x.path: Site("layer.input", path=x.path) for block in anatomy(model).blocks for x in block.linears()
            }
            wanted = {site: Sample(MEASURED) for site in sites.values()}
            batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in self.test]
            seen = record(model, wanted, batches, progress=False)
            self._inputs[bits] = model, {path: seen[site].rows for path, site in sites.items()}
        return self._inputs[bits]

    @torch.no_grad()
    def _error(self, model: nn.Module, rounded: nn.Module, path: str, x: Tensor) -> float:
        """Return the relative squared error of a layer's output."""
        exact, found = get_module(rounded, path)(x).double(), get_module(model, path)(x).double()
        return float((found - exact).square().sum() / exact.square().sum())

    def _quality(self, model: nn.Module) -> float:
        task, metric = ("classification", "accuracy") if self.name == "vit" else ("embedding", "fidelity")
        reference = None if self.name == "vit" else copy.deepcopy(self.exact)
        quality = measure_quality(model, self.test, reference=reference, task=task, resamples=1, progress=False)
        return quality.metrics[metric].value


def on_a_model(name: str, sizes: Sizes) -> Measurement:
    """All arms at 4 bits over the seeds, at 5 and 6 bits with one."""
    bench = Bench(name, sizes)
    found: dict[str, list[Judged]] = {
        arm: [bench.judge(4, arm, seed) for seed in (sizes.seeds if arm in (NOISY, BOTH) else sizes.seeds[:1])]
        for arm in (LARGEST, CLIPPED, SHIFTED, NOISY, BOTH)
    }
    (easy,), (control,) = found[CLIPPED], found[SHIFTED]
    second = [each.second / easy.second for each in found[BOTH]]
    every = [each.every / easy.every for each in found[BOTH]]
    held = sum(a <= 0.95 and b <= 1.0 for a, b in zip(second, every, strict=True))
    lost = easy.quality - mean(each.quality for each in found[BOTH])
    beyond = 1 - mean(each.every for each in found[BOTH]) / control.every
    more = "noise adds nothing to the shift" if beyond < 0.01 else f"noise takes {beyond:.0%} of what the shift leaves"
    lines = [f"4 bits: {_described(found)}"]
    for bits in (5, 6):
        lines.append(f"{bits} bits: {_described({arm: [bench.judge(bits, arm)] for arm in found})}")
    quality = "accuracy" if name == "vit" else "cosine"
    here = (
        f"error of second layers, of all, {quality}: {'; '.join(lines)}. Shift and noise "
        f"over EasyQuant at 4 bits: {spread(second)} on second layers, {spread(every)} on all, in {held} of "
        f"{len(second)} seeds as claimed; {more}"
    )
    return Measurement(here, held >= 0.8 * len(second) and lost <= 0.002)


def _described(found: Mapping[str, list[Judged]]) -> str:
    parts = []
    for arm, judged in found.items():
        second, every, quality = (
            mean(getattr(each, name) for each in judged) for name in ("second", "every", "quality")
        )
        parts.append(f"{arm} {second:.4f}, {every:.4f}, {quality:.4f}")
    return "; ".join(parts)
