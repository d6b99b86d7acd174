"""intervene(model, {site: function or tensor}): change activations while a model runs, for as long as a context lasts.

    with intervene(model, {"blocks.3.mlp.hidden": lambda x: 0 * x}):
        logits = model(**batch).logits                           # also with gradients, and in model.generate

Sites are named as everywhere else (`core/model/sites.py`), and what stands there is given in their layout and whole,
padding included. Contexts may be nested: an inner one sees what an outer one left, and so does `record` inside.
Weights, mode and gradients of the model are left alone. A decoder calls no module, so that text is written by
transformers meanwhile, which it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.hooks import hooked, refuse_compiled_or_sharded
from actkit.core.model.anatomy import Anatomy, Site, Tap
from actkit.core.watch.capture import experts_for, resolve, tap_hooks, view_of

Change = Callable[[Tensor], Tensor] | Tensor


@contextmanager
def intervene(
    model: nn.Module, changes: Mapping[Site | str, Change], *, anatomy: Anatomy | None = None
) -> Iterator[None]:
    """Replace the activations at sites while the context lasts.

    Args:
        model: neither compiled nor sharded.
        changes: site (or a pattern of sites) -> a function from the tensor of the site to one of the same shape, or a
            tensor that takes its place, with as many dimensions as broadcast to it. Either is brought to the dtype and
            device of what stood there. Several keys that name one site act in their order.
        anatomy: of the model, if it was read before.

    Yields:
        Nothing.

    Raises:
        ValueError: a site is unknown or can only be read, or what takes its place has another shape.
        UnsupportedModelError: the model is compiled or sharded.
    """
    refuse_compiled_or_sharded(model)
    view = view_of(model, anatomy, None)
    with experts_for(view, changes):
        found = resolve(view, changes)
        names = {site: view.canonical(site) for site in found}
        taps = view.taps(names.values())
        by_tap: dict[Tap, list[tuple[Site, Change]]] = {}
        for site, given in found.items():
            tap = taps[names[site]]
            if tap.layout == "weights":
                raise ValueError(
                    f"site: {site} can only be read, because attention gives its weights out after it used them; "
                    f"change attention.query, attention.key or attention.mixed instead."
                )
            several = given if isinstance(given, list) else [given]
            by_tap.setdefault(tap, []).extend((site, each) for each in several)

        def see(tap: Tap, value: Tensor, tokens: Tensor | None) -> Tensor:
            for site, change in by_tap[tap]:
                value = _changed(site, value, change)
            return value.clone() if tap.copied else value  # the model will change it in place

        before, after = tap_hooks(by_tap, see)
        with hooked(model, before=before, after=after, replacing=True):
            yield


def _changed(site: Site, value: Tensor, change: Change) -> Tensor:
    other: Any = change if isinstance(change, Tensor) else change(value)
    if not isinstance(other, Tensor):
        raise ValueError(f"site: the function for {site} returned a {type(other).__name__}; return a tensor.")
    try:
        fits = torch.broadcast_shapes(other.shape, value.shape) == value.shape
    except RuntimeError:
        fits = False
    if not fits or (not isinstance(change, Tensor) and other.shape != value.shape):
        raise ValueError(
            f"site: {list(other.shape)} was given for {site}, which is {list(value.shape)} here; give the same shape."
        )
    return other.to(value.device, value.dtype).expand(value.shape)
