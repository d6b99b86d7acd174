"""`actkit analyze MODEL lib`: the interaction basis of the MLPs of blocks, or of a model's head, beside two others.

    divergence after a cut = mean over held-out rows of KL(the model's prediction || its prediction after the cut)
    participation = (sum L)^2 / sum L^2                  how many directions share the importance L

Of each network (the MLP of a block, or the last layers of a model that is no transformer) it finds the local
interaction basis (`basis`), and measures with how few of its directions, and of its strongest edges, the model still
predicts what it predicted; so too with principal components and with neurons, the most important first. Paper: The
Local Interaction Basis (2024, arXiv:2405.10928).

When to use it: to see the wiring of a small net, or whether the MLP of a block is simpler in this basis than in others.
Cost: `sources` products with the Jacobian for each of `rows` rows; edges of 256 rows in three bases; then a pass over
the held-out batches for each point of the curves, about 60 of them. Some minutes for a block of a model of 135M
parameters.
Settled here: every second batch is held out. An MLP is cut while the whole model runs, so that the divergence is that
of its predictions. Edges are those between the `directions` most important directions of each layer. The graph holds
the strongest edges of each pair of layers, which carry 90 % of its interaction together, as shares of it; modules are
those of this graph.
Our own reading: the divergence (the paper takes accuracy or loss, for which labels are needed) and the 90 %.
Left open: blocks are taken one by one; attention and norms between them are no sections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward, mask_of, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.ground.progress import track
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.watch.capture import live, record
from actkit.core.watch.intervene import At, intervene
from actkit.core.watch.sample import Sample
from actkit.interpretation.lib.basis import InteractionBasis, Kind, local_interaction_basis
from actkit.interpretation.lib.graph import modules, strongest
from actkit.interpretation.lib.result import KINDS, Curve, Edge, InteractionNetwork, LocalInteraction, NodeLayer
from actkit.interpretation.lib.sections import ROUGH, Head, Sections, distance, head_of, mlp_sections

CARRIED = 0.9  # of the interaction of a pair of layers, by the edges of the graph
EDGE_ROWS = 256
SAME = 1e-4  # relative, of an MLP and its sections
FACTOR = 4  # between the points of a curve
Cut = Callable[[Tensor], Tensor]  # inputs of the network [rows, ...] -> its outputs [rows, channels]


# -- networks and what their predictions are ---------------------------------------------------------------------------


class _Network(Protocol):
    """What is cut: sections, rows to find a basis on, and how far cuts move predictions."""

    @property
    def name(self) -> str: ...

    @property
    def sections(self) -> Sections: ...

    @property
    def rows(self) -> Tensor: ...

    def moved(self, cuts: Sequence[Cut], progress: bool) -> tuple[list[float], int]:
        """Nats for each cut, and over how many rows."""


@dataclass(frozen=True)
class _Mlp:
    name: str
    sections: Sections
    rows: Tensor
    model: nn.Module
    view: Anatomy
    block: int
    held: Sequence[Any]

    def moved(self, cuts: Sequence[Cut], progress: bool) -> tuple[list[float], int]:
        source, target = (Site(f"mlp.{side}", self.block) for side in ("input", "output"))
        totals, count = [0.0] * len(cuts), 0
        with evaluating(self.model), torch.no_grad():
            for batch in self.held:
                mask = mask_of(batch)
                before = _logs(first_tensor(forward(self.model, batch)), mask)
                count += len(before)
                for number in track(range(len(cuts)), f"Cutting {self.name}", len(cuts), progress):
                    made = cuts[number]

                    def change(value: Tensor, at: At, made: Cut = made) -> Tensor:
                        x = at[source]
                        return made(x.flatten(0, -2)).to(value.dtype).view_as(value)

                    with intervene(self.model, {target: change}, reads=[source], anatomy=self.view):
                        after = _logs(first_tensor(forward(self.model, batch)), mask)
                    totals[number] += _divergence(before, after)
        return [total / count for total in totals], count


@dataclass(frozen=True)
class _Head:
    name: str
    sections: Sections
    rows: Tensor
    held: Tensor

    def moved(self, cuts: Sequence[Cut], progress: bool) -> tuple[list[float], int]:
        with torch.no_grad():
            before = _logs(self.sections.nodes(self.held)[-1][:, 1:], None)
            made = track(cuts, f"Cutting {self.name}", len(cuts), progress)
            return [_divergence(before, _logs(cut(self.held), None)) / len(before) for cut in made], len(before)


def _logs(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Log-probabilities [rows, classes], padding left out."""
    outputs = outputs if mask is None or mask.shape != outputs.shape[:-1] else outputs[mask.bool()]
    flat = outputs.flatten(0, -2)
    return (flat if flat.dtype == torch.float64 else flat.float()).log_softmax(-1)


