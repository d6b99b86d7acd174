"""Functions with parameters of their own on each edge, summed over the inputs: what no shared basis can hold.

    y_o = sum_i f(x_i; theta[..., o, i])

The values of all edges are rows x out x in numbers. They are never all there: outputs go through in chunks, and while
gradients are recorded a chunk's values are computed again in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from actkit.core.layers.activations import Activation
from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32

CHUNK = 1 << 22  # values of edges at once
NARROWEST = 1e-3  # a wavelet's width


class EdgeFunctions(nn.Module):
    """Sums functions of edges; subclasses hold parameters [..., out, in] and give `values`.

    Args:
        in_features: channels of x.
        out_features: channels of y.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features, out_features: {in_features} and {out_features} were given; give 1 or more.")
        self.in_features, self.out_features = in_features, out_features

    def edge_parameters(self) -> tuple[Tensor, ...]:
        """The parameters of the edges, each [..., out, in]."""
        raise NotImplementedError

    def values(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The functions of some outputs' edges.

        Args:
            x: [rows, 1, in].
            parameters: as `edge_parameters`, of these outputs alone: [..., some, in].

        Returns:
            [rows, some, in].
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].

        Raises:
            ValueError: the last dimension is another one.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: its last dimension is {x.shape[-1]}; this layer reads {self.in_features} channels there."
            )
        rows = x.reshape(-1, self.in_features)
        some = max(1, min(self.out_features, CHUNK // max(1, rows.numel())))
        chunks = zip(*(each.split(some, -2) for each in self.edge_parameters()), strict=True)
        keep = not torch.is_grad_enabled() or torch.compiler.is_compiling()
        parts = [
            self._summed(rows, *each) if keep else checkpoint(self._summed, rows, *each, use_reentrant=False)
            for each in chunks
        ]
        return torch.cat(parts, -1).view(*x.shape[:-1], self.out_features)

    def _summed(self, rows: Tensor, *parameters: Tensor) -> Tensor:
        return self.values(rows.unsqueeze(1), *parameters).sum(-1)

    def edge(self, out: int, into: int, x: Tensor) -> Tensor:
        """The function of one edge.

        Args:
            out: index of the output channel.
            into: index of the input channel.
            x: [k].

        Returns:
            [k].
        """
        own = (each[..., out : out + 1, into : into + 1] for each in self.edge_parameters())
        return self.values(x.view(-1, 1, 1), *own).flatten()


Shape = Literal["mexican_hat", "morlet", "dog"]


def wavelets(shape: Shape, x: Tensor, weight: Tensor, shift: Tensor, width: Tensor) -> Tensor:
    """Return weight * psi((x - shift) / width), element by element.

    Args:
        shape: of psi, as in `Wavelets`.
        x: of the shape of the others, or one that goes with it.
        weight: of each edge.
        shift: of each edge.
        width: of each edge, kept at 0.001 or more.
    """
    u = (x - shift) / (F.relu(width.abs() - NARROWEST) + NARROWEST)
    bell = torch.exp(-(u**2) / 2)
    if shape == "morlet":
        return weight * torch.cos(5 * u) * bell
    if shape == "dog":
        return weight * -u * bell
    return weight * (2 / (math.sqrt(3) * math.pi**0.25)) * (u**2 - 1) * bell


class Wavelets(KeepsDtype, EdgeFunctions):
    """A wavelet on each edge, w psi((x - shift) / width); the width is kept at 0.001 or more.

        mexican_hat  2 / (sqrt(3) pi^(1/4)) (u^2 - 1) exp(-u^2 / 2)
        morlet       cos(5 u) exp(-u^2 / 2)
        dog          -u exp(-u^2 / 2)

    Args:
        in_features: channels of x.
        out_features: channels of y.
        shape: which of them.
        base: the name of an element-wise function act: adds W act(x); None for none.

    Raises:
        ValueError: an unknown shape or function, or a width of a layer below 1.
    """

    keeps: ClassVar[tuple[str, ...]] = ("weight", "shift", "width")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: Shape = "mexican_hat",
        base: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        if shape not in ("mexican_hat", "morlet", "dog"):
            raise ValueError(f"shape: {shape!r} was given, allowed are mexican_hat, morlet, dog.")
        self.shape: Shape = shape
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.shift = nn.Parameter(torch.zeros(out_features, in_features))
        self.width = nn.Parameter(torch.ones(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, math.sqrt(5))
        self.act = None if base is None else Activation(base)
        self.base = None if base is None else nn.Linear(in_features, out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].
        """
        y = super().forward(at_least_float32(x)).to(x.dtype)
        return y if self.base is None or self.act is None else y + self.base(self.act(x))

    @torch.no_grad()
    def of_outputs(self, index: Tensor, factor: Tensor) -> Wavelets:
        """Return a layer of some of the outputs alone, each times a factor.

        Args:
            index: int64 [some], of the outputs.
            factor: [some].
        """
        made = Wavelets(self.in_features, len(index), self.shape, None if self.act is None else self.act.name).to(
            factor
        )
        made.weight.copy_(self.weight[index] * factor[:, None])
        made.shift.copy_(self.shift[index])
        made.width.copy_(self.width[index])
        if self.base is not None and made.base is not None:
            made.base.weight.copy_(self.base.weight[index] * factor[:, None])
        return made

    def edge_parameters(self) -> tuple[Tensor, ...]:
        return self.weight, self.shift, self.width

    def values(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return wavelets(self.shape, x, *parameters)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        base = None if self.act is None else self.act.name
        widths = {"in_features": self.in_features, "out_features": self.out_features}
        return {**widths, "shape": self.shape, "base": base}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Wavelets:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        layer = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, shape={self.shape!r}"
