"""What a transform is given besides a block: what calibration saw of it, and a way to try edits on the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from actkit.core.edit.edits import Edit, get_module, temporarily
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground import offload, processes
from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.model.anatomy import Anatomy, Block, Site
from actkit.core.recipe.blockwise import Walk
from actkit.core.recipe.tags import Tags
from actkit.core.watch.calls import Call
from actkit.core.watch.streaming import Statistic


class Seen:
    """What calibration saw of one block: statistics by site, and recorded calls of its submodules.

    Of several processes each has the calls of its own batches, which may be none; statistics and what goes through
    `total` are those of all.

    Args:
        method: the name of the class that sees it.
        tags: of that class.
        walk: None if it needs no data.
        block: what was seen.
        statistics: by site.
        targets: see the property.
    """

    def __init__(
        self,
        method: str,
        tags: Tags,
        walk: Walk | None,
        block: Block,
        statistics: Mapping[Site, Any] | None = None,
        targets: Sequence[Tensor] | None = None,
    ) -> None:
        """What the class `method` with these tags sees; walk: None if it needs no data."""
        self._method, self._tags = method, tags
        self._walk, self._block, self._statistics = walk, block, statistics or {}
        self._targets = targets

    def __getitem__(self, site: Site) -> Any:
        if site not in self._statistics:
            names = ", ".join(map(str, self._statistics)) or "none"
            raise KeyError(f"site: {site} was not observed; `observe` asked for {names}.")
        return self._statistics[site]

    @property
    def tokens(self) -> int:
        """How many real tokens (or images) the calibration data hold."""
        return self._walked("tokens").tokens_before[-1]

    @property
    def block_calls(self) -> list[Call]:
        """The block's own calls on its stream: replay them to evaluate the whole block."""
        return self.calls_of_block(self._tags.observed_stream)

    def calls_of_block(self, stream: str) -> list[Call]:
        """Return the block's own calls on one of the streams that the transform declares.

        Args:
            stream: 'original' or 'edited'.
        """
        walk = self._walked("block_calls")
        check_shares(self._method, self._tags)
        return walk.calls(self._block.index, stream)

    @property
    def targets(self) -> Sequence[Tensor]:
        """What the block gave on each call of the original stream, before any transform of the recipe changed it.

        Raises:
            RecipeError: the transform does not declare `needs_targets`, and stream 'original' or 'both'.
        """
        if self._targets is None:
            raise RecipeError(
                f"targets: they were not kept for {self._method}; declare Tags(needs_targets=True, stream='both')."
            )
        return self._targets

    def rows_apart(self, rows: int) -> bool:
        """Say whether the block gives the same for some rows of a call alone, so that calls can be cut.

        Args:
            rows: how many; more than a call has need no cutting.
        """
        walk = self._walked("rows_apart")
        longer = (call for call in self.block_calls if call.context.batch_size > rows)
        call = next(longer, None)
        return call is None or walk.rows_apart(self._block.index, call, rows)

    def observe(self, wanted: Mapping[Site, Statistic | Sequence[Statistic]]) -> Mapping[Site, Any]:
        """Return fresh statistics of the block as it stands now, behind the edits that were yielded so far.

        It costs a pass over the block up to the last of the sites; if the transform declares `observes_in_turn`, only
        what the edits since the last pass have changed runs again. What it holds counts in the memory plan if the
        transform says so (`Transform.memory`).

        Args:
            wanted: site -> one statistic or several.

        Raises:
            DataError: the transform runs without data.
        """
        walk, stream = self._walked("observe"), self._tags.observed_stream
        return walk.observe(self._block.index, stream, wanted, in_turn=self._tags.observes_in_turn)

    def trial(self, edits: Iterable[Edit]) -> AbstractContextManager[nn.Module]:
        """Replay calls on the block with edits, which are undone at the end of the context.

        Args:
            edits: applied in their order.
        """
        return temporarily(self._walked("trial").anatomy.model, edits)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of what each process computed from its calls (errors, counts).

        What a transform chooses by calls goes through here, so that all processes choose alike; it then declares
        `Tags(sums_calls=True)`.

        Args:
            values: of this process, of one shape in all.
        """
        return processes.total(f"a total of {self._method} in {self._block.path}", values)

    def calls(self, path: str, *, stream: str | None = None, max_tokens: int | None = None) -> list[Call]:
        """Return the calls that a module gets when the block, *as it stands now*, runs on its inputs.

        `call.replay(module)` runs a module on them. Inside an expert, the mask of a call is [rows]: which of the tokens
        sent
        there are real.

        Args:
            path: of the module.
            stream: 'original' or 'edited' inputs of the block; None as the transform declares.
            max_tokens: stop at the row that reaches so many real tokens.

        Raises:
            RecipeError: there are several processes, and the transform does not declare `sums_calls`.
            DataError: the transform runs without data.
        """
        check_shares(self._method, self._tags)
        walk = self._walked("calls")
        model = walk.anatomy.model
        expert = self._expert_around(path)
        recorded: list[Call] = []
        sent: list[Tensor] = []  # to the expert at or around `path`: flat indices of the tokens
        for _, call in walk.some_calls(self._block.index, stream or self._tags.observed_stream, max_tokens):

            def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                sent[:] = [args[1]]

            def keep(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                call: Call = call,
            ) -> None:
                if path == expert:
                    enter(module, args, kwargs)
                kwargs = {key: value for key, value in kwargs.items() if "past_key_value" not in key}
                args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # a block may work in place
                context = call.context
                if expert is not None and context.mask is not None:
                    context = replace(context, mask=context.mask.flatten()[sent[0]])
                recorded.append(Call(args, kwargs, context))

            with hooked(model, before={path: keep} if expert in (None, path) else {expert: enter, path: keep}):
                call.replay(get_module(model, self._block.path))
        return recorded

    def _walked(self, what: str) -> Walk:
        if self._walk is None:
            raise DataError(f"{what}: this transform ran without data; declare Tags(needs_data=True).")
        return self._walk

    def _expert_around(self, path: str) -> str | None:
        """The path of the expert that is, or holds, the module at `path`, if one does."""
        experts = self._block.experts
        if experts is None or not path.startswith(experts.path + "."):
            return None
        return f"{experts.path}.{path.removeprefix(experts.path + '.').partition('.')[0]}"


class Trial:
    """Tries edits over the whole model and takes them back: for transforms that search in `plan`.

    Args:
        view: of the model.
        batches: calibration data.
    """

    def __init__(self, view: Anatomy, batches: Sequence[Any]) -> None:
        self.anatomy, self.model, self.batches = view, view.model, batches

    def __call__(self, edits: Iterable[Edit]) -> AbstractContextManager[nn.Module]:
        """Apply edits for as long as a context lasts; they are undone at its end, also after an exception.

            with trial(edits) as model:
                measure(model)

        Args:
            edits: applied in their order.

        Raises:
            UnsupportedModelError: accelerate offloads the model.
        """
        offload.refuse_offloaded(self.model, "a search tries changes of the whole model at once")
        return temporarily(self.model, edits)

    def outputs(self) -> Iterator[Tensor]:
        """Yield the model's first output on each calibration batch: logits or hidden states."""
        with evaluating(self.model):
            for batch in self.batches:
                yield first_tensor(forward(self.model, batch))


def check_shares(method: str, tags: Tags) -> None:
    """Refuse a transform that goes by recorded calls of which it has only a share.

    Args:
        method: the name of its class.
        tags: of its class.

    Raises:
        RecipeError: several processes have a share each, and it does not say that it adds up what it computes.
    """
    if processes.several() and not tags.sums_calls:
        raise RecipeError(
            f"{method}: it goes by recorded calls, and each of the {processes.count()} processes has only a share of "
            f"them; run it in one process, without torchrun. Its author can add up with seen.total what it computes "
            f"from calls, and declare Tags(sums_calls=True)."
        )
