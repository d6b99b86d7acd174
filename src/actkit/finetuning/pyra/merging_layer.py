"""Blocks of a vision transformer that merge tokens between attention and MLP.

    x  <-  x + attention(norm x, scores + log s)
    r tokens are merged into those that are most alike, by the keys of this attention, averaged over heads
    x  <-  x + mlp(norm x)                                     on the tokens that are left

s says how many patches a token stands for. It travels with the hidden states, as one channel more between the blocks,
so that a block stays a function of its call; sites leave that channel out (`hidden_columns`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from actkit.core.model.fused_layers import PartRows
from actkit.finetuning.pyra.merging import Matching, bipartite_match, merge_tokens
from actkit.finetuning.pyra.modulator import PyraModulator

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # transformers sets them on each block


class MergingLayer(nn.Module):
    """A block that merges tokens; its children are those of the block that it takes the place of.

    Args:
        layer: whose children it takes.
        features: channels of a token.
        r: tokens that go.
        carries: whether the hidden states that it reads, and those that it gives, have sizes as their last channel.
        modulator: settings of PYRA's; None for plain merging.
        proportional: whether log s is added to scores.
    """

    protected: ClassVar[int]  # tokens in front that are never merged
    attention: Any
    mlp: Any
    dropout: Any
    layernorm_before: Any
    layernorm_after: Any

    def __init__(
        self,
        layer: nn.Module,
        features: int,
        r: int,
        carries: tuple[bool, bool],
        modulator: dict[str, Any] | None = None,
        proportional: bool = True,
    ) -> None:
        nn.Module.__init__(self)  # not that of the block, which would make new children
        for name, child in layer.named_children():
            self.add_module(name, child)
        for name in CHECKPOINTING:
            if name in layer.__dict__:
                setattr(self, name, layer.__dict__[name])
        self.features, self.r, self.carries, self.proportional = features, r, carries, proportional
        self.modulator = None if modulator is None else PyraModulator(**modulator)
        if self.modulator is not None:
            weight = next(layer.parameters())
            self.modulator.to(weight.device, weight.dtype if weight.is_floating_point() else None)
        self.train(layer.training)

    @property
    def hidden_columns(self) -> tuple[PartRows | None, PartRows | None]:
        """Which columns of what it reads and gives are the token's channels; None for all."""
        channels = PartRows(0, self.features)
        return channels if self.carries[0] else None, channels if self.carries[1] else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Apply it to hidden states [batch, tokens, features], or with sizes behind them [.., features + 1].

        Args:
            hidden_states: of all tokens.
            attention_mask: None; a mask would not fit the tokens that are left.
            kwargs: of attention.

        Raises:
            ValueError: a mask was given.
        """
        # torch.export has transformers make one that hides nothing
        if attention_mask is not None and not torch.compiler.is_exporting():
            raise ValueError("attention_mask: tokens are merged here, so that no mask fits those that are left.")
        x, size = self.split(hidden_states)
        normed = self.layernorm_before(x)
        weighs = self.carries[0] and self.proportional
        bias = size.log().mT[:, None] if weighs else None  # [batch, 1, 1, tokens]
        mixed, _ = self.attention(normed, bias, **kwargs)
        x = x + self.dropout(mixed)
        if self.r:
            x, size = merge_tokens(x, size, self.matching(normed), modulate=self.modulator)
        x = x + self.dropout(self.mlp(self.layernorm_after(x)))
        return torch.cat([x, size], -1) if self.carries[1] else x

    def split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and their sizes.

        Args:
            hidden_states: as the block reads them.

        Returns:
            [batch, tokens, features] and [batch, tokens, 1]; sizes are 1 if none are carried.
        """
        if self.carries[0]:
            return hidden_states[..., :-1], hidden_states[..., -1:]
        return hidden_states, torch.ones_like(hidden_states[..., :1])

    @torch.no_grad()
    def matching(self, normed: Tensor) -> Matching:
        """Return who is merged into whom.

        Args:
            normed: what attention reads [batch, tokens, features].
        """
        layer, heads = self.attention.k_proj, (-1, self.attention.head_dim)
        if type(layer) is nn.Linear:  # the mean of heads by one product, for a head's price
            bias = None if layer.bias is None else layer.bias.view(heads).mean(0)
            keys = nn.functional.linear(normed, layer.weight.unflatten(0, heads).mean(0), bias)
        else:  # not by a call: whoever watches the layer sees each token once
            keys = layer.forward(normed).unflatten(-1, heads).mean(-2)
        return bipartite_match(keys, self.r, protected=self.protected)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {
            "features": self.features,
            "r": self.r,
            "carries": list(self.carries),
            "modulator": None if self.modulator is None else self.modulator.spec(),
            "proportional": self.proportional,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> Self:
        """Make it of the block that stands in its place; the modulator's values come from the weights file."""
        return cls(original, **{**spec, "carries": tuple(spec["carries"])})

    def extra_repr(self) -> str:
        return f"r={self.r}"


# transformers collects hidden states by the class of its blocks
class MergingViTLayer(MergingLayer, ViTLayer):  # type: ignore[misc]
    """A block of ViT that merges tokens; the class token stays."""

    protected = 1


class MergingDeiTLayer(MergingLayer, DeiTLayer):  # type: ignore[misc]
    """A block of DeiT that merges tokens; the class and the distillation token stay."""

    protected = 2


MERGING: dict[type[nn.Module], type[MergingLayer]] = {ViTLayer: MergingViTLayer, DeiTLayer: MergingDeiTLayer}
