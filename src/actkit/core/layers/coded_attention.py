"""An attention function that keeps codes of queries, keys and values for the backward pass.

    y = attention(q, k, v) exactly;  backward through it at the q, k, v that the codes stand for

It stands before the function by which the model computes its attention anyway (transformers' own, or one of ours), and
calls that once in the forward pass and once, as under checkpointing, in the backward pass. So masks, grouped keys,
dropout and whatever else that function knows hold as they are, and neither attention weights nor 32-bit queries, keys
and values are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.attention_function import AttentionFunction, note_call
from actkit.core.layers.coded import coded_inputs
from actkit.core.layers.packed_codes import AffineCodes, Rounding


@dataclass(frozen=True)
class CodedAttention(AttentionFunction):
    """The function called `inner`, with codes in place of what it keeps.

    Attributes:
        inner: a name that transformers knows an attention function by, such as 'sdpa'.
        bits: of a code.
        group: numbers that share a low end and a step.
        rounding: as in `AffineCodes`.

    Raises:
        ValueError: bits or group out of bounds.
        UnsupportedModelError: 'eager', which is no function that transformers hands out.
    """

    inner: str = "sdpa"
    bits: int = 4
    group: int = 64
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        AffineCodes(self.bits, self.group, self.rounding)
        self.mask_function()

    def may_replace(self, other: AttentionFunction) -> bool:
        """It goes on computing what the other computes. other: of ours."""
        return True

    def mask_function(self) -> Callable[..., Tensor | None]:
        """Return what makes the masks of `inner`."""
        from transformers import AttentionInterface, AttentionMaskInterface

        if self.inner not in AttentionInterface() or self.inner not in AttentionMaskInterface():
            raise UnsupportedModelError(
                f"attention: {self.inner!r} is computed by the model's own code and cannot be coded; call "
                f"model.set_attn_implementation('sdpa') first, or leave 'attention' out of what is coded."
            )
        return AttentionMaskInterface()[self.inner]  # type: ignore[no-any-return]

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, in the form of transformers' attention functions.

        Args:
            module: the attention.
            query: [batch, heads, queries, head size].
            key: [batch, key-value heads, keys, head size].
            value: of the shape of `key`.
            mask: as `inner` takes it.
            settings: of transformers.
        """
        from transformers import AttentionInterface

        note_call(module)
        function = AttentionInterface()[self.inner]
        tensors = {"mask": mask, **{name: each for name, each in settings.items() if isinstance(each, Tensor)}}
        kept = {name: each for name, each in tensors.items() if each is not None}
        trains = any(each.requires_grad for each in (query, key, value, *kept.values()))
        if not (torch.is_grad_enabled() and trains):
            return function(module, query, key, value, mask, **settings)  # type: ignore[no-any-return]

        def call(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> Tensor:
            given = {"mask": None, **settings, **dict(zip(kept, more, strict=True))}
            return function(module, query, key, value, given.pop("mask"), **given)[0]  # type: ignore[no-any-return]

        codes = AffineCodes(self.bits, self.group, self.rounding)
        draws = module.training and bool(settings.get("dropout"))
        return coded_inputs(call, codes, [query, key, value], list(kept.values()), draws), None