def _divergence(before: Tensor, after: Tensor) -> float:
    found = nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).double().sum()
    return max(0.0, float(found))  # rounding may give less than 0


def _networks(
    model: nn.Module, given: Sequence[Any], blocks: tuple[int, ...] | None, start: str | None, rows: int, progress: bool
) -> list[_Network]:
    fitted, held = given[::2], given[1::2]
    view = anatomy(model, given[0])
    if view.architecture == "traced":
        if blocks is not None:
            raise ValueError(f"blocks: {list(blocks)} were given, and {type(model).__name__} has none; leave them out.")
        head = head_of(model, given[0], start=start)
        name = f"{head.paths[0]} to {head.paths[-1]}"
        x, other = (_inputs(head, part) for part in (fitted, held))
        return [_Head(name, head.sections, x[:rows], other)]
    if start is not None:
        raise ValueError(f"start: {start!r} was given, which is for models without blocks; choose blocks instead.")
    chosen = (len(view.blocks) // 2,) if blocks is None else blocks
    cut = {block: mlp_sections(model, block) for block in dict.fromkeys(chosen)}
    wanted: dict[Site | str, Any] = {Site("mlp.input", block): Sample(rows) for block in cut}
    seen = record(model, wanted, fitted, anatomy=view, progress=progress)
    found: list[_Network] = []
    for block, sections in cut.items():
        _check_output(model, view, block, sections, given[0])
        sample = seen[Site("mlp.input", block)].rows.double()
        found.append(_Mlp(f"blocks.{block}.mlp", sections, sample, model, view, block, held))
    return found


def _inputs(head: Head, batches: Sequence[Any]) -> Tensor:
    return torch.cat([head.inputs(batch) for batch in batches])


def _check_output(model: nn.Module, view: Anatomy, block: int, sections: Sections, batch: Any) -> None:
    """What is added to the residual stream is what the sections give, with no norm in between."""
    sites = tuple(Site(f"mlp.{side}", block) for side in ("input", "output"))
    with evaluating(model), torch.no_grad(), live(model, sites, view) as found:
        forward(model, batch)
    x, wanted = (found[site][0].flatten(0, -2) for site in sites)
    with torch.no_grad():
        made = sections.nodes(x)[-1][:, 1:]
    off = distance(made, wanted)
    if not off <= (SAME if wanted.dtype in (torch.float32, torch.float64) else ROUGH):
        raise UnsupportedModelError(
            f"block: the MLP of block {block} of {type(model).__name__} adds another value than its layers give, off "
            f"by {off:.1e} of the largest, as behind a norm; choose a model whose MLP is added as it is."
        )


# -- the analysis ------------------------------------------------------------------------------------------------------


def lib(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: tuple[int, ...] | None = None,
    start: str | None = None,
    rows: int = 2048,
    sources: int | None = 64,
    directions: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> LocalInteraction:
    """Find the local interaction basis of MLPs of blocks, or of a model's head, and compare it with two others.

    Args:
        model: a transformer with plain MLPs, an MLP, or a CNN with a head of linear layers.
        batches: two or more; every second one is held out.
        blocks: whose MLPs; None for the one in the middle.
        start: of a model without blocks, the path of the module that the head begins with; None for the first of its
            last linear layers.
        rows: the most that a basis is found on.
        sources: random combinations of outputs for each row, in layers with more directions; None for exact Jacobians.
        directions: of each layer, between which edges are measured.
        seed: of the random combinations and of the search for modules.
        progress: show bars.

    Returns:
        Importances, graph, modules and curves of each network.

    Raises:
        ValueError: a setting is below 1, or is of another kind of model.
        DataError: fewer than two batches.
        UnsupportedModelError: an MLP, or the end of the model, is not of linear layers and element-wise functions.
        ActkitError: what `local_interaction_basis` raises.
    """
    for name, value in (("rows", rows), ("directions", directions)):
        if value < 1:
            raise ValueError(f"{name}: {value} was given; give at least 1.")
    given = sequence_of(batches)
    if len(given) < 2:
        raise DataError(
            f"batches: {len(given)} was given, and every second one is held out; give two or more, or a smaller batch "
            f"size."
        )
    found, held = [], 0
    networks = _networks(model, given, blocks, start, rows, progress)
    for network in networks:
        measured, held = _measured(network, sources, directions, seed, progress)
        found.append(measured)
    return LocalInteraction(len(networks[0].rows), held, directions, tuple(found))


def _measured(
    network: _Network, sources: int | None, directions: int, seed: int, progress: bool
) -> tuple[InteractionNetwork, int]:
    sections, last = network.sections, len(network.sections)
    bases, edges = {}, {}
    for kind in KINDS:
        basis = local_interaction_basis(
            sections, network.rows, kind=kind, sources=sources, seed=seed, progress=progress
        )
        bases[kind] = basis
        edges[kind] = basis.edges(network.rows[:EDGE_ROWS], directions=directions, progress=progress)
    places: list[tuple[str, int, Kind, int]] = []  # nodes or edges, layer, basis, how many
    cuts: list[Cut] = []
    for layer in range(last):
        for kind, basis in bases.items():
            for kept in _spaced(1, len(basis.importance[layer])):
                places.append(("nodes", layer, kind, kept))
                cuts.append(_of_nodes(basis, layer, kept))
            matrix = edges[kind][layer]
            most = min(directions, matrix.shape[0] - 1) * min(directions, matrix.shape[1] - 1)
            for kept in _spaced(FACTOR, most):
                places.append(("edges", layer, kind, kept))
                cuts.append(_of_edges(basis, layer, strongest(matrix, kept)))
    moved, held = network.moved(cuts, progress)
    by_place = dict(zip(places, moved, strict=True))

    def curves(what: str, layer: int) -> dict[str, Curve]:
        found = {}
        for kind in KINDS:
            points = {kept: value for (*place, kept), value in by_place.items() if place == [what, layer, kind]}
            found[str(kind)] = Curve(tuple(points), tuple(points.values()))
        return found

    layers = []
    for layer, name in enumerate(sections.names):
        importance = bases["lib"].importance[layer]
        spread = float(importance.sum() ** 2 / importance.square().sum().clamp(min=1e-300))
        ends = layer == last
        carrying = {} if ends else {str(kind): len(_carrying(edges[kind][layer])) for kind in KINDS}
        nodes, cut = ({}, {}) if ends else (curves("nodes", layer), curves("edges", layer))
        layers.append(NodeLayer(name, sections.widths[layer], tuple(importance.tolist()), spread, nodes, cut, carrying))
    graph = [
        Edge(layer, start, end, share)
        for layer, matrix in enumerate(edges["lib"])
        for start, end, share in _carrying(matrix)
    ]
    groups, modularity = _grouped(graph, edges["lib"], seed)
    return InteractionNetwork(network.name, tuple(layers), tuple(graph), groups, modularity), held


def _of_nodes(basis: InteractionBasis, layer: int, kept: int) -> Cut:
    return lambda x: basis.ablated_nodes(x, layer, kept)


def _of_edges(basis: InteractionBasis, layer: int, mask: Tensor) -> Cut:
    return lambda x: basis.ablated_edges(x, layer, mask)


def _spaced(first: int, most: int) -> list[int]:
    """first, 4 first, 16 first, ... and the most."""
    found = []
    while first < most:
        found.append(first)
        first *= FACTOR
    return [*found, most]


def _carrying(matrix: Tensor) -> list[tuple[int, int, float]]:
    """(start, end, share) of the strongest edges that carry 90 % of a pair's interaction."""
    inner = matrix[1:, 1:]
    total = inner.sum().clamp(min=1e-300)
    shares, order = (inner.flatten() / total).sort(descending=True, stable=True)
    count = min(len(shares), int((shares.cumsum(0) < CARRIED).sum()) + 1)
    width = inner.shape[1]
    pairs = zip(order[:count].tolist(), shares[:count].tolist(), strict=True)
    return [(at % width, at // width, share) for at, share in pairs if share > 0]


def _grouped(
    graph: Sequence[Edge], edges: Sequence[Tensor], seed: int
) -> tuple[tuple[tuple[tuple[int, int], ...], ...], float]:
    """Modules of the graph, whose edges are shares of the interaction of their pair."""
    kept = [torch.zeros_like(matrix) for matrix in edges]
    for edge in graph:
        kept[edge.layer][1 + edge.end, 1 + edge.start] = edge.share
    least = min(edge.share for edge in graph) * (1 - 1e-9)  # the weakest counts, with a weight of nearly 0
    found = modules(kept, least, seed=seed)
    return tuple(tuple(sorted(group)) for group in found.groups), found.modularity
