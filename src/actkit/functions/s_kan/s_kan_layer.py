"""S-KAN: each node of a layer chooses its basis from a pool in training, the rest goes (2024, arXiv:2408.08338).

    y_j = a_j sum over k of s_jk Phi^k_j(x) / size_jk,   s_j = softmax(g_j / temperature)

Phi^k is a KAN layer in basis k (`pool.py`), size_jk a running root mean square of what it gives, so that no basis is
chosen for being loud, a_j a gain of the node. In the selective phase a penalty on the entropy of s and a falling
temperature make each node decide (`choose_basis`); near its end only the basis with the largest s counts, with the
gradient of all (straight-through). What is left then are layers of one basis each, for the nodes that chose it, with s,
size and gain folded into their coefficients: they compute the same.
When to use it: for a KAN without a search for the basis by hand.
Cost: K layers while it chooses, one afterwards; with edges that choose twice as much, as sizes are those of whole
branches.
Our own reading: all of the gating, as only the abstract and two summaries of the paper were known: softmax gates, the
running size and the gain, the phases and their lengths. They speak of a weighted combination for each node, and of full
training, selective training and pruning.
Settled here: choosing by node, by layer or by edge (then s has a row for each edge, and what is left is in `edges.py`).
Convolutions unfold the image and apply a layer to each patch, as the authors' wrapper does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from actkit.core.layers.keeps_dtype import KeepsDtype, check_floats
from actkit.functions.s_kan.edges import PrunedEdges, scaled
from actkit.functions.s_kan.pool import POOL, Branch, check_pool

Select = Literal["node", "layer", "edge"]
POOLED = ("bspline", "cheby", "wavelet", "rbf")
MOMENTUM, SMALLEST = 0.1, 1e-6  # of the running size


class SKanLayer(KeepsDtype):
    """A layer that chooses: [..., in_features] -> [..., out_features].

    Args:
        in_features: channels of x.
        out_features: nodes.
        pool: names of bases.
        select: whether each node chooses, or each edge, or the layer for all.

    Raises:
        ValueError: an empty pool, a name twice, an unknown one, or another `select`.
    """

    keeps: ClassVar[tuple[str, ...]] = ("gates", "gain")
    sizes: Tensor
    seen: Tensor
    temperature: Tensor
    hard: Tensor

    def __init__(
        self, in_features: int, out_features: int, pool: Sequence[str] = POOLED, select: Select = "node"
    ) -> None:
        super().__init__()
        check_pool(tuple(pool))
        if select not in ("node", "layer", "edge"):
            raise ValueError(f"select: {select!r} was given, allowed are 'node', 'layer' and 'edge'.")
        self.in_features, self.out_features = in_features, out_features
        self.pool, self.select = tuple(pool), select
        self.branches = nn.ModuleDict({name: POOL[name](in_features, out_features) for name in self.pool})
        choosers = {"node": (out_features,), "layer": (1,), "edge": (out_features, in_features)}[select]
        self.gates = nn.Parameter(torch.zeros(*choosers, len(self.pool)))
        self.gain = nn.Parameter(torch.ones(out_features))
        self.register_buffer("sizes", torch.ones(out_features, len(self.pool)))
        self.register_buffer("seen", torch.zeros(()))  # 1 once sizes were measured
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("hard", torch.zeros(()))  # 1 if only the largest counts

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].
        """
        check_floats(x)
        if self.select == "edge":
            return self._of_edges(x)
        found = self._whole(x)
        if self.training:
            self._measure(found.detach())
        return (found * self.factors().to(found.dtype)).sum(-1)

    def _whole(self, x: Tensor) -> Tensor:
        """What each branch gives by itself: [..., out, K]."""
        return torch.stack([branch(x) for branch in self.branches.values()], -1)

    def _of_edges(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self._measure(self._whole(x))
        factors = self.factors().unbind(-1)  # [out, in] for each basis
        branches = [cast(Branch, branch) for branch in self.branches.values()]
        parts = [functional_call(branch, scaled(branch, f), (x,)) for branch, f in zip(branches, factors, strict=True)]
        return sum(parts[1:], parts[0])

    def shares(self) -> Tensor:
        """s [out_features, K], of edges [out, in, K]: rows sum to 1, and hold a single 1 if only the largest counts."""
        soft = (self.gates / self.temperature).softmax(-1)
        largest = F.one_hot(soft.argmax(-1), len(self.pool)).to(soft.dtype)
        chosen = torch.where(self.hard > 0, largest + soft - soft.detach(), soft)
        return chosen if self.select == "edge" else chosen.expand(self.out_features, -1)

    def factors(self) -> Tensor:
        """What each branch's outputs, or edges, are multiplied by: [out_features, K], or [out, in, K]."""
        scale = self.gain[:, None] / self.sizes.clamp(min=SMALLEST)
        return (scale[:, None] if self.select == "edge" else scale) * self.shares()

    def gate_entropy(self) -> Tensor:
        """The mean entropy of s over the nodes or edges, in nats."""
        soft = (self.gates / self.temperature).softmax(-1)
        return -(soft * soft.clamp(min=1e-12).log()).sum(-1).mean()

    def selection(self) -> list[str]:
        """The basis with the largest share, for each node, or for each edge, node by node."""
        largest = self.gates.argmax(-1)
        every = largest.flatten() if self.select == "edge" else largest.expand(self.out_features)
        return [self.pool[index] for index in every.tolist()]

    def pruned(self) -> PrunedLayer | PrunedEdges:
        """Return the layer in which each node, or edge, has its basis alone.

        Raises:
            ValueError: the nodes have not chosen: all branches still count.
        """
        if not float(self.hard):
            shares = self.shares().detach().amax(-1)
            raise ValueError(
                f"hard: the nodes have not chosen, and the largest shares are {float(shares.min()):.2f} to "
                f"{float(shares.max()):.2f}; train under the rule choose_basis to its end, or set hard to 1."
            )
        if self.select == "edge":
            return self._pruned_edges()
        chosen = self.selection()
        factors = (self.gain[:, None] / self.sizes.clamp(min=SMALLEST)).detach()
        made: dict[str, Branch] = {}
        nodes: dict[str, list[int]] = {}
        for number, name in enumerate(self.pool):
            own = [node for node, each in enumerate(chosen) if each == name]
            if own:
                index = torch.tensor(own, device=factors.device)
                branch = cast(Branch, self.branches[name])
                made[name], nodes[name] = branch.of_outputs(index, factors[index, number]), own
        return PrunedLayer(self.in_features, self.out_features, nodes, made).train(self.training)

    @torch.no_grad()
    def _pruned_edges(self) -> PrunedEdges:
        """The same of edges: s, size and gain go into the coefficients, and the edges of other bases go."""
        factors, largest = self.factors(), self.gates.argmax(-1)
        made: dict[str, Branch] = {}
        edges: dict[str, list[list[int]]] = {}
        for number, name in enumerate(self.pool):
            own = (largest == number).nonzero().tolist()
            if own:
                branch = copy.deepcopy(cast(Branch, self.branches[name]))
                for key, value in scaled(branch, factors[..., number]).items():
                    branch.get_parameter(key).copy_(value)
                made[name], edges[name] = branch, own
        return PrunedEdges(self.in_features, self.out_features, edges, made).train(self.training)

    @torch.no_grad()
    def _measure(self, found: Tensor) -> None:
        """The running root mean square of each branch's outputs [..., out, K]."""
        flat = found.reshape(-1, *found.shape[-2:])
        if not len(flat):
            return
        now = flat.float().square().mean(0).sqrt().to(self.sizes.dtype)
        self.sizes.copy_(torch.where(self.seen > 0, self.sizes.lerp(now, MOMENTUM), now))
        self.seen.fill_(1.0)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        widths = {"in_features": self.in_features, "out_features": self.out_features}
        return {**widths, "pool": list(self.pool), "select": self.select}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> SKanLayer:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        layer = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, select={self.select!r}"


class PrunedLayer(nn.Module):
    """What an S-KAN layer became: layers of one basis each, of which each computes its nodes alone.

    Args:
        in_features: channels of x.
        out_features: nodes.
        nodes: by basis, the nodes that chose it.
        branches: by basis; None for new ones.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nodes: dict[str, list[int]],
        branches: dict[str, Branch] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.nodes = in_features, out_features, nodes
        made = branches or {name: POOL[name](in_features, len(own)) for name, own in nodes.items()}
        self.branches = nn.ModuleDict(made)
        found = torch.tensor([node for own in nodes.values() for node in own])
        self.register_buffer("order", found.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features].

        Args:
            x: [..., in_features].
        """
        parts = [branch(x) for branch in self.branches.values()]
        return torch.cat(parts, -1).index_select(-1, self.order)

    def selection(self) -> list[str]:
        """The basis of each node."""
        found = {node: name for name, own in self.nodes.items() for node in own}
        return [found[node] for node in range(self.out_features)]

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        nodes = {name: list(own) for name, own in self.nodes.items()}
        return {"in_features": self.in_features, "out_features": self.out_features, "nodes": nodes}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PrunedLayer:
        """The layer that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        layer = cls(**spec)
        like = None if original is None else next(original.parameters(), None)
        return layer if like is None else layer.to(like.dtype)


class SConvKan2d(nn.Module):
    """An S-KAN layer on every patch of an image: [batch, in, height, width] -> [batch, out, height', width'].

    Args:
        in_channels: of the image.
        out_channels: nodes.
        kernel: height and width of a patch.
        stride: from patch to patch.
        padding: zeros around the image.
        settings: of the layer.

    Raises:
        ValueError: a size out of bounds, or what the layer refuses.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, **settings: Any
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, kernel, stride) < 1 or padding < 0:
            raise ValueError(
                f"in_channels, out_channels, kernel, stride, padding: {in_channels}, {out_channels}, {kernel}, "
                f"{stride} and {padding} were given; give 1 or more, and a padding of 0 or more."
            )
        self.in_channels, self.kernel, self.stride, self.padding = in_channels, kernel, stride, padding
        self.layer: nn.Module = SKanLayer(in_channels * kernel**2, out_channels, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image of the nodes.

        Args:
            x: [batch, in_channels, height, width].

        Raises:
            ValueError: another number of dimensions or channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: {tuple(x.shape)} was given; give [batch, {self.in_channels}, height, width].")
        height, width = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in x.shape[2:])
        patches = F.unfold(x, self.kernel, padding=self.padding, stride=self.stride).transpose(1, 2)
        return self.layer(patches).transpose(1, 2).unflatten(-1, (height, width))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"


def choosing(model: nn.Module) -> dict[str, SKanLayer]:
    """The layers of a model that choose, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SKanLayer)}
