"""VanillaNet, a net of a few plain convolutions for images (2023, arXiv:2305.12972).

    stem:   conv 4 x 4, stride 4            series
    block:  conv 1 x 1    max pool          series            3 to 11 of them
    head:   mean over places                conv 1 x 1

No shortcuts, no attention. While it is trained each convolution is two, with batch norms and an activation between
them that fades out (`deep=True`); `to_deploy()` folds all of it. `series` is the activation of `SeriesActivation2d`.

When to use it: where latency counts and depth costs, as on GPUs at a batch of one; the published nets match much
deeper ones there. Train with the rule `fade_activations`.
Cost: of the trained form about twice the weights and time of the deployed one.
Settled here: the released checkpoints are read by `from_release`, whose tensors have other names. Images whose sides
the stem does not divide are refused, as it would cut them off.
Our own reading: the presets `tiny` (32 x 32 pixels) and `digits` (16 x 16), `deep=False` (a convolution and its batch
norm) and `order=None` (ReLU alone), which the comparisons of the paper need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from actkit.core.layers.activations import Activation
from actkit.functions.vanillanet.folding import EPS, DeepPair, folded
from actkit.functions.vanillanet.series import SeriesActivation2d

FOUR = {  # widths and strides at the published multiplier of 4
    "v5": ((512, 1024, 2048, 4096), (2, 2, 2)),
    "v6": ((512, 1024, 2048, 4096, 4096), (2, 2, 2, 1)),
    "v7": ((512, 512, 1024, 2048, 4096, 4096), (1, 2, 2, 2, 1)),
    **{
        f"v{8 + more}": (
            (512, 512, 1024, *[2048] * (2 + more), 4096, 4096),
            (1, 2, 2, *[1] * (1 + more), 2, 1),
        )
        for more in range(6)
    },
}
_WIDE = tuple(width * 3 // 2 for width in FOUR["v13"][0])
PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"dims": dims, "strides": strides} for name, (dims, strides) in FOUR.items()},
    "v13_x1_5": {"dims": _WIDE, "strides": FOUR["v13"][1]},
    "v13_x1_5_ada_pool": {
        "dims": _WIDE,
        "strides": FOUR["v13"][1],
        "pools": (0, 38, 19, 0, 0, 0, 0, 0, 0, 10, 0),
        "stem": (4, 3, 1),
    },
    "tiny": {"dims": (64, 128, 256, 256), "strides": (2, 2, 1), "stem": (4, 2, 1), "classes": 10},
    "digits": {"dims": (32, 64, 128, 128), "strides": (2, 2, 1), "stem": (4, 2, 1), "classes": 10, "in_channels": 1},
}


class VanillaBlock(nn.Module):
    """A convolution, a pool, an activation.

    Args:
        conv: a layer from dims[i] to dims[i + 1].
        pool: nn.Identity for stride 1.
        act: behind the pool.
    """

    def __init__(self, conv: nn.Module, pool: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool, self.act = conv, pool, act

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, height, width] -> the next one."""
        y: Tensor = self.act(self.pool(self.conv(x)))
        return y


