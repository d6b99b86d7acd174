"""Inputs in training whose step is learned (LSQ), between two vectors that are learned too.

    q(x) = grid(x + before) + after,   the step of the grid a parameter (`core/grids/learned.py`)

`frozen` gives the `RoundedInputs` of the same values: `before` is their shift, and the layer's bias takes `after`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.learned import fake_learned, learned_step
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.rounded_inputs import RoundedInputs


class LearnedInputs(RoundedInputs):
    """Inputs on a grid of integers with learned steps.

    Args:
        grid: of the whole tensor, symmetric or (with a zero point of 0) without a sign.
        scale: where the steps begin: [1], [in] or [positions, 1], as in `RoundedInputs`.
        zero: as there, and so are the next two.
        shift: or None.
        divisor: or None.
        rotation: or None.
        biases: whether there are vectors before and after, which begin at 0.
        channels: of the inputs.
        dtype: of the parameters, that of the layer.
    """

    kind = "learned"
    in_training = True
    grid: IntegerGrid
    before: Tensor | None
    after: Tensor | None

    def __init__(
        self,
        grid: Grid,
        scale: Tensor,
        zero: Tensor | None = None,
        shift: Tensor | None = None,
        divisor: Tensor | None = None,
        rotation: Rotation | None = None,
        *,
        biases: bool,
        channels: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shape = tuple(scale.shape)
        super().__init__(grid, scale, zero, shift, divisor, rotation)
        self.step.data = self.step.data.to(dtype)
        for name in ("before", "after"):
            self.register_parameter(name, nn.Parameter(torch.zeros(channels, dtype=dtype)) if biases else None)

    def _keep(self, name: str, values: Tensor | None) -> None:
        if name == "scale":
            assert values is not None
            self.step = nn.Parameter(values.flatten())  # flat, as vectors neither decay nor go to Muon
        else:
            super()._keep(name, values)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The steps as they are now; of the shape that was given."""
        return self._steps().detach()

    def _steps(self) -> Tensor:
        """The steps with their gradient."""
        return learned_step(self.step if self.step.dtype == torch.float64 else self.step.float()).view(self._shape)

    @property
    def moves_zero(self) -> bool:
        """Whether an input of 0 is not read as 0."""
        return super().moves_zero or self.before is not None

    @property
    def half_range(self) -> None:
        """No kernel multiplies what is in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to what the layer multiplies, in the same dtype.

        Args:
            x: [..., in].

        Raises:
            ValueError: there is a step for each position, and x has other positions.
        """
        self._check_positions(x)
        moved = self.moved(self.rotated(x))
        moved = moved if moved.dtype == torch.float64 else moved.float()
        moved = moved if self.before is None else moved + self.before
        found = fake_learned(moved, self._steps(), self.grid, self.zero)
        return (found if self.after is None else found + self.after).to(x.dtype)

    @torch.no_grad()
    def frozen(self) -> tuple[RoundedInputs, Tensor | None]:
        shift = self.shift
        if self.before is not None:
            before = -self.before.float() if self.divisor is None else -self.before.float() * self.divisor
            shift = before if shift is None else shift + before
        return RoundedInputs(self.grid, self.scale, self.zero, shift, self.divisor, self.rotation), self.after

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, `kind` among them, as a checkpoint keeps them."""
        dtype = str(self.step.dtype).removeprefix("torch.")
        return {**super().spec(), "biases": self.before is not None, "dtype": dtype}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], in_features: int) -> LearnedInputs:
        """One of the right structure whose values come from a file.

        Args:
            spec: as `spec` gave it.
            in_features: of the layer.
        """
        more = {"biases": spec["biases"], "channels": in_features, "dtype": getattr(torch, spec["dtype"])}
        return cls(**cls._given(spec, in_features), **more)

    def describe(self) -> str:
        """A few words for tables."""
        return f"{super().describe()}, in training"
