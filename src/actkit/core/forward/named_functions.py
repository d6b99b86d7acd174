"""Functions that a transformers model computes by name: its attention and its experts.

`attn_implementation=` and `experts_implementation=` may name a function that somebody registered. The weights do not
tell what it computes, so whoever runs, writes or saves a model without calling it asks here first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from actkit.core.ground.errors import DataError
from actkit.core.layers.attention_function import AttentionFunction


def unknown_function(model: nn.Module, *, known: tuple[type[AttentionFunction], ...] = ()) -> str | None:
    """What a model computes by a function that is not transformers' own.

    Args:
        model: any model.
        known: the classes of attention functions of ours that whoever asks knows too.

    Returns:
        "its attention is computed by 'mine' (package.function); ... set another one", or None.
    """
    configs = _configs(model)
    if not configs:
        return None
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    kinds = (  # what it computes, the config's key, the functions by name, how another one is set
        ("attention", "_attn_implementation", AttentionInterface(), "set_attn_implementation('eager')"),
        ("experts", "_experts_implementation", ALL_EXPERTS_FUNCTIONS, "set_experts_implementation('eager')"),
    )
    for config in configs:
        for what, key, functions, other in kinds:
            name = getattr(config, key, None)
            function = functions.get(name) if isinstance(name, str) else None
            if isinstance(function, known):
                continue
            called = _foreign(function)
            if called is not None:
                verb = "is" if what == "attention" else "are"
                return f"its {what} {verb} computed by {name!r} ({called}); for another function call model.{other}"
    return None


def foreign_attention(name: Any) -> str | None:
    """Say which function an attention's name stands for, if neither transformers nor actkit registered it.

    Args:
        name: of the attention implementation.

    Returns:
        Such as "package.function", or None.
    """
    from transformers import AttentionInterface

    function = AttentionInterface().get(name) if isinstance(name, str) else None
    return None if isinstance(function, AttentionFunction) else _foreign(function)


def _foreign(function: Any) -> str | None:
    """Where a function comes from that is not transformers' own; None for one that is."""
    module = getattr(function, "__module__", None) or ""
    if function is None or module.startswith("transformers."):
        return None
    return f"{module}.{getattr(function, '__qualname__', type(function).__name__)}".lstrip(".")


def check_mask(model: nn.Module, mask: Tensor | None, name: str) -> None:
    """Refuse padding that the model's attention would not be told of.

    Args:
        model: any model.
        mask: of a batch, [batch, length], or None.
        name: of the batches, in the text.

    Raises:
        DataError: tokens are masked, and transformers makes no mask for the attention function.
    """
    if mask is None or mask.dim() != 2 or bool(mask.bool().all()):
        return
    configs = _configs(model)
    if not configs:
        return
    from transformers import AttentionMaskInterface

    masks = AttentionMaskInterface()
    for config in configs:
        function = getattr(config, "_attn_implementation", None)
        if isinstance(function, str) and function not in masks:
            raise DataError(
                f"{name}: a batch is padded, and transformers makes no mask for the attention {function!r}, which "
                f"would read the padding. Register one (transformers.AttentionMaskInterface.register({function!r}, "
                f"...)), or give batches without padding."
            )


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and of its parts that name functions, each once."""
    configs = [getattr(part, "config", None) for part in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())
