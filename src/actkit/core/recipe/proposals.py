"""What a method proposes to the search: settings worth trying on a model, and what it would rather not try, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

from pydantic import BaseModel
from torch import nn

from actkit.core.model.anatomy import Anatomy, Block, equalization_sets, paths_of_end
from actkit.core.model.own_attention import why_no_cache
from actkit.core.watch.capture import opened_experts

GROUPS = (64, 32, 16)
INT4_POOR = 18.0  # dB: a bell curve in groups of 64 leaves 20.5


@dataclass(frozen=True)
class Idea:
    """A setting that is worth trying.

    Attributes:
        name: short and unique, such as 'rtn 4 bit'.
        transform: with these settings.
        why: what suggests it.
        order: ideas are tried from the lowest to the highest; those of actkit lie between 10 and 140.
        base: other methods may be stacked over it; bases with a lower number are taken first.
        stacks: it is also tried over the first bases, as many as there are numbers: each is the order of a stack.
        why_stacked: what suggests the stacks.
        before: transforms that stand before it, without which it is not worth trying.
    """

    name: str
    transform: BaseModel
    why: str
    order: int
    base: int | None = None
    stacks: tuple[int, ...] = ()
    why_stacked: str = "both at once: they stack"
    before: tuple[BaseModel, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A method or recipe that is not tried, and why."""

    what: str
    reason: str


class SiteSeen(Protocol):
    """What the profile says of a site, as far as proposals go by it."""

    @property
    def density(self) -> float:
        """Share of the values that are not 0."""
        ...

    @property
    def above_one_percent(self) -> float:
        """Share of the values above 1 % of the site's scale."""
        ...

    @property
    def read_by(self) -> tuple[str, ...]:
        """Paths of the linear layers that read it."""
        ...


class WeightSeen(Protocol):
    """What the profile says of a linear layer, as far as proposals go by it."""

    @property
    def path(self) -> str:
        """Of the layer."""
        ...

    @property
    def role(self) -> str:
        """Of the layer, such as 'down'."""
        ...

    @property
    def int4_snr(self) -> float | None:
        """The signal-to-noise ratio that rounding to 4 bits leaves, in dB."""
        ...


class Looked(Protocol):
    """A profile of a model, as far as proposals go by it (`search.results.Profile`)."""

    @property
    def sites(self) -> Sequence[SiteSeen]:
        """Every observed site."""
        ...

    @property
    def weights(self) -> Sequence[WeightSeen]:
        """Every linear layer."""
        ...


@dataclass(frozen=True)
class Shapes:
    """What decides which methods fit a model.

    Attributes:
        inputs: channels of the inputs of all linear layers in blocks.
        outputs: channels of their outputs.
        scalable: how many sets of layers can take a scale.
        refused: why others cannot.
        roles: of the layers.
        shared: how many of the scalable sets scale value heads that several query heads read.
        ends: the share of the model's parameters that embedding and head hold.
        no_cache: why keys and values are not rounded, or None.
        prompt: tokens behind which the search measures how fast others follow; 0 if it does not.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scalable: int
    refused: tuple[str, ...]
    roles: tuple[str, ...]
    shared: int = 0
    ends: float = 0.0
    no_cache: str | None = None
    prompt: int = 0

    @classmethod
    def of(cls, view: Anatomy) -> Shapes:
        """Read off a model; experts are opened for it and closed again."""
        with opened_experts(view):
            blocks: list[Block] = [view.block(block.index) for block in view.blocks]
            linears = [linear for block in blocks for linear in block.linears()]
            sets = [found for block in blocks for found in equalization_sets(block)]
            return cls(
                tuple(linear.in_features for linear in linears),
                tuple(linear.out_features for linear in linears),
                sum(found.refused is None for found in sets),
                tuple(dict.fromkeys(found.refused for found in sets if found.refused is not None)),
                tuple(dict.fromkeys(linear.role for linear in linears)),
                sum(found.refused is None and found.shared is not None for found in sets),
                _share_of_ends(view.model),
                why_no_cache(view.model),
            )

    @property
    def group(self) -> int:
        """The largest of GROUPS that divides every layer's inputs; -1 (whole rows) if none does."""
        return _largest(self.inputs) or -1

    @property
    def finer_group(self) -> int | None:
        """The largest of GROUPS below `group` that divides every layer's inputs."""
        return _largest(self.inputs, below=self.group)

    @property
    def output_group(self) -> int | None:
        """The largest of GROUPS that divides every layer's outputs."""
        return _largest(self.outputs)

    @property
    def group_fits(self) -> str:
        """Why `group` is what it is, for tables."""
        if self.group != -1:
            return f"groups of {self.group} fit all layers"
        return f"whole rows, because none of the groups {', '.join(map(str, sorted(GROUPS)))} divides all layers"


def _share_of_ends(model: nn.Module) -> float:
    """The share of the parameters that embedding and head hold, tied ones counted once."""
    paths = [path for end in ("input", "output") for path in paths_of_end(model, f"get_{end}_embeddings")]
    if not paths or not hasattr(model.get_submodule(paths[0]), "num_embeddings"):
        return 0.0
    ends = {id(each): each.numel() for path in paths for each in model.get_submodule(path).parameters()}
    return sum(ends.values()) / max(1, sum(each.numel() for each in model.parameters()))


def _largest(widths: Sequence[int], below: int | None = None) -> int | None:
    common = gcd(*widths)
    return next((size for size in GROUPS if common and common % size == 0 and (below is None or size < below)), None)


def poor_at_four_bits(profile: Looked) -> str:
    """'; 3 layers keep less than 18 dB at 4 bits', or '' if none does."""
    poor = [w.int4_snr for w in profile.weights if w.int4_snr is not None and w.int4_snr < INT4_POOR]
    return f"; {len(poor)} layers keep less than {INT4_POOR:.0f} dB at 4 bits" if poor else ""


def small_inputs(profile: Looked) -> str:
    """Say what the profile tells of small inputs.

    Args:
        profile: of the model.

    Returns:
        Over the sites that linear layers read, the median share of values below 1 % of the site's scale; 'always' if
        there
        is no such site.
    """
    shares = sorted(1 - site.above_one_percent for site in profile.sites if site.read_by)
    if not shares:
        return "always"
    return f"the profile finds {shares[len(shares) // 2]:.0%} of the inputs below 1 % of their scale"
