"""What a training changed: tuned weights minus those of the base, as tensors that are added, scaled and compared.

    delta = tuned - base,   base + delta = tuned,   a + 2 b - c,   cosine of a and b

Each parameter has one part: all its values (dense), those that differ (sparse), or two thin factors (low rank). A
parameter with two names, as a head tied to its embedding, is one part. Statistics of batch norms are no weights: they
are kept apart, under `buffers`, and neither norms nor cosines see them. A delta knows the fingerprint of its base, is
added to that model alone, and is a safetensors file.

Differences are float32: base + delta is the tuned model to a rounding, and with `dtype=torch.float64` to the bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.layers.low_rank import decompose
from actkit.core.store.adapter_folder import merged

KIND = "actkit delta"
PIECE = 1 << 17  # numbers that are widened at once


@dataclass(frozen=True, eq=False)
class Dense:
    """All values of a difference.

    Attributes:
        values: of the parameter's shape.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.values.shape)

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return self.values.numel()

    def dense(self) -> Tensor:
        """The difference, whole."""
        return self.values

    def times(self, factor: float) -> Dense:
        """Scale it."""
        return Dense(self.values * factor)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"values": self.values}


@dataclass(frozen=True, eq=False)
class Sparse:
    """The entries of a difference that are not 0.

    Attributes:
        indices: int64 [entries], of the flat parameter, ascending.
        values: [entries].
        shape: of the parameter.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many values it holds."""
        return self.values.numel()

    def dense(self) -> Tensor:
        """The difference, whole."""
        return self.values.new_zeros(prod(self.shape)).index_put((self.indices,), self.values).view(self.shape)

    def times(self, factor: float) -> Sparse:
        """Scale it."""
        return replace(self, values=self.values * factor)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        narrow = self.indices.int() if prod(self.shape) < 2**31 else self.indices
        return {"indices": narrow, "values": self.values}


