"""Binary codes of samples: one bit for each hidden unit, on or off.

    code(x) = (1[z_u(x) > 0] for every hidden unit u),  z the pre-activation
    redundancy = (samples - distinct codes) / samples

From "Neural networks behave as hash encoders" (2021, arXiv:2101.05490): a ReLU network cuts its inputs into linear
regions, and the code names the region. The output layer is not part of it.

When to use it: to see whether a network tells samples apart (redundancy 0: one region for each), to find duplicates, or
for cheap retrieval by Hamming distance; `neural_code` says how much of the class the codes hold.
Cost: one forward pass, and a bit for each unit and sample.
Settled here: "on" is above 0, so that dead units are off. A function other than ReLU has a code too, of the sign of its
input; these layers are `soft`, as they cut no linear regions. A sample is an example (an image, a row of features) in a
model that actkit traces, and a token in others.
Our own reading: `pool="any"` gives one bit for each channel of a map, on if any position is on. The paper's code sums
the outputs of ReLU over a map for large images, which is above 0 in the same cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.layers.activations import gives_zeros
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.model.called_functions import called_functions
from actkit.core.watch.capture import record
from actkit.core.watch.streaming import Rows, Statistic, in_order

Samples = Literal["example", "row"]
NEAR = 1e-6  # a pre-activation so small may have another sign with another batch size
IGNORED = -100  # a label that says "none"


@dataclass(frozen=True)
class CodeLayer:
    """The bits of one activation.

    Attributes:
        path: of the activation, or the name of the function and what reads it.
        start: its first bit in the code.
        stop: behind its last one.
        soft: its function has no exact zeros, so that the sign of its input is no region.
        near_zero: how many pre-activations were within 1e-6 of 0 without being 0: bits that may flip.
    """

    path: str
    start: int
    stop: int
    soft: bool
    near_zero: int


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of samples, eight bits to a byte.

    Attributes:
        packed: uint8 [samples, bytes], the first unit the highest bit.
        layers: which bits are whose; those that were dropped are not counted.
        labels: int64 [samples]; None if the batches had none.
        examples: int64 [samples], the number of the example that each sample is of.
    """

    packed: NDArray[np.uint8] = field(repr=False)
    layers: tuple[CodeLayer, ...]
    labels: NDArray[np.int64] | None = field(repr=False)
    examples: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.layers[-1].stop if self.layers else 0

    def bits(self) -> NDArray[np.uint8]:
        """The codes as 0 and 1: [samples, width]."""
        return np.unpackbits(self.packed, axis=1, count=self.width)

    def counts(self) -> NDArray[np.int64]:
        """At how many samples each unit is on: [width]."""
        total = np.zeros(self.width, dtype=np.int64)
        for start in range(0, len(self), 4096):  # never all bits at once
            total += np.unpackbits(self.packed[start : start + 4096], axis=1, count=self.width).sum(0, dtype=np.int64)
        return total

    def chosen(self, samples: Any) -> Codes:
        """Some samples.

        Args:
            samples: an index, a mask or a slice over samples.
        """
        labels = None if self.labels is None else self.labels[samples]
        return replace(self, packed=self.packed[samples], labels=labels, examples=self.examples[samples])

    def of_layer(self, path: str) -> Codes:
        """The code of one layer.

        Args:
            path: of a layer.

        Raises:
            ValueError: there is no such layer.
        """
        found = next((layer for layer in self.layers if layer.path == path), None)
        if found is None:
            raise ValueError(f"path: {path!r} is no layer of the code; it has {_paths(self.layers)}.")
        kept = np.zeros(self.width, dtype=bool)
        kept[found.start : found.stop] = True
        return self.units(kept)

    def units(self, kept: NDArray[np.bool_]) -> Codes:
        """Some bits; layers without any are left out.

        Args:
            kept: bool [width].
        """
        layers, start = [], 0
        for layer in self.layers:
            size = int(kept[layer.start : layer.stop].sum())
            if size:
                layers.append(replace(layer, start=start, stop=start + size))
                start += size
        return replace(self, packed=np.packbits(self.bits()[:, kept], axis=1), layers=tuple(layers))


def varying(codes: Codes, *others: Codes) -> NDArray[np.bool_]:
    """Say which units are neither always on nor always off: bool [width].

    Args:
        codes: of the samples that decide, such as those of training.
        others: more samples that decide. The paper's code takes the test samples too, a mild leakage.
    """
    samples = len(codes) + sum(map(len, others))
    on = codes.counts() + sum((other.counts() for other in others), start=np.zeros(codes.width, dtype=np.int64))
    return (on > 0) & (on < samples)


