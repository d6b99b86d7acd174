"""The claims of the local interaction basis: it finds what rotations hide, and needs fewer edges than other bases.

Blocks: a net of four hidden layers of 8 ReLUs, which are two independent nets of 4 side by side, with a random rotation
behind every ReLU that the next layer takes back. Data are all 100 x 100 pairs of inputs of the two, so that they are
independent exactly. A direction belongs to the block in which most of it lies, rotations undone. Modules are Louvain's
(networkx), of edges above 1e-6 of the largest. Five nets.

Digits: nets of 64-60-60-10 ReLU (Adam at 1e-3, 30 epochs), bases and edges from the training images, edges and nodes
ablated on test images. Counted are the edges into both hidden layers, the fewest of each pair alone that keep the
accuracy within 0.5 points. Nodes: the mean accuracy over 1, 2, 4, ... directions that are kept in each hidden layer
(the sheet's area, read as: the higher, the better). 3 nets.

Modular addition and language models are not checked. About 3 minutes of one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.ground.progress import track
from actkit.data import digits
from actkit.interpretation.lib.basis import InteractionBasis, Kind, local_interaction_basis
from actkit.interpretation.lib.graph import accuracy, fewest_edges, modules, node_curve
from actkit.interpretation.lib.sections import Sections, sections_of

SHARE, NEURONS, SMALLEST = 1e-3, 0.1, 1e-6
ACCURATE, TOLERANCE, FEWER = 0.96, 0.005, 0.9
KINDS: tuple[Kind, ...] = ("lib", "pca", "neuron")
HALF, DEPTH = 4, 4


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of the nets of digits.
        blocks: nets with hidden blocks.
        rows: inputs of each of their halves.
        epochs: of the nets of digits.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    blocks: int = 5
    rows: int = 100
    epochs: int = 30


HIDDEN = Statement(
    "It separates independent parts that a change of basis hides",
    "not in the paper in this form",
    "in each of 5 nets: edges between the blocks < 1e-3 of all, > 0.1 among rotated neurons; the modules are the two "
    "blocks; without centring the share is above 1e-3",
    SYNTHETIC,
)
SPARSER = Statement(
    "It needs fewer edges than principal components and neurons",
    "more sparsely interacting features on modular addition and CIFAR-10 (figures)",
    "means over 3 nets of >= 96 %: edges <= 0.9 x those of principal components and fewer than those of neurons; node "
    "ablation no worse than of principal components",
    SMALL,
)
STATEMENTS = (HIDDEN, SPARSER)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    experiments: list[Experiment] = []
    if subject in (None, SYNTHETIC):
        experiments.append((HIDDEN, partial(hidden, sizes, progress)))
    if subject in (None, SMALL):
        experiments.append((SPARSER, partial(sparser, sizes, progress)))
    return conduct("lib", experiments, sizes, subject, progress)


# -- hidden blocks -----------------------------------------------------------------------------------------------------


def rotated(seed: int, rows: int) -> tuple[Sections, Tensor, list[Tensor]]:
    """Sections of a net with hidden blocks, its inputs, and the rotation of each node layer."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).double()

    eye = torch.eye(2 * HALF, dtype=torch.float64)
    layers: list[nn.Module] = []
    turns = [eye]
    for at in range(DEPTH):
        layer, turn = nn.Linear(2 * HALF, 2 * HALF).double(), nn.Linear(2 * HALF, 2 * HALF, bias=False).double()
        rotation = eye if at == DEPTH - 1 else torch.linalg.qr(random(2 * HALF, 2 * HALF)).Q
        with torch.no_grad():
            layer.weight.copy_(torch.block_diag(random(HALF, HALF), random(HALF, HALF)) @ turns[-1].T)
            layer.bias.copy_(0.3 * random(2 * HALF))
            turn.weight.copy_(rotation)
        layers += [layer, nn.ReLU(), turn]
        turns.append(rotation)
    halves = random(rows, HALF), random(rows, HALF)
    pairs = torch.cartesian_prod(torch.arange(rows), torch.arange(rows))
    x = torch.cat([half[pairs[:, at]] for at, half in enumerate(halves)], 1)
    return sections_of(layers, x, starts=range(0, len(layers), 3)), x, turns


