"""The Transform contract: what a method is that changes a trained model once.

A transform is a frozen pydantic model, so that a YAML recipe and a Python call are checked alike. The runner
(`core/recipe/runner.py`) asks it per block: what do you want to see (`observe`), which edits follow (`edit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from actkit.core.edit.edits import Edit, Note, Skip
from actkit.core.ground import registry
from actkit.core.model.anatomy import Anatomy, Block, Linear, Site
from actkit.core.model.parts import Convolution
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.scope import Scope
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.watch.statistics import Statistic

Target = Linear | Convolution | str  # a string is the name of a parameter, or the path of a module or nonlinearity


class Transform(BaseModel):
    """Changes a trained model once, from what calibration saw; produces edits.

    Attributes:
        only: the blocks, or the roles of linear layers in some blocks, that it is limited to; None for the whole model.
        tags: what the class declares about itself.
        not_proposed: why the class proposes nothing to the search, if it does not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    only: Scope | None = None
    tags: ClassVar[Tags] = Tags()
    not_proposed: ClassVar[str] = "it proposes nothing to the search; try it with recipes="

    @model_serializer(mode="wrap")
    def _without_no_scope(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A scope is written if there is one."""
        found = handler(self)
        if found.get("only") is None:
            found.pop("only", None)
        return found

    @model_validator(mode="after")
    def _can_be_limited(self) -> Self:
        reason = None if self.only is None else self.cannot_be_limited(whole_blocks=self.only.whole_blocks)
        if reason is not None:
            raise ValueError(f"only: {self.only} was given, and {type(self).__name__} {reason}; leave `only` out")
        return self

    @classmethod
    def cannot_be_limited(cls, *, whole_blocks: bool) -> str | None:
        """Say why `only` may not limit it, or None.

        Args:
            whole_blocks: to some blocks, else to some layers of blocks.
        """
        if cls.tags.spans_blocks:
            return "changes all blocks together"
        if cls.plan is not Transform.plan:
            return "plans on the whole model"
        if not cls.tags.parts:
            return "goes by modules, not by blocks"
        if not whole_blocks and not cls.tags.by_layer:
            return "changes more of a block than single layers, so give whole blocks: {block: ...}"
        return None

    def within(self, block: Block) -> Block | None:
        """Return a block as far as this transform may change it; None if not at all.

        Args:
            block: of the model.
        """
        return block if self.only is None else self.only.within(block)

    def __eq__(self, other: object) -> bool:
        """Of one class and with equal settings; what a run left in it (a batch, modules) does not count."""
        return type(self) is type(other) and self.model_dump() == other.model_dump()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), repr(self.model_dump())))

    @property
    def name(self) -> str:
        """The registered name.

        Raises:
            RecipeError: the class is not registered.
        """
        return registry.method_name(type(self))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of ActLinear that it fills at its settings; the default are those of its tags."""
        return self.tags.slots

    @property
    def needs_data(self) -> bool:
        """Whether it needs calibration batches at its settings; the default is what its tags say."""
        return self.tags.needs_data

    @property
    def least_coverage(self) -> float:
        """Share of the parameters inside blocks that it touches at its settings; the default is what its tags say."""
        return self.tags.least_coverage

    @property
    def label(self) -> str:
        """A short text for tables: the name and the settings that differ from the defaults."""
        given = ", ".join(f"{key}={value}" for key, value in self.model_dump(exclude_defaults=True).items())
        return f"{type(self).__name__}({given})"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Return itself with settings that need the whole model (a budget, a global search). The default changes none.

        Args:
            trial: tries edits on the model.
            data: calibration batches.
        """
        return self

    def targets(self, block: Block) -> Iterable[Target]:
        """Say what it means to change in a block, for the report of coverage.

        Args:
            block: to be changed.

        Returns:
            Linear layers and convolutions, of which the weights count; names of parameters; paths of modules, all of
            whose
            parameters count. An activation function (`block.nonlinearities()`) counts for the weights of the layers
            that it
            stands between. The default are all linear layers.
        """
        return block.linears()

    def passes(self, tokens: int, rows: int) -> float:
        """Return how many forward passes over the calibration data it costs, for the estimate of time.

        Args:
            tokens: how many real tokens the data hold; of images, how many these are.
            rows: how many rows, texts or images.
        """
        return self.tags.passes

    def memory(self, block: Block, length: int) -> int:
        """Return the bytes that it holds at once while it changes a block, beside what it observes and records.

        Args:
            block: to be changed.
            length: rows of hidden states that the longest example has: its tokens, or patches.
        """
        return 0

    def observe(self, block: Block) -> Mapping[Site, Statistic | Sequence[Statistic]]:
        """Say which statistics it needs of a block; several of one site are given as a sequence.

        Args:
            block: to be changed.
        """
        return {}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        """Return the edits of a block; each is applied as it is yielded, so the code after a yield sees it done.

        Args:
            block: to be changed.
            seen: what calibration saw of it.
        """
        raise NotImplementedError

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        """Return the edits of what stands before and behind the blocks, such as embedding and head; the default none.

        Asked once, after the last block; each is applied as it is yielded.

        Args:
            view: of the model, its blocks changed.
        """
        return ()

    def conflicts(self, earlier: Transform) -> str | None:
        """Say why it may not follow another transform, or None.

        The default refuses the same method, or the same slot, twice.

        Args:
            earlier: in the recipe, or already on the model.
        """
        if type(earlier) is type(self):
            return f"{type(self).__name__} was applied already; undo it first, or load the original model"
        shared = [slot for slot in self.slots if slot in earlier.slots]
        if shared:
            return f"both fill the {shared[0]} slot of the layers; undo the first one, or use only one of them"
        return None

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        """Return settings that the search should try on a model, and what it should not try, with the reasons.

        The default proposes nothing, because of what the class says in `not_proposed`.

        Args:
            profile: of the model.
            shapes: of its layers.
        """
        yield LeftOut(registry.method_name(cls), cls.not_proposed)

    @classmethod
    def identity(cls) -> Self | None:
        """Return the setting that changes nothing, or None if there is none."""
        return None
