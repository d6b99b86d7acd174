"""Attention functions: what stands between queries, keys and values, by default softmax.

    Configure("attn_implementation", {"name": "lssar", "power": 15})

A name of the entry-point group `actkit.attentions` stands for a frozen dataclass whose fields are its settings, as JSON
takes them. The edit registers the function and its mask with transformers, under a name that spells the settings, both
when it is applied and when a checkpoint is loaded, so that a fresh process computes the same.

A function is told of padding, caches and windows by its mask alone, which is always there and always says True for what
a query reads. (transformers' own functions get None for full rows, and one without a mask function gets it always.)
What it does not compute (caps, sinks, biases by position) is refused when it is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.ground import registry
from actkit.core.ground.errors import EditError, UnsupportedModelError

UNKNOWN = ("softcap", "position_bias", "s_aux", "cache")  # what scores may have, and no function of ours computes
_calls: ContextVar[list[nn.Module] | None] = ContextVar("attentions that called a function", default=None)


def visible_mask(*args: Any, **settings: Any) -> Tensor:
    """The mask of an attention function, in the form of transformers' mask functions.

    Args:
        args: of transformers.
        settings: of transformers.

    Returns:
        Bool [batch, 1, queries, keys], True where a query reads a key; never None.
    """
    from transformers.masking_utils import sdpa_mask

    settings = {**settings, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, **settings)
    assert mask is not None, "transformers skipped a mask"
    return mask


@dataclass(frozen=True)
class AttentionFunction:
    """What an attention computes from queries, keys and values; a subclass is a frozen dataclass of its settings."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the values.

        Args:
            module: the attention.
            query: [batch, heads, queries, head size].
            key: [batch, key-value heads, keys, head size].
            value: of the shape of `key`.
            visible: bool, [batch, 1 or heads, queries, keys] or what expands to it.
            dropout: of the attention weights, 0 outside of training.

        Returns:
            What is mixed, [batch, heads, queries, head size], and the weights [batch, heads, queries, keys], or None
            if they were not formed.
        """
        raise NotImplementedError

    def forms_weights(self, model: nn.Module) -> bool:
        """Say whether the attention weights of a model are formed by it, so that they can be read.

        Args:
            model: that computes its attention by this function.
        """
        return False

    def may_replace(self, other: AttentionFunction) -> bool:
        """Say whether it may take the place of another function of ours; by default of one of its own class.

        Args:
            other: by which the model computes its attention.
        """
        return type(other) is type(self)

    def mask_function(self) -> Callable[..., Tensor | None]:
        """Return what makes its masks, in the form of transformers' mask functions."""
        return visible_mask

    def spec(self) -> dict[str, Any]:
        """Its registered name and its settings."""
        return {"name": registry.attention_name(type(self)), **asdict(self)}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, in the form of transformers' attention functions.

        Args:
            module: the attention.
            query: [batch, heads, queries, head size].
            key: [batch, key-value heads, keys, head size].
            value: of the shape of `key`.
            mask: as scaled dot-product attention takes it.
            settings: of transformers.

        Raises:
            UnsupportedModelError: scores are capped, biased by position, or join sinks; or the mask is missing or adds
                other numbers than 0 and minus infinity.
        """
        note_call(module)
        refuse_unknown(settings, f"by {type(self).__name__}")
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        visible = read_mask(mask, query, key, bool(causal))
        dropout = settings.get("dropout") or 0.0
        mixed, weights = self.attend(module, query, key, value, visible, dropout if module.training else 0.0)
        return mixed.transpose(1, 2).contiguous(), weights


def read_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Return which keys a query reads.

    Args:
        mask: bool, or float that adds 0 to what is read and minus infinity, or the lowest number, to what is not.
        query: [batch, heads, queries, head size].
        key: [batch, key-value heads, keys, head size].
        causal: whether a query must not read the keys behind it.

    Returns:
        Bool [1 or batch, 1 or heads, 1 or queries, keys].

    Raises:
        UnsupportedModelError: the mask is missing or adds other numbers.
    """
    if mask is None:
        if causal:
            raise UnsupportedModelError(
                "mask: a causal attention gave none, and would read ahead; its model does not make its masks through "
                "transformers (create_causal_mask), so set attention 'sdpa' or 'eager'."
            )
        return torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min  # minus infinity, and the lowest number as transformers fills in
    if not bool((visible | hidden).all()):
        raise UnsupportedModelError(
            "mask: it adds other numbers than 0 and minus infinity to the scores, which only softmax knows how to "
            "read; give a bool mask (True = visible), or set attention 'sdpa'."
        )
    return visible


