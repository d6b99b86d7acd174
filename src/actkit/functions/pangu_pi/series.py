"""A series of scaled and shifted activations in place of one, from PanGu-pi (2023, arXiv:2312.17276).

    series(x) = sum_{i=1..n} f(a_i x + b_i)

f is any activation function; a_i and b_i are learned. n = 1 with a = 1 and b = 0 is f itself. The paper takes n = 2:
more terms gain little there.

When to use it: in the MLPs of a language model, from the first step of a training or put into a trained one by
`add_nonlinearity`, which also adds the shortcuts. For images `vanillanet` has a series that also sees the neighbours.
Cost: n activations in place of one, and 2 n numbers per hidden unit; without a fused kernel, what is kept for the
backward pass grows n-fold. Each term adds to the scale of the output and to its Lipschitz constant.
The CPU decoder computes up to four terms of SiLU, GELU or ReLU (`curve`).
Settled here: a_i and b_i keep float32 in a model of 16 bits, and weight decay spares them (it would switch terms off).
b_i other than 0 gives a ReLU outputs other than 0 for an input of 0.
Our own reading: a pair a_i, b_i for each hidden unit (the paper does not state the shape), behind one shared up
projection. Its equation (9) has an up projection for each term, which would double the MLP; the times that it reports
fit one projection. In a gated MLP the series is the gate's function.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from actkit.core.layers.activation_function import ActivationFunction, Axis
from actkit.core.layers.activations import Activation, flops_of, mixes_of, name_of, record_of
from actkit.core.layers.curve import COEFFICIENTS, KINDS, Curve
from actkit.core.layers.found_record import Term, sum_of
from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32, check_floats

Start = Literal["preserve", "paper"]
STARTS: tuple[Start, ...] = ("preserve", "paper")
MOST_TERMS = 4  # that the decoder computes
SPREAD = 0.02  # standard deviation around the start of the paper's kind


class SeriesActivation(KeepsDtype):
    """sum_i f(a_i x + b_i): [..., channels] -> the same shape.

    Args:
        base: f, a module or the name of a function.
        terms: n.
        channels: a_i and b_i are [channels]; None for one of each.
        start: "preserve" is f itself: a = 1, then zeros. It can be learned from there as f'(0) is not 0. "paper" draws
            every a_i near 1, so that the output is about n times as large.
        normalize: divide the sum by n.

    Raises:
        ValueError: terms or channels below 1, an unknown start, a function that mixes, or one that "preserve" does not
            preserve (f(0) is not 0) or that could not be learned (f'(0) is 0).
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ("scale", "shift")
    weight_decay: ClassVar[bool] = False

    def __init__(
        self,
        base: nn.Module | str,
        terms: int = 2,
        channels: int | None = None,
        start: Start = "preserve",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if terms < 1:
            raise ValueError(f"terms: {terms} was given; give how many activations are added up, 1 or more.")
        if channels is not None and channels < 1:
            raise ValueError(f"channels: {channels} was given; give how many there are, or None for one pair.")
        if start not in STARTS or (normalize and terms > 1 and start == "preserve"):
            raise ValueError(
                f"start: {start!r} was given, allowed are 'preserve', and 'paper', also with normalize=True."
            )
        base = Activation(base) if isinstance(base, str) else base
        reason = why_no_start(base) if start == "preserve" and terms > 1 else None
        if reason is not None:
            raise ValueError(f"base: {reason}")
        self.base, self.terms, self.channels, self.normalize = base, terms, channels, normalize
        shape = (terms, 1 if channels is None else channels)
        scale = torch.ones(shape)
        if start == "paper":
            scale += SPREAD * torch.randn(shape)
        else:
            scale[1:] = 0
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] -> the same shape and dtype, computed in float32 at least."""
        check_floats(x)
        wide = at_least_float32(x)
        y = sum((self.base(wide * a + b) for a, b in zip(self.scale, self.shift, strict=True)), torch.zeros_like(wide))
        return (y / self.terms if self.normalize else y).to(x.dtype)

    @property
    def groups(self) -> int:
        """How many functions it holds: one for each channel, or one."""
        return self.channels or 1

    def record(self, group: int | None = None) -> ActivationFunction | None:
        """What is known of it at its present coefficients; None if nothing is of f, or channels have others each.

        Args:
            group: a channel; None for all.
        """
        base = record_of(self.base)
        if base is None or base.mixes or self.scale.is_meta:
            return None
        pairs = torch.stack((self.scale, self.shift), -1).detach().double()  # [terms, channels, 2]
        if group is None and bool((pairs != pairs[:, :1]).any()):
            return None
        factor = 1 / self.terms if self.normalize else 1.0
        terms = tuple(Term(base, factor, scale, shift) for scale, shift in pairs[:, group or 0].tolist())
        inside = " + ".join(f"{each.scale:.4g} x {each.shift:+.4g}" for each in terms)
        return sum_of(f"series({base.name}: {inside})", terms, self.flops)

    def curve(self) -> Curve | None:
        """Return what it computes now, for the CPU decoder; None above 4 terms, or of a function that it has not."""
        kind: Any = f"series_{name_of(self.base)}"
        if kind not in KINDS or self.terms > MOST_TERMS:
            return None
        pairs = torch.stack((self.scale.detach().float(), self.shift.detach().float()), -1)  # [terms, channels, 2]
        rows = torch.zeros(pairs.shape[1], COEFFICIENTS)
        rows[:, : 2 * self.terms] = pairs.transpose(0, 1).flatten(1)
        rows[:, -2:] = torch.tensor([1 / self.terms if self.normalize else 1.0, float(self.terms)])
        return Curve.of(kind, rows)

    @property
    def flops(self) -> int | None:
        """Operations for one output; None if nobody counted those of its base."""
        base = flops_of(self.base)
        return None if base is None else self.terms * (base + 3) - 1 + self.normalize

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them; the values are in the weights file."""
        return {"terms": self.terms, "channels": self.channels, "normalize": self.normalize}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> SeriesActivation:
        """Make it around the activation that stands in its place."""
        return cls(original, spec["terms"], spec["channels"], "paper", spec["normalize"])

    def extra_repr(self) -> str:
        return f"terms={self.terms}, channels={self.channels}"


def why_no_start(base: nn.Module) -> str | None:
    """Say why a series cannot begin as one activation alone, with all other terms at 0; None if it can.

    Args:
        base: the activation function.
    """
    kind = type(base).__name__
    if mixes_of(base):
        return f"a {kind} mixes {', '.join(mixes_of(base) or ())}; a series takes an element-wise function"
    with torch.enable_grad():
        zero = torch.zeros(1, requires_grad=True)
        value = base(zero)
        slope = torch.autograd.grad(value.sum(), zero, allow_unused=True)[0] if value.requires_grad else None
    if float(value.detach()) != 0:
        return f"a {kind} gives {float(value.detach()):.3g} for 0, so that a second term would change the function"
    if slope is None or float(slope) == 0:
        return f"a {kind} has the slope 0 at 0, so that a second term would never learn; swap it for silu or gelu first"
    return None
