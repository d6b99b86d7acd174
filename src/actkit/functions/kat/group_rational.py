"""The activation of KAT: one learned rational function for each group of channels (2024, ICLR 2025, arXiv:2409.10594).

    F(x) = (a_0 + a_1 x + ... + a_m x^m) / Q(x),   m = 5, n = 4, 8 groups
    Q(x) = 1 + |b_1||x| + ... + |b_n||x|^n  (A, as the released kernels),  or  1 + |b_1 x + ... + b_n x^n|  (B, as the
    paper writes it)

When to use it: `GroupRational` wherever an activation stands that shall be learned; `gr_kan` puts it into trained
models, `GrKanLinear` and `kat` are for new ones.
Cost: 38 numbers per layer (one numerator, 8 denominators) and some 25 operations per element. The backward pass keeps
the input alone.
Settled here: one numerator for all groups and a denominator for each, as released (the paper's text has it the other
way round; `share` has both); coefficients are fitted, never copied, as the released ones for GELU fit kind B and are
used with kind A, where they miss by up to 1.5 on [-3, 3]; coefficients stay float32 and so do powers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from actkit.core.layers.activation_function import ActivationFunction, Axis
from actkit.core.layers.curve import Curve, CurveKind
from actkit.core.layers.keeps_dtype import KeepsDtype
from actkit.core.univariate.fit_rational import RationalFit, fit_rational, rational_like
from actkit.core.univariate.rational_record import rational_record
from actkit.kernels.rationals import Kind, rational

Share = Literal["numerator", "denominator", "none"]
NAMES = ("numerator", "denominator")
Start = str | RationalFit | Callable[[Tensor], Tensor]


class GroupRational(KeepsDtype):
    """A rational function for each group of channels.

    Args:
        channels: of the input along `dim`.
        groups: contiguous ones of equal size.
        degrees: m of the numerator, n of the denominator.
        start: what it computes at first: the name of a function, a function, or a fit. The first two are fitted on
            [-3, 3].
        kind: of the denominator.
        share: what all groups have in common.
        dim: of the channels; 1 for images [batch, channels, height, width].

    Raises:
        ValueError: the groups do not divide the channels, a degree is out of bounds, or a fit has other degrees or
            another kind.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ("numerator", "denominator")
    numerator: nn.Parameter
    denominator: nn.Parameter

    def __init__(
        self,
        channels: int,
        groups: int = 8,
        degrees: tuple[int, int] = (5, 4),
        start: Start = "silu",
        kind: Kind = "A",
        share: Share = "numerator",
        dim: int = -1,
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(
                f"groups: {groups} were given for {channels} channels; give a number that divides them: "
                f"{', '.join(map(str, _divisors(channels)))}."
            )
        if share not in ("numerator", "denominator", "none"):
            raise ValueError(f"share: {share!r} was given, allowed are 'numerator', 'denominator' and 'none'.")
        fitted = _fitted(start, degrees, kind)
        self.channels, self.groups, self.degrees = channels, groups, (degrees[0], degrees[1])
        self.kind, self.share, self.dim = kind, share, dim
        rows = {name: 1 if share == name else groups for name in NAMES}
        self.numerator = _rows(fitted.numerator, rows["numerator"])
        self.denominator = _rows(fitted.denominator, rows["denominator"])

    def forward(self, x: Tensor) -> Tensor:
        """Return F(x), of the shape and dtype of x.

        Args:
            x: [..., channels] (along `dim`), floats.

        Raises:
            ValueError: other channels, or no floats.
        """
        if x.shape[self.dim] != self.channels:
            raise ValueError(f"x: it has {x.shape[self.dim]} channels along dim {self.dim}; give {self.channels}.")
        last = self.dim in (-1, x.dim() - 1)
        found = rational(x if last else x.movedim(self.dim, -1), self.numerator, self.denominator, self.kind)
        return found if last else found.movedim(-1, self.dim)

    @property
    def flops(self) -> int:
        """Operations for one output, by Horner's rule; the paper counts 21 where these are 20."""
        return 2 * sum(self.degrees) + 2

    def record(self, group: int | None = None) -> ActivationFunction | None:
        """What is known of it at its present coefficients; None if its groups have others each.

        Args:
            group: of channels; None for all.
        """
        if self.numerator.is_meta:
            return None
        pairs = [tuple(map(tuple, each)) for each in zip(*(self._by_group(name) for name in NAMES), strict=True)]
        if group is None and len(set(pairs)) > 1:
            return None
        return rational_record(*pairs[group or 0], self.kind)

    def _by_group(self, name: str) -> list[list[float]]:
        rows: list[list[float]] = getattr(self, name).detach().double().tolist()
        return rows * (self.groups // len(rows))

    def curve(self) -> Curve | None:
        """Return what it computes now, for the CPU decoder; None above degrees 5 and 4."""
        kind: CurveKind = "rational_a" if self.kind == "A" else "rational_b"
        return Curve.of(kind, self.numerator, self.denominator) if self.dim == -1 else None

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {
            "channels": self.channels,
            "groups": self.groups,
            "degrees": list(self.degrees),
            "kind": self.kind,
            "share": self.share,
            "dim": self.dim,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> GroupRational:
        """The function that `spec` described; its coefficients come from the checkpoint."""
        m, n = spec["degrees"]
        empty = RationalFit((0.0,) * (m + 1), (0.0,) * n, spec["kind"], 0.0, 0.0, 0.0, (0.0, 0.0))
        return cls(**{**spec, "degrees": (m, n)}, start=empty)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, groups={self.groups}, degrees={self.degrees}, kind={self.kind!r}"


class RationalFirst(nn.Module):
    """A rational function in front of a module of the model, of which it is a wrapper.

    Args:
        inner: what reads the function's outputs.
        rational: on what `inner` read before.
    """

    wraps: ClassVar[str] = "inner"

    def __init__(self, inner: nn.Module, rational: GroupRational) -> None:
        super().__init__()
        self.inner, self.rational = inner, rational

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., channels] -> what `inner` gives for its function."""
        return self.inner(self.rational(x), *args, **kwargs)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"rational": self.rational.spec()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> RationalFirst:
        """Around what stands at its place; the coefficients come from the checkpoint."""
        return cls(original, GroupRational.from_spec(spec["rational"]))


def _fitted(start: Start, degrees: tuple[int, int], kind: Kind) -> RationalFit:
    if isinstance(start, str):
        return rational_like(start, degrees, kind)
    if not isinstance(start, RationalFit):
        return fit_rational(start, degrees, kind)
    found = (len(start.numerator) - 1, len(start.denominator))
    if found != tuple(degrees) or start.kind != kind:
        raise ValueError(
            f"start: a fit of degrees {found} and kind {start.kind!r} was given for {tuple(degrees)} and {kind!r}; "
            f"give one of the same."
        )
    return start


def _rows(values: tuple[float, ...], count: int) -> nn.Parameter:
    return nn.Parameter(torch.tensor([values] * count, dtype=torch.float32))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
