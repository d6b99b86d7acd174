"""A grid: the values that few bits can stand for, and how a value finds its code.

    scale, zero = grid.parameters(x)                 found from the values, one pair for each group of them
    grid.fake(x)                                     rounded, in the shape and dtype of x; parameters found from x
    grid.fake(x, scale, zero)                        the same with given parameters, such as static ones
    codes, scale, zero = grid.quantize(x)            what is stored
    grid.dequantize(codes, scale, zero)              what it stands for

A kind (integers, half-integers, floats) is a frozen dataclass below `Grid`, registered under the entry-point group
`actkit.grids`. It says what a code stands for; *which* part of the values it should cover is chosen apart from it
(`ranges`).

What shares a scale: `group_size` consecutive values along the last dimension (`group_axis="input"`: the inputs of a
weight's row, the channels of a token), or along the last but one (`"output"`); -1 is a whole row, a token or a head
of an activation; `scope="tensor"` is all values. Parameters that are given may be shared in any way: a scale
[..., groups] serves equal parts of the last dimension, and is broadcast along the others, so [1] is one for all, and
[channels] one for each channel.

All is computed in float32 (in float64 if the values are). Gradients go straight through the rounding, to the values
that the range holds, and to scale and zero if they are given; those of `fake_straight` to all values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from actkit.core.grids.parcels import parcels
from actkit.core.grids.ranges import min_max
from actkit.core.ground import registry

GroupAxis = Literal["input", "output"]
Scope = Literal["group", "tensor"]
Choose = Callable[[Tensor, "Grid"], tuple[Tensor, Tensor]]  # a range [..., groups, 1] for values [..., groups, size]
AUTO = (128, 64, 32, 16)  # the group sizes of "auto", the first that divides the layer


class Grid(ABC):
    """What codes of a kind stand for, and what shares a scale.

    Attributes:
        kind: the registered name.
        bits: of a code.
        group_size: values that share a scale; -1 for a whole row, 'auto' for the largest of 128, 64, 32 and 16 that
            divides it (the whole row if none does).
        group_axis: the dimension that groups lie along, 'input' (the last) or 'output' (the last but one).
        scope: 'group', or 'tensor' for one scale for all values.
        scale_dtype: what a scale is rounded to, and stored in.
    """

    kind: ClassVar[str]
    bits: Any
    group_size: Any
    group_axis: Any
    scope: Any
    scale_dtype: Any

    # -- what a kind says

    @abstractmethod
    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero (None if the kind has none) that cover a range; gradients go through.

        Args:
            low: smallest values.
            high: largest values, of the same shape.
        """

    @abstractmethod
    def round(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the values of the grid next to x, in its dtype; gradients go straight through.

        Args:
            x: values, float32 or float64.
            scale: broadcastable to x.
            zero: broadcastable to x, or None.
        """

    @abstractmethod
    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes uint8 of the values that `round` gives; arguments as there."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return what codes stand for, in the dtype of the scale, which is broadcastable to them."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What a code is, for tables."""

    @property
    @abstractmethod
    def has_zeros(self) -> bool:
        """Whether there are zero points."""

    def whole(self, x: Tensor) -> Tensor | None:
        """Return the scale [1] of the whole tensor that scales are stored as multiples of, or None.

        Args:
            x: all values.
        """
        return None

    @property
    def choice(self) -> Choose:
        """How the range of a group is chosen if nobody says."""
        return min_max

    # -- values

    def parameters(self, x: Tensor, choose: Choose | None = None) -> tuple[Tensor, Tensor | None]:
        """Find scale and zero of values.

        Args:
            x: [..., n].
            choose: gives the range of each group; None for the choice of the kind.

        Returns:
            Scale, float32 (float64 for float64), and zero, uint8 or None: [..., groups], [groups, n] for groups along
            the outputs, [1] if all values share one.

        Raises:
            ValueError: the groups do not fit.
        """
        with torch.no_grad():
            scale, zero = self.tracked_parameters(x.detach(), choose)
            return scale, None if zero is None else zero.to(torch.uint8)

    def tracked_parameters(self, x: Tensor, choose: Choose | None = None) -> tuple[Tensor, Tensor | None]:
        """Find scale and zero of values, with gradients to the values and to what `choose` learns.

        Args:
            x: [..., n].
            choose: as in `parameters`.

        Returns:
            As `parameters`, but zero in floats.

        Raises:
            ValueError: the groups do not fit.
        """
        scale, zero = self.from_range(*(choose or self.choice)(self._groups(_wide(x)), self))
        if self.scope == "tensor":
            return scale.flatten(), None if zero is None else zero.flatten()
        return self._turned(scale.squeeze(-1)), None if zero is None else self._turned(zero.squeeze(-1))

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """Round values to the grid.

        Args:
            x: [..., n], any floating dtype.
            scale: [..., groups], broadcastable, as `parameters` gives it; found from x if None.
            zero: of the shape of the scale; None for that of the kind.

        Returns:
            The rounded values, in the shape and dtype of x.

        Raises:
            ValueError: the groups do not fit.
        """
        tracked = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, scale, zero))
        if scale is None and not tracked and x.dim() == 2 and self._by_rows and self.group_axis == "input":
            return torch.cat([self._fake(rows, *self.parameters(rows)) for rows in parcels(x)])
        return self._fake(x, *(self.parameters(x) if scale is None else (scale, zero)))

    def fake_straight(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """Round values as `fake` does, with the gradient of x itself: also outside of the range, and none to scales.

        Args:
            x: as in `fake`, and so are all others.
            scale: or None.
            zero: or None.

        Returns:
            As in `fake`.

        Raises:
            ValueError: the groups do not fit.
        """
        return straight_through(self.fake(_wide(x.detach()), scale, zero), _wide(x)).to(x.dtype)

    def _fake(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        groups, scale, zero = self._aligned(_wide(x), scale, zero)
        return self._turned(self.round(groups, scale, zero).flatten(-2)).to(x.dtype)

    def quantize(
        self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Find codes and parameters of values, in float32.

        Args:
            x: [..., n].
            scale: as in `fake`.
            zero: as in `fake`.

        Returns:
            Codes, uint8 of the shape of x; scale and zero as `parameters` gives them, or as they were given.

        Raises:
            ValueError: the groups do not fit.
        """
        x = x.detach()
        if scale is not None or x.dim() != 2 or not self._by_rows:
            scale, zero = self.parameters(x.float()) if scale is None else (scale, zero)
            return self._turned(self.encode(*self._aligned(x.float(), scale, zero)).flatten(-2)), scale, zero
        rows = x if self.group_axis == "input" else x.mT
        along = self if self.group_axis == "input" else replace(self, group_axis="input")  # type: ignore[type-var]
        parts = [along._quantize(part.float()) for part in parcels(rows)]
        codes, scales, zeros = zip(*parts, strict=True)
        whole = [self._turned(torch.cat(each)).contiguous() for each in (codes, scales, zeros) if each[0] is not None]
        return whole[0], whole[1], whole[2] if len(whole) == 3 else None

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scale, zero = self.parameters(rows)
        return self.encode(*self._aligned(rows, scale, zero)).flatten(-2), scale, zero

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The values float32 [..., n] that codes and parameters stand for.

        Args:
            codes: uint8 [..., n].
            scale: as in `fake`.
            zero: as in `fake`.
        """
        return self._turned(self.decode(*self._aligned(codes, scale.float(), zero)).flatten(-2))

    def places(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return where values lie among the codes, neither rounded nor clamped, for kinds whose codes are equal steps.

        Args:
            x: [..., n], floats.
            scale: as in `fake`.
            zero: as in `fake`.

        Returns:
            Of the shape of x; k + 1/2 is the threshold between the codes k and k + 1.
        """
        return self._turned(self._places(*self._aligned(_wide(x), scale, zero)).flatten(-2))

    def _places(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _aligned(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., groups, size] in groups along its last dimension; scale and zero [..., groups, 1]."""
        dtype = x.dtype if x.dtype.is_floating_point else scale.dtype
        turned = [None if each is None else self._turned(each).to(dtype).unsqueeze(-1) for each in (scale, zero)]
        assert turned[0] is not None
        return self._turned(x).unflatten(-1, (turned[0].shape[-2], -1)), turned[0], turned[1]

    def _groups(self, x: Tensor) -> Tensor:
        """x [..., groups, size]; [1, size] if all values share a scale."""
        if self.scope == "tensor":
            return x.reshape(1, -1)
        reason = self.fits(*((1, *x.shape) if x.dim() == 1 else x.shape[-2:]))
        if reason:
            raise ValueError(reason + ".")
        rows = self._turned(x)
        return rows.unflatten(-1, (-1, self.size(rows.shape[-1])))

    def _turned(self, x: Tensor) -> Tensor:
        """Exchange the last two dimensions, if groups lie along the last but one; its own inverse."""
        return x.mT if self.group_axis == "output" and self.scope == "group" and x.dim() > 1 else x

    @property
    def _by_rows(self) -> bool:
        """Whether a row is rounded without regard to the others."""
        return self.scope == "group" and self.scale_dtype != "e4m3"

    # -- groups

    def size(self, length: int) -> int:
        """Return how many values of a row (or column) of this length share a scale."""
        if self.group_size == "auto":
            return next((size for size in AUTO if length % size == 0), length)
        return length if self.group_size == -1 else self.group_size

    def of(self, out_features: int, in_features: int) -> Self:
        """Return the grid of a weight [out_features, in_features], its group size as a number."""
        if self.group_size != "auto":
            return self
        length = in_features if self.group_axis == "input" else out_features
        size = self.size(length)
        return replace(self, group_size=-1 if size == length else size)  # type: ignore[type-var]

    def fits(self, out_features: int, in_features: int) -> str | None:
        """Why a weight [out_features, in_features] cannot be cut into these groups, or None."""
        if self.scope == "tensor":
            return None
        length = in_features if self.group_axis == "input" else out_features
        if length % self.size(length):
            return (
                f"group_size: {self.group_size} does not divide the {length} {self.group_axis}s; "
                f"choose a divisor of {length}, or -1 for whole rows"
            )
        return None

    def parameter_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of scale and zero for a weight [out, in].

        Args:
            out_features: rows of the weight.
            in_features: columns of the weight.

        Raises:
            ValueError: the groups do not fit.
        """
        reason = self.fits(out_features, in_features)
        if reason:
            raise ValueError(reason + ".")
        if self.scope == "tensor":
            return (1,)
        if self.group_axis == "input":
            return out_features, in_features // self.size(in_features)
        return out_features // self.size(out_features), in_features

    def describe(self) -> str:
        """A few words for tables, such as '4-bit, groups of 64 along the input'."""
        if self.scope == "tensor":
            return f"{self.name}, one scale for all"
        if self.group_size == -1:
            return f"{self.name}, whole {'rows' if self.group_axis == 'input' else 'columns'}"
        return f"{self.name}, groups of {self.group_size} along the {self.group_axis}"

    def _check_groups(self) -> None:
        if isinstance(self.group_size, int) and self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size: {self.group_size} was given; give a positive number, -1 for a whole row, or 'auto'."
            )
        if self.group_axis not in ("input", "output"):
            raise ValueError(f"group_axis: {self.group_axis!r} was given, allowed are 'input' and 'output'.")
        if self.scope not in ("group", "tensor"):
            raise ValueError(f"scope: {self.scope!r} was given, allowed are 'group' and 'tensor'.")

    # -- files

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, `kind` among them."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> Grid:
        """Return the grid that `spec` described.

        Args:
            spec: what it gave.

        Raises:
            RecipeError: a kind that is not registered.
        """
        settings = {name: value for name, value in spec.items() if name != "kind"}
        return registry.grid_class(spec["kind"])(**settings)


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """Return `rounded`, with the gradient of x."""
    return x + (rounded - x).detach() if x.requires_grad and torch.is_grad_enabled() else rounded


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
