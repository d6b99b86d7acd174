"""Ranges of what an attention multiplies, searched by the error of its two products (APHQ-ViT, arXiv:2504.02508).

    scores_h = q_h k_h^T,   mixed_h = a_h v_h        of each head h, a the attention weights

Each of the four has a scale and a zero point for each head; those of a product are searched in turn, by the squared
error of what it gives for that head. Attention weights are never negative, so that their zero point stays 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actkit.core.edit.edits import Insert, get_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.operand_rounding import OPERANDS, OperandRounding
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen
from actkit.core.watch.calls import Call
from actkit.quantization.aphq_vit.candidates import candidates


@dataclass(frozen=True)
class Operands:
    """What an attention multiplies, and the grids that were found for it.

    Attributes:
        path: where the attention asks for what rounds it.
        channels: of all heads.
        scales: by operand, float32 [heads, 1, 1].
        zeros: by operand, float32 [heads, 1, 1], whole numbers.
    """

    path: str
    channels: int
    scales: Mapping[str, Tensor]
    zeros: Mapping[str, Tensor]

    def insert(self, rounds: Mapping[str, RoundedInputs]) -> Insert:
        """Return the edit that puts in what rounds each of them."""
        return Insert(self.path, OperandRounding(rounds, self.channels))


class WatchedInputs(RoundedInputs):
    """What keeps all that it is given, and leaves it as it is.

    Args:
        grid: which it does not use.
    """

    def __init__(self, grid: IntegerGrid) -> None:
        super().__init__(grid, torch.ones(1, 1, 1))
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().float())
        return x


def search_operands(
    block: Block, path: str, seen: Seen, calls: Sequence[Call], grid: IntegerGrid, rounds: int
) -> Operands:
    """Find the grids of what a block's attention multiplies.

    Args:
        block: as it stands.
        path: where the attention asks for what rounds it.
        seen: of the block.
        calls: of the block, which the search runs on.
        grid: with zero points.
        rounds: how often each of a pair is searched.
    """
    assert block.attention is not None
    watched = {name: WatchedInputs(grid) for name in OPERANDS}
    channels = block.attention.output.in_features
    with seen.trial([Insert(path, OperandRounding(watched, channels))]):
        for call in calls:
            call.replay(get_module(block.root, block.path))
    pairs: list[tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = [
        ("query", "key", lambda query, key: query @ key.mT),
        ("weights", "value", torch.matmul),
    ]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for one, other, product in pairs:
        given = watched[one].given, watched[other].given
        found |= zip((one, other), search_product(*given, product, grid, rounds), strict=True)
    scales, zeros = ({name: each[index] for name, each in found.items()} for index in (0, 1))
    return Operands(path, channels, scales, zeros)


def search_product(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
    grid: IntegerGrid,
    rounds: int,
) -> list[tuple[Tensor, Tensor]]:
    """Find the grids of two factors in turn, each head by the error of its own product.

    Args:
        first: of each call, [batch, heads, ...].
        second: of each call, [batch, heads, ...]; fewer heads are read by several of the first one's.
        product: of the two.
        grid: with zero points.
        rounds: how often each is searched.

    Returns:
        Scale and zero of both, [heads, 1, 1] each.
    """
    sides = [list(first), list(second)]
    readers = first[0].shape[1] // second[0].shape[1]

    def outputs(a: Tensor, b: Tensor) -> Tensor:
        return product(a, b.repeat_interleave(readers, 1))

    exact = [outputs(a, b) for a, b in zip(*sides, strict=True)]
    heads = [side[0].shape[1] for side in sides]
    tried = [list(candidates(torch.cat([x.transpose(0, 1).flatten(1) for x in side], 1), grid)) for side in sides]
    rounded = [list(side) for side in sides]
    best = [(torch.ones(0), torch.zeros(0))] * 2
    for _ in range(rounds):
        for side in (0, 1):
            least = torch.full((heads[side],), torch.inf)
            chosen = [torch.ones(heads[side], 1, 1), torch.zeros(heads[side], 1, 1)]
            for scale, zero in tried[side]:
                now = list(rounded)
                now[side] = [grid.fake(x, scale[:, None], zero[:, None]) for x in sides[side]]
                squares = [(outputs(a, b) - y).square().sum((0, 2, 3)) for a, b, y in zip(*now, exact, strict=True)]
                error = torch.stack(squares).sum(0).view(heads[side], -1).sum(1)
                better = (error < least)[:, None, None]
                least = torch.minimum(error, least)
                chosen = [
                    torch.where(better, new[:, None], old) for new, old in zip((scale, zero), chosen, strict=True)
                ]
            best[side] = chosen[0], chosen[1]
            rounded[side] = [grid.fake(x, *best[side]) for x in sides[side]]
    return best
