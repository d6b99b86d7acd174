"""An activation that fades out while a model is trained: deep training, from VanillaNet (2023, arXiv:2305.12972).

    faded(x) = (1 - strength) f(x) + strength x

strength runs from 0 (f) to 1 (nothing is done). With ReLU this is a leaky ReLU of that slope. Two layers with a faded
activation between them are one layer in the end (`collapse`).

When to use it: `fade_activations` as a rule of a training, after `deepen`; or on activations of your own choice, put in
by the recipe `swap: {where: relu, new: {module: faded_activation, spec: {}}}`, to make a trained model more linear.
Cost: one multiplication more per value.
Settled here: the strength is a buffer, so that a checkpoint from the midst of a training is what it was (in the
release it is an attribute that is lost, and loads as 1). It follows the steps, not the epochs, and is set to exactly
1 at the end: 0.9999 would still bend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.ground.errors import EditError
from actkit.core.layers.activation_function import ActivationFunction, Axis
from actkit.core.layers.activations import Activation, groups_of, mixes_of, record_of
from actkit.core.layers.found_record import Term, sum_of
from actkit.core.layers.keeps_dtype import KeepsDtype, check_floats
from actkit.core.layers.known_functions import IDENTITY
from actkit.core.recipe.rule import AttachedRule, TrainingRule


class FadedActivation(KeepsDtype):
    """(1 - strength) f(x) + strength x: any shape -> the same.

    Args:
        base: f, a module or the name of a function.
        strength: 0 for f alone, 1 for nothing; a buffer.

    Raises:
        ValueError: a strength outside of 0 to 1, or a function that mixes.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
    strength: Tensor

    def __init__(self, base: nn.Module | str, strength: float = 0.0) -> None:
        super().__init__()
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: {strength} was given; give 0 (the function) to 1 (nothing is done).")
        base = Activation(base) if isinstance(base, str) else base
        if mixes_of(base):
            raise ValueError(f"base: a {type(base).__name__} mixes {', '.join(mixes_of(base) or ())}; it cannot fade.")
        self.base = base
        self.register_buffer("strength", torch.tensor(float(strength)))

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        check_floats(x)
        return torch.lerp(self.base(x), x, self.strength.to(x.dtype))

    @property
    def groups(self) -> int:
        """Of f: how many functions it holds."""
        return groups_of(self.base)

    def record(self, group: int | None = None) -> ActivationFunction | None:
        """What is known of it at its present strength; None if nothing is known of f.

        Args:
            group: of channels; None for all.
        """
        base = record_of(self.base, group)
        if base is None or self.strength.is_meta:
            return None
        faded = float(self.strength)
        flops = None if base.flops is None else base.flops + 3
        return sum_of(f"{base.name} faded by {faded:.4g}", (Term(base, 1 - faded), Term(IDENTITY, faded)), flops)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments; the strength is in the weights file."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> FadedActivation:
        """Make it around the activation that stands in its place."""
        return cls(original)

    def extra_repr(self) -> str:
        return f"strength={float(self.strength):.4g}"


class FadeActivations(TrainingRule):
    """Fade activations out during a training, to exactly nothing.

    Attributes:
        share: of the training, after which nothing is left of them; the paper's is 1/3.
        mode: "linear", or "cosine", slow at both ends.
        where: a pattern of paths of faded activations.

    Raises:
        EditError: the model has no faded activation there.
    """

    keep: ClassVar[Literal["best", "last"]] = "last"
    share: float = Field(1 / 3, gt=0, le=1)
    mode: Literal["linear", "cosine"] = "linear"
    where: str = "*"

    def strength(self, progress: float) -> float:
        """Return the strength at a share of the training.

        Args:
            progress: from 0 to 1.
        """
        passed = min(progress / self.share, 1.0)
        return passed if self.mode == "linear" else (1 - math.cos(math.pi * passed)) / 2

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedFading:
        found = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, FadedActivation) and fnmatchcase(path, self.where)
        }
        if not found:
            raise EditError(
                f"where: {self.where!r} matches no faded activation of this {type(model).__name__}; put some in with "
                f"the transform deepen, or Swap(where='relu', new={{'module': 'faded_activation', 'spec': {{}}}})."
            )
        return AttachedFading(self, found)


class AttachedFading(AttachedRule):
    """The rule at work.

    Args:
        rule: its settings.
        faded: the activations by path.
    """

    def __init__(self, rule: FadeActivations, faded: Mapping[str, FadedActivation]) -> None:
        self.rule, self.faded = rule, faded

    def before_step(self, progress: float) -> None:
        self._set(progress)

    def after_step(self, progress: float) -> None:
        self._set(progress)

    def report(self) -> dict[str, Any]:
        return {"strength": float(next(iter(self.faded.values())).strength)}

    @torch.no_grad()
    def _set(self, progress: float) -> None:
        for module in self.faded.values():
            module.strength.fill_(self.rule.strength(progress))
