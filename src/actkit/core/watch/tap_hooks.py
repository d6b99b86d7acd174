"""How tensors at taps are watched and replaced: one hook before and one after each module, and inside attention.

A tensor that several layers are called with is replaced at all of them, and one that also passes its block by is
changed there too: see `shared` and `passing` of a tap (`core/model/sites.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from actkit.core.forward.hooks import After, Before, hooked
from actkit.core.model.sites import Tap, read_tap, write_tap
from actkit.core.watch.inside_attention import inside_attention


@contextmanager
def tapped(
    model: nn.Module,
    taps: Iterable[Tap],
    see: Callable[[Tap, Tensor, Tensor | None], Tensor | None],
    rotary: Callable[[], Any] = lambda: None,
    *,
    changes: bool = False,
    alike: bool = False,
) -> Iterator[None]:
    """Call `see(tap, tensor, tokens)` whenever the tensor of a tap passes by, as long as a context lasts.

    Args:
        model: neither compiled nor sharded.
        taps: what is watched.
        see: as in `tap_hooks`.
        rotary: as in `tap_hooks`.
        changes: what `see` returns takes the tensor's place.
        alike: that is always equal to the tensor, so that whoever looks for hooks need not mind these.

    Yields:
        Nothing.
    """
    taps = list(taps)
    before, after = tap_hooks(taps, see, rotary)
    inside = [tap for tap in taps if tap.where == "inside"]
    seen = see if changes else lambda *given: see(*given) and None  # type: ignore[func-returns-value]
    with (
        hooked(model, before=before, after=after, replacing=changes, marked=not alike),
        inside_attention(model, inside, lambda tap, value: seen(tap, value, None)),
    ):
        yield


def tap_hooks(
    taps: Iterable[Tap],
    see: Callable[[Tap, Tensor, Tensor | None], Tensor | None],
    rotary: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Before], dict[str, After]]:
    """Make one hook before and one after each watched module; they call `see(tap, tensor, tokens)`.

    Args:
        taps: what is watched.
        see: a tensor that it returns stands at the site from there on, if the hooks are registered as replacing.
            tokens:
            inside an expert, which of the batch's tokens (flat) the rows are.
        rotary: gives (cos, sin), if all else fails.

    Returns:
        What to call before and after which modules, by path.
    """
    taps = [tap for tap in taps if tap.where != "inside"]
    tables: dict[str, Any] = {}  # attention path -> (cos, sin) of its running call
    tokens: dict[str, Tensor] = {}  # expert path -> its running call's tokens
    shared: dict[Tap, tuple[Any, Any, set[str]]] = {}  # what was read and put there, and who is still to be given it
    passing: dict[str, Tensor] = {}  # path -> what is still to be added at its output
    before: dict[str, list[Before]] = {}
    after: dict[str, list[After]] = {}

    def keep_tables(path: str) -> Before:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tables[path] = kwargs.get("position_embeddings")

        return hook

    def keep_tokens(path: str) -> Before:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens[path] = args[1] if len(args) > 1 else kwargs["rows"]

        return hook

    def read(tap: Tap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
            angles = (tables.get(tap.attention or "") or rotary()) if tap.rotary else None
            value = read_tap(tap, args, kwargs, output, angles)
            other = see(tap, value, tokens.get(tap.expert or ""))
            if other is None:
                return None
            if tap.passing is not None:
                passing[tap.passing] = other - value
            if tap.shared:
                shared[tap] = (value, other, set(tap.shared))
            return write_tap(tap, other, value, args, kwargs, output, angles)

        return hook

    def give(tap: Tap, path: str) -> Before:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value, other, waiting = shared.get(tap, (None, None, set()))
            if path not in waiting:
                return None
            if read_tap(replace(tap, path=path), args, kwargs) is not value:
                raise ValueError(
                    f"site: {path} was called with another tensor than {tap.path}, so what was put there does not "
                    f"reach it; change layer.input of each of them."
                )
            waiting.discard(path)
            if not waiting:
                del shared[tap]
            return write_tap(tap, other, value, args, kwargs)

        return hook

    def add_passing(path: str) -> After:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            added = passing.pop(path, None)
            if added is None:
                return None
            if isinstance(output, Tensor):
                return _sum(output, added)
            return type(output)((_sum(output[0], added), *output[1:]))

        return hook

    for path in dict.fromkeys(tap.attention for tap in taps if tap.attention):
        before.setdefault(path, []).append(keep_tables(path))
    for path in dict.fromkeys(tap.expert for tap in taps if tap.expert):
        before.setdefault(path, []).append(keep_tokens(path))
    for path in dict.fromkeys(tap.passing for tap in taps if tap.passing):
        after.setdefault(path, []).append(add_passing(path))
    for tap in taps:  # after those above, which they need
        where: dict[str, list[Any]] = before if tap.where == "input" else after
        where.setdefault(tap.path, []).append(read(tap))
        for path in tap.shared:
            before.setdefault(path, []).append(give(tap, path))
    return {path: in_turn(each) for path, each in before.items()}, {path: in_turn(each) for path, each in after.items()}


def _sum(output: Tensor, added: Tensor) -> Tensor:
    """The sum, where an output may have more columns than channels (`hidden_columns` of a block)."""
    rows = added.reshape(*output.shape[:-1], -1)
    return output + nn.functional.pad(rows, (0, output.shape[-1] - rows.shape[-1]))


def in_turn(hooks: list[Any]) -> Callable[..., Any]:
    """Return one hook that calls several; each sees what those before it returned in place of what came.

    Args:
        hooks: in their order.
    """

    def call(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        changed = None
        for hook in hooks:
            found = hook(module, args, kwargs, *output)
            if found is not None:
                changed = found
                if output:
                    output = (found,)
                else:
                    args, kwargs = found
        return changed

    return call