def blocks_of(basis: InteractionBasis, turns: list[Tensor]) -> list[Tensor]:
    """In which block each direction of each layer lies: bool [directions], rotations undone."""
    found = []
    for back, turn in zip(basis.back, turns, strict=True):
        mass = (back[1:, 1:] @ turn).square()
        found.append(mass[:, HALF:].sum(1) > mass[:, :HALF].sum(1))
    return found


def between(edges: list[Tensor], blocks: list[Tensor]) -> float:
    """The share of all edges that join the blocks."""
    inner = [each[1:, 1:] for each in edges]
    crossing = [each[blocks[at + 1][:, None] != blocks[at][None]].sum() for at, each in enumerate(inner)]
    return float(torch.stack(crossing).sum() / torch.stack([each.sum() for each in inner]).sum())


def hidden(sizes: Sizes, progress: bool) -> Measurement:
    """Two nets side by side behind rotations."""
    shares: dict[str, list[float]] = {"lib": [], "neuron": [], "without centring": []}
    two, pure, counts = [], [], []
    for seed in track(range(sizes.blocks), "Hidden blocks", sizes.blocks, progress):
        sections, x, turns = rotated(seed, sizes.rows)
        for name, settings in (("lib", {}), ("neuron", {"kind": "neuron"}), ("without centring", {"centre": False})):
            basis = local_interaction_basis(sections, x, progress=False, **settings)  # type: ignore[arg-type]
            edges = basis.edges(x, progress=False)
            blocks = blocks_of(basis, turns)
            shares[name].append(between(edges, blocks))
            if name == "lib":
                found = modules(edges, SMALLEST * max(float(each[1:, 1:].max()) for each in edges))
                sides = [{bool(blocks[layer][at]) for layer, at in group} for group in found.groups]
                counts.append(len(sides))
                pure.append(all(len(side) == 1 for side in sides))
                two.append(len(sides) == 2 and pure[-1])
    passed = (
        max(shares["lib"]) < SHARE
        and min(shares["neuron"]) > NEURONS
        and all(two)
        and min(shares["without centring"]) > SHARE
    )
    listed = "; ".join(f"{name} {min(values):.1e} to {max(values):.1e}" for name, values in shares.items())
    text = (
        f"share between the blocks: {listed}; modules are the blocks in {sum(two)} of {len(two)} nets ({min(counts)} "
        f"to {max(counts)} modules; none joins the blocks in {sum(pure)})"
    )
    return Measurement(text, passed)


# -- digits ------------------------------------------------------------------------------------------------------------


def trained(seed: int, epochs: int) -> nn.Sequential:
    """A net of digits in float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10))
    x, labels = digits("train")
    optimizer, draw = torch.optim.Adam(net.parameters(), lr=1e-3), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimizer.step()
    return net.double().eval()


def sparser(sizes: Sizes, progress: bool) -> Measurement:
    """Edges and nodes that each basis needs."""
    counts: dict[str, list[int]] = {kind: [] for kind in KINDS}
    curves: dict[str, list[float]] = {kind: [] for kind in KINDS}
    accuracies = []
    x, (other, labels) = digits("train")[0].double(), (part for part in digits("test"))
    other, score = other.double(), accuracy(labels)

    for seed in track(sizes.seeds, "Digits", len(sizes.seeds), progress):
        model = trained(seed, sizes.epochs)
        with torch.no_grad():
            accuracies.append(score(model(other)))
        sections = sections_of(model, x)
        for kind in KINDS:
            basis = local_interaction_basis(sections, x, kind=kind, progress=False)
            edges = basis.edges(x, progress=False)
            counts[kind].append(
                sum(fewest_edges(basis, edges[layer], layer, other, score, TOLERANCE) for layer in (0, 1))
            )
            kept = (1, 2, 4, 8, 16, 32)
            curves[kind].append(
                mean(value for layer in (1, 2) for value in node_curve(basis, layer, other, score, kept).values())
            )
    edges_needed, nodes = ({kind: mean(found[kind]) for kind in KINDS} for found in (counts, curves))
    passed = (
        min(accuracies) >= ACCURATE
        and edges_needed["lib"] <= FEWER * edges_needed["pca"]
        and edges_needed["lib"] < edges_needed["neuron"]
        and nodes["lib"] >= nodes["pca"]
    )
    listed = "; ".join(
        f"{kind}: {spread([float(value) for value in counts[kind]], '.0f')} edges, nodes {nodes[kind]:.3f}"
        for kind in KINDS
    )
    return Measurement(f"{listed}; accuracy {spread([100 * each for each in accuracies])} %", passed)
