"""What the edges of a basis say: how few are needed, and which directions go together.

    fewest edges: the largest k of a pair of layers whose accuracy is within a tolerance, found by halving
    modules: communities of the graph of all layers, weights log10(E / smallest edge that is needed), not below 0

Modules are those of networkx (Louvain; the paper's code takes Leiden). Edges from the constant are always there and
never counted. Paper: The Local Interaction Basis (2024, arXiv:2405.10928).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actkit.core.ground.errors import DataError
from actkit.interpretation.lib.basis import InteractionBasis

Node = tuple[int, int]  # layer, direction (from 0, without the constant)


def accuracy(labels: Tensor) -> Callable[[Tensor], float]:
    """A score of outputs [rows, classes]: the share of labels found.

    Args:
        labels: [rows].
    """
    return lambda outputs: float((outputs.argmax(-1) == labels).double().mean())


def strongest(edges: Tensor, count: int) -> Tensor:
    """Mark the strongest edges of a pair of layers: bool of the same shape; the constant's are not counted.

    Args:
        edges: [1 + directions of the next, 1 + directions].
        count: how many.
    """
    inner = edges[1:, 1:]
    mask = torch.zeros_like(edges, dtype=torch.bool)
    order = inner.flatten().sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros(inner.numel(), dtype=torch.bool)
    chosen[order] = True
    mask[1:, 1:] = chosen.view_as(inner)
    return mask


def fewest_edges(
    basis: InteractionBasis,
    edges: Tensor,
    layer: int,
    x: Tensor,
    score: Callable[[Tensor], float],
    tolerance: float,
) -> int:
    """Return how many of the strongest edges keep the score.

    Args:
        basis: of the network.
        edges: of this pair, from `InteractionBasis.edges`.
        layer: its number.
        x: held-out inputs.
        score: of outputs, the higher the better.
        tolerance: how far the score may fall below that of the network.

    Raises:
        DataError: it is not kept with all edges: too much of the basis was dropped.
    """
    with torch.no_grad():
        wanted = score(basis.sections.nodes(x)[-1][:, 1:]) - tolerance
    low, high = -1, edges[1:, 1:].numel()
    if score(basis.ablated_edges(x, layer, strongest(edges, high))) < wanted:
        raise DataError("edges: even with all of them the score is not kept; give a smaller truncation.")
    while high - low > 1:
        middle = (low + high) // 2
        kept = score(basis.ablated_edges(x, layer, strongest(edges, middle))) >= wanted
        low, high = (low, middle) if kept else (middle, high)
    return high


def node_curve(
    basis: InteractionBasis, layer: int, x: Tensor, score: Callable[[Tensor], float], kept: Sequence[int]
) -> dict[int, float]:
    """Return the score if only so many directions of a layer are kept.

    Args:
        basis: of the network.
        layer: its number.
        x: inputs.
        score: of outputs.
        kept: numbers of directions.
    """
    return {count: score(basis.ablated_nodes(x, layer, count)) for count in kept}


@dataclass(frozen=True)
class Modules:
    """Communities of the interaction graph.

    Attributes:
        groups: of (layer, direction), the largest first.
        modularity: of the division.
    """

    groups: tuple[frozenset[Node], ...]
    modularity: float


def interaction_graph(edges: Sequence[Tensor], smallest: float) -> Any:
    """Build the graph of all layers, as networkx has it.

    Args:
        edges: of every pair of layers.
        smallest: edges are weighed by log10 of what they are beside it; weaker ones are left out.

    Raises:
        ValueError: it is not above 0.
    """
    import networkx

    if not smallest > 0:
        raise ValueError(f"smallest: {smallest} was given; give the smallest edge that counts, above 0.")
    graph = networkx.Graph()
    for layer, matrix in enumerate(edges):
        inner = matrix[1:, 1:]
        for at in range(inner.shape[1]):
            graph.add_node((layer, at))
        for at in range(inner.shape[0]):
            graph.add_node((layer + 1, at))
        for row, column in (inner > smallest).nonzero().tolist():
            weight = float((inner[row, column] / smallest).log10())
            graph.add_edge((layer, column), (layer + 1, row), weight=weight)
    return graph


def modules(edges: Sequence[Tensor], smallest: float, *, resolution: float = 1.0, seed: int = 0) -> Modules:
    """Divide the directions of all layers into communities.

    Args:
        edges: of every pair of layers.
        smallest: as in `interaction_graph`.
        resolution: larger for more, smaller communities.
        seed: of the search.

    Raises:
        DataError: no edge is above the smallest.
    """
    from networkx.algorithms.community import louvain_communities, modularity

    graph = interaction_graph(edges, smallest)
    if not graph.number_of_edges():
        raise DataError(f"smallest: no edge is above {smallest:g}; give a smaller one.")
    graph.remove_nodes_from([node for node in list(graph) if not graph.degree(node)])
    groups = louvain_communities(graph, resolution=resolution, seed=seed)
    ordered = sorted((frozenset(group) for group in groups), key=len, reverse=True)
    return Modules(tuple(ordered), float(modularity(graph, groups, resolution=resolution)))
