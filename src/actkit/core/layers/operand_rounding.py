"""What an attention multiplies, rounded by steps that are learned: queries, keys, values and the attention weights.

It stands where an `AttentionRounding` does, and the same attention function asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actkit.core.ground import registry
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.rounded_inputs import RoundedInputs

OPERANDS = ("query", "key", "value", "weights")


class OperandRounding(AttentionRounding):
    """How one attention rounds its operands.

    Args:
        rounds: by name ('query', 'key', 'value', 'weights') what rounds it: the first three [..., tokens, channels of
            all heads], the weights [..., keys]; all [..., heads, tokens, ...] if it has a scale for each head. One that
            is missing stays as it is.
        channels: of all heads.

    Raises:
        ValueError: another name.
    """

    def __init__(self, rounds: Mapping[str, RoundedInputs], channels: int) -> None:
        unknown = rounds.keys() - set(OPERANDS)
        if unknown:
            raise ValueError(f"rounds: {', '.join(sorted(unknown))} was given, allowed are {', '.join(OPERANDS)}.")
        super().__init__(weights=rounds["weights"].grid if "weights" in rounds else None)
        self.bits = next((each.grid.bits for name, each in rounds.items() if name != "weights"), None)
        self.channels = channels
        self.rounds = nn.ModuleDict({name: rounds[name] for name in OPERANDS if name in rounds})

    def forward(self, x: Tensor) -> Tensor:
        """Round attention weights [..., queries, keys], each from 0 to 1."""
        return self.rounds["weights"](x) if "weights" in self.rounds else x

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round queries, keys and values, [batch, heads, tokens, head size] each."""
        return self.heads("query", query), self.heads("key", key), self.heads("value", value)

    def heads(self, name: str, x: Tensor) -> Tensor:
        """Round one of them.

        Args:
            name: of the operand.
            x: [batch, heads, tokens, head size].
        """
        if name not in self.rounds:
            return x
        inputs: Any = self.rounds[name]
        if inputs.scale is not None and inputs.scale.dim() == 3:
            return inputs(x)
        flat = inputs(x.transpose(1, 2).flatten(2))
        return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        rounds = {name: module.spec() for name, module in self.rounds.items()}  # type: ignore[operator]
        return {"channels": self.channels, "rounds": rounds}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> OperandRounding:
        """One of the right structure whose values come from a file."""
        made = {
            name: registry.inputs_class(each["kind"]).from_spec(each, spec["channels"])
            for name, each in spec["rounds"].items()
        }
        return cls(made, spec["channels"])

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