class VanillaNet(nn.Module):
    """Images [batch, in_channels, height, width] -> logits [batch, classes].

    Args:
        dims: channels of the stem and behind each block.
        strides: of the blocks' pools.
        in_channels: of the images.
        classes: how many.
        order: of the series; None for ReLU alone.
        dropout: before the head.
        stem: kernel, stride and padding of the first convolution.
        pools: side to which a block pools in place of its stride, 0 for none; None for none at all.
        deep: each convolution is a pair of them that can be folded; else one with a batch norm.
        fused: one with a bias, and no batch norm anywhere: what `to_deploy` makes.

    Raises:
        ValueError: widths and strides that do not go together.
    """

    def __init__(
        self,
        dims: Sequence[int],
        strides: Sequence[int],
        *,
        in_channels: int = 3,
        classes: int = 1000,
        order: int | None = 3,
        dropout: float = 0.0,
        stem: Sequence[int] = (4, 4, 0),
        pools: Sequence[int] | None = None,
        deep: bool = True,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if len(dims) != len(strides) + 1 or (pools is not None and len(pools) != len(strides)):
            raise ValueError(
                f"dims, strides: {len(dims)} and {len(strides)} were given; give one width more than strides, and as "
                f"many pools as strides."
            )
        self.settings: dict[str, Any] = {
            "dims": list(dims),
            "strides": list(strides),
            "in_channels": in_channels,
            "classes": classes,
            "order": order,
            "dropout": dropout,
            "stem": list(stem),
            "pools": None if pools is None else list(pools),
            "deep": deep,
            "fused": fused,
        }
        kernel, stride, padding = stem
        self.stem_conv = self._conv(in_channels, dims[0], dims[0], kernel, stride, padding)
        self.stem_act = self._activation(dims[0])
        self.stages = nn.ModuleList(
            VanillaBlock(
                self._conv(width, width, following),
                _pool(step, 0 if pools is None else pools[index]),
                self._activation(following),
            )
            for index, (width, following, step) in enumerate(zip(dims[:-1], dims[1:], strides, strict=True))
        )
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout)
        self.head = self._conv(dims[-1], classes, classes, last=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """Make one of the published nets, or of the small ones.

        Args:
            name: of PRESETS: v5 to v13, v13_x1_5, v13_x1_5_ada_pool, tiny, digits.
            settings: of the class, in place of the preset's.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: {name!r} was given, allowed are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **settings})

    def _conv(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        last: bool = False,
    ) -> nn.Module:
        if self.settings["fused"]:
            return nn.Conv2d(inputs, outputs, kernel, stride, padding)
        if self.settings["deep"]:
            first = nn.Conv2d(inputs, inner, kernel, stride, padding)
            return DeepPair(first, nn.Conv2d(inner, outputs, 1), norms=(True, not last))
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        return conv if last else nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=EPS))

    def _activation(self, channels: int) -> nn.Module:
        order = self.settings["order"]
        return (
            Activation("relu") if order is None else SeriesActivation2d(channels, order, fused=self.settings["fused"])
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, classes]."""
        kernel, stride, padding = self.settings["stem"]
        height, width = pixel_values.shape[-2:]
        rest = [(side + 2 * padding - kernel) % stride for side in (height, width)]
        if self.settings["pools"] is None and (any(rest) or min(height, width) + 2 * padding < kernel):
            raise ValueError(
                f"pixel_values: images of {height} x {width} were given, which the stem (kernel {kernel}, stride "
                f"{stride}, padding {padding}) does not cover to the border; give sides of {kernel - 2 * padding} plus "
                f"a multiple of {stride}."
            )
        x = self.stem_act(self.stem_conv(pixel_values))
        for stage in self.stages:
            x = stage(x)
        y: Tensor = self.head(self.dropout(self.pool(x))).flatten(1)
        return y

    def example(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Return random images that it can be called with.

        Args:
            rows: how many.
            seed: of the numbers.
        """
        kernel, stride, padding = self.settings["stem"]
        side = 15 * stride + kernel - 2 * padding
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.rand(rows, self.settings["in_channels"], side, side, generator=generator)}

    def to_deploy(self) -> VanillaNet:
        """Return the net that computes the same, folded, in evaluation mode; this one stays as it is.

        Raises:
            ValueError: an activation has not faded, or the net is in training mode.
        """
        first = next(self.parameters())
        with torch.device("meta"):  # nothing is drawn that is overwritten
            deployed = VanillaNet(**{**self.settings, "fused": True})
        deployed = deployed.to_empty(device=first.device).to(first.dtype).eval()
        pairs = zip(_foldable(self), _foldable(deployed), strict=True)
        with torch.no_grad():
            for (path, source), (_, target) in pairs:
                try:
                    new = _folded(source)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                target.load_state_dict(new.state_dict())
        return deployed

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return dict(self.settings)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Build the model that `spec` described; its values come from the weights file."""
        return cls(**spec)

    @classmethod
    def from_release(cls, state: Mapping[str, Tensor], name: str, **settings: Any) -> Self:
        """Make one of the tensors of a released checkpoint of the trained form (`vanillanet_5` and on).

        Args:
            state: by the names of the release, as `torch.load(..., weights_only=True)` gives them.
            name: of PRESETS.
            settings: of the class.

        Returns:
            The net, in evaluation mode, its activations faded: the release keeps no strength.

        Raises:
            RuntimeError: the tensors are those of another net.
        """
        made = cls.preset(name, **settings)
        made.load_state_dict(renamed(state, made), strict=True)
        return made.eval()


def renamed(state: Mapping[str, Tensor], net: VanillaNet) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint by the names of a net of ours.

    Args:
        state: by the names of the release.
        net: of the same settings, deep; how far it has faded is set to 1.
    """
    pair = {"0": "first", "1": "norm1"}
    prefixes = {f"stem1.{at}": f"stem_conv.{part}" for at, part in pair.items()}
    prefixes |= {"stem2.0": "stem_conv.second", "stem2.1": "stem_conv.norm2", "stem2.2": "stem_act"}
    prefixes |= {"cls1.2": "head.first", "cls1.3": "head.norm1", "cls2.0": "head.second"}
    for index in range(len(net.stages)):
        here = f"stages.{index}"
        prefixes |= {f"{here}.conv1.{at}": f"{here}.conv.{part}" for at, part in pair.items()}
        prefixes |= {f"{here}.conv2.0": f"{here}.conv.second", f"{here}.conv2.1": f"{here}.conv.norm2"}
        prefixes |= {f"{here}.act": f"{here}.act"}
    found = {}
    for name, tensor in state.items():
        old = max((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), key=len, default=None)
        new = name if old is None else prefixes[old] + name.removeprefix(old)
        found[new.replace("act.bn.", "act.norm.")] = tensor
    faded = {name: torch.ones_like(value) for name, value in net.state_dict().items() if name.endswith(".strength")}
    return found | faded


def _pool(stride: int, side: int) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    return nn.AdaptiveMaxPool2d((side, side)) if side else nn.MaxPool2d(stride)


def _foldable(net: VanillaNet) -> list[tuple[str, nn.Module]]:
    """The convolutions and activations of a net, in order, with their paths."""
    found: list[tuple[str, nn.Module]] = [("stem_conv", net.stem_conv), ("stem_act", net.stem_act)]
    for index, stage in enumerate(net.stages):
        found += [(f"stages.{index}.conv", stage.conv), (f"stages.{index}.act", stage.act)]  # type: ignore[list-item]
    return [*found, ("head", net.head)]


def _folded(module: nn.Module) -> nn.Module:
    if isinstance(module, DeepPair):
        return module.merged()
    if isinstance(module, SeriesActivation2d):
        return module.fuse()
    if isinstance(module, nn.Sequential):
        conv: Any = module[0]
        return folded(conv, module[1])
    return module
