"""The edits of a recipe, kept, so that a longer recipe that begins with it does not compute them again.

    kept = Steps(1)
    apply(copy, "awq", batches, steps=kept)
    apply(another_copy, "awq,wina", batches, steps=kept)     # takes awq's edits, calibrates wina only

Both runs must have the same model, the same batches and the same first transforms: then the edits are the same, because
a transform sees of a block only what the transforms before it left there and what its stream brings. The modules that
an edit holds are shared by the models that take it, so none of them is to be changed in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from actkit.core.edit.edits import Edit, Note, Skip
from actkit.core.ground.errors import RecipeError
from actkit.core.recipe.transform import Transform

Step = Edit | Skip | Note


class Steps:
    """The edits that a recipe made, by transform and block.

    Args:
        count: of how many transforms, from the first on, the edits are kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._found: dict[tuple[int, int], list[Step]] = {}  # by transform and block

    def check(self, transforms: list[Transform]) -> None:
        """Refuse to keep the edits of a transform that later ones would have changed.

        On the edited stream, what enters a block depends on all transforms, those behind it in the recipe included.

        Args:
            transforms: of the recipe.

        Raises:
            RecipeError: a later transform would have to be seen by one whose edits are kept.
        """
        kept = transforms[: self.count]
        if len(transforms) > self.count and any(t.needs_data and t.tags.stream != "original" for t in kept):
            names = ", ".join(type(transform).__name__ for transform in kept)
            raise RecipeError(f"steps: {names} calibrates on the edited model, which later transforms change too.")

    @property
    def filled(self) -> bool:
        """Whether edits are held."""
        return bool(self._found)

    def take(self, position: int, block: int) -> list[Step] | None:
        """Return what a transform did to a block, if that is known.

        Args:
            position: of the transform in the recipe.
            block: its index.
        """
        return self._found.get((position, block))

    def keep(self, position: int, block: int, edits: Iterable[Step]) -> Iterator[Step]:
        """Yield the same edits, and keep them as they come.

        Args:
            position: of the transform in the recipe.
            block: its index.
            edits: of that transform on that block.
        """
        if position >= self.count:
            yield from edits
            return
        found: list[Step] = []
        for edit in edits:
            found.append(edit)
            yield edit
        self._found[position, block] = found
