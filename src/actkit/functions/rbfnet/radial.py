"""A layer of radial basis neurons, each with a centre and a width along every feature (2025, arXiv:2503.06762).

    d_n = sum_d exp(beta_nd) (f_d - c_nd)^2,   phi_n = exp(-d_n / 2),   out = W phi + bias

Distances are formed by two products, sum f^2 exp(beta) - 2 sum f exp(beta) c + sum exp(beta) c^2, so that nothing of
the size rows x units x features is there. They are clamped at 0, below which cancellation takes them; all of it runs in
float32 at least, and beta is clamped to [-10, 10].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32, check_floats

if TYPE_CHECKING:
    from rich.table import Table

Shape = Literal["gaussian", "multiquadric", "inverse_multiquadric", "cubic", "thin_plate", "wendland"]
Place = Literal["data", "kmeans"]
LEAST = 1e-12  # a squared distance of the shapes with a root or a logarithm
WIDEST = 10.0  # of beta, either way
ROUNDS = 10  # of k-means


def _thin_plate(d: Tensor) -> Tensor:
    d = d.clamp(min=LEAST)
    return d * d.log() / 2  # r^2 log r


def _wendland(d: Tensor) -> Tensor:
    r = d.clamp(min=LEAST).sqrt()
    return (1 - r).clamp(min=0) ** 4 * (4 * r + 1)


SHAPES: dict[Shape, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda d: torch.exp(-d / 2),
    "multiquadric": lambda d: (d + 1).sqrt(),
    "inverse_multiquadric": lambda d: (d + 1).rsqrt(),
    "cubic": lambda d: d**1.5,
    "thin_plate": _thin_plate,
    "wendland": _wendland,
}


class RadialUnits(KeepsDtype):
    """Radial basis neurons: [..., in_features] -> [..., units].

    Args:
        in_features: channels of f.
        units: how many.
        shape: of a neuron over its distance; Gaussians are the method.
        beta: logarithm of 1 / width^2 at first, of every neuron and feature.
        reach: centres begin uniformly in -reach to reach; the paper's are all but equal.

    Raises:
        ValueError: a number below 1, an unknown shape, or beta or reach that are not finite.
    """

    keeps: ClassVar[tuple[str, ...]] = ("centres", "beta")

    def __init__(
        self, in_features: int, units: int = 64, shape: Shape = "gaussian", beta: float = 0.0, reach: float = 1e-4
    ) -> None:
        super().__init__()
        if in_features < 1 or units < 1:
            raise ValueError(f"in_features, units: {in_features} and {units} were given; give 1 or more.")
        if shape not in SHAPES:
            raise ValueError(f"shape: {shape!r} was given, allowed are {', '.join(SHAPES)}.")
        if not (math.isfinite(beta) and math.isfinite(reach) and reach >= 0):
            raise ValueError(f"beta, reach: {beta} and {reach} were given; give finite numbers, the second from 0 on.")
        self.in_features, self.units, self.shape = in_features, units, shape
        self.centres = nn.Parameter((2 * torch.rand(units, in_features) - 1) * reach)
        self.beta = nn.Parameter(torch.full((units, in_features), float(beta)))

    def forward(self, f: Tensor) -> Tensor:
        """Return phi [..., units].

        Args:
            f: [..., in_features], floats.

        Raises:
            ValueError: another last dimension, or f holds no floats.
        """
        check_floats(f, "f")
        with torch.autocast(f.device.type, enabled=False):
            return SHAPES[self.shape](self.distances(f)).to(f.dtype)

    def distances(self, f: Tensor) -> Tensor:
        """Return the squared distances d [..., units], at least in float32.

        Args:
            f: [..., in_features], floats.

        Raises:
            ValueError: another last dimension, or f holds no floats.
        """
        if f.shape[-1] != self.in_features:
            raise ValueError(
                f"f: its last dimension is {f.shape[-1]}; this layer reads {self.in_features} features there."
            )
        wide, inverse = at_least_float32(f), self.beta.clamp(-WIDEST, WIDEST).exp()
        scaled = inverse * self.centres
        squares = F.linear(wide * wide, inverse, (scaled * self.centres).sum(-1))
        return (squares - 2 * F.linear(wide, scaled)).clamp(min=0)

    @torch.no_grad()
    def place(self, features: Tensor, how: Place = "data", seed: int = 0) -> Self:
        """Put the centres where features are, all widths so that the mean squared distance is 2.

        Args:
            features: [..., in_features], at least as many as units.
            how: "data" takes some of them, "kmeans" means of clusters.
            seed: of which ones.

        Returns:
            Itself.

        Raises:
            ValueError: too few features, features that are all the same, or an unknown way.
        """
        rows = features.reshape(-1, features.shape[-1]).to(self.centres)
        if how not in ("data", "kmeans") or len(rows) < self.units:
            raise ValueError(
                f"how, features: {how!r} and {len(rows)} rows were given for {self.units} units; give 'data' or "
                f"'kmeans', and at least as many rows as units."
            )
        if bool((rows == rows[0]).all()):
            raise ValueError("features: all rows are the same, so that no width fits them; give features that differ.")
        with own_random_numbers(torch.device("cpu"), seed):
            centres = rows[torch.randperm(len(rows))[: self.units]]
        for _ in range(ROUNDS if how == "kmeans" else 0):
            nearest = torch.cdist(rows, centres).argmin(-1)
            count = nearest.bincount(minlength=self.units)
            sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
            centres = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], centres)
        self.centres.copy_(centres)
        mean = torch.cdist(rows, centres).square().mean().clamp(min=LEAST)
        self.beta.fill_(float((2 / mean).log()))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, units={self.units}, shape={self.shape!r}"


class RadialDecoder(nn.Module):
    """Radial basis neurons and a linear layer on them: [..., in_features] -> [..., out_features].

    Args:
        in_features: channels of the features.
        out_features: channels of the output.
        units: how many neurons.
        settings: of the neurons, as in `RadialUnits`.

    Raises:
        ValueError: what `RadialUnits` refuses, or no output.
    """

    linear_inputs: ClassVar[tuple[tuple[str | None, tuple[str, ...]], ...]] = ((None, ("weights",)),)

    def __init__(self, in_features: int, out_features: int, units: int = 64, **settings: Any) -> None:
        super().__init__()
        if out_features < 1:
            raise ValueError(f"out_features: {out_features} was given; give 1 or more.")
        self.units = RadialUnits(in_features, units, **settings)
        self.weights = nn.Linear(units, out_features)

    def forward(self, f: Tensor) -> Tensor:
        """f [..., in_features] -> [..., out_features]."""
        return self.weights(self.units(f))

    def units_table(self, most: int = 20) -> Table:
        """The neurons with the largest weights, for a terminal.

        Args:
            most: rows.

        Returns:
            Length of the centre, smallest and largest width, length of the weights.

        Raises:
            NonFiniteError: a centre, width or weight is NaN or infinite.
        """
        from rich import box

        from actkit.core.ground.tables import PlainTable

        units = self.units
        widths = (-units.beta.detach().clamp(-WIDEST, WIDEST) / 2).exp()
        weights, centres = self.weights.weight.detach().norm(dim=0), units.centres.detach().norm(dim=1)
        bad = [n for n in range(units.units) if not bool((widths[n].sum() + weights[n] + centres[n]).isfinite())]
        if bad:
            raise NonFiniteError(f"units: number {bad[0]} of {units.units} holds NaN or Inf; train at a lower rate.")
        table = PlainTable(title=f"{units.units} neurons, {units.shape}", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("unit", "centre", "widths", "weights"):
            table.add_column(name, justify="right")
        for n in weights.argsort(descending=True)[:most].tolist():
            span = f"{float(widths[n].min()):.3g} to {float(widths[n].max()):.3g}"
            table.add_row(str(n), f"{float(centres[n]):.3g}", span, f"{float(weights[n]):.3g}")
        return table

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        units, widths = self.units, (self.units.in_features, self.weights.out_features)
        return {"in_features": widths[0], "out_features": widths[1], "units": units.units, "shape": units.shape}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> RadialDecoder:
        """The decoder that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        made = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return made if like is None else made.to(like.dtype)
