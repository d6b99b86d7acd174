"""The local interaction basis of every layer, and the interactions between neighbouring layers in it.

    G = mean f f^T, W D W^T its eigenvectors;  R = W D^-1/2                     whitened, constant apart
    M = R+ (mean J^T J) R+^T = V L V^T,  J = d (f_(l+1) C_(l+1)) / d f_l        backwards from the last layer
    C = R V L^1/2                                                              importance of a direction: L
    E_ij = mean ( int_0^1 d fhat_i(a fhat) / d fhat_j  fhat_j  da )^2           edges, by integrated gradients

From "The Local Interaction Basis" (2024, arXiv:2405.10928; rules of the reference code, ApolloResearch/rib: basis
"jacobian", edges "squared"). Directions without variance, and without influence on the next layer, are dropped; axes
are singular directions of the Jacobian, scaled by their importance.

When to use it: a small net, or an MLP of a transformer: some hundred units, whose wiring it makes sparse.
Cost: a Jacobian for each row and layer, in float64, or a product with it for each of `sources` random combinations of
its outputs (a mean over them is M); edges one for each point of the integral.
Settled here: `pca` and `neuron` are the baselines, `global` takes the Jacobian to the output at every layer. The last
layer keeps its own axes (`rotate_last` for its principal components).
Left open: attention and norms, so that blocks are not joined through the residual stream; sections are of `sections`,
or callables of your own. The reference's random sources over positions: a section here reads one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from actkit.core.ground.errors import DataError
from actkit.core.ground.progress import track
from actkit.interpretation.lib.sections import Sections

Kind = Literal["lib", "pca", "neuron", "global"]
Integration = Literal["gradient", "trapezoidal", "gauss-legendre"]
CHUNK = 1 << 24  # values of Jacobians held at once


@dataclass(frozen=True, eq=False)
class InteractionBasis:
    """A basis for each node layer. The first direction is the constant, which is not turned.

    Attributes:
        sections: of the network.
        kind: 'lib', 'pca', 'neuron' or 'global'.
        to: float64 [1 + width, 1 + directions] of each layer: fhat = f @ to.
        back: float64 [1 + directions, 1 + width]: f = fhat @ back, but for what was dropped.
        importance: float64 [directions] of each layer; of 'pca' the variances, of 'neuron' and an output that keeps its
            axes the mean squares. It falls, but at such an output.
    """

    sections: Sections
    kind: Kind
    to: tuple[Tensor, ...]
    back: tuple[Tensor, ...]
    importance: tuple[Tensor, ...]

    def strongest(self, layer: int, count: int) -> Tensor:
        """Return the numbers of a layer's most important directions, from 0 without the constant.

        Args:
            layer: its number.
            count: how many, at most.
        """
        return self.importance[layer].sort(descending=True, stable=True).indices[:count]

    def edges(
        self,
        x: Tensor,
        *,
        integration: Integration = "gauss-legendre",
        points: int = 5,
        directions: int | None = None,
        progress: bool = True,
    ) -> list[Tensor]:
        """Measure the interactions of neighbouring layers: [1 + directions of the next, 1 + directions] for each pair.

        Args:
            x: inputs [rows, ...].
            integration: 'gradient' takes the end alone, for which the parts do not add up.
            points: of the integral.
            directions: only between so many of the most important ones of each layer, and the constant; the others'
                edges are 0. None for all.
            progress: show a bar.

        Raises:
            ValueError: an unknown integration, no point, or no direction.
        """
        weights, at = _quadrature(integration, points)
        if directions is not None and directions < 1:
            raise ValueError(f"directions: {directions} was given; give at least 1, or None for all.")
        chosen = [
            torch.cat((torch.zeros(1, dtype=torch.int64), 1 + self.strongest(layer, directions or len(importance))))
            for layer, importance in enumerate(self.importance)
        ]
        found = []
        with torch.no_grad():
            nodes = self.sections.nodes(x)
        for layer in track(range(len(self.sections)), "Edges", len(self.sections), progress):
            before, after = chosen[layer], chosen[layer + 1]
            function, fhat = self._hat(layer, after), nodes[layer] @ self.to[layer]
            total = torch.zeros(len(after), len(before), dtype=torch.float64)
            for part in _parts(fhat, len(after) * fhat.shape[1]):
                mean = torch.zeros(len(part), *total.shape, dtype=torch.float64)
                for weight, alpha in zip(weights, at, strict=True):
                    mean += weight * vmap(jacrev(function))(alpha * part)[:, :, before]
                total += (mean * part[:, None, before]).square().sum(0)
            whole = torch.zeros(self.to[layer + 1].shape[1], self.to[layer].shape[1], dtype=torch.float64)
            whole[after[:, None], before] = total / len(fhat)
            found.append(whole)
        return found

    def _hat(self, layer: int, directions: Tensor) -> Callable[[Tensor], Tensor]:
        """A section in the new coordinates, of one row; some directions of what it gives."""
        function, back, to = self.sections.functions[layer], self.back[layer], self.to[layer + 1][:, directions]
        return lambda fhat: (function((fhat @ back)[None]) @ to)[0]

    def ablated_nodes(self, x: Tensor, layer: int, kept: int) -> Tensor:
        """Return the outputs if only the most important directions of one layer are kept: [rows, outputs].

        Args:
            x: inputs.
            layer: its number.
            kept: directions, without the constant.
        """
        with torch.no_grad():
            nodes = self.sections.nodes(x)[layer]
            chosen = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + self.strongest(layer, kept)))
            return self.sections.rest(nodes @ self.to[layer][:, chosen] @ self.back[layer][chosen], layer)

    def ablated_edges(self, x: Tensor, layer: int, mask: Tensor) -> Tensor:
        """Return the outputs if each direction of the next layer reads its kept edges alone: [rows, outputs].

        Args:
            x: inputs.
            layer: whose edges to the next one are cut.
            mask: bool [1 + directions of the next, 1 + directions]; the constant's edges are always kept.
        """
        kept = mask.clone()
        kept[:, 0] = True
        with torch.no_grad():
            fhat = self.sections.nodes(x)[layer] @ self.to[layer]
            made = torch.empty(len(fhat), len(kept), dtype=torch.float64)
            patterns, owner = kept.unique(dim=0, return_inverse=True)
            for number, pattern in enumerate(patterns):
                nodes = self.sections.functions[layer]((fhat * pattern) @ self.back[layer])
                mine = owner == number
                made[:, mine] = nodes @ self.to[layer + 1][:, mine]
            made[:, 0] = 1.0
            return self.sections.rest(made @ self.back[layer + 1], layer + 1)


def local_interaction_basis(
    sections: Sections,
    x: Tensor,
    *,
    kind: Kind = "lib",
    centre: bool = True,
    truncation: float = 1e-12,
    rotate_last: bool = False,
    sources: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InteractionBasis:
    """Find the basis of each layer.

    Args:
        sections: of the network.
        x: inputs [rows, ...].
        kind: 'lib', or 'global', 'pca', 'neuron' to compare with.
        centre: subtract means, through the constant.
        truncation: directions whose variance, or importance, is below it (relative to the largest) are dropped.
        rotate_last: turn the output to its principal components.
        sources: estimate each row's influence by so many combinations of the next layer's directions with random
            signs, if it has more; None for exact Jacobians. The fewer, the noisier are small importances.
        seed: of the signs.
        progress: show a bar.

    Returns:
        The basis.

    Raises:
        ValueError: an unknown kind, or no source.
        DataError: no direction of a layer is left.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} was given; give one of {', '.join(get_args(Kind))}.")
    if sources is not None and sources < 1:
        raise ValueError(f"sources: {sources} was given; give at least 1, or None for exact Jacobians.")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nodes = sections.nodes(x)
    last = len(sections)
    to: list[Tensor] = [torch.empty(0)] * (last + 1)
    back, importance = list(to), list(to)
    for layer in track(range(last, -1, -1), "Finding the basis", last + 1, progress):
        f = nodes[layer]
        if kind == "neuron" or (layer == last and not rotate_last):
            squares, eye = f[:, 1:].square().mean(0), torch.eye(f.shape[1] - 1, dtype=torch.float64)
            order = torch.arange(len(squares))
            if layer != last:
                order = squares.sort(descending=True, stable=True).indices
            to[layer], back[layer] = _beside_one(eye[:, order]), _beside_one(eye[order])
            importance[layer] = squares[order]
            continue
        values, axes, mean = _principal(f, centre, truncation, sections.names[layer])
        if kind == "pca" or layer == last:
            to[layer], back[layer] = _with_constant(axes, axes.T, mean)
            importance[layer] = values
            continue
        whiten, colour = _with_constant(axes / values.sqrt(), (axes * values.sqrt()).T, mean)
        gram = _influence(sections, f, layer, to, kind == "global", sources, draw)
        seen = (colour @ gram @ colour.T)[1:, 1:]
        strengths, turned = torch.linalg.eigh((seen + seen.T) / 2)
        strengths, turned = strengths.flip(0), turned.flip(1)
        kept = strengths > truncation * strengths[0].clamp(min=1e-300)
        if not bool(kept.any()) or float(strengths[0]) <= 0:
            raise DataError(
                f"x: no direction of {sections.names[layer]} has any influence; give other data or sections."
            )
        strengths, turned = strengths[kept], turned[:, kept]
        importance[layer] = strengths
        to[layer] = whiten @ _beside_one(turned * strengths.sqrt())
        back[layer] = _beside_one((turned / strengths.sqrt()).T) @ colour
    return InteractionBasis(sections, kind, tuple(to), tuple(back), tuple(importance))


