"""Which models may compute attention by the function of ours that rotates and rounds what is multiplied there."""

from __future__ import annotations

from typing import Any

from torch import nn

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


def why_no_function(model: nn.Module) -> str | None:
    """Say why no attention function of ours can take the place of a model's own, or None.

    Args:
        model: any.
    """
    if not hasattr(model, "set_attn_implementation") or not model._can_set_attn_implementation():  # type: ignore[operator]
        return "its class computes attention by itself, not through transformers' attention functions"
    implementation = attention_implementation(model)
    if implementation not in ("sdpa", IMPLEMENTATION):
        return (
            f"its attention is {implementation!r}; call model.set_attn_implementation('sdpa') first, if it takes that"
        )
    return None
