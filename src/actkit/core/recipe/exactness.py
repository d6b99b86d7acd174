"""Whether edits that claim to keep a model's function do: each block before and after them, on a probe batch.

    difference(block k) = max |after(h_k) - before(h_k)| / max |before(h_k)|

h_k is what block k is called with in a pass of the probe through the model: the first rows of the data, or fixed random
ones if there are none. What a block gives is compared in the model's own dtype, so that the bound is one of rounding.
Edits of all blocks together (a rotation) are compared by what the whole model gives, as a share of its norm: rounding
alone moves single outputs of a deep model far. A block with experts in 16 bits is reported and not judged, as rounding
may send a token to another expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.forward.batch import BatchContext, first_rows, first_tensor, forward, has_rows, main_first
from actkit.core.forward.example import main_dtype, make_example
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground import offload
from actkit.core.ground.errors import DataError, EditError
from actkit.core.model.anatomy import Anatomy
from actkit.core.watch.calls import Call

# of the largest value of what a block gives; in float64, norms and kept coefficients may compute in float32
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
MOVED = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}  # of the model's, by norm
ROWS = 2  # of the probe
WHOLE = "the model"


class Probe:
    """A batch that a model is called with before and after edits.

    Args:
        view: of the model as it is before them, in evaluation mode.
        batches: the data; the first rows of the first are taken.

    Attributes:
        unable: why the model cannot be called; None if it can.
    """

    def __init__(self, view: Anatomy, batches: Sequence[Any]) -> None:
        self.model = view.model
        self.unable: str | None = None
        self._calls: dict[str, Call] = {}
        self._found: dict[str, tuple[float, str]] = {}  # method -> the largest difference, and where
        self._whole: Tensor | None = None
        self._dtype = main_dtype(view.model)
        self._jumps = {block.path for block in view.blocks if block.experts is not None}
        if offload.is_offloaded(self.model):
            self.unable = "its weights are offloaded"
            return
        try:
            self.batch = _batch(self.model, batches)
        except DataError:
            self.unable = "no data were given, and the model does not say what it takes"
            return
        self.context = BatchContext.of(self.batch, self.model)
        paths = [block.path for block in view.blocks if block.path]
        with evaluating(self.model), hooked(self.model, before={path: self._keep(path) for path in paths}):
            self._whole = first_tensor(forward(self.model, self.batch)).detach().clone()

    def outputs(self, path: str) -> Tensor | None:
        """Return what a block gives as it is now; None if it cannot be said.

        Args:
            path: of the block; '' is the whole model.
        """
        if self.unable is not None or (path and path not in self._calls):
            return None
        with evaluating(self.model):
            if not path:
                return first_tensor(forward(self.model, self.batch)).detach()
            call = self._calls[path]  # a block may work in place on what it gets
            return call.with_hidden(call.hidden.clone()).replay(get_module(self.model, path)).detach()

    def compare(self, method: str, path: str, before: Tensor | None) -> None:
        """Compare what a block gives now with what it gave.

        Args:
            method: the name of what changed it.
            path: of the block; '' is the whole model.
            before: what `outputs` gave; None if that could not be said.

        Raises:
            EditError: they differ by more than rounding.
        """
        after = self.outputs(path) if before is not None else None
        if before is None or after is None or not before.numel():
            return
        place = path or WHOLE
        if after.shape != before.shape:
            raise EditError(
                f"{place}: {method} claims to keep what the model computes, and outputs of shape {tuple(before.shape)} "
                f"became {tuple(after.shape)}."
            )
        difference = _largest(after, before) if path else _moved(after, before)
        limit = (ROUNDING if path else MOVED).get(self._dtype, 0.0)
        judged = path not in self._jumps or self._dtype in (torch.float32, torch.float64)
        if judged and not difference <= limit:
            dtype = str(self._dtype).removeprefix("torch.")
            raise EditError(
                f"{place}: {method} claims to keep what the model computes, and moves what {place} gives by "
                f"{difference:.1e} of its {'largest value' if path else 'norm'} ({limit:g} is allowed in {dtype}). The "
                f"model is restored, unless undo is 'off'. Apply it in a wider dtype if this is rounding; else tell "
                f"its author."
            )
        known = self._found.get(method, (-1.0, ""))[0]
        if difference >= known if path else not self._found:  # the whole model is reported if no block is
            self._found[method] = difference, place

    def compare_whole(self, methods: Sequence[str]) -> None:
        """Compare what the whole model gives now with what it gave before all edits.

        Args:
            methods: the names of what changed it.

        Raises:
            EditError: they differ by more than rounding.
        """
        self.compare(" and ".join(methods), "", self._whole)

    def notes(self, methods: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        """Return what was found, as texts with values.

        Args:
            methods: that claim to keep the function.
        """
        if self.unable is not None:
            return [(f"{', '.join(methods)}: outputs before and after were not compared, as {self.unable}", {})]
        found = []
        for method, (difference, place) in self._found.items():
            what = "what the model gives" if place == WHOLE else "what blocks give"
            share = "norm" if place == WHOLE else f"largest value ({place})"
            text = f"{method}: {what} on a probe batch moved by at most {difference:.1e} of its {share}"
            found.append((text, {"difference": difference, "at": place}))
        return found

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with suppress(KeyError, AttributeError):  # a block that takes no hidden states is not called alone
                call = Call(args, dict(kwargs), self.context)
                self._calls[path] = call.with_hidden(call.hidden.clone())

        return hook


def _batch(model: nn.Module, batches: Sequence[Any]) -> Any:
    """The first rows of the data, or fixed random ones. Raises DataError if the model does not say what it takes."""
    if not len(batches):
        return make_example(model, ROWS)
    batch = main_first(batches[0], model)
    return first_rows(batch, ROWS, model) if has_rows(batch, model) else batch


def _largest(after: Tensor, before: Tensor) -> float:
    return float((after.double() - before.double()).abs().max() / before.double().abs().max().clamp(min=1e-30))


def _moved(after: Tensor, before: Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-30))
