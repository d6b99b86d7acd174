"""Two layers in one, and batch norms in the layer before them: exact folds, from VanillaNet (2023, arXiv:2305.12972).

    norm(W x + b)        = (g W) x + g (b - mean) + beta,     g = gamma / sqrt(var + eps)
    W2 (W1 x + b1) + b2  = (W2 W1) x + W2 b1 + b2

W1 is a linear layer or a convolution of any kernel, W2 a linear layer or a 1 x 1 convolution. In float64, then rounded
once. `DeepPair` is what is folded: two layers, batch norms or none, and between them an activation that fades out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.layers.batch_norm import norm_behind
from actkit.functions.vanillanet.faded import FadedActivation

EPS = 1e-6  # of VanillaNet's batch norms; torch's own is 1e-5
Layer = nn.Linear | nn.Conv1d | nn.Conv2d
SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
NORMS: dict[type[nn.Module], Any] = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}


class DeepPair(nn.Module):
    """norm2(second(faded(norm1(first(x))))), which is one layer once the activation has faded.

    Args:
        first: a linear layer or a convolution.
        second: a linear layer, or a convolution of kernel 1, on what the first gives.
        act: between them, a module or the name of a function.
        strength: how far the activation has faded, from 0 to 1.
        norms: whether a batch norm follows the first, and the second.
        eps: of these.
        stands_for: what `described` gives of the one layer that it took the place of; None if there was none.

    Raises:
        ValueError: the layers are of two kinds, or do not fit each other or a fold.
    """

    def __init__(
        self,
        first: Layer,
        second: Layer,
        act: nn.Module | str = "relu",
        strength: float = 0.0,
        norms: tuple[bool, bool] = (False, False),
        eps: float = EPS,
        stands_for: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        reason = why_no_pair(first, second)
        if reason is not None:
            raise ValueError(f"first, second: {reason}")
        self.first, self.second, self.eps, self.stands_for = first, second, eps, stands_for
        self.norm1, self.norm2 = (
            NORMS[type(layer)](_outputs(layer), eps=eps) if wanted else nn.Identity()
            for layer, wanted in zip((first, second), norms, strict=True)
        )
        self.act = FadedActivation(act, strength)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to what the first layer takes."""
        y: Tensor = self.norm2(self.second(self.act(self.norm1(self.first(x)))))
        return y

    @property
    def in_features(self) -> int:
        """Channels of what the first layer takes."""
        return _inputs(self.first)

    @property
    def out_features(self) -> int:
        """Channels of what the second layer gives."""
        return _outputs(self.second)

    @property
    def weight(self) -> Tensor:
        """The product of both weights, which models read that ask a layer for its dtype; without batch norms."""
        return torch.einsum("om,mi...->oi...", self.second.weight.flatten(1), self.first.weight)

    def merged(self) -> Layer:
        """Return the one layer that computes the same.

        Raises:
            ValueError: the activation has not faded, or a batch norm is in training mode.
        """
        if float(self.act.strength) != 1:
            raise ValueError(
                f"strength: the activation is at {float(self.act.strength):.6g}, and two layers are one at exactly 1; "
                f"train on under the rule fade_activations."
            )
        first, second = folded(self.first, self.norm1), folded(self.second, self.norm2)
        weight = torch.einsum("om,mi...->oi...", second.weight.double().flatten(1), first.weight.double())
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
            bias = bias if first.bias is None else bias + second.weight.double().flatten(1) @ first.bias.double()
            bias = bias if second.bias is None else bias + second.bias.double()
        return _like(self.first, weight, bias, self.second.weight.dtype)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {
            "first": described(self.first),
            "second": described(self.second),
            "act": self.act.base.name,
            "norms": [isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) for norm in (self.norm1, self.norm2)],
            "eps": self.eps,
            "stands_for": self.stands_for,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> DeepPair:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        pair = cls(_built(spec["first"]), _built(spec["second"]), spec["act"], 0.0, tuple(spec["norms"]), spec["eps"])
        pair.stands_for = spec.get("stands_for")  # earlier versions did not write it
        return pair if original is None else pair.to(next(original.parameters()).dtype)


def why_no_pair(first: nn.Module, second: nn.Module) -> str | None:
    """Say why two layers are not one without what is between them, or None.

    Args:
        first: reads the input.
        second: reads what the first gives.
    """
    kinds = (type(first), type(second))
    if kinds[0] not in NORMS or kinds[0] is not kinds[1]:
        given = " and ".join(kind.__name__ for kind in kinds)
        return f"{given} were given; give two of nn.Linear, nn.Conv1d or nn.Conv2d"
    if isinstance(second, nn.Conv1d | nn.Conv2d) and isinstance(first, nn.Conv1d | nn.Conv2d):
        plain = (1,) * len(second.kernel_size)
        if second.kernel_size != plain or second.stride != plain or second.groups != 1 or any(second.padding):  # type: ignore[arg-type]
            return (
                f"a convolution of kernel 1, stride 1, no padding and one group folds as the second one, not {second}"
            )
        if first.groups != 1:
            return f"a convolution of one group folds as the first one, not of {first.groups}"
        if first.padding_mode != "zeros":
            return f"a convolution padded with zeros folds as the first one, not padding_mode={first.padding_mode!r}"
    if _outputs(first) != _inputs(second):
        return f"the first gives {_outputs(first)} channels, the second reads {_inputs(second)}"
    return None


def folded(layer: Layer, norm: nn.Module) -> Layer:
    """Return a layer in float64 that computes what a layer and the batch norm behind it do.

    Args:
        layer: a linear layer or a convolution.
        norm: a batch norm, or nn.Identity.

    Raises:
        ValueError: as `core.layers.batch_norm.batch_norm_factors`.
    """
    weight, bias = layer.weight.detach().double(), None if layer.bias is None else layer.bias.detach().double()
    if not isinstance(norm, nn.Identity):
        weight, bias = norm_behind(norm, weight, bias)
    return _like(layer, weight, bias, torch.float64)


def _like(layer: Layer, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Layer:
    """A layer with the settings of another, other outputs, and these values."""
    settings = described(layer) | {"bias": bias is not None}
    settings["out_features" if isinstance(layer, nn.Linear) else "out_channels"] = len(weight)
    made = _built(settings).to(weight.device, dtype).train(layer.training)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
    return made


def described(layer: Layer) -> dict[str, Any]:
    """Return the class and the settings of a layer, as JSON takes them.

    Args:
        layer: of torch's own classes.
    """
    if isinstance(layer, nn.Linear):
        settings: dict[str, Any] = {"in_features": layer.in_features, "out_features": layer.out_features}
    else:
        settings = {name: getattr(layer, name) for name in SETTINGS}
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"kind": type(layer).__name__, **settings, "bias": layer.bias is not None}


def _built(described: dict[str, Any]) -> Layer:
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}
    kinds: dict[Any, Any] = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d}
    made: Layer = kinds[settings.pop("kind")](**settings)
    return made


def _inputs(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]
