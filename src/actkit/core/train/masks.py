"""Which entries of a model's weights are kept, and a rule that holds the others at 0 while the model is trained.

    w <- m * w  when training begins and after each step,   gradient of w <- m * gradient

When to use it: to train a model that was pruned, here or by any other tool, so that it stays pruned.
Cost: one bool per entry, a product for each gradient, and a pass over the weights after each step.
Settled here: masks are explicit, so that an entry that is 0 by chance is pruned only where no masks are given. They are
saved as bits, and pass to and from `torch.nn.utils.prune`; what a training gives is that of torch's own pruning (to
1e-6), and the model keeps its modules and the names of its parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import PrivateAttr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from actkit.core.ground.errors import CheckpointError
from actkit.core.recipe.rule import AttachedRule, TrainingRule

KIND = "actkit masks"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def layer_weights(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Find the weights of linear layers and convolutions, each once; those that are an embedding too are left out.

    Args:
        model: any.
        patterns: of names; None for all.

    Raises:
        ValueError: there are none, or a pattern fits none of them.
    """
    embedded = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    layers = {id(each.weight) for each in model.modules() if isinstance(each, LAYERS)} - embedded
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in layers}
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"parameters: {pattern!r} fits no weight of a linear layer or convolution; they are "
                f"{', '.join(list(found)[:5]) or 'none'}."
            )
    chosen = {name: each for name, each in found.items() if patterns is None or _fits(name, patterns)}
    if not chosen:
        raise ValueError(
            f"model: this {type(model).__name__} has no linear layer or convolution whose weight is its own."
        )
    return chosen


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, eq=False)
class Masks:
    """Which entries of some parameters are kept.

    Attributes:
        kept: by the name of the parameter a bool tensor of its shape.
    """

    kept: Mapping[str, Tensor]

    @classmethod
    def all_of(cls, weights: Mapping[str, Tensor]) -> Self:
        """Keep everything.

        Args:
            weights: by name.
        """
        return cls({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})

    @classmethod
    def of_zeros(cls, model: nn.Module, patterns: Sequence[str] | None = None) -> Self:
        """Keep what is not 0.

        Args:
            model: whose layers' weights are read.
            patterns: as in `layer_weights`; weights without a 0 are left out.
        """
        found = {name: weight.detach() != 0 for name, weight in layer_weights(model, patterns).items()}
        return cls({name: kept for name, kept in found.items() if not bool(kept.all())})

    @classmethod
    def of_torch(cls, model: nn.Module) -> Self:
        """Read the masks that `torch.nn.utils.prune` has put into a model.

        Args:
            model: with parameters such as 'fc.weight_orig' and buffers such as 'fc.weight_mask'.

        Returns:
            Masks by the plain names, such as 'fc.weight'.
        """
        parameters = dict(model.named_parameters())
        masks = {name.removesuffix("_mask"): each for name, each in model.named_buffers() if name.endswith("_mask")}
        return cls({name: each.bool() for name, each in masks.items() if f"{name}_orig" in parameters})

    def to_torch(self, model: nn.Module) -> None:
        """Prune a model as `torch.nn.utils.prune` does; `prune.remove` makes it plain again.

        Args:
            model: in place; its parameters become 'weight_orig', with a buffer 'weight_mask' beside.

        Raises:
            ValueError: the masks are of another model.
        """
        self.check(model)
        for name, kept in self.kept.items():
            path, _, own = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(path), own, kept)

    @property
    def total(self) -> int:
        """How many entries there are."""
        return sum(kept.numel() for kept in self.kept.values())

    @property
    def alive(self) -> int:
        """How many of them are kept."""
        return sum(int(kept.sum()) for kept in self.kept.values())

    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that the masks are of.

        Args:
            model: that they should fit.

        Raises:
            ValueError: a parameter is missing, or of another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, kept in self.kept.items():
            shape = list(parameters[name].shape) if name in parameters else "no such parameter"
            if shape != list(kept.shape):
                raise ValueError(
                    f"masks: {name} has a mask of shape {list(kept.shape)}, the model has {shape}; give masks of this "
                    f"model."
                )
        return {name: parameters[name] for name in self.kept}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set what is not kept to 0.

        Args:
            model: in place.

        Raises:
            ValueError: the masks are of another model.
        """
        for name, parameter in self.check(model).items():
            parameter.masked_fill_(~self.kept[name].to(parameter.device), 0)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, a bit for each entry.

        Args:
            path: of the file.
        """
        shapes = {name: list(kept.shape) for name, kept in self.kept.items()}
        bits = {name: np.packbits(kept.cpu().numpy().reshape(-1)) for name, kept in self.kept.items()}
        tensors = {name: torch.from_numpy(each) for name, each in bits.items()}
        save_file(tensors, path, metadata={"kind": KIND, "shapes": json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            CheckpointError: it is missing, or no file of masks.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise CheckpointError(f"masks: {path} holds no masks; give a file that Masks.save wrote.")
                shapes = json.loads(metadata["shapes"])
                kept = {name: _unpacked(file.get_tensor(name), shape) for name, shape in shapes.items()}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"masks: {path} is not readable ({error}); give a file that Masks.save wrote."
            ) from error
        return cls(kept)


def _unpacked(bits: Any, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool)).view(*shape)


class KeepMasks(TrainingRule):
    """Hold pruned weights at 0 while a model is trained.

    Attributes:
        masks: a file that `Masks.save` wrote; None for the zeros that the layers' weights have when training begins.
            `KeepMasks.of(masks)` takes masks that are in memory.

    Raises:
        ValueError: the masks are of another model, or no weight has a zero.
        CheckpointError: the file is not readable, or a resumed training began with other masks.
    """

    masks: str | None = None
    _given: Masks | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, masks: Masks) -> Self:
        """Make the rule of masks in memory."""
        rule = cls()
        rule._given = masks
        return rule

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedMasks:
        masks = self._given
        if masks is None:
            masks = Masks.of_zeros(model) if self.masks is None else Masks.load(self.masks)
        if not masks.kept:
            raise ValueError(
                "masks: no weight of a layer has an entry that is 0, so there is nothing to hold; prune first, or give "
                "masks."
            )
        return AttachedMasks(model, masks)


class AttachedMasks(AttachedRule):
    """Masks at work.

    Args:
        model: in place.
        masks: of it; `keep` puts others in their place.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.model, self.parameters = model, masks.check(model)
        self.keep(masks)
        self._handles = [
            parameter.register_hook(lambda gradient, name=name: gradient * self.masks.kept[name])
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        ]

    def keep(self, masks: Masks) -> None:
        """Hold what these masks do not keep at 0 from now on."""
        self.masks = Masks({name: masks.kept[name].to(each.device) for name, each in self.parameters.items()})
        self.masks.apply(self.model)

    def after_step(self, progress: float) -> None:
        self.masks.apply(self.model)

    def report(self) -> dict[str, Any]:
        """Return the share of the entries that is kept."""
        return {"alive": self.masks.alive / self.masks.total}

    def state_dict(self) -> dict[str, Any]:
        return {"masks": dict(self.masks.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = state.get("masks", {})
        same = found.keys() == self.masks.kept.keys() and all(
            torch.equal(found[name].to(kept.device), kept) for name, kept in self.masks.kept.items()
        )
        if not same:
            raise CheckpointError("masks: the training began with other masks; give those, or start anew.")

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
