"""What every runtime must satisfy that decodes models: `check_runtime`, one small function per property.

    from actkit.testing import check_runtime

    def test_my_decoder():
        check_runtime(MyDecoder, model, range(1, 20), tolerance=1e-4)

A runtime computes a model another way, from its own memory (`core.measure.decoding.Decoder`): it must give what the
model gives, and give back what it took.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from types import FrameType, FunctionType, GeneratorType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import MemoryLimitError, UnsupportedModelError
from actkit.testing.checks import (
    Check,
    NotApplicable,
    State,
    assert_no_hook_left,
    equal,
    hooks_of,
    modes_of,
    run_checks,
    tensors_of,
    works,
)
from actkit.testing.models import TinyMlp

WORKSPACE = 1 << 20  # bytes that a runtime may hold beside weights and cache
SKIPPED = (type, ModuleType, FunctionType, FrameType, GeneratorType)  # what leads to everything else in the process
SHARE = 0.1  # by which what it holds may differ from what it says


@dataclass(frozen=True)
class RuntimeCase:
    """What all checks share.

    Attributes:
        make: makes the runtime.
        original: the model, as it was given.
        ids: a text.
        tolerance: how far logits may be from the model's own.
        other: a model that the runtime must refuse.
    """

    make: Callable[..., Any]
    original: nn.Module
    ids: list[int]
    tolerance: float
    other: nn.Module

    def model(self) -> Any:
        """A copy of the model."""
        return copy.deepcopy(self.original)

    def runtime(self, model: nn.Module | None = None, **settings: Any) -> Any:
        """A new runtime for the whole text."""
        return self.make(self.model() if model is None else model, capacity=len(self.ids), **settings)

    @cached_property
    def reference(self) -> Tensor:
        """The model's own logits: float32 [tokens, vocabulary]."""
        return reference(self.original, self.ids)

    @cached_property
    def expected(self) -> list[Tensor]:
        """The logits of a new runtime that reads one token after another."""
        return stepped(self.runtime(), self.ids)

    def assert_close(self, found: Tensor, place: int, what: str) -> None:
        """Assert that logits are those of the model after a token, within the stated tolerance.

        Args:
            found: [vocabulary].
            place: of the token, from 0.
            what: how to call the logits in the error.
        """
        expected = self.reference[place]
        assert found.dtype == torch.float32, f"{what} are {found.dtype}, not torch.float32"
        assert found.shape == expected.shape, f"{what} have the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error <= self.tolerance, f"{what} differ by {error:.3g} of the largest, {self.tolerance:g} was stated"


def check_runtime(
    make: Callable[..., Any],
    model: nn.Module,
    ids: Iterable[int],
    *,
    tolerance: float,
    unsupported: nn.Module | None = None,
) -> list[Check]:
    """Check everything that a runtime promises, on one model.

    Args:
        make: the class, or a function that calls it: make(model, capacity=tokens, decode_only=False).
        model: a language model that it takes; never changed, each check works on a copy.
        ids: a text of eight tokens or more.
        tolerance: how far logits may be from the model's own, as a share of the largest one.
        unsupported: a model that it must refuse; by default one that no library knows.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
        ValueError: there are fewer than eight tokens.
    """
    text = [int(token) for token in ids]
    if len(text) < 8:
        raise ValueError(f"ids: {len(text)} tokens were given; give eight or more.")
    case = RuntimeCase(make, model, text, tolerance, TinyMlp() if unsupported is None else unsupported)
    start = State.of(model)
    return run_checks(CHECKS, case, partial(_still, start, model))


def _still(start: State, model: nn.Module, name: str) -> None:
    start.compare(model, f"{name}: a copy was changed, and the original with it")


