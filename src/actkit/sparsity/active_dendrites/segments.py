"""Dendritic segments: recognise a sparse code by a few of its ones (2016, arXiv:1601.00720).

    code  = the `active` largest of an activation vector, as a boolean vector of `cells`
    match = (how many of the segment's cells are on in the code) >= threshold

A segment stores `synapses` cells drawn from the ones of a code; several codes may share one segment, which then holds
the union. How often that goes wrong is computed in `pattern_theory`, for codes whose ones are uniform; those of a real
network are not, see `pattern_simulation`.
When to use it: to recognise a state of a model, or to say that it is new, at a stated rate of false alarms; to ask how
many patterns codes of a given sparsity can hold. Take the threshold from a comparison on your model
(`pattern_simulation`), not from the theory.
Cost: a segment is a list of cells; matching adds up one row of the batch per stored cell (a sparse matrix product),
some 20 ms for 10,000 segments of 24 synapses and 64 codes on one core.
Left open by the paper: how a code is made of activations. Here: the largest magnitudes, or the largest values.
This is not the later layer of the same group that gates linear units by context (2021, arXiv:2201.00042).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.largest import largest
from actkit.sparsity.active_dendrites.hypergeometric import log_hazard
from actkit.sparsity.active_dendrites.pattern_theory import DENSE, overlap_probability

REJECTED = -1  # the label and the segment of a code that matches nothing


def sparse_code(x: Tensor, active: int, *, by: Literal["abs", "value"] = "abs") -> Tensor:
    """Mark the `active` (k) largest entries of each vector; of equal ones, the first.

    Args:
        x: [..., cells].
        active: how many entries to mark.
        by: 'abs' goes by magnitude, 'value' by the signed value.

    Returns:
        bool [..., cells].

    Raises:
        ValueError: `active` is outside 1 to cells, `by` is unknown, or x holds NaN.
    """
    if by not in ("abs", "value"):
        raise ValueError(f"by: {by!r} was given; allowed are 'abs' and 'value'.")
    if not 1 <= active <= x.shape[-1]:
        raise ValueError(
            f"1 <= active <= cells does not hold: active={active} was given for vectors of cells={x.shape[-1]}; "
            f"give 1 to {x.shape[-1]}."
        )
    if bool(x.isnan().any()):
        raise ValueError("x: it holds NaN, which has no rank; check the activations.")
    return largest(x.abs() if by == "abs" else x, active)


class GrowingModule(nn.Module):
    """A module whose buffers grow as it learns; it loads them at whatever length they were saved."""

    growing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, cells: int, synapses: int, threshold: int) -> None:
        super().__init__()
        self.cells, self.synapses, self.threshold = cells, synapses, threshold

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them, and how long its buffers have become."""
        lengths = {name: len(buffer) for name, buffer in self.named_buffers()}
        return {"cells": self.cells, "synapses": self.synapses, "threshold": self.threshold, "lengths": lengths}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The module that `spec` described; its values come from the weights file."""
        made = cls(spec["cells"], spec["synapses"], spec["threshold"])
        for name, length in spec["lengths"].items():
            parent, _, leaf = name.rpartition(".")
            holder = made.get_submodule(parent)
            setattr(holder, leaf, getattr(holder, leaf).new_zeros(length))
        return made

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.growing:
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, getattr(self, name).new_zeros(state_dict[f"{prefix}{name}"].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DendriticSegments(GrowingModule):
    """A list of segments that match codes of `cells` (n) boolean entries.

    Args:
        cells: the length of a code.
        synapses: (s) how many ones of a code a segment stores.
        threshold: (theta) how many of them make a match.

    Raises:
        ValueError: 1 <= threshold <= synapses <= cells does not hold.
    """

    growing = ("members", "offsets")
    members: Tensor  # int64: the cells of all segments, one segment after another
    offsets: Tensor  # int64 [segments]: where each segment begins

    def __init__(self, cells: int, synapses: int, threshold: int) -> None:
        super().__init__(cells, synapses, threshold)
        if not 1 <= threshold <= synapses <= cells:
            raise ValueError(
                f"1 <= threshold <= synapses <= cells does not hold: threshold={threshold}, synapses={synapses} and "
                f"cells={cells} were given."
            )
        self.register_buffer("members", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("offsets", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def sizes(self) -> Tensor:
        """How many cells each segment holds: int64 [segments]; a union holds more than `synapses`."""
        return torch.diff(self.offsets, append=self.offsets.new_tensor([len(self.members)]))

    def learn(self, codes: Tensor, *, segment: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Store random ones of each code.

        Warns if a union has become so dense that random codes as dense as the last would match it.

        Args:
            codes: bool [cells] or [batch, cells].
            segment: an existing one that all of the codes join (a union); by default each gets a new one.
            generator: of the draws, on the CPU.

        Returns:
            The segments, int64 [batch].

        Raises:
            ValueError: a code has fewer ones than `synapses`, or no segment has that index.
        """
        codes = self._checked(codes)
        ones = codes.sum(1)
        if len(codes) and int(ones.min()) < self.synapses:
            raise ValueError(
                f"synapses <= active does not hold: synapses={self.synapses} and a code with active={int(ones.min())} "
                f"ones was given; give denser codes or fewer synapses."
            )
        if segment is not None and not 0 <= segment < len(self):
            raise ValueError(f"segment: {segment} was given; there are {len(self)}, counted from 0.")
        drawn = [_draw(code, self.synapses, generator) for code in codes]
        if segment is None:
            known = len(self)
            starts = len(self.members) + self.synapses * torch.arange(len(drawn), device=self.offsets.device)
            self.members = torch.cat([self.members, *drawn])
            self.offsets = torch.cat([self.offsets, starts])
            return torch.arange(known, len(self), device=self.offsets.device)
        parts = list(self.members.split(self.sizes.tolist()))
        parts[segment] = torch.cat([parts[segment], *drawn]).unique()
        self.members = torch.cat(parts)
        lengths = self.offsets.new_tensor([len(part) for part in parts])
        self.offsets = lengths.cumsum(0) - lengths
        self._warn_if_dense(segment, int(ones.max()) if len(ones) else 0)
        return torch.full((len(drawn),), segment, device=self.offsets.device)

    def overlap(self, codes: Tensor) -> Tensor:
        """Count how many cells of each segment are on in codes [cells] or [batch, cells]: int64 [batch, segments]."""
        codes = self._checked(codes)
        if len(self) == 0:
            return torch.zeros(len(codes), 0, dtype=torch.int64, device=codes.device)
        # float32 counts to 2^24 exactly
        return F.embedding_bag(self.members, codes.t().float(), self.offsets, mode="sum").t().long()

    def match(self, codes: Tensor) -> Tensor:
        """Return which segments each code matches: bool [batch, segments]."""
        return self.overlap(codes) >= self.threshold

    def forward(self, codes: Tensor) -> Tensor:
        """Do the same as `match`."""
        return self.match(codes)

    def false_positive(self, active: int) -> float:
        """Return the probability that a random code with `active` ones matches any segment, taken as independent."""
        if len(self) == 0:
            return 0.0
        single = overlap_probability(self.cells, active, self.sizes.cpu().numpy(), self.threshold, form="log10")
        return -math.expm1(-float(np.exp(log_hazard(single * math.log(10))).sum()))

    def extra_repr(self) -> str:
        settings = f"cells={self.cells}, synapses={self.synapses}, threshold={self.threshold}"
        return f"{settings}, segments={len(self)}"

    def _checked(self, codes: Tensor) -> Tensor:
        if codes.dtype != torch.bool or codes.dim() not in (1, 2) or codes.shape[-1] != self.cells:
            given = f"{codes.dtype} of shape {list(codes.shape)}"
            raise ValueError(f"codes: {given} was given; give bool [batch, {self.cells}], such as sparse_code(x, k).")
        return codes.reshape(-1, self.cells).to(self.members.device)

    def _warn_if_dense(self, segment: int, active: int) -> None:
        size = int(self.sizes[segment])
        rate = float(overlap_probability(self.cells, active, size, self.threshold))
        if rate > DENSE or 2 * size > self.cells:
            warnings.warn(
                f"Segment {segment} holds {size} of {self.cells} cells: {rate:.1%} of random codes with {active} ones "
                f"match it. Store fewer codes in it, or raise the threshold.",
                stacklevel=3,
            )


