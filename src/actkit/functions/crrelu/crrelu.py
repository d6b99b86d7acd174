"""CRReLU: a ReLU with one learned correction (Sun et al. 2024, arXiv:2405.12954).

    f(x) = max(x, 0) + epsilon x exp(-x^2 / 2)          epsilon: learned, one for each place, 0.01 at first

The correction is the direction in which the entropy of a ReLU's output changes fastest, for a standard normal input
(`eafo.py`). It is odd, at most 0.61 epsilon high and gone beyond 4, so that the units that a ReLU turns off still
learn, and their outputs are small but not 0.

When to use it: in place of a ReLU, or of the GELU or SiLU of a transformer, before training; `swap(model, "relu",
"crrelu")`, or as `hidden_act="crrelu"`. `eafo` says what epsilon the entropy argument wants in each layer.
Cost: about that of GELU, of which it also keeps no more than the input for the backward pass; one number per place. Its
zeros are gone: methods that skip exact zeros find none. The CPU decoder computes it (`curve`).
Settled here: every place has its own epsilon, in float32 whatever the model's dtype, and weight decay leaves it alone,
which would pull it to plain ReLU. With `per_channel` each channel has one.
Our own reading: for a standard normal input the entropy falls with epsilon < 0 (`eafo.suggest`), while the published
start is +0.01; both signs are learned as they come.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.activation_function import ActivationFunction, Axis, Break, Piece
from actkit.core.layers.curve import Curve
from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32, check_floats

START = 0.01  # the published initial value


def crrelu(x: Tensor, epsilon: Tensor | float) -> Tensor:
    """Compute max(x, 0) + epsilon x exp(-x^2 / 2), in float32 at least.

    Args:
        x: [...], floating.
        epsilon: a number, or a tensor that broadcasts with x.

    Returns:
        The shape and the dtype of x.

    Raises:
        ValueError: x holds no floats.
    """
    check_floats(x)
    return _Corrected.apply(x, epsilon if isinstance(epsilon, Tensor) else x.new_tensor(epsilon))  # type: ignore[no-any-return, no-untyped-call]


class _Corrected(torch.autograd.Function):
    """CRReLU that keeps its input alone for the backward pass, which can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, epsilon: Tensor) -> Tensor:
        wide = at_least_float32(x)
        with torch.autocast(x.device.type, enabled=False):
            return (F.relu(wide) + epsilon * wide * torch.exp(-(wide**2) / 2)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, epsilon = ctx.saved_tensors
        wide, given = at_least_float32(x), at_least_float32(gradient)
        with torch.autocast(x.device.type, enabled=False):
            bell = torch.exp(-(wide**2) / 2)
            by_x = given * ((wide > 0) + epsilon * (1 - wide**2) * bell)
            return by_x.to(x.dtype), (given * wide * bell).sum_to_size(epsilon.shape).to(epsilon.dtype)


class CRReLU(KeepsDtype):
    """A ReLU with a learned correction.

    Args:
        epsilon: at first.
        learned: False for one that stays.
        per_channel: one for each channel, instead of one for all.
        channels: how many; `swap` tells it.
        dim: which dimension they are.

    Raises:
        ValueError: an epsilon that is not finite, or `per_channel` without `channels`.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ("epsilon",)
    epsilon: Tensor

    def __init__(
        self,
        epsilon: float = START,
        *,
        learned: bool = True,
        per_channel: bool = False,
        channels: int | None = None,
        dim: int = -1,
    ) -> None:
        super().__init__()
        if not math.isfinite(epsilon):
            raise ValueError(f"epsilon: {epsilon} was given; give a finite number, such as {START}.")
        if per_channel and (channels is None or channels < 1):
            raise ValueError(f"channels: {channels} was given with per_channel; give how many there are, 1 or more.")
        self.start, self.learned = float(epsilon), learned
        self.channels, self.dim = (channels, dim) if per_channel else (None, -1)
        value = torch.full([] if self.channels is None else [self.channels], self.start, dtype=torch.float32)
        if learned:
            self.epsilon = nn.Parameter(value)
        else:
            self.register_buffer("epsilon", value)

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        return crrelu(x, self._beside(x))

    def curve(self) -> Curve | None:
        """Return what it computes now, for the CPU decoder; None with channels that are not the last dimension."""
        return Curve.of("crrelu", self.epsilon.detach().reshape(-1, 1)) if self.dim == -1 else None

    def _beside(self, x: Tensor) -> Tensor:
        """Epsilon, in the shape that broadcasts with x."""
        if self.channels is None:
            return self.epsilon
        return self.epsilon.view(-1, *[1] * (-1 - self.dim if self.dim < 0 else x.dim() - 1 - self.dim))

    @property
    def groups(self) -> int:
        """How many functions it holds: one for each channel, or one."""
        return self.channels or 1

    def record(self, group: int | None = None) -> ActivationFunction | None:
        """What is known of it at the present epsilon; None if channels have others each.

        Args:
            group: a channel; None for all.
        """
        if self.epsilon.is_meta:
            return None
        values = self.epsilon.detach().reshape(-1).tolist()
        return record_at(values[group or 0]) if group is not None or len(set(values)) == 1 else None

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        given = {"epsilon": self.start, "learned": self.learned}
        if self.channels is None:
            return given
        return {**given, "per_channel": True, "channels": self.channels, "dim": self.dim}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> CRReLU:
        """The module that `spec` described; what was learned comes from the checkpoint."""
        return cls(**spec)

    def extra_repr(self) -> str:
        if self.epsilon.is_meta or self.epsilon.dim():
            return f"channels={self.channels}, dim={self.dim}"
        return f"epsilon={float(self.epsilon.detach()):.4g}"


def record_at(epsilon: float) -> ActivationFunction:
    """What is known of CRReLU at one epsilon.

    Args:
        epsilon: any finite number.

    Returns:
        Its record. Left of 0 it turns at -1; right of 0 it rises throughout for epsilon from -1 to 2.24.
    """

    def slope(x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype) + epsilon * (1 - x**2) * torch.exp(-(x**2) / 2)

    def curvature(x: Tensor) -> Tensor:
        return epsilon * (x**3 - 3 * x) * torch.exp(-(x**2) / 2)

    return ActivationFunction(
        name=f"crrelu({epsilon:.6g})",
        function=lambda x: F.relu(x) + epsilon * x * torch.exp(-(x**2) / 2),
        derivative=slope,
        second_derivative=curvature,
        antiderivative=lambda x: F.relu(x) ** 2 / 2 - epsilon * torch.exp(-(x**2) / 2),
        breaks=(Break(0.0, 1),),
        inflections=(-math.sqrt(3), math.sqrt(3)) if epsilon else (),
        pieces=tuple(_pieces(epsilon)),
        limits=(0.0, math.inf),
        flops=7,
    )


def _pieces(epsilon: float) -> list[Piece]:
    if not epsilon:
        return [Piece(-math.inf, 0.0, 0), Piece(0.0, math.inf, 1)]
    side = 1 if epsilon > 0 else -1  # it falls to -1 and rises again, or the other way round
    ends = [-math.inf, -1.0, 0.0, *_turns(epsilon), math.inf]
    ways = [-side, side, *([1, -1, 1][-(len(ends) - 3) :])]
    found: list[Piece] = []
    for start, end, way in zip(ends, ends[1:], ways, strict=False):
        if found and found[-1].direction == way:
            start = found.pop().start
        found.append(Piece(start, end, way))  # type: ignore[arg-type]
    return found


def _turns(epsilon: float) -> list[float]:
    """Where it turns right of 0: 1 + epsilon (1 - x^2) exp(-x^2 / 2) = 0, by Lambert's W of both branches."""
    from scipy.special import lambertw

    argument = -math.exp(0.5) / (2 * epsilon)
    if argument < -1 / math.e:
        return []
    branches = (0, -1) if argument < 0 else (0,)
    squares = [1 - 2 * float(lambertw(argument, branch).real) for branch in branches]
    return sorted(math.sqrt(square) for square in squares if square > 0)