def reference(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """A model's own logits on a text: float32 [tokens, vocabulary]."""
    with evaluating(model):
        return model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def stepped(runtime: Any, ids: Sequence[int]) -> list[Tensor]:
    """The logits after each token, read one by one."""
    return [runtime([token]).clone() for token in ids]


# -- the properties ----------------------------------------------------------------------------------------------------


def logits_are_the_models(case: RuntimeCase) -> None:
    """Token by token, as a whole and in parts, within the stated tolerance."""
    for place, found in enumerate(case.expected):
        case.assert_close(found, place, f"the logits after token {place + 1}")
    last = len(case.ids)
    case.assert_close(case.runtime()(case.ids), last - 1, "the logits after a prompt")
    runtime, at = case.runtime(), 0
    for end in (last // 2, last - 1, last):
        case.assert_close(runtime(case.ids[at:end]), end - 1, f"the logits of a part that ends at token {end}")
        at = end


def same_result_twice(case: RuntimeCase) -> None:
    """Two runtimes of equal models give equal logits."""
    equal(stepped(case.runtime(), case.ids), case.expected, "the logits of a second runtime")


def reset_forgets(case: RuntimeCase) -> None:
    """After `reset()` a text gives what it gives a new runtime, whatever was read before."""
    runtime = case.runtime()
    runtime(case.ids[::-1][: len(case.ids) // 2])
    runtime.reset()
    equal(stepped(runtime, case.ids), case.expected, "the logits after reset()")


def an_error_leaves_it_usable(case: RuntimeCase) -> None:
    """What it cannot read is refused (no token, one outside of the vocabulary, too many), and it goes on as before."""
    vocabulary = case.reference.shape[1]
    refused = {"no token": [], "token -1": [-1], f"token {vocabulary}": [vocabulary]}
    refused[f"{len(case.ids)} tokens more than fit"] = case.ids
    runtime = case.runtime()
    runtime(case.ids[:3])
    for what, tokens in refused.items():
        assert not works(partial(runtime, tokens)), f"{what}: accepted"
    case.assert_close(runtime([case.ids[3]]), 3, "after errors the logits")


def two_take_turns(case: RuntimeCase) -> None:
    """Two runtimes, of two models, each give what they give alone."""
    second = case.model()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.25)
    runtimes = [case.runtime(), case.runtime(second)]
    found = [[runtime([token]).clone() for runtime in runtimes] for token in case.ids]
    alone = stepped(case.runtime(second), case.ids)
    equal([first for first, _ in found], case.expected, "in turns with another the logits")
    equal([other for _, other in found], alone, "in turns with another the logits of the second")


def model_is_not_changed(case: RuntimeCase) -> None:
    """The model stays as it was, and goes on working, while the runtime is made, used and closed."""
    model = case.model()
    before, modes = State.of(model), modes_of(model)
    runtime = case.runtime(model)
    stepped(runtime, case.ids)
    for when, do in (("while it is used", lambda: None), ("after it was closed", runtime.close)):
        do()
        before.compare(model, when)
        assert_no_hook_left(model, hooks_of(case.original), when)
        assert modes_of(model) == modes, f"{when}: modules are in another mode"
        equal([reference(model, case.ids)], [case.reference], f"{when} the model's own logits")


def decode_only_gives_the_same(case: RuntimeCase) -> None:
    """With `decode_only=True`, which lets it take the model's weights, the logits are the same."""
    equal(stepped(case.runtime(decode_only=True), case.ids), case.expected, "with decode_only=True the logits")


def memory_is_as_planned(case: RuntimeCase) -> None:
    """Once its cache is full, it holds what `nbytes` and `cache_bytes` say, and a workspace."""
    model = case.model()
    runtime = case.runtime(model)
    if not (hasattr(runtime, "nbytes") and hasattr(runtime, "cache_bytes")):
        raise NotApplicable("it says neither nbytes nor cache_bytes")
    planned = runtime.nbytes + runtime.cache_bytes
    stepped(runtime, case.ids)
    assert runtime.nbytes + runtime.cache_bytes == planned, "nbytes and cache_bytes change while it is used"
    held = held_bytes(runtime, model)
    assert abs(held - planned) <= SHARE * planned + WORKSPACE, f"it holds {held:,} bytes, and says {planned:,}"


def too_little_memory_is_refused(case: RuntimeCase) -> None:
    """If memory is short it raises MemoryLimitError before it takes any; the model stays as it was."""
    model = case.model()
    before = State.of(model)
    with mock.patch("psutil.virtual_memory", return_value=SimpleNamespace(available=0, total=0, free=0)):
        try:
            case.runtime(model)
        except MemoryLimitError:
            before.compare(model, "after memory was refused")
        else:
            raise AssertionError("it was made with no memory free; compare with psutil.virtual_memory().available")


def it_closes(case: RuntimeCase) -> None:
    """`close()`, also twice, at the end of a `with` and after an error: memory, threads, processes and files go."""
    stepped(case.runtime(), case.ids)  # what a first use starts for the whole process stays
    gc.collect()
    before = _taken()
    model = case.model()
    runtime = case.runtime(model)
    stepped(runtime, case.ids[:2])
    with suppress(Exception):
        runtime([-1])
    runtime.close()
    runtime.close()
    assert not works(partial(runtime, case.ids[:1])), "it decodes after close()"
    held = held_bytes(runtime, model)
    assert held <= WORKSPACE // 16, f"it holds {held:,} bytes after close()"
    try:
        with case.runtime(model) as second:
            raise _Planned
    except _Planned:
        assert not works(partial(second, case.ids[:1])), "it decodes after a `with` that an error ended"
    dropped = case.runtime(model)
    stepped(dropped, case.ids[:2])
    gone = weakref.ref(dropped)
    del dropped, runtime, second
    gc.collect()
    assert gone() is None, "something holds it after its last name is gone"
    for what, count in _taken().items():
        assert count <= before[what], f"{count} {what} are left, {before[what]} were there before"


def other_models_are_refused(case: RuntimeCase) -> None:
    """`supports` says None for a model that it takes, else why not, which UnsupportedModelError repeats."""
    supports = type(case.runtime()).supports
    reason = supports(case.original)
    assert reason is None, f"supports() says of the model that it takes: {reason!r}"
    reason = supports(case.other)
    assert isinstance(reason, str) and reason, f"supports() says {reason!r} of a {type(case.other).__name__}"
    try:
        case.make(case.other, capacity=len(case.ids))
    except UnsupportedModelError as error:
        assert reason in str(error), f"the error does not say why ({reason!r}): {error}"
    else:
        raise AssertionError(f"a {type(case.other).__name__} was accepted")


CHECKS: dict[str, Callable[[RuntimeCase], None]] = {
    "logits are the model's": logits_are_the_models,
    "the same result twice": same_result_twice,
    "reset forgets": reset_forgets,
    "an error leaves it usable": an_error_leaves_it_usable,
    "two take turns": two_take_turns,
    "it closes": it_closes,
    "the model is not changed": model_is_not_changed,
    "decode_only gives the same": decode_only_gives_the_same,
    "memory is as planned": memory_is_as_planned,
    "too little memory is refused": too_little_memory_is_refused,
    "other models are refused": other_models_are_refused,
}


# -- what a runtime holds ----------------------------------------------------------------------------------------------


class _Planned(Exception):
    pass


def _taken() -> dict[str, int]:
    """What a process has that memory alone does not show."""
    process = psutil.Process()
    files = process.num_fds() if hasattr(process, "num_fds") else 0
    return {"threads": threading.active_count(), "processes": len(process.children()), "open files": files}


def held_bytes(thing: Any, model: nn.Module) -> int:
    """Bytes of the tensors and arrays that can be reached from an object, without those of the model; each once."""
    own = sorted(_span(tensor) for _, tensor in tensors_of(model) if tensor.numel() and not tensor.is_meta)
    spans = sorted(span for span in _spans(thing, model) if not any(low <= span[0] < high for low, high in own))
    held, end = 0, 0
    for low, high in spans:  # arrays and tensors may be views of one memory
        held += max(0, high - max(low, end))
        end = max(end, high)
    return held


def _spans(thing: Any, model: nn.Module) -> Iterator[tuple[int, int]]:
    seen = {id(module) for module in model.modules()}
    waiting = [thing]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, SKIPPED):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.numel() and not item.is_meta:
                yield _span(item)
        elif isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            start = item.__array_interface__["data"][0]
            yield start, start + item.nbytes
        else:
            waiting += gc.get_referents(item)


def _span(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
