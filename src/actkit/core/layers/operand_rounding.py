"""What attention multiplies, rounded: queries, keys, values and the weights of the softmax.

A child module of an attention holds what rounds each of them; the attention function `IMPLEMENTATION`, registered with
transformers when a model first asks for it, rounds with it and attends. For attention over whole inputs, without cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground import registry
from actkit.core.layers.rounded_inputs import RoundedInputs

IMPLEMENTATION = "actkit_rounded_operands"
CHILD = "operand_rounding"  # the name of the child module
OPERANDS = ("query", "key", "value", "weights")


class OperandRounding(nn.Module):
    """How one attention rounds its operands.

    Args:
        operands: by name ('query', 'key', 'value', 'weights') what rounds it: the first three [..., tokens, channels of
            all heads], the weights [..., keys]. One that is missing stays as it is.
        channels: of all heads.

    Raises:
        ValueError: another name.
    """

    mixes: ClassVar[None] = None

    def __init__(self, operands: Mapping[str, RoundedInputs], channels: int) -> None:
        super().__init__()
        unknown = operands.keys() - set(OPERANDS)
        if unknown:
            raise ValueError(f"operands: {', '.join(sorted(unknown))} was given, allowed are {', '.join(OPERANDS)}.")
        self.channels = channels
        self.operands = nn.ModuleDict({name: operands[name] for name in OPERANDS if name in operands})

    def heads(self, name: str, x: Tensor) -> Tensor:
        """Round queries, keys or values [batch, heads, tokens, head size].

        Args:
            name: of the operand.
            x: its values.
        """
        if name not in self.operands:
            return x
        flat = self.operands[name](x.transpose(1, 2).flatten(2))
        return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """Round the weights of the softmax [batch, heads, tokens, keys]."""
        return self.operands["weights"](x) if "weights" in self.operands else x

    def forward(self, x: Tensor) -> Tensor:
        """Round values [batch, tokens, channels], as a layer among others does."""
        return self.operands["value"](x) if "value" in self.operands else x

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        operands = {name: module.spec() for name, module in self.operands.items()}  # type: ignore[operator]
        return {"channels": self.channels, "operands": operands}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> OperandRounding:
        """The module that `spec` described."""
        made = {
            name: registry.inputs_class(each["kind"]).from_spec(each, spec["channels"])
            for name, each in spec["operands"].items()
        }
        return cls(made, spec["channels"])

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float, rounding: Any
) -> tuple[Tensor, Tensor]:
    """Attend over operands, rounded.

    Args:
        query: [batch, heads, tokens, head size].
        key: [batch, heads, keys, head size].
        value: of the shape of `key`.
        mask: added to the scores, or None.
        scaling: of the scores.
        dropout: of the weights.
        rounding: an `OperandRounding`, or None.

    Returns:
        What is mixed [batch, tokens, heads, head size], and the weights.
    """
    if rounding is not None:
        query, key, value = (rounding.heads(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    return mix(query @ key.mT * scaling, value, mask, dropout, rounding)


def mix(scores: Tensor, value: Tensor, mask: Tensor | None, dropout: float, rounding: Any) -> tuple[Tensor, Tensor]:
    """Mix values by the softmax of scores, whose weights are rounded.

    Args:
        scores: [batch, heads, tokens, keys].
        value: [batch, heads, keys, head size].
        mask: as in `attend`, and so are the next two.
        dropout: a share.
        rounding: or None.

    Returns:
        As `attend`.
    """
    scores = scores if mask is None else scores + mask[..., : scores.shape[-1]]
    weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    weights = weights if rounding is None else rounding.weights(weights)
    mixed = F.dropout(weights, dropout, training=dropout > 0) @ value
    return mixed.transpose(1, 2).contiguous(), weights


def rounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Attend over rounded operands, in the form of transformers' attention functions.

    Args:
        module: the attention.
        query: [batch, heads, tokens, head size].
        key: [batch, heads, keys, head size].
        value: of the shape of `key`.
        attention_mask: added to the scores.
        scaling: of the scores; None for 1 / sqrt(head size).
        dropout: of the weights.
        settings: of transformers; none is used.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scaling, dropout, getattr(module, CHILD, None))


def register() -> None:
    """Make the attention function known to transformers, with the masks of its eager one; again is no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, rounded_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
