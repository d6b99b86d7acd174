"""What `intervene` can put at a site: values added, scaled, put there, zeroed or cut off from gradients.

    with intervene(model, {"blocks.3.block.output": Add(direction, factor=4.0, positions="generated")}):

`positions` says at which tokens: 'all', 'prompt', 'generated', 'last' (of the prompt), numbers that count the real
tokens of a row from 0 (or from the end of the prompt, if negative), or a bool mask [batch, length] of the prompt.
`heads` says in which heads. The rest of the tensor stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from actkit.core.watch.intervene import At

Positions = Literal["all", "prompt", "generated", "last"] | Sequence[int] | Tensor
NAMES = ("all", "prompt", "generated", "last")


@dataclass(frozen=True, eq=False)
class SiteChange:
    """A change of some positions and heads of a site; a subclass says of what.

    Attributes:
        positions: the tokens that it is for.
        heads: the heads that it is for; None for all.
    """

    _: KW_ONLY
    positions: Positions = "all"
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.positions, str) and self.positions not in NAMES:
            raise ValueError(
                f"positions: {self.positions!r} was given, allowed are {', '.join(NAMES)}, a list of positions or a "
                f"bool tensor [batch, length of the prompt]."
            )

    def __call__(self, value: Tensor, at: At) -> Tensor:
        """Return the changed tensor of a site.

        Args:
            value: the tensor, in the layout of the site.
            at: where it stands.
        """
        changed = self.change(value, at)
        chosen = at.chosen(value, self.positions, self.heads)
        return changed if chosen is None else torch.where(chosen, changed, value)

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return the tensor as if all of it were to be changed.

        Args:
            value: as in `__call__`.
            at: as in `__call__`.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Add(SiteChange):
    """Adds a tensor, such as a direction [channels].

    Attributes:
        tensor: what broadcasts to the site.
        factor: of it; a tensor [batch] holds one for each row.
    """

    tensor: Tensor
    factor: float | Tensor = 1.0

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return value + factor * tensor. See `SiteChange.change`."""
        return value + at.by_row(value, self.factor) * at.fitted(value, self.tensor)


@dataclass(frozen=True, eq=False)
class Scale(SiteChange):
    """Multiplies.

    Attributes:
        factor: a number; a tensor [batch] holds one for each row.
    """

    factor: float | Tensor

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return factor * value. See `SiteChange.change`."""
        return at.by_row(value, self.factor) * value


@dataclass(frozen=True, eq=False)
class Put(SiteChange):
    """Puts a tensor in the place of what stands there.

    Attributes:
        tensor: what broadcasts to the site.
    """

    tensor: Tensor

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return the tensor. See `SiteChange.change`."""
        return at.fitted(value, self.tensor).expand(value.shape)


@dataclass(frozen=True, eq=False)
class Zero(SiteChange):
    """Puts zeros."""

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return zeros. See `SiteChange.change`."""
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Detach(SiteChange):
    """Leaves the values and lets no gradient through."""

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return the values without their graph. See `SiteChange.change`."""
        return value.detach()


def change_of(given: Any) -> Any:
    """Return what is called with (value, at): a tensor is put there.

    Args:
        given: a tensor, a `SiteChange` or a function.
    """
    return Put(given) if isinstance(given, Tensor) else given