@dataclass(frozen=True, eq=False)
class LowRank:
    """A difference as the product of two thin factors.

    Attributes:
        left: [out, rank].
        right: [rank, in].
        shape: of the parameter, whose size is out * in.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return self.left.numel() + self.right.numel()

    def dense(self) -> Tensor:
        """The difference, whole."""
        return (self.left @ self.right).view(self.shape)

    def times(self, factor: float) -> LowRank:
        """Scale it."""
        return replace(self, left=self.left * factor)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"left": self.left, "right": self.right}


Part = Dense | Sparse | LowRank


def added(one: Part, other: Part) -> Part:
    """Add two parts of one parameter: sparse ones stay sparse, low-rank ones have the sum of their ranks.

    Args:
        one: a part.
        other: of the same shape.
    """
    if isinstance(one, Sparse) and isinstance(other, Sparse):
        indices, places = torch.cat([one.indices, other.indices]).unique(return_inverse=True)
        values = torch.cat([one.values, other.values])
        return Sparse(indices, values.new_zeros(len(indices)).index_add(0, places, values), one.shape)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return LowRank(torch.cat([one.left, other.left], 1), torch.cat([one.right, other.right]), one.shape)
    return Dense(one.dense() + other.dense())


def product(one: Part, other: Part) -> float:
    """The inner product of two parts of one parameter, in float64.

    Args:
        one: a part.
        other: of the same shape.
    """
    if isinstance(other, Sparse) and not isinstance(one, Sparse):
        one, other = other, one
    if isinstance(one, Sparse):
        return float(one.values.double() @ other.dense().flatten()[one.indices].double())
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        inner = one.left.double().t() @ other.left.double()
        return float((inner * (one.right.double() @ other.right.double().t())).sum())
    pieces = zip(one.dense().flatten().split(PIECE), other.dense().flatten().split(PIECE), strict=True)
    return sum(float(a.double() @ b.double()) for a, b in pieces)


def moved(part: Part, device: torch.device) -> Part:
    """Put a part on a device.

    Args:
        part: anywhere.
        device: where it shall be.
    """
    tensors: dict[str, Any] = {key: value for key, value in vars(part).items() if isinstance(value, Tensor)}
    return replace(part, **{key: value.to(device) for key, value in tensors.items()})


@dataclass(frozen=True, eq=False)
class Delta:
    """The changes of a model.

    Attributes:
        parts: by the name of the parameter; those that did not change may be missing.
        base: fingerprint of the model that they are added to; None for any.
        buffers: differences of statistics, by name.
    """

    parts: Mapping[str, Part]
    base: str | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def between(cls, tuned: nn.Module, base: nn.Module, *, dtype: torch.dtype = torch.float32) -> Self:
        """Subtract a base from what was tuned from it.

        Args:
            tuned: the model after.
            base: the same before.
            dtype: of the differences.

        Returns:
            Dense parts of the parameters that changed.

        Raises:
            ValueError: the two have other parameters, or other shapes.
        """
        parts = _differences(dict(tuned.named_parameters()), dict(base.named_parameters()), dtype)
        return cls(
            {name: Dense(each) for name, each in parts.items()},
            model_fingerprint(base, widened=True),
            _differences(_statistics(tuned), _statistics(base), dtype),
        )

    @classmethod
    def of_adapter(cls, base: nn.Module, folder: str | Path) -> Self:
        """Read what an adapter, such as a LoRA, adds to its base; `low_rank` of its rank makes factors of that again.

        Args:
            base: the model that it was trained on, which stays as it is.
            folder: of the adapter, as `actkit train --adapter` wrote it.

        Raises:
            CheckpointError: it was trained on another model, or is not readable.
            ImportError: peft is missing.
        """
        return cls.between(merged(copy.deepcopy(base), folder), base)

    def sparse(self, tolerance: float = 0.0) -> Self:
        """Keep the entries that are not 0.

        Args:
            tolerance: magnitudes up to it count as 0.
        """
        return self._each(lambda part: _sparse(part.dense(), tolerance))

    def low_rank(self, rank: int) -> Self:
        """Approximate the parts of matrices and convolutions by factors, if that takes fewer numbers.

        Args:
            rank: of them.

        Raises:
            ValueError: rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"rank: {rank} was given; give 1 or more.")

        def reduced(part: Part) -> Part:
            whole = part.dense()
            rows = whole.flatten(1) if whole.dim() > 1 else whole[None]
            if min(rows.shape) <= rank or rank * sum(rows.shape) >= rows.numel():
                return part
            left, right = decompose(rows.double(), rank).factors()
            return LowRank(left.to(whole.dtype), right.to(whole.dtype), tuple(whole.shape))

        return self._each(reduced)

    def dense(self) -> Self:
        """Make all parts whole."""
        return self._each(lambda part: Dense(part.dense()))

    def _each(self, change: Callable[[Part], Part]) -> Self:
        return replace(self, parts={name: change(part) for name, part in self.parts.items()})

    # -- sums

    def __add__(self, other: Delta) -> Self:
        base = self._common(other)
        parts = dict(self.parts)
        for name, part in other.parts.items():
            parts[name] = added(parts[name], part) if name in parts else part
        buffers = dict(self.buffers)
        for name, values in other.buffers.items():
            buffers[name] = buffers[name] + values if name in buffers else values
        return replace(self, parts=parts, base=base, buffers=buffers)

    def __mul__(self, factor: float) -> Self:
        scaled = {name: values * factor for name, values in self.buffers.items()}
        return replace(self._each(lambda part: part.times(factor)), buffers=scaled)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1.0

    def __sub__(self, other: Delta) -> Self:
        return self + -other

    # -- sizes

    @property
    def numbers(self) -> int:
        """How many numbers the parts hold; indices are not counted."""
        return sum(part.numbers for part in self.parts.values())

    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each part."""
        return {name: sqrt(max(product(part, part), 0.0)) for name, part in self.parts.items()}

    def norm(self) -> float:
        """The norm of all parts together."""
        return sqrt(sum(each**2 for each in self.norms().values()))

    def product(self, other: Delta) -> float:
        """The inner product with another one.

        Args:
            other: of the same base.

        Raises:
            ValueError: it is of another base, or its parts have other shapes.
        """
        self._common(other)
        return sum(product(part, other.parts[name]) for name, part in self.parts.items() if name in other.parts)

    def cosine(self, other: Delta) -> float:
        """The cosine of the angle between the two; 0 if one of them is 0.

        Args:
            other: of the same base.

        Raises:
            ValueError: as `product`.
        """
        length = self.norm() * other.norm()
        return self.product(other) / length if length else 0.0

    def _common(self, other: Delta) -> str | None:
        if self.base and other.base and self.base != other.base:
            raise ValueError(
                f"delta: its base is {other.base[:12]}, that of the other is {self.base[:12]}; deltas of one base can "
                f"be added and compared."
            )
        wrong = [
            name for name in self.parts if name in other.parts and self.parts[name].shape != other.parts[name].shape
        ]
        if wrong:
            raise ValueError(f"delta: {', '.join(wrong[:5])} have other shapes; give deltas of one model.")
        return self.base or other.base

    # -- models and files

    @torch.no_grad()
    def add_to(self, model: nn.Module, scale: float = 1.0, *, check: bool = True) -> None:
        """Add it to a model.

        Args:
            model: the base, in place.
            scale: it is multiplied by this.
            check: that the model is the base, by its fingerprint.

        Raises:
            CheckpointError: the model is another one.
            ValueError: a parameter is missing, or of another shape.
        """
        if check and self.base and (found := model_fingerprint(model, widened=True)) != self.base:
            raise CheckpointError(
                f"delta: it belongs to a model with the fingerprint {self.base[:12]}, this one has {found[:12]}; give "
                f"that model, or check=False if you know what you do."
            )
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name, shape in [*((name, part.shape) for name, part in self.parts.items()), *_shapes(self.buffers)]:
            if name not in state or tuple(state[name].shape) != shape:
                what = f"has shape {list(state[name].shape)}" if name in state else "is not there"
                raise ValueError(f"delta: {name} {what} in this model, {list(shape)} was expected; give its base.")
        for name, part in self.parts.items():
            _add(state[name], part.dense() * scale if scale != 1 else part.dense())
        for name, values in self.buffers.items():
            _add(state[name], values * scale)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Args:
            path: of the file.
        """
        tensors = {
            f"{name}|{key}": tensor.detach().cpu().contiguous()
            for name, part in self.parts.items()
            for key, tensor in part.tensors().items()
        }
        tensors |= {f"{name}|buffer": values.detach().cpu().contiguous() for name, values in self.buffers.items()}
        shapes = {name: part.shape for name, part in self.parts.items()}
        metadata = {"kind": KIND, "base": self.base or "", "shapes": json.dumps(shapes), "format": "pt"}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            CheckpointError: it is missing, or no delta.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise CheckpointError(f"delta: {path} holds none; give a file that Delta.save wrote.")
                found: dict[str, dict[str, Tensor]] = {}
                for key in file.keys():  # noqa: SIM118
                    name, _, own = key.rpartition("|")
                    found.setdefault(name, {})[own] = file.get_tensor(key)
                shapes = json.loads(metadata["shapes"])
                buffers = {name: each.pop("buffer") for name, each in found.items() if "buffer" in each}
                parts = {name: _part(found[name], tuple(shape)) for name, shape in shapes.items()}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"delta: {path} is not readable ({error}); give a file that Delta.save wrote."
            ) from error
        return cls(parts, metadata["base"] or None, buffers)


