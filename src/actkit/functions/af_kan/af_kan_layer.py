"""AF-KAN: a KAN layer with about the parameters of a linear layer (2025, arXiv:2503.06112).

    A = pairs of shifted activations of x:  A_im = f(s(x_i - low_m), s(high_m - x_i)),  m = 1 ... grid + order
    A is brought to [0, 1], reduced to one number h_i for each input, and

    y = W s(norm(h))

When to use it: in place of a small MLP or a classifier's head that you train, if features of KANs are wanted at an
MLP's size. It is slower than the MLP, as it forms M = grid + order values for each input.
Cost: 2 M numbers for the grid, a few dozen for the reduction, and the linear layer without bias.
Settled here: the release brings A to [0, 1] by its smallest and largest value over the whole batch, so that what is
predicted depends on the other rows; `scale` does it for each row (`sample`), or by running extremes as a batch norm
does (`running`), and as released for comparison alone (`batch`). The norm by the L2 length before it cancels and is
left out. If all values are equal they become 0. Of several reductions each has a stack of its own (the release means to
have copies, and never passes their names to its layers).
Our own reading: inputs should lie in [0, 1], which the grid covers at first; the paper was known from its abstract, a
summary and the release's code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.layers.activations import Activation
from actkit.core.layers.keeps_dtype import KeepsDtype, check_floats
from actkit.core.univariate.kan_linear import KanLinear
from actkit.core.univariate.shifted_pairs import ShiftedPairs
from actkit.functions.af_kan.reductions import REDUCTIONS

Scale = Literal["sample", "running", "batch", "none"]
Norm = Literal["layer", "batch", "none"]
Join = Literal["sum", "product", "sum_product", "quadratic"]
MOMENTUM = 0.1  # of running extremes


class AfKanLayer(KeepsDtype):
    """One layer: [..., in_features] -> [..., out_features].

    Args:
        in_features: channels of x.
        out_features: channels of y.
        grid: intervals of [0, 1].
        order: how far a pair reaches over its interval.
        act: the name of the element-wise function s.
        combine: how a pair is combined, one of `COMBINATIONS`.
        reduce: one of `REDUCTIONS`.
        norm: of the reduced features.
        scale: by what the values are brought to [0, 1].
        train_grid: whether the grid is learned.

    Raises:
        ValueError: a width, grid or order out of bounds, or an unknown name.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int = 3,
        order: int = 3,
        act: str = "silu",
        combine: str = "quad1",
        reduce: str = "global_attn",
        norm: Norm = "layer",
        scale: Scale = "sample",
        train_grid: bool = True,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features, out_features: {in_features} and {out_features} were given; give 1 or more.")
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce: {reduce!r} was given, allowed are {', '.join(REDUCTIONS)}.")
        if norm not in ("layer", "batch", "none"):
            raise ValueError(f"norm: {norm!r} was given, allowed are 'layer', 'batch' and 'none'.")
        if scale not in ("sample", "running", "batch", "none"):
            raise ValueError(f"scale: {scale!r} was given, allowed are 'sample', 'running', 'batch' and 'none'.")
        self.in_features, self.out_features = in_features, out_features
        self.reduce, self.norm, self.scale = reduce, norm, scale
        self.basis = ShiftedPairs(grid, order, act, combine, train_grid=train_grid)
        self.reduction = REDUCTIONS[reduce](in_features, self.basis.size)
        kinds = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.normed = kinds[norm](in_features) if norm in kinds else nn.Identity()
        self.act = Activation(act)
        self.coefficients = nn.Linear(in_features, out_features, bias=False)
        self.noticed = False  # whether inputs were looked at
        if scale == "running":
            self.register_buffer("low", torch.zeros(()))
            self.register_buffer("high", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].

        Raises:
            ValueError: the last dimension is another one.
        """
        h = self.reduction(self.features(x))
        if self.norm == "batch":
            h = self.normed(h.reshape(-1, self.in_features)).view(h.shape)
        else:
            h = self.normed(h)
        return self.coefficients(self.act(h))

    def features(self, x: Tensor) -> Tensor:
        """Return the values before they are reduced: [..., in_features, grid + order].

        Args:
            x: [..., in_features].

        Raises:
            ValueError: the last dimension is another one.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: its last dimension is {x.shape[-1]}; this layer reads {self.in_features} channels there."
            )
        check_floats(x)
        values = self.basis(x)
        if self.scale == "none" or not values.numel():
            return values
        low, high = self._extremes(values)
        self._notice(low, high)
        return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)

    def _notice(self, low: Tensor, high: Tensor) -> None:
        """Warn if samples have nothing between their extremes; of the first inputs alone."""
        if self.noticed or low.is_meta or torch.compiler.is_compiling():
            return
        self.noticed = True
        same = float((high == low).float().mean())
        if same:
            warnings.warn(
                f"x: {same:.0%} of the samples give one value in all features, which has no extremes to be scaled by, "
                f"and becomes 0; scale the inputs into the grid, or take scale='none'. This is said once.",
                stacklevel=2,
            )

    def _extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale == "sample":
            return values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
        if self.scale == "running" and not self.training:
            return self.low.to(values.dtype), self.high.to(values.dtype)
        low, high = values.amin(), values.amax()
        if self.scale == "running":
            self._remember(low.detach(), high.detach())
        return low, high

    @torch.no_grad()
    def _remember(self, low: Tensor, high: Tensor) -> None:
        for buffer, now in ((self.low, low), (self.high, high)):
            buffer.lerp_(now.to(buffer.dtype), MOMENTUM)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        names = ("in_features", "out_features", "reduce", "norm", "scale")
        found = {name: getattr(self, name) for name in names}
        basis = self.basis.settings()
        return {**found, **{name: basis[name] for name in ("grid", "order", "act", "combine", "train_grid")}}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> AfKanLayer:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        layer = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale!r}"


