"""Pooling by a poset in place of a network's own: max or average pooling (2024, arXiv:2412.06097).

    y = max over up-sets F of sum_(i in F) x_i, divided by the number of points

When to use it: on a network that you train behind it, if pooling reads signed values (before its ReLU). Behind a ReLU
all posets are average pooling, forward and nearly so backward. There are as many outputs as before.
Cost: no data; as the layer (`pooling.py`).
Settled here: windows that are square, without padding and dilation, and that hold as many points as the poset (4 for
those of the paper); other pooling, adaptive pooling and global pooling stay, with a line that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator
from torch import nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import Anatomy, Block
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform
from actkit.functions.posets.pooling import PosetPool2d
from actkit.functions.posets.poset import Poset

KINDS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
OTHERS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.FractionalMaxPool2d)


class ReplacePooling(Transform):
    """Pool by a poset in place of max or average pooling; train the model behind it.

    Attributes:
        poset: a number from 0 to 15 or a name on four points ('N', 'chain', 'antichain', 'diamond'), or relations such
            as 'a<b c<d', on as many points as a window has.
        kinds: what is replaced: 'max', 'avg' or both.
        where: patterns of paths; only what fits one is replaced.
        perm: point i of the poset reads place perm[i] of the window.
        normalize: divide by the number of points, so that outputs are as large as those of average pooling.

    Raises:
        ValueError: the poset is none.
    """

    poset: int | str = 12
    kinds: tuple[Literal["max", "avg"], ...] = ("max", "avg")
    where: tuple[str, ...] = ("*",)
    perm: tuple[int, ...] | None = None
    normalize: bool = True

    tags: ClassVar[Tags] = Tags(parts=False)
    not_proposed: ClassVar[str] = "the model must be trained behind it; put it into a recipe with a training"

    @field_validator("poset")
    @classmethod
    def _known(cls, poset: int | str) -> int | str:
        Poset.of(poset, 9)  # raises what is wrong with it
        return poset

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if not any(isinstance(found, Replace) for found in self._edits(trial.model)):
            left = "; ".join(
                f"{found.path}: {found.reason}" for found in self._edits(trial.model) if isinstance(found, Skip)
            )
            raise UnsupportedModelError(
                f"model: {type(trial.model).__name__} has no pooling to replace ({left or 'none of the kinds'}); see "
                f"`kinds` and `where`, or put a PosetPool2d into the model yourself."
            )
        return self

    def targets(self, block: Block) -> Iterable[Target]:
        return ()

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        return ()

    def conflicts(self, earlier: Transform) -> str | None:
        return None  # what an earlier one replaced is no pooling of torch any more

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        yield from self._edits(view.model)
        yield Note("model", "pooling is another function now: train the model behind this (actkit train)")

    def _edits(self, model: nn.Module) -> list[Replace | Skip]:
        found: list[Replace | Skip] = []
        for path, module in list(model.named_modules()):
            kind = next((name for name, cls in KINDS.items() if type(module) is cls), None)
            if not any(fnmatchcase(path, pattern) for pattern in self.where):
                continue
            if isinstance(module, OTHERS):
                found.append(Skip(path, f"a {type(module).__name__} has no windows of one size"))
            elif kind in self.kinds:
                reason = self._reason(module)
                found.append(Replace(path, self._pool(module)) if reason is None else Skip(path, reason))
        return found

    def _reason(self, module: Any) -> str | None:
        """Why a pooling stays as it is, or None."""
        sides = _pair(module.kernel_size)
        strides = _pair(module.kernel_size if module.stride is None else module.stride)
        if sides[0] != sides[1] or strides[0] != strides[1]:
            return f"its windows are {sides[0]} x {sides[1]}, and not square"
        if _pair(module.padding) != (0, 0) or _pair(getattr(module, "dilation", 1)) != (1, 1):
            return "it is padded or dilated"
        if getattr(module, "return_indices", False):
            return "it gives indices too"
        try:
            self._pool(module)
        except ValueError as error:
            return str(error)
        return None

    def _pool(self, module: Any) -> PosetPool2d:
        side, stride = _pair(module.kernel_size)[0], _pair(module.stride or module.kernel_size)[0]
        poset = Poset.of(self.poset, side**2)
        return PosetPool2d(poset, side, stride, self.perm, normalize=self.normalize, ceil=module.ceil_mode)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
