"""S-KAN whose edges choose: one basis at some of the edges alone (2024, arXiv:2408.08338).

    y_j = sum over the edges (j, i) that chose the basis of phi_ji(x_i)

Of these edges the coefficients are kept, [edges, size], and nothing of the others.
When to use it: `SKanLayer.pruned` makes it of a layer with select="edge".
Cost: for each basis that some edge chose, the product of a dense layer in which the other edges are zeros.
Our own reading: the paper speaks of nodes. A bias, which no edge owns, goes with the share of a node's edges.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32
from actkit.core.univariate.edge_functions import Wavelets, wavelets
from actkit.core.univariate.kan_linear import KanLinear
from actkit.functions.s_kan.pool import POOL, Branch


def scaled(branch: Branch, factor: Tensor) -> dict[str, Tensor]:
    """Return a branch's parameters, by name, with each edge's times a factor.

    Args:
        branch: of the pool.
        factor: [out_features, in_features].
    """
    if isinstance(branch, Wavelets):
        pairs: dict[str, tuple[Tensor, Tensor]] = {"weight": (branch.weight, factor)}
    else:
        weight, bias = branch.coefficients.weight, branch.coefficients.bias
        size = weight.shape[1] // factor.shape[1]
        pairs = {"coefficients.weight": (weight, factor.repeat_interleave(size, 1))}
        if bias is not None:
            pairs["coefficients.bias"] = (bias, factor.mean(1))
    if branch.base is not None:
        pairs["base.weight"] = (branch.base.weight, factor)
    return {name: (value * own).to(value.dtype) for name, (value, own) in pairs.items()}  # factors are float32


class KanEdges(nn.Module):
    """A basis that the edges share, at some of them: [..., in_features] -> [..., out_features].

    Args:
        branch: at all edges; its basis and its norm are taken over, and the coefficients of these edges.
        rows: int64 [edges], the node of each.
        columns: int64 [edges], the channel of each.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, branch: KanLinear, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.shape = (branch.out_features, branch.in_features)
        self.basis, self.norm, self.act = branch.basis, branch.norm, branch.act
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        weight, bias = branch.coefficients.weight.view(*self.shape, -1), branch.coefficients.bias
        self.coefficients = nn.Parameter(weight[rows, columns].detach())  # [edges, size]
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.base = None if branch.base is None else nn.Parameter(branch.base.weight[rows, columns].detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].
        """
        given = x if self.norm is None else self.norm(x)
        self.basis.notice(given)
        y = F.linear(self.basis(given).flatten(-2), self._dense(self.coefficients).flatten(1), self.bias)
        return y if self.base is None or self.act is None else y + F.linear(self.act(x), self._dense(self.base))

    def _dense(self, values: Tensor) -> Tensor:
        """Values of the edges [edges, ...] among zeros: [out, in, ...]."""
        return values.new_zeros(*self.shape, *values.shape[1:]).index_put((self.rows, self.columns), values)


class WaveletEdges(KeepsDtype):
    """Wavelets at some of the edges: [..., in_features] -> [..., out_features].

    Args:
        branch: at all edges.
        rows: int64 [edges], the node of each.
        columns: int64 [edges], the channel of each.
    """

    keeps: ClassVar[tuple[str, ...]] = ("weight", "shift", "width")
    rows: Tensor
    columns: Tensor

    def __init__(self, branch: Wavelets, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.out_features, self.form, self.act = branch.out_features, branch.shape, branch.act
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.weight, self.shift, self.width = (  # [edges]
            nn.Parameter(each[rows, columns].detach()) for each in (branch.weight, branch.shift, branch.width)
        )
        self.base = None if branch.base is None else nn.Parameter(branch.base.weight[rows, columns].detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].
        """
        wide = at_least_float32(x)[..., self.columns]  # [..., edges]
        y = self._summed(wavelets(self.form, wide, self.weight, self.shift, self.width)).to(x.dtype)
        if self.base is None or self.act is None:
            return y
        return y + self._summed(self.act(x)[..., self.columns] * self.base)

    def _summed(self, values: Tensor) -> Tensor:
        """Values of the edges [..., edges], added up for each node: [..., out]."""
        return values.new_zeros(*values.shape[:-1], self.out_features).index_add(-1, self.rows, values)


class PrunedEdges(nn.Module):
    """What an S-KAN layer whose edges chose became: each edge has the function of its own basis.

    Args:
        in_features: channels of x.
        out_features: nodes.
        edges: by basis, (node, channel) of each edge that chose it.
        branches: by basis, at all edges; None for new ones.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        edges: dict[str, list[list[int]]],
        branches: dict[str, Branch] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.edges = in_features, out_features, edges
        made = branches or {name: POOL[name](in_features, out_features) for name in edges}
        self.branches = nn.ModuleDict({name: _some(made[name], own) for name, own in edges.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].
        """
        first, *others = (branch(x) for branch in self.branches.values())
        return sum(others, first)

    def selection(self) -> list[str]:
        """The basis of each edge, node by node."""
        found = {tuple(edge): name for name, own in self.edges.items() for edge in own}
        return [found[node, channel] for node in range(self.out_features) for channel in range(self.in_features)]

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"in_features": self.in_features, "out_features": self.out_features, "edges": self.edges}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PrunedEdges:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        layer = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.dtype)


def _some(branch: Branch, edges: list[list[int]]) -> nn.Module:
    device = next(branch.parameters()).device
    rows, columns = (torch.tensor([edge[side] for edge in edges], device=device) for side in (0, 1))
    if isinstance(branch, Wavelets):
        return WaveletEdges(branch, rows, columns)
    return KanEdges(branch, rows, columns)
