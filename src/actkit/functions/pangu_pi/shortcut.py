"""A small MLP beside attention, the augmented shortcut of PanGu-pi (2023, arXiv:2312.17276).

    out = attention(x) + sum_t W2_t gelu(W1_t x),    W1: d -> d / ratio,  W2: d / ratio -> d

It treats each token alone: causality and the key-value cache are as before. Attention averages tokens and draws them
together; what does not pass through it stays apart.

When to use it: through `add_nonlinearity`. By hand: `AugmentedAttention(model.layers[0].self_attn,
AugmentedShortcut(d))`.
Cost: 2 d^2 / ratio weights and multiplications per token and layer; 1/16 of the attention's at the paper's ratio of 32.
Settled here: W2 starts at 0, so that a trained model computes what it did; W1 learns once W2 has moved.
Our own reading: it reads what the attention reads, behind the norm (the paper does not say; its figure has the norm in
front of both), and has no biases. One path per layer. Where a norm stands behind attention, in front of the residual
sum (Gemma 2 and 3), the shortcut's output goes through it too. BERT adds the residual inside of its attention: there
the shortcut goes to that summand.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from actkit.core.layers.activations import Activation


class AugmentedShortcut(nn.Module):
    """sum_t W2_t f(W1_t x): [..., features] -> the same shape; zeros at the start.

    Args:
        features: d.
        ratio: how many times narrower its hidden layer is.
        act: f, the name of a function.
        paths: how many such MLPs are added up.
        zero: W2 starts at 0; else as nn.Linear draws it.

    Raises:
        ValueError: a ratio above the features, or a number below 1.
    """

    def __init__(self, features: int, ratio: int = 32, act: str = "gelu", paths: int = 1, zero: bool = True) -> None:
        super().__init__()
        if not 1 <= ratio <= features:
            raise ValueError(
                f"ratio: {ratio} was given for {features} features, which leaves no hidden unit; give 1 to {features}."
            )
        if paths < 1:
            raise ValueError(f"paths: {paths} was given; give how many MLPs are added up, 1 or more.")
        self.features, self.ratio, self.paths = features, ratio, paths
        hidden = features // ratio
        self.down = nn.ModuleList([nn.Linear(features, hidden, bias=False) for _ in range(paths)])
        self.act_fn = Activation(act)
        self.up = nn.ModuleList([nn.Linear(hidden, features, bias=False) for _ in range(paths)])
        if zero:
            for layer in self.up:
                nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., features]."""
        first, *others = (up(self.act_fn(down(x))) for down, up in zip(self.down, self.up, strict=True))
        return sum(others, first)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that build it again, without its values."""
        return {"features": self.features, "ratio": self.ratio, "act": self.act_fn.name, "paths": self.paths}


class AugmentedAttention(nn.Module):
    """An attention whose output has a shortcut's added; it is called as the attention is, and gives what it gives.

    Args:
        inner: the attention; its first argument, or `hidden_states`, is what the shortcut reads.
        shortcut: what is added.
    """

    wraps: ClassVar[str] = "inner"

    def __init__(self, inner: nn.Module, shortcut: AugmentedShortcut) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the attention and add to its first output."""
        added = self.shortcut(args[0] if args else kwargs["hidden_states"])
        output = self.inner(*args, **kwargs)
        return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return self.shortcut.settings()

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> AugmentedAttention:
        """Make it around the attention that stands in its place, in its dtype."""
        return cls(original, AugmentedShortcut(**spec).to(next(original.parameters()).dtype))


class AugmentedResidual(nn.Module):
    """BERT's sum of attention and residual, with a shortcut of the residual added to it.

    Args:
        inner: called with (attention's heads, residual); adds the two up, and normalises.
        shortcut: of the residual, which is what the attention reads.
    """

    wraps: ClassVar[str] = "inner"

    def __init__(self, inner: nn.Module, shortcut: AugmentedShortcut) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Both [..., features]."""
        mixed: Tensor = self.inner(hidden_states, input_tensor + self.shortcut(input_tensor))
        return mixed

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return self.shortcut.settings()

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> AugmentedResidual:
        """Make it around the module that stands in its place, in its dtype."""
        return cls(original, AugmentedShortcut(**spec).to(next(original.parameters()).dtype))
