"""Keys and values rounded to few bits as they enter attention: what a decoder may keep as codes.

A child module of an attention says how; the attention function `RoundedAttention`, by its name `IMPLEMENTATION`, rounds
keys and values with it and calls transformers' scaled dot-product attention. The scale
of a token and head is found from its own vector, so that a vector is rounded alike whenever it is read; or all are
rounded to floats of 8 bits (E4M3), by a scale for the keys and one for the values. Queries and keys may be rotated
before that, by one rotation: their products stay, (q R) (k R)^T = q k^T. Another child
(`attention_rounding.py`) rounds what is multiplied by static scales, and the attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.grids.floats import FloatGrid
from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers import attention_rounding
from actkit.core.layers.attention_function import AttentionFunction, note_call
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.keeps_dtype import KeepsDtype

IMPLEMENTATION = "actkit_rounded_cache"
CHILD = "cache_rounding"  # the name of the child module
FP8 = FloatGrid(4, 3, reserved="nan", scope="tensor")  # as torch.float8_e4m3fn, up to 448


class CacheRounding(KeepsDtype):
    """How one attention rounds its keys and values: symmetric integers, one scale per token and head; or static fp8.

    Args:
        bits: 2 to 8; None to round nothing.
        rotation: of queries and keys, behind the rotary embedding; None for none.
        scales: of all keys and of all values, float32 [1] each, which are then floats of 8 bits; None for integers.
    """

    key: Tensor | None
    value: Tensor | None

    decodes_as: ClassVar[str] = "cache_rounding"

    def __init__(
        self, bits: int | None = 8, rotation: Rotation | None = None, scales: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.bits, self.rotation = bits, rotation
        self.grid: Grid | None = None if bits is None else IntegerGrid(bits, -1, symmetric=True)
        if scales is not None:
            self.grid = FP8
        for name, scale in zip(("key", "value"), scales or (None, None), strict=True):
            self.register_buffer(name, None if scale is None else scale.detach().clone().float())

    @property
    def static(self) -> bool:
        """Whether keys and values have one scale each, which calibration found."""
        return self.key is not None

    def rounded(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Round keys and values, [..., tokens, head size] each."""
        return self(key, self.key), self(value, self.value)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Round keys or values [..., tokens, head size]; gradients reach the range of each token too.

        Args:
            x: keys or values.
            scale: [1], of all of them; None for one per token and head.
        """
        if self.grid is None:
            return x
        if scale is not None:
            return self.grid.fake(x, scale)
        if torch.is_grad_enabled() and x.requires_grad:
            return self.grid.fake(x, *self.grid.tracked_parameters(x)).to(x.dtype)
        return self.grid.fake(x)

    def rotated(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [..., tokens, head size]."""
        return x if self.rotation is None else self.rotation(x)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        rotation = None if self.rotation is None else self.rotation.spec()
        return {"bits": self.bits, "rotation": rotation} | ({"static": True} if self.static else {})

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> CacheRounding:
        """The module that `spec` described."""
        rotation = spec.get("rotation")  # folders of earlier versions say nothing of it
        scales = (torch.ones(1), torch.ones(1)) if spec.get("static") else None  # the values come from a file
        return cls(spec["bits"], None if rotation is None else Rotation.from_spec(rotation), scales)

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + (", fp8, static" if self.static else "")


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
            key, value = rounding.rounded(key, value)
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
