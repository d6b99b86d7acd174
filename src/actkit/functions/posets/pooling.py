"""Pooling, and an activation over groups of channels, by the tropical polynomial of a poset (2024, arXiv:2412.06097).

    y = max over up-sets F of sum_(i in F) x_i          of the points x of a window

When to use it: in place of average or max pooling in a network that you train; it has no parameters, and its gradient
reaches every point of the up-set that is chosen. A ReLU is built in, as the empty up-set gives 0: use it on signed
values, *not* behind a ReLU. On values that are not negative every poset gives their sum, which is average pooling.
Cost: a sum per up-set and window (16 for the antichain on four points, 8 for N, 5 for the chain).
Settled here: `normalize` divides by the number of points, so that outputs are as large as those of average pooling; the
transform uses it, the layer is the paper's without it. Of equal sums the gradient goes to the smallest up-set. A
window that reaches beyond the right or the lower edge is filled with 0 (`ceil`), as in the release, or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.functions.posets.poset import Poset
from actkit.functions.posets.tropical import ENUMERATED, best_sum, poset_eval

Given = Poset | int | str | Sequence[Sequence[int]]


class _PosetUnit(nn.Module):
    """What the three share.

    Args:
        poset: or what `Poset.of` reads.
        points: that the poset must have.
        perm: point i of the poset reads place perm[i].
        normalize: divide by the number of points.
        constant: the empty up-set counts, and gives 0.
    """

    rows: Tensor | None

    def __init__(
        self, poset: Given, points: int | None, perm: Sequence[int] | None, normalize: bool, constant: bool
    ) -> None:
        super().__init__()
        self.poset = Poset.of(poset, 4 if points is None else points)
        if points is not None and self.poset.n != points:
            raise ValueError(f"poset: one on {self.poset.n} points was given for windows of {points}; both must agree.")
        if self.poset.n <= 9 and len(self.poset.upsets()) > ENUMERATED:
            raise ValueError(f"poset: it has more than {ENUMERATED} up-sets; give a smaller window.")
        self.perm = None if perm is None else [int(place) for place in perm]
        self.placed = self.poset if self.perm is None else self.poset.relabelled(self.perm)
        self.normalize, self.constant = normalize, constant
        listed = self.poset.n <= 9 or self.poset.tree is None
        rows = torch.from_numpy(self.placed.indicators()).to(torch.get_default_dtype()) if listed else None
        self.register_buffer("rows", rows, persistent=False)

    def unit(self, x: Tensor) -> Tensor:
        """Evaluate points [..., n] -> [...]."""
        t = 0.0 if self.constant else -inf
        if not x.is_floating_point():
            raise TypeError(f"x: a tensor of {x.dtype} was given; give floating point numbers.")
        found = poset_eval(x, self.placed, t) if self.rows is None else best_sum(x, self.rows.to(x.dtype), t)
        return found / self.poset.n if self.normalize else found

    def _spec(self) -> dict[str, Any]:
        return {
            "poset": self.poset.spec(),
            "perm": self.perm,
            "normalize": self.normalize,
            "constant": self.constant,
        }

    def extra_repr(self) -> str:
        return f"{self.placed}, normalize={self.normalize}, constant={self.constant}"


class PosetPool2d(_PosetUnit):
    """Pool windows of an image, their points row by row.

    Args:
        poset: on kernel^2 points: a poset, one of the numbers 0 to 15 or names on four, or pairs.
        kernel: side of a window, 1 to 3.
        stride: None for the kernel.
        perm: point i of the poset reads place perm[i] of the window.
        normalize: divide by the number of points.
        constant: the empty up-set counts, and gives 0: a ReLU is built in.
        ceil: windows that reach beyond the right or lower edge are filled with 0; else they are left out.

    Raises:
        ValueError: a size is out of bounds, or the poset has another number of points.
    """

    mixes = ("positions",)

    def __init__(
        self,
        poset: Given = 12,
        kernel: int = 2,
        stride: int | None = None,
        perm: Sequence[int] | None = None,
        normalize: bool = False,
        constant: bool = True,
        ceil: bool = True,
    ) -> None:
        stride = kernel if stride is None else stride
        if not 1 <= kernel <= 3 or not stride >= 1:
            raise ValueError(
                f"kernel, stride: {kernel} and {stride} were given; give a kernel of 1 to 3, a stride from 1."
            )
        super().__init__(poset, kernel**2, perm, normalize, constant)
        self.kernel, self.stride, self.ceil = kernel, stride, ceil

    def forward(self, x: Tensor) -> Tensor:
        """Pool an image.

        Args:
            x: [batch, channels, height, width].

        Raises:
            ValueError: it has another number of dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"x: shape {list(x.shape)} was given; give [batch, channels, height, width].")
        if self.ceil:
            x = F.pad(x, (0, self._missing(x.shape[3]), 0, self._missing(x.shape[2])))
        windows = x.unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        return self.unit(windows.flatten(-2))

    def _missing(self, size: int) -> int:
        return max(0, self.kernel - size, -(size - self.kernel) % self.stride)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        return {**self._spec(), "kernel": self.kernel, "stride": self.stride, "ceil": self.ceil}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PosetPool2d:
        """The module that `spec` described."""
        return cls(**spec)


