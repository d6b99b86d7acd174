"""Passes over a block that begin behind what they have in common with the pass before.

A transform that goes through a block layer by layer sees it again after every edit. What attention's last layer reads
is the same until something before that layer is changed, and so is what the MLP's last layer reads. Both are kept; as
long as they hold, a module stands in for attention or MLP that calls the last layer on what was kept. The numbers are
the same, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from actkit.core.edit.edits import standing_in
from actkit.core.forward.hooks import Before, hooked
from actkit.core.ground.modules import is_within
from actkit.core.recipe.recording import Tail


@dataclass(frozen=True)
class _Kept:
    """What the last layer of a part read, per call, each with the version of the tensor; and the state it holds for."""

    inputs: list[tuple[Tensor, int]]
    state: Any


class Resuming:
    """What is kept of one block on one stream.

    Args:
        model: that holds the block.
        block: its path.
        tails: its parts that end with a layer.
    """

    def __init__(self, model: nn.Module, block: str, tails: Sequence[Tail]) -> None:
        self.model, self.block, self.tails = model, block, tails
        self._kept: dict[str, _Kept] = {}
        self._standing: list[_Resumed] = []
        self._reading: dict[str, list[tuple[Tensor, int]]] = {}

    def begin(self, index: int) -> None:
        """Say which call runs next.

        Args:
            index: of the call among those of the stream.
        """
        for standing in self._standing:
            standing.index = index

    @contextmanager
    def passes(self, calls: int, watched: Iterable[str] = (), keep: bool = True) -> Iterator[None]:
        """Let the block begin behind what is known, and keep what its last layers read, as long as a context lasts.

        Args:
            calls: how many of the stream will run, all in their order.
            watched: paths of modules with hooks; a part that has one before its last layer runs as a whole.
            keep: what is read now.
        """
        watched, states = list(watched), {tail.path: self._state(tail) for tail in self.tails}
        known = [tail for tail in self.tails if self._holds(tail, states[tail.path], watched)]
        found: dict[str, list[tuple[Tensor, int]]] = {
            tail.last: [] for tail in self.tails if tail not in known and keep
        }
        self._standing = [_Resumed(tail, self._kept[tail.path].inputs) for tail in known]

        def read(path: str) -> Before:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if args:
                    found[path].append((args[0], args[0]._version))

            return hook

        standing = standing_in(self.model, {each.tail.path: each for each in self._standing})
        try:
            with standing, hooked(self.model, before={path: read(path) for path in found}):
                yield
        finally:
            self._standing = []
        for tail in self.tails:
            if len(found.get(tail.last, ())) == calls:
                self._kept[tail.path] = _Kept(found[tail.last], states[tail.path])

    def _holds(self, tail: Tail, state: Any, watched: list[str]) -> bool:
        """Whether what the last layer of a part reads is known and still the same."""
        kept = self._kept.get(tail.path)
        if kept is None or kept.state != state or self.model.get_submodule(tail.path) is not tail.module:
            return False
        if any(is_within(path, tail.path) and not is_within(path, tail.last) for path in watched if path != tail.path):
            return False
        return all(tensor._version == version for tensor, version in kept.inputs)

    def _state(self, tail: Tail) -> Any:
        """The modules that begin before the last layer, their tensors with versions, and the settings of the model."""
        before = {
            name: (_Same(module), [(_Same(each), each._version) for each in _tensors(module)])
            for name, module in self.model.get_submodule(self.block).named_modules(prefix=self.block)
            if not is_within(name, tail.last) and name not in tail.behind
        }
        config: Any = getattr(self.model, "config", None)
        settings = (config.to_dict(), config._attn_implementation) if hasattr(config, "to_dict") else None
        return before, settings


class _Resumed(nn.Module):
    """Stands in for a part: calls its last layer on what was kept. Its submodules are those of the part."""

    def __init__(self, tail: Tail, inputs: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.tail, self.inputs, self.index = tail, inputs, 0
        for name, module in tail.module.named_children():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        last = self.get_submodule(self.tail.last.removeprefix(f"{self.tail.path}."))
        return self.tail.around(last(self.inputs[self.index][0]))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.tail.module, name)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


class _Same:
    """Equal to that of the same object as long as it lives, and then to none; it does not keep it alive."""

    def __init__(self, value: Any) -> None:
        self.value = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        mine = self.value()
        return mine is not None and isinstance(other, _Same) and mine is other.value()

    __hash__ = None  # type: ignore[assignment]
