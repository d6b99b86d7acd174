"""AP: part of each pruning goes to negative weights that hardly moved, so silent units wake (2022, arXiv:2212.06145).

    each cycle, of n weights that are alive:   X prunes (p - q) n of them by its own score
    AP prunes q n of the rest:                 those with w < 0 and the smallest |w - w_start of the cycle|
    rewind:                                    w <- mask * w_0,   train again

A unit that ReLU silences on most inputs sends no gradient to the weights before it, so they hardly move. Where inputs
are 0 or more, a negative weight can only push the unit's pre-activation down; without it the unit can only rise.

When to use it: beside any pruner (X) that prunes in cycles with training between, in networks with ReLU, at high
sparsity: as many weights go as without it. A rule for one training with all its cycles, or `ActivatingPruner` for a
training per cycle, in any loop.
Cost: a copy of the weights at the start and one of each cycle's; a sort per cycle; nothing in a step but the masks.
Settled here: exactly int(q n) weights go; `released` prunes one more, as the release's threshold does. Both p and q are
shares of what was alive before the cycle. Masks are explicit and applied after each step (the release masks gradients
alone, so that momentum moves pruned weights), each weight counts once (the release counts those of layers with a bias
twice), norms are not pruned, and rewinding takes biases, norms and their statistics back too.
Our own reading: a norm between weight and ReLU turns the sign where its scale is negative; `norms` says where one
stands. The first layer of a network on standardised images reads negative values, so `spare` it. The paper's variants
AP-Lite and AP-Pro are not here: we know their names only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.compression.ap.dead_neurons import DeadNeurons, dead_neuron_rate
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.largest import largest
from actkit.core.recipe.rule import TrainingRule
from actkit.core.train.masks import AttachedMasks, Masks, layer_weights

Sign = Literal["negative", "any"]
Order = Literal["movement", "random"]
Base = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], Mapping[str, Tensor]]
Rewind = Literal["init", "none"]


def ap_select(
    now: Tensor,
    reference: Tensor,
    alive: Tensor,
    number: int,
    *,
    sign: Sign = "negative",
    order: Order = "movement",
    released: bool = False,
    scale: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Choose the weights that AP prunes, and return which stay.

    Args:
        now: the weights.
        reference: what they were when the cycle began, of the same shape.
        alive: bool, which of them are not pruned.
        number: how many to prune.
        sign: prune among the negative ones, or among all ('any', a control).
        order: those that moved least, or some at random (a control).
        released: prune all that moved no more than the one after the last, as the release does: one more, and ties.
        scale: of the norm behind each weight, whose sign turns that of the weight.
        seed: of the random order.

    Returns:
        bool, of the same shape: `alive` without those that were chosen.

    Raises:
        ValueError: fewer weights than `number` can be chosen.
    """
    candidates = alive & ((now if scale is None else now * scale) < 0) if sign == "negative" else alive
    found, least = int(candidates.sum()), number + released
    if found < least or number < 0:
        kind = "negative" if sign == "negative" else "unpruned"
        raise ValueError(
            f"number: {number} was given, and {found} {kind} weights are alive; give a smaller share to AP."
        )
    moved = (now - reference).abs()
    if order == "random":
        drawn = torch.rand(now.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = drawn.to(now.device)
    if released:
        threshold = moved[candidates].sort().values[number]
        return alive & ~(candidates & (moved <= threshold))
    ranked = torch.where(candidates, -moved, -torch.inf).flatten()
    return alive & ~(largest(ranked, number).view_as(alive) & candidates)


# -- pruners that AP rides on ------------------------------------------------------------------------------------------


def global_magnitude(weights: Mapping[str, Tensor], alive: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Prune the weights of least magnitude, over all layers together.

    Args:
        weights: by name.
        alive: bool, which of them are not pruned.
        number: how many to prune.

    Returns:
        bool by name, which stay.
    """
    return _least({name: weight.abs() for name, weight in weights.items()}, alive, number)


def layer_magnitude(weights: Mapping[str, Tensor], alive: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Prune the weights of least magnitude, in each layer the same share, as `global_magnitude` otherwise.

    Args:
        weights: by name.
        alive: bool, which of them are not pruned.
        number: how many to prune in all.

    Returns:
        bool by name, which stay.
    """
    counts = {name: int(kept.sum()) for name, kept in alive.items()}
    total, given = sum(counts.values()), 0
    found: dict[str, Tensor] = {}
    for name, count in counts.items():  # shares are rounded so that they add up
        own = round((given + count) * number / total) - round(given * number / total)
        found |= global_magnitude({name: weights[name]}, {name: alive[name]}, own)
        given += count
    return found


def at_random(weights: Mapping[str, Tensor], alive: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Prune some weights at random.

    Args:
        weights: by name.
        alive: bool, which of them are not pruned.
        number: how many to prune; the draw follows from how many are alive.

    Returns:
        bool by name, which stay.
    """
    generator = torch.Generator().manual_seed(sum(int(kept.sum()) for kept in alive.values()))
    drawn = {name: torch.rand(weight.shape, generator=generator).to(weight.device) for name, weight in weights.items()}
    return _least(drawn, alive, number)


def by_torch(method: Any, **settings: Any) -> Base:
    """Make a pruner of one of `torch.nn.utils.prune`, over all layers together.

    Args:
        method: a class such as `prune.L1Unstructured`.
        settings: of it, beside the amount.
    """

    def base(weights: Mapping[str, Tensor], alive: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        flat, kept = _flat(weights), _flat(alive)
        stays = method(amount=number, **settings).compute_mask(flat[kept], torch.ones_like(flat[kept]))
        return _parts(kept.masked_scatter(kept, stays.bool()), weights)

    return base


BASES: dict[str, Base] = {
    "global_magnitude": global_magnitude,
    "layer_magnitude": layer_magnitude,
    "random": at_random,
}


def _least(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    kept = _flat(alive)
    ranked = torch.where(kept, -_flat(scores), -torch.inf)
    return _parts(kept & ~largest(ranked, number), scores)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def _parts(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


# -- cycles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneReport:
    """What one cycle pruned.

    Attributes:
        by_base: weights that the pruner took.
        by_ap: weights that AP took.
        alive: how many are left.
        total: of how many.
        negative_scales: channels of the `norms` whose scale is 0 or less.
        dead_before: the dead neuron rate before, if batches were given.
        dead_after: the same, after.
    """

    by_base: int
    by_ap: int
    alive: int
    total: int
    negative_scales: int = 0
    dead_before: DeadNeurons | None = None
    dead_after: DeadNeurons | None = None


class ActivatingPruner:
    """Prunes a model in cycles, a part of each by AP.

        pruner = ActivatingPruner(model)
        train(model, ...)
        for cycle in range(8):
            pruner.prune()
            pruner.rewind()
            train(model, ..., rules=[KeepMasks.of(pruner.masks)])

    Args:
        model: whose weights are those to rewind to.
        base: X: 'global_magnitude', 'layer_magnitude', 'random', or a function from weights, which of them are alive,
            and a number, to which stay; `by_torch(prune.L1Unstructured)` makes one.
        share: p, pruned in a cycle, of what is alive.
        activating: q, of the same, which AP prunes; 0 for X alone.
        rewind: 'init' goes back to the weights that the model has now, 'none' goes on with those that were trained.
        parameters: patterns of the weights that are pruned; None for those of all linear layers and convolutions.
        spare: patterns of weights that X prunes and AP leaves alone.
        norms: by the path of a layer that of the batch norm between it and its ReLU.
        sign: as in `ap_select`.
        order: the same.
        seed: of the random order.

    Attributes:
        masks: what is kept now.

    Raises:
        ValueError: shares out of bounds, an unknown pruner, or names that fit nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        base: str | Base = "global_magnitude",
        share: float = 0.2,
        activating: float = 0.02,
        *,
        rewind: Rewind = "init",
        parameters: Sequence[str] | None = None,
        spare: Sequence[str] = (),
        norms: Mapping[str, str] | None = None,
        sign: Sign = "negative",
        order: Order = "movement",
        seed: int = 0,
    ) -> None:
        if not (0 < share < 1 and 0 <= activating < share):
            raise ValueError(
                f"share, activating: {share} and {activating} were given; give 0 < share < 1 and 0 <= activating < "
                f"share."
            )
        if isinstance(base, str) and base not in BASES:
            raise ValueError(f"base: {base!r} was given; allowed are {', '.join(BASES)}, or a function.")
        self.model, self.share, self.activating, self.seed = model, share, activating, seed
        self.base = BASES[base] if isinstance(base, str) else base
        self.sign: Sign = sign
        self.order: Order = order
        self.weights = layer_weights(model, parameters)
        self.spared = {name for name in self.weights if any(fnmatchcase(name, pattern) for pattern in spare)}
        self.norms = {f"{path}.weight": _norm(model, path, norm, self.weights) for path, norm in (norms or {}).items()}
        self.masks = Masks.all_of(self.weights)
        state = model.state_dict() if rewind == "init" else {}
        self.initial = {name: value.detach().clone() for name, value in state.items()}
        self.start_cycle()

    def start_cycle(self) -> None:
        """Remember the weights: from now on their movement counts. `rewind` and the construction do so too."""
        self.reference = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def prune(self, batches: Iterable[Any] | None = None) -> PruneReport:
        """Prune a share of what is alive: set it to 0, and keep the masks.

        Args:
            batches: on which the dead neuron rate is measured before and after.

        Raises:
            ValueError: fewer negative weights are alive than AP is to prune, or the pruner pruned another number.
        """
        given = None if batches is None else list(batches)
        before = None if given is None else dead_neuron_rate(self.model, given, progress=False)
        alive = self.masks.alive
        by_ap = int(self.activating * alive)
        by_base = round(self.share * alive) - by_ap
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        kept = dict(self.base(weights, self.masks.kept, by_base))
        _check(kept, self.masks.kept, by_base)
        if by_ap:
            kept = self._activated(weights, kept, by_ap)
        self.masks = Masks(kept)
        self.masks.apply(self.model)
        return PruneReport(
            by_base,
            by_ap,
            self.masks.alive,
            self.masks.total,
            sum(int((norm.weight <= 0).sum()) for norm in self.norms.values()),
            before,
            None if given is None else dead_neuron_rate(self.model, given, progress=False),
        )

    def _activated(self, weights: dict[str, Tensor], kept: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The masks without the weights that AP prunes."""
        free = {name: each for name, each in kept.items() if name not in self.spared}
        scale = {name: self._scale(name, weights[name]) for name in free} if self.norms else None
        chosen = ap_select(
            _flat({name: weights[name] for name in free}),
            _flat({name: self.reference[name] for name in free}),
            _flat(free),
            number,
            sign=self.sign,
            order=self.order,
            scale=None if scale is None else _flat(scale),
            seed=self.seed + self.masks.alive,
        )
        return kept | _parts(chosen, free)

    def _scale(self, name: str, weight: Tensor) -> Tensor:
        """The scale of the norm behind each weight; 1 without one."""
        if name not in self.norms:
            return torch.ones_like(weight)
        gamma = self.norms[name].weight.detach()
        turned = isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)  # [in, out]
        return gamma.expand_as(weight) if turned else gamma.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)

    @torch.no_grad()
    def rewind(self) -> None:
        """Put all parameters and statistics back to what they were at the start, with the masks; a cycle begins."""
        state = self.model.state_dict(keep_vars=True)
        for name, value in self.initial.items():
            state[name].copy_(value)
        self.masks.apply(self.model)
        self.start_cycle()


def _norm(model: nn.Module, path: str, norm: str, weights: Mapping[str, Tensor]) -> Any:
    modules = dict(model.named_modules())
    found = modules.get(norm)
    if (
        not isinstance(found, nn.modules.batchnorm._BatchNorm)
        or found.weight is None
        or f"{path}.weight" not in weights
    ):
        raise ValueError(
            f"norms: {path!r}: {norm!r} was given; give the path of a pruned layer, and that of its batch norm."
        )
    return found


def _check(kept: Mapping[str, Tensor], alive: Mapping[str, Tensor], number: int) -> None:
    if kept.keys() != alive.keys() or any(bool((kept[name] & ~alive[name]).any()) for name in alive):
        raise ValueError("base: it gave masks of other weights, or brought pruned ones back; keep a part of `alive`.")
    pruned = sum(int((alive[name] & ~kept[name]).sum()) for name in alive)
    if pruned != number:
        raise ValueError(f"base: it pruned {pruned} weights, {number} were asked; prune exactly that many.")


# -- as a rule ---------------------------------------------------------------------------------------------------------


class Ap(TrainingRule):
    """Prune in cycles while a model is trained, a part of each cycle by AP.

    The steps are divided among cycles + 1 trainings of equal length; between two the model is pruned and, unless
    `rewind` is 'none', taken back to its start, and the moments of the optimizer are forgotten. Give the training a
    constant rate (`schedule="constant"`): its course is one for all steps.

    Attributes:
        share: p, pruned in a cycle, of what is alive.
        activating: q, of the same, which AP prunes.
        cycles: how often.
        base: the pruner that AP rides on.
        rewind: 'init' or 'none', as in `ActivatingPruner`.
        parameters: the same.
        spare: the same.
        norms: the same.

    Raises:
        ValueError: activating is not below share, or names that fit nothing.
    """

    keep: ClassVar[Literal["best", "last"]] = "last"

    share: float = Field(0.2, gt=0, lt=1)
    activating: float = Field(0.02, ge=0, lt=1)
    cycles: int = Field(8, ge=1)
    base: Literal["global_magnitude", "layer_magnitude", "random"] = "global_magnitude"
    rewind: Rewind = "init"
    parameters: tuple[str, ...] | None = None
    spare: tuple[str, ...] = ()
    norms: dict[str, str] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.activating >= self.share:
            raise ValueError(f"activating: {self.activating} was given; give less than share={self.share}.")
        return self

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedAp:
        given = self.model_dump(include={"base", "share", "activating", "rewind", "parameters", "spare", "norms"})
        return AttachedAp(ActivatingPruner(model, **given), self, optimizer)


class AttachedAp(AttachedMasks):
    """The rule at work.

    Args:
        pruner: of the model.
        rule: its settings.
        optimizer: whose moments are forgotten when the model is rewound.
    """

    def __init__(self, pruner: ActivatingPruner, rule: Ap, optimizer: torch.optim.Optimizer | None) -> None:
        super().__init__(pruner.model, pruner.masks)
        self.pruner, self.rule, self.optimizer, self.cycle = pruner, rule, optimizer, 0

    def before_step(self, progress: float) -> None:
        if progress * (self.rule.cycles + 1) + 1e-9 < self.cycle + 1:
            return
        self.cycle += 1
        self.pruner.prune()
        self.keep(self.pruner.masks)
        if self.rule.rewind == "none":
            self.pruner.start_cycle()
            return
        self.pruner.rewind()
        for parameter in self.model.parameters():
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)

    def report(self) -> dict[str, Any]:
        """Return the cycle, and the share of the weights that is alive."""
        return {"cycle": self.cycle, **super().report()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "cycle": self.cycle,
            "masks": dict(self.masks.kept),
            "reference": self.pruner.reference,
            "initial": self.pruner.initial,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state_dict()) or state["masks"].keys() != self.masks.kept.keys():
            raise CheckpointError("ap: the state is of another rule, or of other weights; start anew.")
        self.cycle = state["cycle"]
        self.keep(Masks(state["masks"]))
        self.pruner.masks = self.masks
        for mine, theirs in ((self.pruner.reference, state["reference"]), (self.pruner.initial, state["initial"])):
            for name, value in theirs.items():
                mine[name].copy_(value)
