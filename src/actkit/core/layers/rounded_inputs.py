"""What a layer reads in place of its inputs: registered by `kind` under the entry-point group `actkit.inputs`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.ranges import Shrunk
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.keeps_dtype import KeepsDtype


class RoundedInputs(KeepsDtype):
    """Inputs on the points of a grid: q(x) = grid((x R - shift) / divisor), computed in float32.

    Rotation, shift and divisor are not taken back: the layer's weight and bias stand for them. Gradients go straight
    through the rounding: to all inputs if each token has a scale of its own, else to those that the range holds.

    Args:
        grid: of whole rows (`group_size` -1), which are the tokens then, or of the whole tensor. None: not rounded.
        scale: float32, the step of the grid, found before: [1] for all values, [in] for each channel, [positions, 1]
            for each place of a sequence of that length, [heads, 1, 1] for each head of [..., heads, tokens, channels];
            None to find it for each token.
        zero: its zero point, [1] or shaped like the scale; None if it is symmetric, or found like the scale.
        shift: float32 [in], or None for 0.
        divisor: float32 [in], or None for 1.
        rotation: R, of the inputs as they come; None for none.
        clip: what both ends of a token's range are multiplied by.

    Raises:
        ValueError: the grid is neither of tokens nor, with a scale, of the whole tensor; `clip` beside a scale.
    """

    kind: ClassVar[str] = "rounded"
    in_training: ClassVar[bool] = False  # a stand-in while a model is trained; `frozen` gives what is stored then
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
        clip: float = 1.0,
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
        if clip != 1 and scale is not None:
            raise ValueError(f"clip: {clip} was given beside a scale, which says what is clipped; leave it out.")
        self.grid, self.clip = grid, clip
        for name, values in (("scale", scale), ("zero", zero), ("shift", shift), ("divisor", divisor)):
            kept = None if values is None else values.detach().clone()
            self._keep(name, kept if kept is None or name == "zero" else kept.float())
        self.rotation = rotation

    def _keep(self, name: str, values: Tensor | None) -> None:
        self.register_buffer(name, values)

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
    def moves_zero(self) -> bool:
        """Whether an input of 0 is not read as 0."""
        return self.shift is not None

    def frozen(self) -> tuple[RoundedInputs, Tensor | None]:
        """What stands in place of one in training, and the vector [in] that the bias then stands for, if there is one.

        Any other one is itself.
        """
        return self, None

    @property
    def half_range(self) -> float | None:
        """What a token's largest value becomes before it is rounded; None if `kernels.int8_linear` rounds otherwise."""
        grid = self.grid
        if not (isinstance(grid, IntegerGrid) and grid.bits == 8 and grid.symmetric):
            return None
        other = grid.convention != "zero_in_range" or grid.scale_dtype != "float32" or self.clip != 1
        other |= self.scale is not None and self.scale.numel() != 1
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
        """Map inputs to what the layer multiplies, in the same dtype.

        Args:
            x: [..., in].

        Raises:
            ValueError: there is a scale for each position, and x has other positions.
        """
        moved = self.moved(self.rotated(x))
        if self.grid is None:
            return moved.to(x.dtype)
        if self.scale is not None:
            self._check_positions(x)
            return self.grid.fake(moved, self.scale, self.zero).to(x.dtype)
        given = () if self.clip == 1 else self.grid.parameters(moved, Shrunk(self.clip, self.grid.choice))
        return self.grid.fake_straight(moved, *given).to(x.dtype)

    def _check_positions(self, x: Tensor) -> None:
        scale: Any = self.scale
        if scale.dim() == 2 and (x.dim() < 2 or x.shape[-2] != len(scale)):
            given = x.shape[-2] if x.dim() > 1 else 1
            raise ValueError(
                f"inputs: they have a scale for each of {len(scale)} positions, and {given} were given; give sequences "
                f"of {len(scale)}, or choose a scale for all values (per: tensor)."
            )

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, `kind` among them, as a checkpoint keeps them."""
        more: dict[str, Any] = {} if self.clip == 1 else {"clip": self.clip}
        if self.scale is not None and tuple(self.scale.shape) != (1,):
            more["scales"] = list(self.scale.shape)
        if self.zero is not None and tuple(self.zero.shape) != (1,):
            more["zeros"] = list(self.zero.shape)
        return {
            "kind": self.kind,
            "grid": None if self.grid is None else self.grid.spec(),
            "given": [name for name in ("scale", "zero", "shift", "divisor") if getattr(self, name) is not None],
            "rotation": None if self.rotation is None else self.rotation.spec(),
            **more,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], in_features: int) -> RoundedInputs:
        """One of the right structure whose values come from a file.

        Args:
            spec: as `spec` gave it.
            in_features: of the layer.
        """
        return cls(**cls._given(spec, in_features), clip=spec.get("clip", 1.0))

    @staticmethod
    def _given(spec: dict[str, Any], in_features: int) -> dict[str, Any]:
        """The grid, the rotation, and tensors of the right shapes for what the layer was given."""
        shapes: dict[str, tuple[int, ...]] = {
            "scale": tuple(spec.get("scales", (1,))),
            "zero": tuple(spec.get("zeros", (1,))),
            "shift": (in_features,),
            "divisor": (in_features,),
        }
        given = {name: torch.ones(shapes[name]) for name in spec["given"]}
        if "zero" in given:
            given["zero"] = given["zero"].to(torch.uint8)
        rotation = spec.get("rotation")  # folders of earlier versions say nothing of it
        return {
            "grid": None if spec["grid"] is None else Grid.from_spec(spec["grid"]),
            "rotation": None if rotation is None else Rotation.from_spec(rotation),
            **given,
        }

    def describe(self) -> str:
        """A few words for tables, such as 'inputs rounded to 8 bits per token'."""
        first = "" if self.rotation is None else "inputs rotated"
        if self.grid is None:
            return first
        first = first and f"{first}, "
        clipped = "" if self.clip == 1 else f", its range times {self.clip:g}"
        scope = f"per token{clipped}" if self.scale is None else f"by {self._scales()}"
        moved = [name for name in ("shift", "divisor") if getattr(self, name) is not None]
        after = f" after a {' and a '.join(moved)} per channel" if moved else ""
        zeros = "" if getattr(self.grid, "symmetric", True) else ", with zero points"
        return f"{first}inputs rounded to {self.grid.bits} bits {scope}{zeros}{after}"

    def _scales(self) -> str:
        assert self.scale is not None
        if self.scale.numel() == 1:
            return "one scale"
        return f"a scale for each {('channel', 'position', 'head')[self.scale.dim() - 1]}"