class PosetPool1d(_PosetUnit):
    """Pool windows of a sequence.

    Args:
        poset: on `kernel` points.
        kernel: length of a window, 1 to 9.
        stride: None for the kernel.
        perm: as in `PosetPool2d`, and so are the others.
        normalize: see perm.
        constant: see perm.
        ceil: see perm.

    Raises:
        ValueError: a size is out of bounds, or the poset has another number of points.
    """

    mixes = ("positions",)

    def __init__(
        self,
        poset: Given = 12,
        kernel: int = 4,
        stride: int | None = None,
        perm: Sequence[int] | None = None,
        normalize: bool = False,
        constant: bool = True,
        ceil: bool = True,
    ) -> None:
        stride = kernel if stride is None else stride
        if not 1 <= kernel <= 9 or not stride >= 1:
            raise ValueError(
                f"kernel, stride: {kernel} and {stride} were given; give a kernel of 1 to 9, a stride from 1."
            )
        super().__init__(poset, kernel, perm, normalize, constant)
        self.kernel, self.stride, self.ceil = kernel, stride, ceil

    def forward(self, x: Tensor) -> Tensor:
        """Pool a sequence.

        Args:
            x: [batch, channels, length].

        Raises:
            ValueError: it has another number of dimensions.
        """
        if x.dim() != 3:
            raise ValueError(f"x: shape {list(x.shape)} was given; give [batch, channels, length].")
        if self.ceil:
            x = F.pad(x, (0, max(0, self.kernel - x.shape[2], -(x.shape[2] - self.kernel) % self.stride)))
        return self.unit(x.unfold(2, self.kernel, self.stride))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        return {**self._spec(), "kernel": self.kernel, "stride": self.stride, "ceil": self.ceil}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PosetPool1d:
        """The module that `spec` described."""
        return cls(**spec)


class PosetActivation(_PosetUnit):
    """One number of every group of channels: maxout's place, with a poset in that of the maximum.

    Args:
        poset: or what `Poset.of` reads for four points; its points are the channels of a group, side by side.
        dim: of the channels.
        perm: as in `PosetPool2d`, and so are the others.
        normalize: see perm.
        constant: see perm.

    Raises:
        ValueError: the poset is none.
    """

    mixes = ("channels",)

    def __init__(
        self,
        poset: Given = 12,
        dim: int = -1,
        perm: Sequence[int] | None = None,
        normalize: bool = False,
        constant: bool = True,
    ) -> None:
        super().__init__(poset, None, perm, normalize, constant)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate every group of channels.

        Args:
            x: [..., groups * n, ...], to give [..., groups, ...].

        Raises:
            ValueError: the number of channels is no multiple of the poset's points.
        """
        if x.shape[self.dim] % self.poset.n:
            raise ValueError(
                f"x: {x.shape[self.dim]} channels were given; give a multiple of the poset's {self.poset.n} points."
            )
        return self.unit(x.movedim(self.dim, -1).unflatten(-1, (-1, self.poset.n))).movedim(-1, self.dim)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        return {**self._spec(), "dim": self.dim, "points": self.poset.n}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PosetActivation:
        """The module that `spec` described."""
        rest = {name: value for name, value in spec.items() if name != "points"}
        return cls(**{**rest, "poset": Poset.of(spec["poset"], spec["points"])})
