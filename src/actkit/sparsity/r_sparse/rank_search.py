"""The evolutionary search of R-Sparse (2025, arXiv:2504.19449): one number in [0, 1] per layer, by the model's loss.

First the best value shared by all layers is taken from a grid. A population starts from it and its mutations; in each
further generation the best quarter survives, and children, each gene from one of two survivors and then mutated, fill
the rest. The paper gives five generations and the grid as the baseline; the size of the population, what survives and
the mutation (normal noise of 0.1 on a tenth of the genes) are our choice.
Cost: one evaluation of the loss for each of the 7 values of the grid and each new candidate: at most 134 in all at 5
generations of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actkit.core.ground.progress import track

GRID = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
DIGITS = 4  # kept of a value, so that a recipe stays readable
SHARE, NOISE = 0.1, 0.1  # of the genes that a mutation changes, and its standard deviation
Genome = tuple[float, ...]


@dataclass(frozen=True)
class Evolution:
    """What a search found.

    Attributes:
        alphas: by name.
        loss: with these.
        uniform: the best value of the grid.
        uniform_loss: with that one.
        history: the smallest loss after each generation.
        evaluations: how often the loss was computed.
    """

    alphas: dict[str, float]
    loss: float
    uniform: float
    uniform_loss: float
    history: tuple[float, ...]
    evaluations: int


def evolve(
    loss: Callable[[dict[str, float]], float],
    names: Sequence[str],
    *,
    generations: int = 5,
    population: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Evolution:
    """Minimise `loss` over a value in [0, 1] for each name; the result is never worse than the best of the grid.

    The same seed gives the same candidates if the loss is deterministic.

    Args:
        loss: of the values by name.
        names: such as paths of layers.
        generations: how many.
        population: candidates in each.
        seed: of the draws.
        progress: show a bar.

    Returns:
        The best values, and how the search went.

    Raises:
        ValueError: there are no names.
    """
    if not names:
        raise ValueError("names: none were given; give at least one layer to search over.")
    generator = torch.Generator().manual_seed(seed)
    known: dict[Genome, float] = {}
    history: list[float] = []
    best = best_uniform = (1.0,) * len(names)

    def mutated(genes: Tensor) -> Genome:
        chosen = torch.rand(len(names), generator=generator) < SHARE
        noise = NOISE * torch.randn(len(names), generator=generator)
        values = (genes + chosen * noise).clamp(0, 1).tolist()
        return tuple(round(value, DIGITS) for value in values)

    def proposals() -> Iterator[Genome]:
        nonlocal best, best_uniform
        uniform = [(value,) * len(names) for value in GRID]
        yield from uniform
        best = best_uniform = min(uniform, key=known.__getitem__)
        members = [best, *(mutated(torch.tensor(best)) for _ in range(population - 1))]
        yield from members[1:]
        for generation in range(generations):
            members = sorted(dict.fromkeys(members), key=known.__getitem__)  # stable: of equal ones the earlier
            best = members[0]
            history.append(known[best])
            if generation == generations - 1:
                return
            members = members[: max(2, population // 4)]
            parents = torch.tensor(members)
            children = []
            for _ in range(population - len(members)):
                pair = torch.randint(len(parents), (2,), generator=generator)
                first, second = parents[pair]
                children.append(mutated(torch.where(torch.rand(len(names), generator=generator) < 0.5, first, second)))
            yield from children
            members += children

    total = len(GRID) + population - 1 + (generations - 1) * (population - max(2, population // 4))
    for genome in track(proposals(), "Searching the mix of each layer", total, enabled=progress):
        if genome not in known:
            known[genome] = loss(dict(zip(names, genome, strict=True)))
    alphas = dict(zip(names, best, strict=True))
    return Evolution(alphas, known[best], best_uniform[0], known[best_uniform], tuple(history), len(known))