def refuse_unknown(settings: Mapping[str, Any], beside: str) -> None:
    """Refuse what transformers' models ask of an attention and what no function of ours computes.

    Args:
        settings: that the attention gave.
        beside: what does not compute them, for the text.

    Raises:
        UnsupportedModelError: scores are capped, biased by position, or join sinks, or the cache is paged.
    """
    for name in UNKNOWN:
        if settings.get(name) is not None:
            raise UnsupportedModelError(
                f"attention: its scores use {name!r}, which is not computed {beside}; set attention 'eager', or undo "
                f"the transform that asks for it."
            )


# -- registering -------------------------------------------------------------------------------------------------------


def make_function(value: str | Mapping[str, Any]) -> AttentionFunction | None:
    """Make a function of its description.

    Args:
        value: a registered name, or {"name": ..., and settings}; what is neither is a name of transformers'.

    Returns:
        The function, or None for transformers' own.

    Raises:
        EditError: the settings are not those of the function, or not allowed.
        RecipeError: no function has this name.
    """
    if isinstance(value, str):
        if value not in registry.attention_names():
            return function_called(value)
        value = {"name": value}
    if "name" not in value:  # transformers takes one name for each part of a model
        return None
    settings = {key: each for key, each in value.items() if key != "name"}
    cls = registry.attention_class(str(value.get("name")))
    allowed = [field.name for field in fields(cls)]
    if not set(settings) <= set(allowed):
        wrong = ", ".join(sorted(set(settings) - set(allowed)))
        raise EditError(
            f"configure attn_implementation: {value['name']!r} has no setting {wrong}; it has "
            f"{', '.join(allowed) or 'none'}."
        )
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise EditError(f"configure attn_implementation: {value['name']!r}: {error}") from error


def describe_function(function: AttentionFunction) -> str | dict[str, Any]:
    """Return the JSON form that `make_function` reads: the name alone if there are no settings."""
    spec = function.spec()
    return spec["name"] if len(spec) == 1 else spec


def register(function: AttentionFunction) -> str:
    """Make a function known to transformers, with its masks; again is no harm.

    Args:
        function: of ours.

    Returns:
        The name by which a model is told of it.

    Raises:
        EditError: transformers itself has a function of that name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    spec = function.spec()
    settings = {key: value for key, value in spec.items() if key != "name"}
    name = spec["name"] + (json.dumps(settings, sort_keys=True) if settings else "")
    known = AttentionInterface().get(name)
    if name == "eager" or (known is not None and not isinstance(known, AttentionFunction)):
        raise EditError(f"configure attn_implementation: {name!r} is transformers' own; register the class by another.")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, function.mask_function())
    return name


def function_called(name: str | None) -> AttentionFunction | None:
    """Return the function of ours that a model is told of by a name; None for another one.

    Args:
        name: of the attention implementation.
    """
    if name is None:
        return None
    from transformers import AttentionInterface

    found = AttentionInterface().get(name)
    return found if isinstance(found, AttentionFunction) else None


def function_of(model: nn.Module) -> AttentionFunction | None:
    """Return the function of ours by which a model computes its attention; None for another one.

    Args:
        model: any.
    """
    config: Any = getattr(model, "config", None)
    return function_called(getattr(config, "_attn_implementation", None))


@contextmanager
def watched_calls() -> Iterator[list[nn.Module]]:
    """List the attentions that call a function of ours, as long as a context lasts.

    Yields:
        The modules, in the order of their calls.
    """
    found: list[nn.Module] = []
    token = _calls.set(found)
    try:
        yield found
    finally:
        _calls.reset(token)


def note_call(module: nn.Module) -> None:
    """Tell whoever watches that an attention called a function of ours.

    Args:
        module: the attention.
    """
    if torch.compiler.is_compiling():
        return  # a compiled model is not watched, and the context variable would break its graph
    watching = _calls.get()
    if watching is not None:
        watching.append(module)
