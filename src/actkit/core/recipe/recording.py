"""How the blocks of a model are called on a batch: their arguments, and what runs inside of them.

The first batch, and the first of each shape, runs through the whole model. For the others modules stand in for the
blocks that give back the hidden states they get, so that the model makes its masks and rotary tables and nothing else.
Whether the calls are the same that way is tried on the first batch. They are not if a block is told what an earlier one
computed, beside its hidden states; then every batch runs through the model.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import standing_in
from actkit.core.forward.batch import BatchContext, arguments, forward
from actkit.core.forward.hooks import StopForward, hooked
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.modules import is_within
from actkit.core.model.anatomy import Anatomy, Block, Linear
from actkit.core.watch.calls import Call

Around = Callable[[Tensor], Any]  # makes what a module returns of its first tensor


@dataclass(frozen=True)
class Tail:
    """A part of a block whose output is that of one of its layers: attention or MLP.

    Attributes:
        path: of the part.
        module: that stood there.
        last: path of the layer.
        norm: path of a norm whose output nothing else reads, or None.
        before: paths of the modules that begin before the layer.
        behind: paths of those that begin with it or after it, and not before.
        around: what the part returns, of the layer's output.
    """

    path: str
    module: nn.Module
    last: str
    norm: str | None
    before: frozenset[str]
    behind: frozenset[str]
    around: Around

    def comes_after(self, path: str) -> bool:
        """Whether a module of the block, which may be new, has no part in what the layer reads."""
        return path not in self.before and any(is_within(path, other) for other in self.behind)


class Recorder:
    """Records the calls of the blocks, batch by batch.

    Args:
        anatomy: of the model.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.paths = [block.path for block in anatomy.blocks]
        self.tails: dict[str, tuple[Tail, ...]] = {}  # path of a block -> its parts that end with a layer
        self._once: dict[Any, frozenset[str]] = {}  # shape of a batch -> the modules in blocks that ran once
        self._around: dict[str, Around | None] = {}  # path of a block -> what it returns, of its hidden states
        self._without_blocks: bool | None = None  # whether the calls are the same without them
        self.chained: bool | None = None  # whether each block gives what the next one is called with; None: not known

    def record(self, batch: Any, context: BatchContext, states: bool = False) -> tuple[list[Call], frozenset[str]]:
        """Return the call of each block, and which modules inside of them run once.

        Args:
            batch: that the model is called on.
            context: of the batch.
            states: the hidden states that blocks are called with are wanted of all blocks, not of the first alone.

        Raises:
            UnsupportedModelError: a block runs several times in one pass, or not at all.
        """
        if self.paths == [""]:
            self.chained = True
            return [Call(*arguments(self.anatomy.model, batch), context)], frozenset()  # it does not run here
        shape = _shapes(batch)
        if self._without_blocks and shape in self._once and not states:
            return self._run_without_blocks(batch, context), self._once[shape]
        first = not self._once
        calls = self._run(batch, context, whole=first, shape=shape)
        if first:
            self.chained = self.chained and self._replays(calls)
            self._without_blocks = self._same_without_blocks(batch, context, calls)
        return calls, self._once[shape]

    def _run(self, batch: Any, context: BatchContext, whole: bool, shape: Any) -> list[Call]:
        """Run the model. whole: on behind the last block, to see whether any runs again."""
        seen = _Calls(context)
        started: list[str] = []
        outputs: dict[str, tuple[Any, int]] = {}
        runs: Counter[str] = Counter()
        ends = [end for block in self.anatomy.blocks for end in _ends(block)] if whole else []
        last = {path: layer for path, layer, _ in ends}
        returns: dict[str, Around | None] = {}
        given: list[Any] = [None]  # by the block that ran last
        chained = []

        def begin(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                started.append(path)
                if path in self.paths:
                    call = seen.keep(path, args, kwargs)
                    if whole and path != self.paths[0]:
                        chained.append(_equal(given[0], call.hidden))

            return hook

        def end(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                runs.update((path,))
                if path in self.paths and whole:
                    self._around[path] = _around(output, drop=True)
                    given[0] = _first(output)
                if path in last.values() and isinstance(output, Tensor):
                    outputs[path] = (output, output._version)
                elif path in last:
                    own = outputs.get(last[path], (None, 0))
                    if own[0] is not None and _first(output) is own[0] and own[0]._version == own[1]:
                        returns[path] = _around(output)
                if path in self.paths:
                    outputs.clear()  # all its parts have ended

            return hook

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(seen.calls) == len(self.paths) and not whole:  # logits are the largest tensor of a language model
                raise StopForward

        model = self.anatomy.model
        inside = [name for name, _ in model.named_modules() if any(is_within(name, path) for path in self.paths)]
        before = {path: begin(path) for path in inside} | {
            path: stop for path in self.anatomy.head if path not in inside
        }
        args, kwargs = arguments(model, batch)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            kwargs.setdefault("logits_to_keep", 1)
        with torch.no_grad(), hooked(model, before=before, after={path: end(path) for path in inside}):
            with suppress(StopForward):
                model(*args, **kwargs)
        once = frozenset(path for path, times in runs.items() if times == 1)
        self._once[shape] = next((known for known in self._once.values() if known == once), once)
        calls = seen.of(self.paths)
        if whole:
            self.tails = self._tails(ends, returns, once, started)
            self.chained = all(chained) and not seen.overwritten
        return calls

    def _replays(self, calls: list[Call]) -> bool:
        """Whether a block gives the same when it is called alone: one of each kind is."""
        kinds = set()
        for block, call, following in zip(self.anatomy.blocks, calls, calls[1:], strict=False):
            module = self.anatomy.model.get_submodule(block.path)
            told = [*call.args[1:], *(value for name, value in call.kwargs.items() if name != "hidden_states")]
            kind = (*map(type, module.modules()), *map(id, told))
            if kind not in kinds and not torch.equal(call.replay(module), following.hidden):
                return False
            kinds.add(kind)
        return True

    def _tails(
        self,
        ends: Iterable[tuple[str, str, str | None]],
        returns: Mapping[str, Around | None],
        once: frozenset[str],
        started: list[str],
    ) -> dict[str, tuple[Tail, ...]]:
        found: dict[str, list[Tail]] = {block: [] for block in self.paths}
        for path, last, norm in ends:
            around, module = returns.get(path), self.anatomy.model.get_submodule(path)
            if around is None or not {path, last} <= once or _has_hooks(module):  # hooks would not see what is left out
                continue
            before = frozenset(started[: started.index(last)])
            behind = frozenset(started) - before
            block = next(each for each in self.paths if is_within(path, each))
            found[block].append(Tail(path, module, last, norm if norm in once else None, before, behind, around))
        return {block: tuple(tails) for block, tails in found.items()}

    def _run_without_blocks(self, batch: Any, context: BatchContext) -> list[Call]:
        seen = _Calls(context)
        model = self.anatomy.model

        def keep(path: str) -> Callable[..., None]:
            def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.keep(path, args, kwargs)
                if len(seen.calls) == len(self.paths):
                    raise StopForward

            return call

        blocks = {path: Passing(model.get_submodule(path), keep(path), self._around[path]) for path in self.paths}  # type: ignore[arg-type]
        with torch.no_grad(), standing_in(model, blocks), suppress(StopForward):
            forward(model, batch)
        return seen.of(self.paths)

    def _same_without_blocks(self, batch: Any, context: BatchContext, calls: list[Call]) -> bool:
        """Whether the blocks are called with the same, but for their hidden states, if none of them computes any."""
        if not all(self._around.get(path) for path in self.paths):
            return False
        try:
            found = self._run_without_blocks(batch, context)
        except Exception:  # whatever a model does with what it gets back
            return False
        nothing = torch.empty(0)
        alike = [
            _equal((one.args, one.kwargs), (other.args, other.kwargs))
            for one, other in zip(
                [calls[0], *(call.with_hidden(nothing) for call in calls[1:])],
                [found[0], *(call.with_hidden(nothing) for call in found[1:])],
                strict=True,
            )
        ]
        return all(alike)


class _Calls:
    """The calls of the blocks in one pass."""

    def __init__(self, context: BatchContext) -> None:
        self.context = context
        self.calls: dict[str, Call] = {}
        self._versions: dict[str, int] = {}

    @property
    def overwritten(self) -> bool:
        """Whether hidden states that a block was called with were changed in place since."""
        return any(self.calls[path].hidden._version != version for path, version in self._versions.items())

    def keep(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if path in self.calls:
            raise UnsupportedModelError(
                f"model: the block {path} runs several times in one pass, so its inputs are not those of one "
                f"place; such a model is not changed block by block."
            )
        call = self.calls[path] = Call(args, dict(kwargs), self.context)
        self._versions[path] = call.hidden._version
        return call

    def of(self, paths: list[str]) -> list[Call]:
        for path in paths:
            if path not in self.calls:
                raise UnsupportedModelError(
                    f"model: the block {path} does not run when the model is called on this batch, so nothing can be "
                    f"seen there; give batches that reach all blocks."
                )
        return [self.calls[path] for path in paths]


class Passing(nn.Module):
    """Stands in for a module: gives back the hidden states that it gets. What is read off it is the module's.

    Args:
        module: that it stands in for.
        called: is told the arguments of each call.
        around: what the module returns, of hidden states.
    """

    def __init__(
        self,
        module: nn.Module,
        called: Callable[..., None] = lambda args, kwargs: None,
        around: Around = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is no submodule
        self._called, self._around = called, around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what came first."""
        self._called(args, kwargs)
        return self._around(args[0] if args else kwargs["hidden_states"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module[0], name)


def _ends(block: Block) -> Iterator[tuple[str, str, str | None]]:
    """The parts of a block that may end with a layer of their own, each with the layer and the norm in front."""
    attention, mlp = block.attention, block.mlp
    attentions: list[tuple[str, Any, Linear]] = (
        [] if attention is None else [("attention", attention, attention.output)]
    )
    mlps: list[tuple[str, Any, Linear]] = [] if mlp is None else [("mlp", mlp, mlp.down)]
    for role, part, last in attentions + mlps:
        norm = part.norm
        alone = norm is not None and norm.role == role and not norm.feeds_residual and not block.other
        if last.path.startswith(f"{part.path}."):
            yield part.path, last.path, norm.path if norm is not None and alone else None


def _around(output: Any, drop: bool = False) -> Around | None:
    """What a module returns, as a function of its first tensor; None if it returns more tensors.

    drop: these are None then, such as attention weights that the model does not ask for.
    """
    if isinstance(output, Tensor):
        return lambda tensor: tensor
    if type(output) is not tuple or not output or not isinstance(output[0], Tensor):
        return None
    if not drop and any(each is not None for each in output[1:]):
        return None
    rest = (None,) * (len(output) - 1)
    return lambda tensor: (tensor, *rest)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward pass that was put into it, as accelerate does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _shapes(value: Any) -> Any:
    """The shapes of all tensors in a batch, with their keywords or places."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((key, _shapes(each)) for key, each in value.items())
    return tuple(map(_shapes, value)) if isinstance(value, tuple | list) else None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and _all_equal(one, other)
    return bool(one == other)


def _all_equal(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(_equal(a, b) for a, b in zip(one, other, strict=True))
