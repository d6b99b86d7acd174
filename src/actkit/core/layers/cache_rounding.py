"""Keys and values rounded to few bits as they enter attention: what a decoder may keep as codes.

A child module of an attention says how; the attention function `RoundedAttention`, by its name `IMPLEMENTATION`, rounds
keys and values with it and calls transformers' scaled dot-product attention. The scale
of a token and head is found from its own vector, so that a vector is rounded alike whenever it is read. Queries and
keys may be rotated before that, by one rotation: their products stay, (q R) (k R)^T = q k^T. Another child
(`attention_rounding.py`) rounds what is multiplied by static scales, and the attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers import attention_rounding
from actkit.core.layers.attention_function import AttentionFunction, note_call
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.hadamard import Rotation

IMPLEMENTATION = "actkit_rounded_cache"
CHILD = "cache_rounding"  # the name of the child module


class CacheRounding(nn.Module):
    """How one attention rounds its keys and values: symmetric, one scale per token and head.

    Args:
        bits: 2 to 8; None to round nothing.
        rotation: of queries and keys, behind the rotary embedding; None for none.
    """

    decodes_as: ClassVar[str] = "cache_rounding"

    def __init__(self, bits: int | None = 8, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.bits, self.rotation = bits, rotation
        self.grid = None if bits is None else IntegerGrid(bits, -1, symmetric=True)

    def forward(self, x: Tensor) -> Tensor:
        """Round keys or values [..., tokens, head size]; gradients reach the range of each token too."""
        if self.grid is None:
            return x
        if torch.is_grad_enabled() and x.requires_grad:
            return self.grid.fake(x, *self.grid.tracked_parameters(x)).to(x.dtype)
        return self.grid.fake(x)

    def rotated(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [..., tokens, head size]."""
        return x if self.rotation is None else self.rotation(x)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        return {"bits": self.bits, "rotation": None if self.rotation is None else self.rotation.spec()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> CacheRounding:
        """The module that `spec` described."""
        rotation = spec.get("rotation")  # folders of earlier versions say nothing of it
        return cls(spec["bits"], None if rotation is None else Rotation.from_spec(rotation))

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


@dataclass(frozen=True)
class RoundedAttention(AttentionFunction):
    """Scaled dot-product attention over what the attention's children round, with transformers' masks for it."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        note_call(module)
        rounding = getattr(module, CHILD, None)
        if rounding is not None:
            query, key = rounding.rotated(query), rounding.rotated(key)
            key, value = rounding(key), rounding(value)
        rounding = getattr(module, attention_rounding.CHILD, None)
        if rounding is not None:
            query, key, value = rounding.operands(query, key, value)
            if rounding.weights is not None:
                return rounding.attend(module, query, key, value, mask, **settings)
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    def forms_weights(self, model: nn.Module) -> bool:
        rounding = [module for module in model.modules() if isinstance(module, AttentionRounding)]
        return bool(rounding) and all(each.weights is not None for each in rounding)

    def mask_function(self) -> Callable[..., Tensor | None]:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask
