"""What stands inside a model's attention function: the scores before softmax and the weights after it.

    out' = out + (W' - W) V,    W = softmax(S),  S = scale * Q K^T (capped, if the model caps it)

Attention functions are called by name (transformers' `AttentionInterface`), not as modules, so no hook sees inside. For
as long as a context lasts the model is told of a function that calls the one in use and adds what changed, which is
exactly 0 if nothing did: the output stays as it was to the bit. It is registered once for each function and stays
known, and does nothing outside of a context.

Cost: scores are formed beside the attention function, [batch, heads, queries, keys]; weights are those that it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import ATTENTION, Configure, temporarily
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.parts import WATCHED, attention_implementation
from actkit.core.model.sites import Tap

See = Callable[[Tap, Tensor], Tensor | None]
TOLERANCE = 1e-3  # relative, of what our own softmax of the scores mixes, beside what the attention function gave


@dataclass(frozen=True)
class _Watch:
    """One context: of which attentions what is seen, the scores first."""

    taps: Mapping[int, tuple[Tap, ...]]
    see: See


_watching: ContextVar[tuple[_Watch, ...]] = ContextVar("what watches the inside of attentions", default=())


@contextmanager
def inside_attention(model: nn.Module, taps: list[Tap], see: See) -> Iterator[None]:
    """Call `see(tap, tensor)` inside the attention functions of a model, as long as a context lasts.

    Args:
        model: of transformers.
        taps: those with `where` 'inside'; nothing is done if there are none.
        see: what it returns, if not None, takes the place of the scores or weights [batch, heads, queries, keys].

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: the model computes its attention by itself.
    """
    if not taps:
        yield
        return
    can_set: Any = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        raise UnsupportedModelError(
            f"site: {type(model).__name__} computes attention by itself, not through transformers' attention "
            f"functions, so nothing inside of it can be read or changed; choose attention.mixed."
        )
    by_module: dict[int, tuple[Tap, ...]] = {}
    for tap in sorted(taps, key=lambda tap: str(tap.index)):  # scores before weights, in whatever order they are named
        for module in model.get_submodule(tap.path).modules():  # one of them calls the function
            by_module[id(module)] = (*by_module.get(id(module), ()), tap)
    token = None
    name = WATCHED + str(attention_implementation(model))
    told = getattr(model.config, "_attn_implementation", None) == name  # type: ignore[union-attr]  # by an outer context
    _register(name)
    with temporarily(model, [] if told else [Configure(ATTENTION, name)]):
        token = _watching.set((*_watching.get(), _Watch(by_module, see)))
        try:
            yield
        finally:
            _watching.reset(token)


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if name in AttentionInterface():
        return
    inner = name.removeprefix(WATCHED)
    masks = AttentionMaskInterface()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        function = _eager(module) if inner == "eager" else AttentionInterface()[inner]
        out, weights = function(module, query, key, value, mask, **settings)
        watching = [(watch, watch.taps[id(module)]) for watch in _watching.get() if id(module) in watch.taps]
        if not watching:
            return out, weights
        return _changed(module, (query, key, value), mask, settings, out, weights, watching)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, masks[inner])


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager function of the file that a module's class, or the class it is made from, stands in."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"attention: the eager function of {type(module).__name__} is not found beside its class; "
        f"call model.set_attn_implementation('sdpa') first, if the model takes that."
    )


def _changed(
    module: nn.Module,
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    settings: Mapping[str, Any],
    out: Tensor,
    weights: Tensor | None,
    watching: list[tuple[_Watch, tuple[Tap, ...]]],
) -> tuple[Tensor, Tensor | None]:
    """The output [batch, queries, heads, head size] and the weights, with what those who watch put in their place."""
    query, key, value = operands
    if settings.get("dropout") and module.training:
        raise UnsupportedModelError(
            f"attention: {type(module).__name__} drops weights by chance (dropout {settings['dropout']:g}) while it "
            f"trains, so that scores and weights cannot be changed; call model.eval(), or set its dropout to 0."
        )
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    before = weights
    by_scores = any(tap.index == "scores" for _, taps in watching for tap in taps)
    if by_scores:
        scores, hidden = scores_of(module, query, key, mask, settings)
        before = _softmax(scores, hidden)
        _check(module, (before @ value).transpose(1, 2), out)
        other = _seen(watching, "scores", scores)
        after = before if other is scores else _softmax(other, hidden)
    else:
        after = before  # type: ignore[assignment]
    if before is None:
        raise UnsupportedModelError(
            f"attention: {type(module).__name__} formed no weights; call model.set_attn_implementation('eager') first."
        )
    after = _seen(watching, "weights", after)
    if after is before:
        return out, weights
    return out + ((after - before) @ value).transpose(1, 2), None if weights is None else after


def _seen(watching: list[tuple[_Watch, tuple[Tap, ...]]], name: str, value: Tensor) -> Tensor:
    """What is left of a tensor after all who watch it, outer contexts first."""
    for watch, taps in watching:
        for tap in taps:
            if tap.index == name:
                other = watch.see(tap, value)
                value = value if other is None else other
    return value


def scores_of(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, settings: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return what an attention takes the softmax of.

    Args:
        module: the attention.
        query: [batch, heads, queries, head size].
        key: [batch, key-value heads, keys, head size].
        mask: bool, or float that is added; None for none.
        settings: what transformers' attention function was called with besides.

    Returns:
        The scores [batch, heads, queries, keys], also of keys that a query does not read; and what is added to them,
        minus infinity there, or None.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = settings.get("scaling")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    cap = settings.get("softcap")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    queries, keys = scores.shape[-2:]
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if mask is None:
        return scores, None
    mask = mask[..., :keys]
    if mask.dtype != torch.bool:
        return scores, mask.to(scores.dtype)
    hidden = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    lowest = float("-inf") if bool(mask.any(-1).all()) else torch.finfo(scores.dtype).min  # a query that reads nothing
    return scores, hidden.masked_fill(~mask, lowest)


def _softmax(scores: Tensor, hidden: Tensor | None) -> Tensor:
    given = scores if hidden is None else scores + hidden
    return torch.softmax(given, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _check(module: nn.Module, ours: Tensor, out: Tensor) -> None:
    """Refuse an attention that does more with its scores than take their softmax: sinks, or biases of its own."""
    difference = (ours - out).detach().abs().amax((-1, -2))
    worst = difference.median() / out.detach().abs().amax().clamp(min=1e-12)  # rows of padding may read nothing
    bound = TOLERANCE if out.dtype == torch.float32 else 20 * TOLERANCE
    if not bool(worst <= bound):
        raise UnsupportedModelError(
            f"site: attention.scores of {type(module).__name__} are not all that its weights come from (it has sinks, "
            f"or biases by position), so they cannot be read or changed; choose attention.weights in eager mode."
        )
