"""Neural fields: a grid of learned features and a decoder, which give a value for each point (2025, arXiv:2503.06762).

    field(x) = decoder(e(x)),  e(x) = each level's grid G_l, at u = 2 ((x + 1) mod p_l) / p_l - 1,  p_l = 2 / freq_l

Points lie in the box [-1, 1]^k, k = 1, 2 or 3. A level's grid G_l is read several times along each side, so that a
small grid gives features of high frequency; between its cells values are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground import registry

Mapping = Literal["sawtooth", "triangle", "cosine", "none"]
CHANNELS = (4, 4, 4, 2, 2, 2)
RESOLUTIONS = (32, 51, 70, 89, 108, 128)
FREQUENCIES = (2.0, 3.2, 4.4, 5.6, 6.8, 8.0)
AT_ONCE = 1 << 16  # points, when a whole grid is asked for


class DifGrid(nn.Module):
    """The encoder of DiF-Grid: levels of small grids that repeat, [..., dim] -> [..., sum of channels].

    Args:
        dim: of the points, 1 to 3; the first coordinate runs along a grid's last side.
        channels: of each level.
        resolutions: cells along a side, of each level.
        frequencies: how often a level's grid is read along the box.
        mapping: of a coordinate within its period: `sawtooth` jumps between them, `triangle` goes back and forth,
            `cosine` too, and `none` reads each grid once.

    Raises:
        ValueError: another dim, levels that do not match, sizes below 1, or an unknown mapping.
    """

    def __init__(
        self,
        dim: int = 2,
        channels: Sequence[int] = CHANNELS,
        resolutions: Sequence[int] = RESOLUTIONS,
        frequencies: Sequence[float] = FREQUENCIES,
        mapping: Mapping = "sawtooth",
    ) -> None:
        super().__init__()
        if dim not in (1, 2, 3):
            raise ValueError(f"dim: {dim} was given; give 1, 2 or 3.")
        levels = {len(channels), len(resolutions), len(frequencies)}
        if len(levels) > 1 or levels == {0} or min(*channels, *resolutions, *frequencies) <= 0:
            raise ValueError(
                f"channels, resolutions, frequencies: {list(channels)}, {list(resolutions)} and {list(frequencies)} "
                f"were given; give as many of each, one at least, all above 0."
            )
        if mapping not in ("sawtooth", "triangle", "cosine", "none"):
            raise ValueError(f"mapping: {mapping!r} was given, allowed are sawtooth, triangle, cosine and none.")
        self.dim, self.mapping = dim, mapping
        self.channels, self.resolutions = tuple(channels), tuple(resolutions)
        self.frequencies = tuple(float(each) for each in frequencies)
        sizes = zip(self.channels, self.resolutions, strict=True)
        self.grids = nn.ParameterList(nn.Parameter(torch.randn(c, *[r] * dim)) for c, r in sizes)

    @property
    def width(self) -> int:
        """Channels of the output."""
        return sum(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [..., width].

        Args:
            x: points [..., dim] in [-1, 1].

        Raises:
            ValueError: another last dimension, or points outside of the box.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: its last dimension is {x.shape[-1]}; the points of this grid have {self.dim}.")
        if not torch.compiler.is_compiling() and x.numel() and not float(x.detach().abs().max()) <= 1 + 1e-6:
            raise ValueError(
                f"x: coordinates up to {float(x.detach().abs().max()):.3g} were given; the box is [-1, 1]: scale them."
            )
        points = x.reshape(-1, self.dim)
        levels = zip(self.grids, self.frequencies, strict=True)
        found = [_read(grid, self.within(points, frequency).to(grid.dtype)) for grid, frequency in levels]
        return torch.cat(found, -1).view(*x.shape[:-1], self.width)

    def within(self, x: Tensor, frequency: float) -> Tensor:
        """Where points are in a grid that is read `frequency` times.

        Args:
            x: points [..., dim] in [-1, 1].
            frequency: of the level.

        Returns:
            [..., dim] in [-1, 1].
        """
        turns = (x + 1) * (frequency / 2)  # in periods
        if self.mapping == "sawtooth":
            return 2 * torch.remainder(turns, 1.0) - 1
        if self.mapping == "triangle":
            return 1 - 2 * (torch.remainder(turns, 2.0) - 1).abs()
        return -torch.cos(math.pi * turns) if self.mapping == "cosine" else x

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        levels = {"channels": self.channels, "resolutions": self.resolutions, "frequencies": self.frequencies}
        return {"dim": self.dim, **{name: list(each) for name, each in levels.items()}, "mapping": self.mapping}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, width={self.width}, mapping={self.mapping!r}"


class NeuralField(nn.Module):
    """An encoder and a decoder: points [..., dim] -> values [..., out].

    Args:
        encoder: a grid.
        decoder: from its features to values, such as a `RadialDecoder`.
    """

    def __init__(self, encoder: DifGrid, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] in [-1, 1] -> [..., out]."""
        return self.decoder(self.encoder(x))

    @torch.no_grad()
    def to_grid(self, *sizes: int) -> Tensor:
        """The values at the centres of the cells of a regular grid over the box.

        Args:
            sizes: cells along each side, the last one along the first coordinate; a single one for all sides.

        Returns:
            [*sizes, out].

        Raises:
            ValueError: another number of sizes, or sizes below 1.
        """
        full = sizes * self.encoder.dim if len(sizes) == 1 else sizes
        if len(full) != self.encoder.dim or min(full) < 1:
            raise ValueError(f"sizes: {sizes} were given; give one, or {self.encoder.dim}, each 1 or more.")
        like = self.encoder.grids[0]
        points = cells(*full).to(like).view(-1, self.encoder.dim)
        return torch.cat([self(each) for each in points.split(AT_ONCE)]).view(*full, -1)

    def to_image(self, height: int, width: int) -> Tensor:
        """The image [height, width, channels] in [0, 1] of a field of two coordinates.

        Args:
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: a field of another dimension.
        """
        if self.encoder.dim != 2:
            raise ValueError(f"field: its points have {self.encoder.dim} coordinates; an image needs 2, use to_grid.")
        return self.to_grid(height, width).clamp(0, 1)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        decoder: Any = self.decoder
        made = {"module": registry.module_name(type(decoder)), "spec": decoder.spec()}
        return {"encoder": self.encoder.spec(), "decoder": made}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> NeuralField:
        """The field that `spec` described; its values come from the weights file."""
        decoder = registry.module_class(spec["decoder"]["module"]).from_spec(spec["decoder"]["spec"], None)
        return cls(DifGrid(**spec["encoder"]), decoder)


def cells(*sizes: int) -> Tensor:
    """The centres of the cells of a regular grid over [-1, 1]^k: [*sizes, k], the first coordinate along the last side.

    Args:
        sizes: cells along each side.
    """
    axes = [(torch.arange(size) + 0.5) * (2 / size) - 1 for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)


def _read(grid: Tensor, u: Tensor) -> Tensor:
    """A grid [channels, side ...] at places u [points, dim] in [-1, 1]: [points, channels]."""
    dim = u.shape[-1]
    if dim == 1:  # torch reads two or three sides
        grid, u = grid.unsqueeze(-2), torch.cat((u, torch.zeros_like(u)), -1)
    places = u.view(1, *[1] * (u.shape[-1] - 1), -1, u.shape[-1])
    found = F.grid_sample(grid.unsqueeze(0), places, "bilinear", "border", align_corners=False)
    return found.reshape(grid.shape[0], -1).T