class AfKanNetwork(nn.Module):
    """A stack of AF-KAN layers; with several reductions a stack for each, whose outputs are joined.

    Args:
        widths: of the input, hidden layers and output.
        reductions: one or more of `REDUCTIONS`.
        join: `quadratic` is the sum, the product and the sum of squares together.
        settings: of every layer, as in `AfKanLayer`.

    Raises:
        ValueError: fewer than two widths, no reduction, an unknown way to join, or what the layers refuse.
    """

    def __init__(
        self, widths: Sequence[int], reductions: Sequence[str] = ("global_attn",), join: Join = "sum", **settings: Any
    ) -> None:
        super().__init__()
        if len(widths) < 2 or not reductions:
            raise ValueError(
                f"widths, reductions: {list(widths)} and {list(reductions)} were given; give two widths and one "
                f"reduction at least."
            )
        if join not in ("sum", "product", "sum_product", "quadratic"):
            raise ValueError(f"join: {join!r} was given, allowed are 'sum', 'product', 'sum_product' and 'quadratic'.")
        self.join = join
        pairs = list(pairwise(widths))
        self.stacks = nn.ModuleList(
            nn.Sequential(*(AfKanLayer(*pair, reduce=reduce, **settings) for pair in pairs)) for reduce in reductions
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., widths[0]] -> [..., widths[-1]]."""
        if len(self.stacks) == 1:
            return self.stacks[0](x)
        found = torch.stack([stack(x) for stack in self.stacks])
        total, product = found.sum(0), found.prod(0)
        joined = {"sum": total, "product": product, "sum_product": total + product}
        return joined[self.join] if self.join in joined else total + product + (found**2).sum(0)


def relu_kan_layer(
    in_features: int, out_features: int, grid: int = 3, order: int = 3, *, norm: bool = True, train_grid: bool = True
) -> KanLinear:
    """Make a layer of ReLU-KAN (2024, arXiv:2406.02075): pairs with ReLU, a grid for each input, and no reduction.

    Args:
        in_features: channels of x.
        out_features: channels of y.
        grid: intervals of [0, 1].
        order: how far a pair reaches over its interval.
        norm: a LayerNorm before it, as in the release that AF-KAN is compared in.
        train_grid: whether the grid is learned.

    Returns:
        The layer.
    """
    peak = 4 * grid**2 / (order + 1) ** 2
    basis = ShiftedPairs(grid, order, "relu", "quad1", in_features, train_grid, peak**2)
    return KanLinear(in_features, out_features, basis, norm=norm)