def _principal(f: Tensor, centre: bool, truncation: float, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Variances, axes [width, directions] and the mean of a layer, without the constant."""
    x = f[:, 1:]
    mean = x.mean(0) if centre else torch.zeros_like(x[0])
    values, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    values, axes = values.flip(0), axes.flip(1)
    kept = values > truncation * values[0].clamp(min=1e-300)
    if float(values[0]) <= 0 or not bool(kept.any()):
        raise DataError(f"x: {name} is the same for all rows, so that it has no direction; give more, different data.")
    return values[kept], axes[:, kept], mean


def _beside_one(matrix: Tensor) -> Tensor:
    """A matrix with an axis of its own for the constant."""
    return torch.block_diag(torch.ones(1, 1, dtype=matrix.dtype), matrix)


def _with_constant(to: Tensor, back: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Maps there and back of [1, x], where x - mean is turned: linear, as the mean comes through the constant."""
    shift = torch.eye(len(mean) + 1, dtype=torch.float64)
    shift[0, 1:] = -mean
    unshift = shift.clone()
    unshift[0, 1:] = mean
    return shift @ _beside_one(to), _beside_one(back) @ unshift


def _influence(
    sections: Sections,
    f: Tensor,
    layer: int,
    to: Sequence[Tensor],
    whole: bool,
    sources: int | None,
    draw: torch.Generator,
) -> Tensor:
    """The mean of J^T J, [1 + width, 1 + width]: of the next layer in its basis, or of the output."""
    if whole:
        functions, ahead = sections.functions[layer:], to[-1]
    else:
        functions, ahead = sections.functions[layer : layer + 1], to[layer + 1]

    def function(row: Tensor) -> Tensor:
        nodes = row[None]
        for each in functions:
            nodes = each(nodes)
        return (nodes @ ahead)[0]

    def combined(row: Tensor, signs: Tensor) -> Tensor:
        return signs @ function(row)

    outputs = ahead.shape[1]
    exact = sources is None or outputs <= sources
    count = outputs if sources is None or exact else sources
    total = torch.zeros(f.shape[1], f.shape[1], dtype=torch.float64)
    for part in _parts(f, f.shape[1] * count):
        if exact:
            jacobian = vmap(jacrev(function))(part).flatten(0, 1)
        else:
            signs = torch.randint(0, 2, (len(part), count, outputs), generator=draw).double() * 2 - 1
            jacobian = vmap(jacrev(combined))(part, signs).flatten(0, 1) / count**0.5
        total += jacobian.T @ jacobian
    return total / len(f)


def _parts(f: Tensor, size: int) -> Iterator[Tensor]:
    """Rows, so many that their Jacobians fit."""
    yield from f.split(max(1, CHUNK // max(1, size)))


def _quadrature(integration: Integration, points: int) -> tuple[list[float], list[float]]:
    """Weights and places of an integral from 0 to 1."""
    if integration not in get_args(Integration) or points < 1:
        raise ValueError(
            f"integration, points: {integration!r}, {points} were given; give one of "
            f"{', '.join(get_args(Integration))}, and 1 or more."
        )
    if integration == "gradient":
        return [1.0], [1.0]
    if integration == "gauss-legendre":
        at, weights = np.polynomial.legendre.leggauss(points)
        return (weights / 2).tolist(), ((at + 1) / 2).tolist()
    end = 1e-3 / (points + 1)  # the ends themselves may be kinks
    at = np.linspace(end, 1 - end, points + 1)
    weights = np.full(points + 1, 1 / points)
    weights[[0, -1]] /= 2
    return weights.tolist(), at.tolist()