def distinct(codes: Codes) -> int:
    """Count the different codes: the regions that the samples lie in."""
    if not codes.packed.shape[1]:
        return min(1, len(codes))
    rows = np.ascontiguousarray(codes.packed).view(np.dtype((np.void, codes.packed.shape[1])))
    return len(np.unique(rows))


def redundancy(codes: Codes) -> float:
    """Return the share of samples that have no code of their own: 0 if each has one.

    Args:
        codes: without repeated samples, which would count as redundant; compare equal numbers of them.
    """
    return (len(codes) - distinct(codes)) / len(codes)


def duplicates(codes: Codes) -> list[list[int]]:
    """Find samples that share a code: groups of two and more, the largest first."""
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(codes.packed):
        groups.setdefault(row.tobytes(), []).append(index)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def hamming(one: Codes, other: Codes) -> NDArray[np.int32]:
    """Count the bits in which codes differ: [samples, samples of the other].

    Args:
        one: some codes.
        other: codes of the same units.

    Raises:
        ValueError: they have other numbers of bits.
    """
    if one.width != other.width:
        raise ValueError(
            f"other: its codes have {other.width} bits and these {one.width}; give codes of the same units."
        )
    words = -(-one.packed.shape[1] // 8) * 8

    def in_words(codes: Codes) -> NDArray[np.uint64]:
        padded = np.zeros((len(codes), words), dtype=np.uint8)
        padded[:, : codes.packed.shape[1]] = codes.packed
        return padded.view(np.uint64)

    a, b = in_words(one), in_words(other)
    found = np.empty((len(a), len(b)), dtype=np.int32)
    for index, row in enumerate(a):  # a row at a time: [samples, samples, words] would not fit
        found[index] = np.bitwise_count(row ^ b).sum(1, dtype=np.int32)
    return found


def nearest(queries: Codes, known: Codes, k: int = 10) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Find the known samples with the nearest codes.

    Args:
        queries: what is looked for.
        known: where.
        k: how many; of equal distances the first counts.

    Returns:
        Indices and distances, [queries, k], the nearest first.

    Raises:
        ValueError: k is below 1 or above the number of known samples.
    """
    if not 1 <= k <= len(known):
        raise ValueError(f"k: {k} was given, and {len(known)} samples are known; give 1 to {len(known)}.")
    distances = hamming(queries, known)
    order = distances.argsort(axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


# -- reading them ------------------------------------------------------------------------------------------------------


class SignBits(Statistic):
    """Which channels are above 0 at each row, packed; and how many are nearly 0."""

    _packed: Tensor
    _sequence: Tensor
    _position: Tensor
    _near: Tensor

    def memory(self, channels: int) -> int:
        return 0  # an eighth of a byte for each value and 16 bytes for each row, and nobody knows how many there are

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        keys = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in ("sequence", "position")}
        packed = torch.zeros(0, -(-channels // 8), dtype=torch.uint8, device=device)
        return {"packed": packed, **keys, "near": torch.zeros(1, dtype=torch.int64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: SignBits tells samples apart; pass Rows(documents, positions).")
        on = torch.from_numpy(np.packbits((x > 0).cpu().numpy(), axis=1)).to(self._device)
        near = ((x.abs() < NEAR) & (x != 0)).sum().reshape(1)
        keys = rows.sequences.to(self._device), rows.positions.to(self._device)
        self._add(on, *keys, near)

    def _merge(self, other: Self) -> None:
        self._add(*(getattr(other, f"_{name}").to(self._device) for name in self._fields))

    def _add(self, packed: Tensor, sequence: Tensor, position: Tensor, near: Tensor) -> None:
        self._packed = torch.cat((self._packed, packed))
        self._sequence = torch.cat((self._sequence, sequence))
        self._position = torch.cat((self._position, position))
        self._near = self._near + near

    @property
    def rows(self) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], int]:
        """Bits [rows, channels] in the order of sequences and positions, these two, and how many are nearly 0."""
        self._needs_rows()
        order = in_order(self._sequence, self._position)
        packed, sequence, position = (x[order].cpu().numpy() for x in (self._packed, self._sequence, self._position))
        bits = np.unpackbits(packed, axis=1, count=self.channels).astype(bool)
        return bits, sequence, position, int(self._near)


def neural_codes(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    samples: Samples | None = None,
    pool: Literal["any"] | None = None,
    progress: bool = True,
) -> Codes:
    """Read the codes of samples.

    Args:
        model: in evaluation mode meanwhile, as batch norms and dropout change codes.
        batches: as for the model; "labels" [batch] or [batch, length] are kept, -100 for none.
        layers: patterns of paths of activations; None for all.
        samples: 'example': all positions of an image or a text are one code; 'row': each is one. By default examples
            in a traced model and rows (tokens) in others.
        pool: 'any': one bit for each channel of an example, on if any position is.
        progress: show a bar.

    Returns:
        The codes, in the order of the examples and positions.

    Raises:
        DataError: no activation is found, examples have unequal numbers of positions, layers read other rows than each
            other, or labels do not fit.
        ValueError: `layers` fits none, or a value out of bounds.
        ActkitError: what `record` raises.
    """
    if samples not in (None, "example", "row") or pool not in (None, "any"):
        raise ValueError(f"samples, pool: {samples!r}, {pool!r} were given; allowed are 'example', 'row', and 'any'.")
    given = sequence_of(batches)
    if not len(given):
        raise DataError("batches: none were given; pass at least one.")
    view = anatomy(model, given[0])
    kind: Samples = samples or ("example" if view.architecture == "traced" else "row")
    if pool is not None and kind == "row":
        raise ValueError("pool: 'any' was given, which joins the positions of examples; pass samples='example'.")
    places = _places(view, layers)
    seen = record(model, {place.site: SignBits() for place in places}, given, anatomy=view, progress=progress)
    parts, found, start = [], [], 0
    keys: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    for place in places:
        statistic = seen[place.site]
        assert isinstance(statistic, SignBits)
        bits, sequence, position, near = statistic.rows
        if kind == "example":
            bits, sequence = _by_example(bits, sequence, place.path, pool is not None)
            position = np.zeros_like(sequence)
        if keys is not None and not all(map(np.array_equal, keys, (sequence, position))):
            raise DataError(
                f"layers: {place.path} reads other rows than {places[0].path}, so that they have no common code; "
                f"name layers of one kind by layers=, or pass samples='example'."
            )
        keys = sequence, position
        parts.append(bits)
        found.append(CodeLayer(place.path, start, start + bits.shape[1], place.soft, near))
        start += bits.shape[1]
    assert keys is not None  # there is a layer
    packed = np.packbits(np.concatenate(parts, axis=1), axis=1)
    return Codes(packed, tuple(found), _labels(given, *keys, kind), keys[0])


@dataclass(frozen=True)
class _Place:
    site: Site
    path: str
    soft: bool


def _places(view: Anatomy, patterns: Sequence[str] | None) -> list[_Place]:
    """The inputs of activation functions; in a traced model what reads a ReLU that is called as a function."""
    modules = dict(view.model.named_modules())
    places = [
        _Place(Site("activation.input", path=path), path, not gives_zeros(modules[path])) for path in view.activations()
    ]
    for called in called_functions(view):
        if not called.gives_zeros:
            raise DataError(
                f"layers: {called.name} before {called.before} is called as a function, and of its outputs no "
                f"sign of its inputs can be read; make it a module of torch.nn."
            )
        places.append(_Place(called.site, called.label, False))
    if not places:
        raise DataError("layers: this model has no activation function that is seen; make functions it calls modules.")
    wanted = [p for p in places if patterns is None or any(fnmatchcase(p.path, each) for each in patterns)]
    if not wanted:
        raise ValueError(f"layers: {list(patterns or ())} fit no activation; the model has {_paths(places)}.")
    return wanted


def _paths(layers: Iterable[CodeLayer | _Place]) -> str:
    names = [layer.path for layer in layers]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _by_example(
    bits: NDArray[np.bool_], sequence: NDArray[np.int64], path: str, pooled: bool
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    examples, counts = np.unique(sequence, return_counts=True)
    if len(set(counts.tolist())) > 1 and not pooled:
        raise DataError(
            f"samples: {path} has {counts.min()} to {counts.max()} positions in an example, so that these have no "
            f"common code; pass samples='row', or pool='any'."
        )
    if pooled:
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        return np.logical_or.reduceat(bits, starts, axis=0), examples
    return bits.reshape(len(examples), -1), examples


def _labels(
    batches: Sequence[Any], sequence: NDArray[np.int64], position: NDArray[np.int64], kind: Samples
) -> NDArray[np.int64] | None:
    if not all(isinstance(batch, dict) and isinstance(batch.get("labels"), Tensor) for batch in batches):
        return None
    rows = [row.cpu().numpy() for batch in batches for row in batch["labels"]]
    if len(rows) <= int(sequence.max()):
        raise DataError(f"labels: there are {len(rows)} for {int(sequence.max()) + 1} examples; give one for each.")
    if rows[0].ndim == 0:
        return np.array([int(rows[index]) for index in sequence], dtype=np.int64)
    if kind == "example":
        return None  # labels of tokens say nothing of a whole text
    short = next((i for i, p in zip(sequence, position, strict=True) if p >= len(rows[i])), None)
    if short is not None:
        raise DataError(f"labels: row {short} has {len(rows[short])} of them and more positions; give one for each.")
    return np.array([int(rows[i][p]) for i, p in zip(sequence, position, strict=True)], dtype=np.int64)
