"""Which models may compute attention by the function of ours that rotates and rounds what is multiplied there."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from actkit.core.ground import registry
from actkit.core.layers.attention_function import function_of
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.cache_rounding import IMPLEMENTATION
from actkit.core.model.parts import attention_implementation


def why_no_cache(model: nn.Module) -> str | None:
    """Say why the keys and values of a model are not rounded, or None.

    Args:
        model: any.
    """
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return "it keeps no cache, as it generates nothing"
    if any(isinstance(module, AttentionRounding) and module.bits for module in model.modules()):
        return "its queries, keys and values have static scales; put what finds those (agile_quant) behind it"
    return why_no_function(model)


def why_no_function(model: nn.Module, over: Collection[str] = ("sdpa", IMPLEMENTATION)) -> str | None:
    """Say why no attention function of ours can take the place of a model's own, or None.

    Args:
        model: any.
        over: the names of the functions whose place it may take; one without settings by its registered name.
    """
    if not hasattr(model, "set_attn_implementation") or not model._can_set_attn_implementation():  # type: ignore[operator]
        return "its class computes attention by itself, not through transformers' attention functions"
    implementation, function = attention_implementation(model), function_of(model)
    name = implementation if function is None else registry.attention_name(type(function))
    if name not in over:
        return (
            f"its attention is {implementation!r}; call model.set_attn_implementation('sdpa') first, if it takes that"
        )
    return None
