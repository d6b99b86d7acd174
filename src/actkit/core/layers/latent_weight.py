"""A weight in training that the layer multiplies as a grid has it: y = q(W) x, with W trained.

Its scales are found anew in each step, and then the gradient of q(W) is that of W, everywhere; or they are learned
(`core/grids/learned.py`), and then a clipped weight gets none. `frozen` gives the codes that are stored in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.grids.grid import Grid
from actkit.core.grids.learned import fake_learned, first_step, learned_step
from actkit.core.grids.ranges import Shrunk
from actkit.core.ground import registry
from actkit.core.layers.weights import CodedWeight, WeightStorage


class LatentWeight(WeightStorage):
    """A trainable weight, seen through a grid.

    Args:
        tensor: [out, in]; becomes a Parameter.
        grid: that it is seen through.
        clip: what both ends of a range that is found anew are multiplied by.
        step: [out * groups], learned scales in the order of the rows; None to find them anew.

    Raises:
        ValueError: the groups do not fit.
    """

    kind = "latent"
    in_training = True

    def __init__(self, tensor: Tensor, grid: Any, clip: float = 1.0, step: Tensor | None = None) -> None:
        super().__init__()
        self.tensor = nn.Parameter(tensor)
        self.grid, self.clip = grid.of(*tensor.shape), clip
        self._scales = self.grid.parameter_shape(*tensor.shape)
        self.step = None if step is None else nn.Parameter(step)  # flat, as vectors neither decay nor go to Muon

    @classmethod
    def of(cls, weight: Tensor, grid: Any, *, clip: float = 1.0, learned: bool = False) -> LatentWeight:
        """Make one that begins as a weight.

        Args:
            weight: [out, in], copied.
            grid: as in the class.
            clip: as in the class.
            learned: whether scales are learned, from where LSQ begins.

        Raises:
            ValueError: the groups do not fit.
        """
        made = cls(weight.detach().clone(), grid, clip)
        if learned:
            mean = weight.detach().float().unflatten(1, (made._scales[1], -1)).abs().mean(-1)
            made.step = nn.Parameter(first_step(mean, made.grid).flatten().to(weight.dtype))
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of what is trained."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def latent(self) -> Tensor:
        """The values [out, in] that are rounded."""
        return self.tensor

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero as they are now, as `Grid.parameters` gives them; a learned one with its gradient."""
        if self.step is None:
            shrunk = None if self.clip == 1 else Shrunk(self.clip, self.grid.choice)
            return self.grid.parameters(self.latent(), shrunk)
        step = self.step if self.step.dtype == torch.float64 else self.step.float()
        return learned_step(step).view(self._scales), None

    def _values(self) -> Tensor:
        scale, zero = self.scales()
        if self.step is None:
            return self.grid.fake_straight(self.latent(), scale, zero)
        wide = self.tensor if self.dtype == torch.float64 else self.tensor.float()
        groups = fake_learned(wide.unflatten(1, (self._scales[1], -1)), scale[..., None], self.grid)
        return groups.flatten(1).to(self.dtype)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """The codes as they are now: uint8 [out, in]."""
        return self.grid.quantize(self.latent(), *self.scales())[0]

    @torch.no_grad()
    def places(self) -> Tensor:
        """Where the values lie among the codes, neither rounded nor clamped: float32 [out, in].

        A value whose place is k + 1/2 lies on the threshold between the codes k and k + 1.
        """
        return self.grid.places(self.latent(), *self.scales())

    @torch.no_grad()
    def from_thresholds(self) -> Tensor:
        """How far each value is from the next threshold between two codes, in steps: [out, in], 0 to 1/2 and more."""
        places = self.places()
        return (places - (places.floor().clamp(0, self.grid.levels - 1) + 0.5)).abs()

    @torch.no_grad()
    def frozen(self) -> CodedWeight:
        latent = self.latent()
        codes, scale, zero = self.grid.quantize(latent, *self.scales())
        cls = registry.weight_class(self.grid.kind)
        return cls.of_codes(codes, scale, zero, self.grid, self.dtype, self.grid.whole(latent.float()))

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "grid": self.grid.spec(),
            "clip": self.clip,
            "learned": self.step is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> LatentWeight:
        made = cls(torch.empty(shape, dtype=dtype), Grid.from_spec(spec["grid"]), spec["clip"])
        if spec["learned"]:
            count = made._scales[0] * made._scales[1]
            made.step = nn.Parameter(torch.empty(count, dtype=dtype))
        return made

    def describe(self) -> str:
        how = "learned steps" if self.step is not None else "steps found anew"
        return f"trained, seen as {self.grid.describe()}, {how}"