def _part(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    if "left" in tensors:
        return LowRank(tensors["left"], tensors["right"], shape)
    if "indices" in tensors:
        return Sparse(tensors["indices"].long(), tensors["values"], shape)
    return Dense(tensors["values"])


def _sparse(whole: Tensor, tolerance: float) -> Sparse:
    flat = whole.flatten()
    indices = (flat.abs() > tolerance).nonzero().flatten()
    return Sparse(indices, flat[indices], tuple(whole.shape))


def _add(tensor: Tensor, values: Tensor) -> None:
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    tensor.copy_(tensor.to(wide) + values.to(tensor.device))


def _shapes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((name, tuple(each.shape)) for name, each in tensors.items())


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved and are floats: the statistics of batch norms."""
    saved = model.state_dict()
    return {name: each for name, each in model.named_buffers() if name in saved and each.is_floating_point()}


def _differences(tuned: Mapping[str, Any], base: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the tensors that differ."""
    shapes = [{name: tuple(each.shape) for name, each in given.items()} for given in (tuned, base)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name in {*tuned, *base} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"tuned, base: {', '.join(wrong[:5])} differ in name or shape; give the same model twice.")
    return {
        name: each.detach().to(dtype) - base[name].detach().to(each.device, dtype)
        for name, each in tuned.items()
        if each.is_floating_point() and not torch.equal(each, base[name].to(each.device))
    }
