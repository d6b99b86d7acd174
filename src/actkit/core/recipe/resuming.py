"""Passes over a block that begin behind what they have in common with the pass before.

A transform that goes through a block layer by layer sees it again after every edit. What attention's last layer reads
is the same until something before that layer is changed, and what it gives until it is changed itself; so it is with
the MLP's last layer. Both are kept. As long as they hold, a module stands in for attention or MLP that calls the last
layer on what was kept, or gives what that gave; the norm in front, which nothing else reads, is left out. The numbers
are the same, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from actkit.core.edit.edits import standing_in
from actkit.core.forward.hooks import Before, hooked
from actkit.core.ground.modules import is_within
from actkit.core.recipe.recording import Passing, Tail


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
            keep: what is read now, and what last layers give.
        """
        watched, states = list(watched), {tail.path: self._state(tail) for tail in self.tails}
        known = [tail for tail in self.tails if self._holds(tail, states[tail.path], watched)]
        unknown = [tail for tail in self.tails if tail not in known] if keep else []
        found: dict[str, list[_Versioned]] = {tail.last: [] for tail in unknown}

        def read(path: str) -> Before:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if args:
                    found[path].append(_Versioned(args[0]))

            return hook

        self._standing = [self._stand_in(tail, watched, keep) for tail in known]
        instead: dict[str, nn.Module] = {each.tail.path: each for each in self._standing}
        norms = [tail.norm for tail in known if tail.norm is not None and tail.norm not in watched]
        instead |= {norm: Passing(self.model.get_submodule(norm)) for norm in norms}
        try:
            with standing_in(self.model, instead), hooked(self.model, before={path: read(path) for path in found}):
                yield
        finally:
            self._standing = []
        for tail in unknown:
            if len(found[tail.last]) == calls:
                self._kept[tail.path] = _Kept(found[tail.last], states[tail.path])

    def _stand_in(self, tail: Tail, watched: list[str], keep: bool) -> _Resumed:
        """What stands in for a part; its last layer runs if there is a hook on it, or it is another one by now."""
        kept, last = self._kept[tail.path], self._modules(tail.last)
        if kept.last != last:
            kept.outputs, kept.last = [None] * len(kept.inputs), last
        seen = any(is_within(path, tail.last) for path in watched)
        return _Resumed(tail, kept, reuse=not seen, keep=keep)

    def _holds(self, tail: Tail, state: Any, watched: list[str]) -> bool:
        """Whether what the last layer of a part reads is known and still the same."""
        kept = self._kept.get(tail.path)
        if kept is None or kept.state != state or self.model.get_submodule(tail.path) is not tail.module:
            return False
        if any(is_within(path, tail.path) and not is_within(path, tail.last) for path in watched if path != tail.path):
            return False
        return all(each.unchanged for each in kept.inputs)

    def _state(self, tail: Tail) -> Any:
        """The modules that begin before the last layer, their tensors with versions, and the settings of the model."""
        modules = self._modules(self.block)
        before = {name: found for name, found in modules.items() if not tail.comes_after(name)}
        config: Any = getattr(self.model, "config", None)
        settings = (config.to_dict(), config._attn_implementation) if hasattr(config, "to_dict") else None
        return before, settings

    def _modules(self, path: str) -> dict[str, Any]:
        """The modules at and inside of a path, with their tensors and the versions of these."""
        return {
            name: (_Same(module), [(_Same(each), each._version) for each in _tensors(module)])
            for name, module in self.model.get_submodule(path).named_modules(prefix=path)
        }


class _Versioned:
    """A tensor as it is now."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    @property
    def unchanged(self) -> bool:
        """Whether nobody has changed it in place since."""
        return self.tensor._version == self.version


class _Kept:
    """What the last layer of a part read and gave, per call, and for which modules that holds."""

    def __init__(self, inputs: list[_Versioned], state: Any) -> None:
        self.inputs, self.state = inputs, state
        self.outputs: list[_Versioned | None] = []
        self.last: Any = None  # the layer that gave the outputs


class _Resumed(nn.Module):
    """Stands in for a part: calls its last layer on what was kept. Its submodules are those of the part.

    Args:
        tail: the part.
        kept: of it.
        reuse: what the layer gave before.
        keep: what the layer gives.
    """

    def __init__(self, tail: Tail, kept: _Kept, reuse: bool, keep: bool) -> None:
        super().__init__()
        self.tail, self.kept, self.reuse, self.keep, self.index = tail, kept, reuse, keep, 0
        for name, module in tail.module.named_children():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the part would return; its arguments do not matter."""
        known = self.kept.outputs[self.index]
        if self.reuse and known is not None and known.unchanged:
            return self.tail.around(known.tensor)
        last = self.get_submodule(self.tail.last.removeprefix(f"{self.tail.path}."))
        output = last(self.kept.inputs[self.index].tensor)
        if self.keep:
            self.kept.outputs[self.index] = _Versioned(output)
        return self.tail.around(output)

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
