"""Encoders and small vision transformers of reduced attention, with MLPs or without (2024, arXiv:2410.13732).

    pre:   x + attention(norm x),  then  x + mlp(norm x)         post:   norm(x + attention(x)),  norm(x + mlp(x))
    bare:  attention(x), and nothing else

    MinimalViT: patches -> linear + positions -> encoder -> mean over tokens -> linear

When to use it: to see how much of a model is needed on your data: the same shape with and without MLPs, and with fewer
attention matrices. In the paper, variants without MLP are as good as the whole on MNIST and CIFAR-10 with up to 90 %
fewer numbers; on ImageNet its own baseline did not train, and nothing is claimed there.
Cost: an MLP of 4 n units is two thirds of an ordinary layer.
Settled here: without an MLP its norm is gone too, so that counts are honest. A bare encoder has neither norms nor sums;
`collapse_stack` makes one matrix a layer of it.
Our own reading: the paper's text does not say width, patches or pooling; here tokens are averaged, positions are
learned, and there is no token for the class. Dropout is in attention alone.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from actkit.compression.minimal.reduced_attention import QueryKey, ReducedAttention, ValueOutput

Normed = Literal["pre", "post", "bare"]


class ReducedLayer(nn.Module):
    """One layer of an encoder: [batch, tokens, features] -> the same shape.

    Args:
        features: of a token.
        mlp_ratio: how many times wider its MLP is; None for no MLP.
        norm: where the norms stand; 'bare' for no norm and no residual sum.
        attention: settings of `ReducedAttention`.

    Raises:
        ValueError: an MLP in a bare layer, or an unknown place of norms.
    """

    def __init__(self, features: int, mlp_ratio: float | None = 4, norm: Normed = "pre", **attention: Any) -> None:
        super().__init__()
        if norm not in ("pre", "post", "bare"):
            raise ValueError(f"norm: {norm!r} was given, allowed are pre, post, bare.")
        if norm == "bare" and mlp_ratio is not None:
            raise ValueError(
                f"mlp_ratio: {mlp_ratio} was given; a bare layer has attention alone, so give None, or another norm."
            )
        self.norm = norm
        self.attention = ReducedAttention(features, **attention)
        self.attention_norm = nn.Identity() if norm == "bare" else nn.LayerNorm(features)
        self.mlp: nn.Module | None = None
        self.mlp_norm: nn.Module | None = None
        if mlp_ratio is not None:
            width = round(features * mlp_ratio)
            self.mlp = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, features))
            self.mlp_norm = nn.LayerNorm(features)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Apply it to x [batch, tokens, features]; mask and causal are attention's."""
        if self.norm == "bare":
            return self.attention(x, mask, causal)
        if self.norm == "post":
            x = self.attention_norm(x + self.attention(x, mask, causal))
            return x if self.mlp is None or self.mlp_norm is None else self.mlp_norm(x + self.mlp(x))
        x = x + self.attention(self.attention_norm(x), mask, causal)
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))


class ReducedEncoder(nn.Module):
    """A stack of layers: [batch, tokens, features] -> the same shape.

    Args:
        features: of a token.
        depth: layers.
        mlp_ratio: as in `ReducedLayer`.
        norm: as in `ReducedLayer`; 'pre' has one more norm at the end.
        attention: settings of `ReducedAttention`.

    Raises:
        ValueError: as `ReducedLayer`; or no layer.
    """

    def __init__(
        self, features: int, depth: int, mlp_ratio: float | None = 4, norm: Normed = "pre", **attention: Any
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: {depth} was given; give at least one layer.")
        self.norm = norm
        self.layers = nn.ModuleList([ReducedLayer(features, mlp_ratio, norm, **attention) for _ in range(depth)])
        self.last_norm = nn.LayerNorm(features) if norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Apply all layers to x [batch, tokens, features]; mask and causal are attention's."""
        for layer in self.layers:
            x = layer(x, mask, causal)
        return self.last_norm(x)


class MinimalViT(nn.Module):
    """Images [batch, channels, height, width] -> logits [batch, classes].

    Args:
        image: height and width, or one number for both.
        patch: side of a patch.
        features: of a token.
        depth: layers.
        classes: how many.
        channels: of an image.
        heads: of attention.
        mlp_ratio: how many times wider MLPs are; None for none.
        norm: where the norms stand.
        qk: how query and key are made.
        vo: how value and output are.
        bias: whether attention's layers have one.
        dropout: of attention weights.

    Raises:
        ValueError: patches do not divide the image; or as `ReducedEncoder`.
    """

    def __init__(
        self,
        image: int | tuple[int, int],
        patch: int,
        features: int,
        depth: int,
        classes: int,
        channels: int = 3,
        heads: int = 1,
        mlp_ratio: float | None = 4,
        norm: Normed = "pre",
        qk: QueryKey = "full",
        vo: ValueOutput = "full",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (image, image) if isinstance(image, int) else image
        if height % patch or width % patch:
            raise ValueError(f"patch: {patch} was given for images of {height} x {width}; give a divisor of both.")
        attention: dict[str, Any] = {"heads": heads, "qk": qk, "vo": vo, "bias": bias, "dropout": dropout}
        self.settings: dict[str, Any] = {
            "image": [height, width],
            "patch": patch,
            "features": features,
            "depth": depth,
            "classes": classes,
            "channels": channels,
            "mlp_ratio": mlp_ratio,
            "norm": norm,
            **attention,
        }
        self.input_shape = (channels, height, width)
        self.patches = nn.Conv2d(channels, features, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((height // patch) * (width // patch), features))
        self.encoder = ReducedEncoder(features, depth, mlp_ratio, norm, **attention)
        self.head = nn.Linear(features, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits [batch, classes]."""
        tokens = self.patches(pixel_values).flatten(2).mT + self.positions
        return self.head(self.encoder(tokens).mean(1))

    def example(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Return random images that it can be called with.

        Args:
            rows: how many.
            seed: of their values.
        """
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.rand(rows, *self.input_shape, generator=generator)}

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return dict(self.settings)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Make the model that `spec` described; its values come from the weights file."""
        return cls(**{**spec, "image": tuple(spec["image"])})
