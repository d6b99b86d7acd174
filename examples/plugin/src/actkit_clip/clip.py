"""Clip the activations of MLPs at a magnitude that few calibration values exceed.

    y = clamp(f(x), -t, t),    f: the MLP's activation function, t: the (1 - share)-quantile of |f(x)|

Few values of an activation are far larger than all others, and a quantizer with one scale for all of them wastes its
levels on those. Cost: two comparisons per value. Each MLP has its own limit, each expert too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Replace, Skip
from actkit.core.layers.keeps_dtype import KeepsDtype
from actkit.core.model.anatomy import Block, Site
from actkit.core.model.parts import Mlp
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Quantiles, Statistic


class Clipped(KeepsDtype):
    """An activation function whose outputs are clamped to [-limit, limit].

    `spec` and `from_spec` are what a checkpoint needs: structure in JSON; the limit, as every tensor, comes from the
    weights file.

    Args:
        base: the function.
        limit: float32 scalar, a buffer that keeps its dtype.
    """

    mixes: ClassVar[tuple[str, ...]] = ()  # element-wise: so that it is still read as the MLP's activation
    limit: Tensor

    def __init__(self, base: nn.Module, limit: float = math.inf) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("limit", torch.tensor(float(limit), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x, of any shape."""
        limit = self.limit.to(x.dtype)
        return self.base(x).clamp(-limit, limit)

    def spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> Clipped:
        """Make it around the function that stands in its place."""
        return cls(original)


class Clip(Transform):
    """Clip the outputs of every MLP's activation function.

    A model whose MLPs actkit does not know (a traced one) has nothing to clip.

    Attributes:
        share: of the calibration values that are clipped, in [0, 1); 0 leaves the model as it is.
    """

    share: float = Field(0.001, ge=0, lt=1)

    tags: ClassVar[Tags] = Tags(needs_data=True, stream="edited", least_coverage=0.25)

    @classmethod
    def identity(cls) -> Self:
        return cls(share=0.0)

    def targets(self, block: Block) -> Iterable[str]:
        return block.nonlinearities()

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        return {site_of(block, expert, mlp): Quantiles() for expert, mlp in block.mlps()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip]:
        for expert, mlp in block.mlps():
            magnitudes = seen[site_of(block, expert, mlp)]
            if not magnitudes.count:
                yield Skip(mlp.activation, "no calibration token reached it")
                continue
            limit = magnitudes.quantile(1 - self.share) if self.share else math.inf
            yield Replace(mlp.activation, Clipped(block.root.get_submodule(mlp.activation), limit))


def site_of(block: Block, expert: int | None, mlp: Mlp) -> Site:
    """Return the site of the activation's outputs."""
    return Site("mlp.gate" if mlp.gated else "mlp.hidden", block.index, expert)
