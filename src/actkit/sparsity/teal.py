"""TEAL: drop the inputs of linear layers that are small in magnitude (2024, arXiv:2408.14690). The baseline of WINA.

    y = W (m * x),  m_j = 1 if |x_j| > t;  t = the p-quantile of |x| on calibration text, per layer input

When to use it: to read fewer weights per decoded token in any model with linear layers, without training; it is the
simplest method of its kind, and the one to beat. 0.25 to 0.5 to begin with.
Cost: one comparison per input; the weight columns of dropped inputs are not read at decode.
`allocation="greedy"` is the paper's block-wise greedy search: from all zero, raise the sparsity of the projection that
harms the block's output least by a step inversely proportional to its size, until the block reaches the target.
Settled here: layers that share an input share a mask and move together in the greedy search; the quantile is taken of
|x| itself (the release takes it of a signed histogram and assumes symmetry); projection sizes come from the shapes (the
release's table is wrong for one model); the greedy step is counted at the largest layers (the release counts it at the
query, so its 0.05 is 0.05 / 7 here at Llama's shape, and takes seven times as long); the greedy error leaves padding
out; every token is sparse, in prefill too (the release leaves the first half of the prompt dense), unless
`prefill="dense"` leaves the whole prompt dense, which quality figures never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Prefill, Selection, Threshold, TopK, check_prefill
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes, small_inputs
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Quantiles, Statistic

LARGEST = 0.95  # no projection is driven above it: its output would be noise
HIGHEST = 0.9  # of the sparsity that is proposed for zeros that are there anyway
ZEROS = 0.5  # share of zeros from which skipping them pays for the bookkeeping
GREEDY = "hundreds of passes over the calibration data; try it with recipes= and allocation: greedy"


@dataclass(frozen=True)
class MaskGroup:
    """Linear layers that share one mask.

    Attributes:
        site: where their input is observed.
        linears: the layers.
        score: of the input's channels, [in], or None.
    """

    site: Site
    linears: tuple[Linear, ...]
    score: Tensor | None


class Teal(Transform):
    """Sparsify the inputs of linear layers by magnitude.

    Attributes:
        sparsity: share of the inputs dropped, in [0, 1); 0 leaves the model as it is.
        mode: one calibrated threshold per input, or the exact top k of each token.
        allocation: the same share everywhere, or greedy within each block.
        step: of the greedy search, for the largest mask's layers; smaller ones move further, in inverse proportion to
            their size. Halving it doubles the cost.
        skip: roles left dense, for example ("output",).
        prefill: 'dense' if it is meant for decoding only: whatever decodes reads all inputs of a prompt. Quality is
            measured with every token sparse either way.

    Raises:
        ValueError: a value is out of bounds.
    """

    sparsity: float = Field(0.5, ge=0, lt=1)
    mode: Literal["threshold", "top_k"] = "threshold"
    allocation: Literal["uniform", "greedy"] = "uniform"
    step: float = Field(0.05, gt=0, le=0.5)
    skip: tuple[LinearRole, ...] = ()
    prefill: Prefill = "sparse"

    tags: ClassVar[Tags] = Tags(slot="select", by_layer=True, needs_data=True, stream="original", sums_calls=True)

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        guess = small_inputs(profile)
        yield Idea("teal 25%", cls(sparsity=0.25), f"{guess}; magnitude alone, the baseline of wina", 80)
        yield Idea("teal 50%", cls(sparsity=0.5), f"{guess}; magnitude alone", 110)
        yield from cls._of_zeros(profile, shapes)
        yield LeftOut("teal with greedy allocation", GREEDY)

    @classmethod
    def _of_zeros(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea]:
        """Propose the share of exact zeros, for the layers that read them, if the profile finds such sites."""
        sites = [site for site in profile.sites if site.read_by and 1 - site.density >= ZEROS]
        roles = {w.role for w in profile.weights for site in sites if w.path in site.read_by}
        if not sites or not roles:
            return
        share = min(HIGHEST, int(10 * min(1 - site.density for site in sites)) / 10)
        names = ", ".join(sorted(roles))
        why = f"{share:.0%} or more of the inputs of {names} are exactly 0: skipping them costs nothing"
        others = tuple(role for role in shapes.roles if role not in roles)
        yield Idea(f"teal {share:.0%} on {names}", cls(sparsity=share, skip=others), why, 50)

    @classmethod
    def identity(cls) -> Self:
        return cls(sparsity=0.0)

    @model_validator(mode="after")
    def _greedy_can_reach_it(self) -> Self:
        if self.allocation == "greedy" and self.sparsity > LARGEST:
            raise ValueError(f"sparsity: {self.sparsity} was given; greedy allocation goes up to {LARGEST}")
        return self

    @model_validator(mode="after")
    def _something_is_sparse(self) -> Self:
        check_prefill(self.prefill, "sparsity", self.sparsity)
        return self

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role not in self.skip]

    def groups(self, block: Block) -> list[MaskGroup]:
        """Return the masks of a block: here one per distinct input, by magnitude alone."""
        wanted = {linear.path for linear in self.targets(block)}
        groups = []
        for inputs in block.linear_inputs():
            linears = tuple(linear for linear in inputs.linears if linear.path in wanted)
            if linears:
                groups.append(MaskGroup(inputs.site, linears, None))
        return groups

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        return {group.site: Quantiles(weight=group.score) for group in self.groups(block)}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        groups = []
        for group in self.groups(block):
            if seen[group.site].count:
                groups.append(group)
            else:
                yield from (Skip(linear.path, "no calibration token reached it") for linear in group.linears)
        shares = [self.sparsity] * len(groups)
        if self.allocation == "greedy":
            shares = self._allocate(groups, block, seen)
            described = ", ".join(f"{g.linears[0].role} {p:.2f}" for g, p in zip(groups, shares, strict=True))
            yield Note(block.path or "model", f"greedy sparsities: {described}")
        for group, share in zip(groups, shares, strict=True):
            yield from self._edits(group, share, seen)

    def _edits(self, group: MaskGroup, share: float, seen: Seen) -> list[Edit]:
        return [
            Replace(linear.path, ActLinear.of(linear, select=self._selection(group, share, seen)))
            for linear in group.linears
        ]

    def _selection(self, group: MaskGroup, share: float, seen: Seen) -> Selection:
        select: Selection = TopK(int(group.linears[0].in_features * (1 - share)), group.score)
        if self.mode == "threshold":
            select = Threshold(seen[group.site].quantile(share), group.score)
        select.prefill = self.prefill
        return select

    def _allocate(self, groups: list[MaskGroup], block: Block, seen: Seen) -> list[float]:
        """Find greedy sparsities, one per group, whose weighted mean is `sparsity`."""
        sizes = torch.tensor([float(sum(linear.weight.numel() for linear in group.linears)) for group in groups])
        calls = seen.block_calls
        module = block.module
        dense = [call.replay(module) for call in calls]

        def error(shares: Tensor) -> float:
            edits = [e for g, p in zip(groups, shares.tolist(), strict=True) if p > 0 for e in self._edits(g, p, seen)]
            with seen.trial(edits):
                return sum(
                    _error(call.replay(module), target, call.context.mask)
                    for call, target in zip(calls, dense, strict=True)
                )

        shares = torch.zeros(len(groups))
        while (effective := float((shares * sizes).sum() / sizes.sum())) < self.sparsity - 1e-9:
            room = (self.sparsity - effective) * sizes.sum() / sizes  # do not step past the target
            steps = torch.minimum(self.step * sizes.max() / sizes, room).clamp(min=1e-6)
            candidates = []
            for index in range(len(groups)):
                candidate = shares.clone()
                candidate[index] = min(float(shares[index] + steps[index]), LARGEST)
                if candidate[index] > shares[index]:
                    candidates.append(candidate)
            if not candidates:
                break
            errors = seen.total(torch.tensor([error(candidate) for candidate in candidates], dtype=torch.float64))
            shares = candidates[int(errors.argmin())]
        return shares.tolist()


def _error(sparse: Tensor, dense: Tensor, mask: Tensor | None) -> float:
    """Compute the release's error: the L2 norm over the last quarter of the positions, averaged over channels and rows.

    Args:
        sparse: [batch, length, channels], or [rows, channels].
        dense: of the same shape.
        mask: bool [batch, length], which tokens are real.
    """
    difference = (dense - sparse).float()
    if difference.dim() != 3:
        return float(difference.norm(dim=0).mean())
    real = torch.ones_like(difference[..., 0], dtype=torch.bool)
    if mask is not None and mask.shape == real.shape:
        real = mask
    lengths = real.sum(1, keepdim=True)
    last = real & (real.cumsum(1) > lengths - (lengths // 4).clamp(min=1))
    return float((difference * last[..., None]).norm(dim=1).mean())
