"""QKAN and HQKAN: networks of learned one-qubit functions (2025, arXiv:2509.14026).

QKAN    a stack of QKAN layers
HQKAN   last(qkan(first(x))),   first: d_in -> scale ceil(log2 d_in),  last: scale ceil(log2 d_out) -> d_out
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from actkit.core.univariate.bases import BSplines
from actkit.core.univariate.kan_linear import KanLinear
from actkit.functions.qkan.circuit import Spectrum
from actkit.functions.qkan.qkan_layer import QkanLayer

SAMPLES = 100  # of an edge, for splines to be fitted to
STEADY = 0.1  # added to the spread of what an edge reads


class Qkan(nn.Module):
    """A stack of QKAN layers: [..., widths[0]] -> [..., widths[-1]].

    Args:
        widths: of the input, hidden layers and output.
        settings: of every layer, as in `QkanLayer`.

    Raises:
        ValueError: fewer than two widths, or what the layers refuse.
    """

    def __init__(self, widths: Sequence[int], **settings: Any) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: {list(widths)} was given; give those of input and output at least.")
        self.layers = nn.ModuleList(QkanLayer(*pair, **settings) for pair in pairwise(widths))

    @classmethod
    def of(cls, layers: Sequence[QkanLayer]) -> Qkan:
        """A network of layers that there are.

        Args:
            layers: each reads what the one before gives.

        Returns:
            The network, with these layers and not copies of them.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.layers = nn.ModuleList(layers)
        return made

    @property
    def widths(self) -> list[int]:
        """Of the input, hidden layers and output."""
        return [self._layer(0).in_features, *(cast(QkanLayer, layer).out_features for layer in self.layers)]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., widths[0]] -> [..., widths[-1]]."""
        for layer in self.layers:
            x = layer(x)
        return x

    def extended(self, reps: int) -> Qkan:
        """Return a network with more repetitions in each layer that computes the same.

        Args:
            reps: at least those that it has.

        Returns:
            The network.

        Raises:
            ValueError: fewer repetitions, or an ansatz whose new gates would change the function.
        """
        return Qkan.of([cast(QkanLayer, layer).extended(reps) for layer in self.layers])

    @torch.no_grad()
    def edge_function(self, layer: int, out: int, into: int, x: Tensor) -> Tensor:
        """The function of one edge, with its share of SiLU.

        Args:
            layer: its number, from 0.
            out: index of the node that it leads to.
            into: index of the node that it comes from.
            x: [k].

        Returns:
            [k].
        """
        return self._layer(layer).edge(out, into, x)

    def spectrum(self, layer: int, out: int, into: int) -> Spectrum:
        """The function of one edge as a sum of cosines, without its share of SiLU.

        Args:
            layer: its number, from 0.
            out: index of the node that it leads to.
            into: index of the node that it comes from.

        Returns:
            Its frequencies with amplitudes.

        Raises:
            ValueError: `px` or the fast measure, which are no such sum, or too many repetitions.
        """
        return self._layer(layer).spectrum(out, into)

    @torch.no_grad()
    def to_kan(self, x: Tensor, grid: int = 5, order: int = 3) -> nn.Sequential:
        """Return a KAN of B-splines that are fitted to the edges.

        Args:
            x: inputs [..., widths[0]]; the splines of each layer reach over what its nodes see of them.
            grid: intervals of that range.
            order: degree of the pieces.

        Returns:
            `KanLinear`s, to be trained on.

        Raises:
            ValueError: no inputs, or a layer whose inputs are all equal.
        """
        made: list[nn.Module] = []
        rows = x.reshape(-1, x.shape[-1])
        for number, module in enumerate(self.layers):
            layer = cast(QkanLayer, module)
            low, high = (float(each) for each in rows.aminmax()) if rows.numel() else (0.0, 0.0)
            if not low < high:
                raise ValueError(
                    f"x: layer {number} is given values from {low:.3g} to {high:.3g}; give inputs that differ, as the "
                    f"splines must have a range."
                )
            basis = BSplines(grid, order, (low, high))
            points = torch.linspace(low, high, SAMPLES, dtype=torch.float64, device=rows.device)
            columns = points[:, None].expand(-1, layer.in_features)
            targets = layer.values(columns[:, None], *layer.edge_parameters()).flatten(1)  # [samples, out * in]
            matrix = basis(points[:, None]).squeeze(-2)
            fitted = torch.linalg.lstsq(matrix.cpu(), targets.cpu(), driver="gelsd").solution  # [size, out * in]
            spline = KanLinear(layer.in_features, layer.out_features, basis, base="silu")
            spline.coefficients.weight.copy_(fitted.T.reshape(layer.out_features, -1))
            cast(nn.Parameter, spline.coefficients.bias).copy_(layer.rest)
            cast(nn.Linear, spline.base).weight.copy_(layer.base * layer.mask)
            made.append(spline.to(rows))
            rows = layer(rows)
        return nn.Sequential(*made)

    def scores(self, x: Tensor) -> list[Tensor]:
        """How much each edge does: the spread of what it gives over that of what it reads, [out, in] for each layer.

        Args:
            x: inputs [..., widths[0]].

        Returns:
            standard deviation of the output / (standard deviation of the input + 0.1).
        """
        rows, found = x.reshape(-1, x.shape[-1]), []
        for module in self.layers:
            layer = cast(QkanLayer, module)
            given = layer.edges(rows)
            found.append(given.std(0, correction=0) / (rows.std(0, correction=0) + STEADY))
            rows = given.sum(-1) + layer.rest
        return found

    def penalty(self, x: Tensor, weight: float = 1.0, entropy: float = 2.0) -> Tensor:
        """What a training that is to be pruned adds to its loss: few edges that do much, as in pykan.

        Args:
            x: inputs [..., widths[0]].
            weight: of the sum of scores.
            entropy: of the entropy of their shares, in bits.

        Returns:
            A number.
        """
        total = x.new_zeros(())
        for scores in self.scores(x):
            shares = scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)
            total = total + weight * scores.sum() - entropy * (shares * torch.log2(shares + 1e-4)).sum()
        return total

    @torch.no_grad()
    def pruned(self, x: Tensor, edges: float = 3e-2, nodes: float = 1e-2) -> Qkan:
        """Return a network without hidden nodes and edges that do little; what they gave on average stays.

        Args:
            x: inputs [..., widths[0]] that say what an edge does.
            edges: an edge with a smaller score gives 0 from now on, whatever is learned.
            nodes: a hidden node is removed unless an edge to it and one from it have at least this score.

        Returns:
            The network.

        Raises:
            ValueError: no inputs, or nothing would be left of a layer.
        """
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            raise ValueError("x: no inputs were given; give some that the scores of edges can be found on.")
        scores = self.scores(rows)
        alive = [torch.ones(self.widths[0], dtype=torch.bool, device=rows.device)]
        for into, out in pairwise(scores):
            alive.append((into.amax(1) >= nodes) & (out.amax(0) >= nodes))
        alive.append(torch.ones(self.widths[-1], dtype=torch.bool, device=rows.device))
        made = []
        for number, (module, score) in enumerate(zip(self.layers, scores, strict=True)):
            layer = cast(QkanLayer, module)
            kept = (score >= edges) & alive[number] & alive[number + 1][:, None]
            if not bool(kept.any()):
                raise ValueError(
                    f"edges, nodes: {edges} and {nodes} were given, which leaves nothing of layer {number}, whose "
                    f"largest score is {float(score.max()):.3g}; give smaller ones."
                )
            given = layer.edges(rows).mean(0)  # [out, in]
            outputs, inputs = alive[number + 1].nonzero().flatten(), alive[number].nonzero().flatten()
            left = layer.of_edges(outputs, inputs)
            left.mask.mul_(kept[outputs][:, inputs])
            left.rest.add_((given * ~kept).sum(-1)[outputs])
            made.append(left)
            rows = layer(rows)
        return Qkan.of(made)

    def _layer(self, number: int) -> QkanLayer:
        return cast(QkanLayer, self.layers[number])


class Hqkan(nn.Module):
    """A small QKAN between two linear layers, in place of an MLP or a head: [..., d_in] -> [..., d_out].

    Args:
        in_features: channels of x.
        out_features: channels of y.
        latent: what the QKAN reads and gives; None for scale ceil(log2) of the channels.
        scale: of these widths.
        reps: how often a qubit reads its input.
        settings: of the QKAN layer.

    Raises:
        ValueError: a width or scale below 1, or what the layer refuses.
    """

    linear_inputs: ClassVar[tuple[tuple[str | None, tuple[str, ...]], ...]] = ((None, ("first",)), (None, ("last",)))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        latent: tuple[int, int] | None = None,
        scale: int = 1,
        reps: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, scale, *(latent or (1,))) < 1:
            raise ValueError(
                f"in_features, out_features, latent, scale: {in_features}, {out_features}, {latent} and {scale} were "
                f"given; give 1 or more."
            )
        inner = latent or (scale * _bits(in_features), scale * _bits(out_features))
        self.settings = settings
        self.first = nn.Linear(in_features, inner[0])
        self.qkan = QkanLayer(*inner, reps, **settings)
        self.last = nn.Linear(inner[1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.last(self.qkan(self.first(x)))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {
            "in_features": self.first.in_features,
            "out_features": self.last.out_features,
            "latent": [self.qkan.in_features, self.qkan.out_features],
            "reps": self.qkan.circuit.reps,
            "settings": {**self.settings, "trainable": list(self.qkan.trainable)},
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Hqkan:
        """The module that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        widths = spec["in_features"], spec["out_features"], tuple(spec["latent"])
        made = cls(*widths, reps=spec["reps"], **spec["settings"])
        like = None if original is None else next(original.parameters(), None)
        return made if like is None else made.to(like.dtype)


def _bits(channels: int) -> int:
    """ceil(log2), and 1 at least."""
    return max(1, math.ceil(math.log2(channels)))