def _draw(code: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the ones of a code, without replacement, in order: int64 [count]."""
    ones = code.nonzero()[:, 0]
    return ones[torch.randperm(len(ones), generator=generator)[:count].to(ones.device)].sort().values


@dataclass(frozen=True)
class Recognised:
    """What a memory made of a batch of codes, all int64 [batch].

    Attributes:
        labels: of the segment that matched; -1 if none did.
        segments: its index; -1 if none matched.
        overlaps: how many of its cells are on in the code.
    """

    labels: Tensor
    segments: Tensor
    overlaps: Tensor


class PatternMemory(GrowingModule):
    """Stored codes with labels: a code gets the label of the segment that it overlaps most, or is rejected.

    `segments.false_positive(active)` is the predicted rate at which a random code gets any label.

    Args:
        cells: as in `DendriticSegments`.
        synapses: as in `DendriticSegments`.
        threshold: as in `DendriticSegments`.
    """

    growing = ("labels",)
    labels: Tensor  # int64 [segments]

    def __init__(self, cells: int, synapses: int, threshold: int) -> None:
        super().__init__(cells, synapses, threshold)
        self.segments = DendriticSegments(cells, synapses, threshold)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    def learn(
        self, codes: Tensor, labels: Tensor | Sequence[int], *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Store codes with labels.

        Args:
            codes: bool [batch, cells].
            labels: [batch], each 0 or more.
            generator: of the draws, on the CPU.

        Returns:
            The segments, int64 [batch].

        Raises:
            ValueError: the labels do not fit, or what `DendriticSegments.learn` raises.
        """
        given = torch.as_tensor(labels, dtype=torch.int64, device=self.labels.device).reshape(-1)
        count = codes.shape[0] if codes.dim() == 2 else 1
        if len(given) != count or bool((given < 0).any()):
            raise ValueError(f"labels: {len(given)} were given for {count} codes; give one per code, 0 or more.")
        stored = self.segments.learn(codes, generator=generator)
        self.labels = torch.cat([self.labels, given])
        return stored

    def classify(self, codes: Tensor) -> Recognised:
        """Find the label of the segment with the largest overlap, the first of equal ones; -1 if none matches.

        Args:
            codes: bool [cells] or [batch, cells].

        Returns:
            Labels, segments and overlaps.

        Raises:
            ValueError: nothing was stored.
        """
        if len(self.segments) == 0:
            raise ValueError("classify: the memory is empty; call learn(codes, labels) first.")
        overlap = self.segments.overlap(codes)
        best = overlap.argmax(1)
        most = overlap.gather(1, best[:, None])[:, 0]
        rejected = most < self.segments.threshold
        labels = self.labels[best].masked_fill(rejected, REJECTED)
        return Recognised(labels, best.masked_fill(rejected, REJECTED), most)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the labels, as `classify` does."""
        return self.classify(codes).labels
