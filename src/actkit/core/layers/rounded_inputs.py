"""What a layer reads in place of its inputs: registered by `kind` under the entry-point group `actkit.inputs`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.keeps_dtype import KeepsDtype


class RoundedInputs(KeepsDtype):
    """Inputs on the points of a grid: q(x) = grid((x R - shift) / divisor), computed in float32.

    Rotation, shift and divisor are not taken back: the layer's weight and bias stand for them.

    Args:
        grid: of whole rows (`group_size` -1), which are the tokens then, or of the whole tensor. None: not rounded.
        scale: float32, the step of the grid, found before; None to find it for each token (or call).
        zero: its zero point; None if it is symmetric, or found like the scale.
        shift: float32 [in], or None for 0.
        divisor: float32 [in], or None for 1.
        rotation: R, of the inputs as they come; None for none.

    Raises:
        ValueError: the grid is neither of tokens nor, with a scale, of the whole tensor.
    """

    kind: ClassVar[str] = "rounded"
    grid: Any  # a Grid, or None
    scale: Tensor | None
    zero: Tensor | None
    shift: Tensor | None
    divisor: Tensor | None

    def __init__(
        self,
        grid: Grid | None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        shift: Tensor | None = None,
        divisor: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        if grid is None and (rotation is None or scale is not None):
            raise ValueError("grid: None was given; give one for the scale, or a rotation alone.")
        if grid is not None and grid.scope == "tensor" and scale is None:
            raise ValueError("scale: none was given for a grid of the whole tensor; find one in calibration.")
        if grid is not None and grid.scope == "group" and grid.group_size != -1:
            raise ValueError(
                f"grid: groups of {grid.group_size} were given; give group_size -1 for tokens, or scope 'tensor'."
            )
        self.grid = grid
        for name, values in (("scale", scale), ("zero", zero), ("shift", shift), ("divisor", divisor)):
            kept = None if values is None else values.detach().clone()
            self.register_buffer(name, kept if kept is None or name == "zero" else kept.float())
        self.rotation = rotation

    @property
    def does(self) -> str:
        """What a layer does by it, such as 'rounds its inputs'."""
        rounds = "rounds its inputs" if self.grid is not None else ""
        rotates = "rotates its inputs" if self.rotation is not None else ""
        return " and ".join(filter(None, (rotates, rounds)))

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def half_range(self) -> float | None:
        """What a token's largest value becomes before it is rounded; None if `kernels.int8_linear` rounds otherwise."""
        grid = self.grid
        if not (isinstance(grid, IntegerGrid) and grid.bits == 8 and grid.symmetric):
            return None
        other = grid.convention != "zero_in_range" or grid.scale_dtype != "float32"
        return None if other else grid.middle - (0.5 if grid.half_step else 1)

    def rotated(self, x: Tensor) -> Tensor:
        """Inputs x [..., in] behind the rotation, which is what the weight is made for."""
        return x if self.rotation is None else self.rotation(x)

    def moved(self, x: Tensor) -> Tensor:
        """What is rounded, of rotated inputs x [..., in]; in float32 or wider if there is a shift or a divisor."""
        if self.shift is None and self.divisor is None:
            return x
        x = x if x.dtype == torch.float64 else x.float()
        x = x if self.shift is None else x - self.shift
        return x if self.divisor is None else x / self.divisor

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to what the layer multiplies, in the same dtype."""
        moved = self.moved(self.rotated(x))
        return (moved if self.grid is None else self.grid.fake(moved, self.scale, self.zero)).to(x.dtype)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, `kind` among them, as a checkpoint keeps them."""
        given = [name for name in ("scale", "zero", "shift", "divisor") if getattr(self, name) is not None]
        rotation = None if self.rotation is None else self.rotation.spec()
        return {
            "kind": self.kind,
            "grid": None if self.grid is None else self.grid.spec(),
            "given": given,
            "rotation": rotation,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], in_features: int) -> RoundedInputs:
        """One of the right structure whose values come from a file.

        Args:
            spec: as `spec` gave it.
            in_features: of the layer.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "scale": (1,),
            "zero": (1,),
            "shift": (in_features,),
            "divisor": (in_features,),
        }
        given = {name: torch.ones(shapes[name]) for name in spec["given"]}
        if "zero" in given:
            given["zero"] = given["zero"].to(torch.uint8)
        rotation = spec.get("rotation")  # folders of earlier versions say nothing of it
        return cls(
            None if spec["grid"] is None else Grid.from_spec(spec["grid"]),
            **given,
            rotation=None if rotation is None else Rotation.from_spec(rotation),
        )

    def describe(self) -> str:
        """A few words for tables, such as 'inputs rounded to 8 bits per token'."""
        first = "" if self.rotation is None else "inputs rotated"
        if self.grid is None:
            return first
        first = first and f"{first}, "
        scope = "per token" if self.scale is None else "by one scale"
        moved = [name for name in ("shift", "divisor") if getattr(self, name) is not None]
        after = f" after a {' and a '.join(moved)} per channel" if moved else ""
        zeros = "" if getattr(self.grid, "symmetric", True) else ", with zero points"
        return f"{first}inputs rounded to {self.grid.bits} bits {scope}{zeros}{after}"
