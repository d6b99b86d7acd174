"""Tokens of low scores, of which layers read fewer bits (Agile-Quant, 2023, arXiv:2312.05693).

Three sites of a block have them: what the output layer of the attention reads, what leaves the norm before the MLP, and
what the last layer of the MLP reads. The range of a channel stays, its steps get wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from actkit.core.edit.edits import get_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import Block


@dataclass(frozen=True)
class LowBits:
    """Of which share of a prompt's tokens layers read fewer bits.

    Attributes:
        shares: block -> share of the tokens that it reads, from 0 to below 1: those of the smallest scores that it does
            not drop.
        bits: of what layers read of them, 2 to 7.
        inherited: the blocks behind read them so too.

    Raises:
        ValueError: a share or the bits are out of bounds, or a block below 0.
    """

    shares: Mapping[int, float] = field(default_factory=dict)
    bits: int = 4
    inherited: bool = True

    def __post_init__(self) -> None:
        for block, share in self.shares.items():
            if block < 0 or not 0 <= share < 1:
                raise ValueError(
                    f"shares: {share} in block {block} was given; give blocks from 0 on, and 0 to below 1."
                )
        if not 2 <= self.bits <= 7:
            raise ValueError(f"bits: {self.bits} was given; give 2 to 7, fewer than the inputs have.")

    def reads(self, block: int) -> bool:
        """Say whether a block may read tokens in fewer bits.

        Args:
            block: its number.
        """
        chosen = [index for index, share in self.shares.items() if share]
        return bool(chosen) and (min(chosen) <= block if self.inherited else block in chosen)

    def of(self, block: Block) -> dict[str, RoundedInputs]:
        """Return what rounds low tokens, by the path of what rounds the others.

        Args:
            block: of a model whose layers have static inputs.

        Raises:
            UnsupportedModelError: they have not, or no attention and MLP are described.
        """
        if block.attention is None or block.mlp is None:
            raise UnsupportedModelError(
                f"low: {block.path} has no attention and MLP that are described; leave it out of the tokens in fewer "
                f"bits."
            )
        linears = (block.attention.output, *block.mlp.inputs, block.mlp.down)
        return {
            f"{linear.path}.inputs": coarser(get_module(block.root, linear.path), linear.path, self.bits)
            for linear in linears
        }


def coarser(layer: Any, path: str, bits: int) -> RoundedInputs:
    """Return what rounds to fewer bits of the same range as a layer's inputs are rounded to.

    Args:
        layer: of the model.
        path: of it, for the error.
        bits: fewer than it has.

    Raises:
        UnsupportedModelError: its inputs are not rounded by static scales, or to no more bits.
    """
    inputs: Any = layer.inputs if isinstance(layer, ActLinear) else None
    static = inputs is not None and isinstance(inputs.grid, IntegerGrid) and inputs.scale is not None
    if not static or inputs.grid.bits <= bits or inputs.rotation is not None or inputs.divisor is not None:
        raise UnsupportedModelError(
            f"low: {path} does not read static inputs of more than {bits} bits, which tokens could be read coarser "
            f"than; apply agile_quant first."
        )
    ratio = (2**inputs.grid.bits - 1) / (2**bits - 1)
    zero = None if inputs.zero is None else torch.round(inputs.zero.float() / ratio)
    return RoundedInputs(replace(inputs.grid, bits=bits), inputs.scale * ratio, zero)
