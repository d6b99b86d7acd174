"""Each expert in as few bits as it bears: importance, and a bound on the loss (EdgeMoE, 2023, arXiv:2308.14352).

    importance of an expert = loss with it alone in the fewest bits, all others in the base width
    base      the lowest width that all experts may have with loss <= (1 + tolerance) * loss of the original
    then      the K least important experts one width lower, K the most that keep the bound; again for the next width

When to use it: before a store of experts is made (`ExpertStore.create(bits=...)`), so that less is read for each miss;
or to shrink a mixture of experts that stays in memory. Only experts are rounded; attention, routers and embedding are
not. At 2 bits a row of weights has four values, which some experts bear and others do not.
Cost: a pass over the data for each expert and a few more; with `importance: error` one pass in place of the former.
While it searches it holds the experts' weights in all widths.
Settled here: quality is the loss on the batches that are given (the paper has the accuracy of a task); K is found by
bisection, as if the loss rose with every expert that is lowered; the next width down is tried on those that were
lowered before. If not even the highest width keeps the bound, all experts get it, and a note says so.
Our own reading: `importance: error` ranks by what rounding does to the output of an expert, weighted by its router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import NonFiniteError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import rounded, widened
from actkit.core.model.anatomy import Block, Linear, anatomy
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.train.objective import Objective
from actkit.core.watch.capture import opened_experts

Experts = Mapping[str, Sequence[Linear]]  # path of an expert -> its gate, up and down


class ExpertBits(Transform):
    """Round the weights of every expert to its own number of bits.

    Attributes:
        tolerance: by which share the loss may rise.
        widths: bits that an expert may have.
        importance: 'loss' measures the model with each expert alone in the fewest bits; 'error' one pass for all.
        group_size: weights per scale, must divide the rows; -1 for a scale for each row.
        symmetric: no zero point.
        scale_dtype: what scales are rounded to and stored in.
        bits: by the path of the expert; None finds them. What `expert_bits` found may be given, and then no data are
            needed.

    Raises:
        ValueError: a value is out of bounds.
        DataError: when applied, the model has no loss.
    """

    tolerance: float = Field(0.01, ge=0, allow_inf_nan=False)
    widths: tuple[int, ...] = (2, 4, 8)
    importance: Literal["loss", "error"] = "loss"
    group_size: int = Field(-1, ge=-1)
    symmetric: bool = False
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    bits: dict[str, int] | None = None

    tags: ClassVar[Tags] = Tags(
        slot="weight", needs_data=True, stream="original", plans_in_turn=True, passes=64, least_coverage=0.1
    )

    _said: str = PrivateAttr("")
    _values: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("widths")
    @classmethod
    def _in_order(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if not widths or any(not 2 <= each <= 8 for each in widths) or len(set(widths)) < len(widths):
            raise ValueError(f"{widths} was given; give different widths of 2 to 8 bits")
        return tuple(sorted(widths))

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        if not any(".experts." in weight.path for weight in profile.weights):
            yield LeftOut("expert_bits", "the model has no experts")
            return
        why = "experts take most of a mixture, and some bear fewer bits than others"
        yield Idea("expert_bits", cls(importance="error"), why, 25)

    @property
    def needs_data(self) -> bool:
        """Only if the widths are to be found."""
        return self.bits is None

    @classmethod
    def identity(cls) -> Self:
        return cls(bits={})

    def grid(self, bits: int) -> IntegerGrid:
        """The grid of an expert with so many bits."""
        return IntegerGrid(bits, self.group_size, symmetric=self.symmetric, scale_dtype=self.scale_dtype)

    def passes(self, tokens: int, rows: int) -> float:
        return 64.0 if self.importance == "loss" else 20.0

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for layers in experts_of([block]).values() for linear in layers]

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if self.bits is not None:
            return self
        view = trial.anatomy
        experts = experts_of([view.block(block.index) for block in view.blocks])
        search = _Search(self, trial, data, experts)
        found = search.widths_of_all() if experts else {}
        planned = self.model_copy(update={"bits": found})
        planned._said, planned._values = search.said, search.values
        return planned

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        assert self.bits is not None
        if self._said and block.index == 0:
            yield Note(block.path or "model", self._said, self._values)
        for path, layers in experts_of([block]).items():
            if path in self.bits:
                for linear in layers:
                    yield Replace(linear.path, self.layer(linear, self.bits[path]))
            elif self.bits:
                yield Skip(path, "no width was given for it")

    def layer(self, linear: Linear, bits: int) -> ActLinear:
        """The layer with its weight in so many bits."""
        return ActLinear.of(linear, weight=rounded(linear.weight, self.grid(bits)))


def plan_bits(model: nn.Module, batches: Sequence[Any], **settings: Any) -> dict[str, int]:
    """Find the widths of all experts, for a store, and leave the model as it is.

    Args:
        model: a mixture of experts, in memory.
        batches: that the loss is measured on.
        settings: of `ExpertBits`.

    Returns:
        Bits by the path of the expert.

    Raises:
        ValueError: a setting is out of bounds.
        DataError: the model has no loss on these batches.
    """
    view = anatomy(model)
    with opened_experts(view):
        found = ExpertBits(**settings).plan(Trial(view, batches), batches)
    return found.bits or {}


def experts_of(blocks: Iterable[Block]) -> dict[str, tuple[Linear, ...]]:
    """The linear layers of each opened expert, by its path."""
    found: dict[str, list[Linear]] = {}
    for block in blocks:
        for linear in block.linears():
            if linear.expert is not None:
                found.setdefault(linear.path.rpartition(".")[0], []).append(linear)
    return {path: tuple(layers) for path, layers in found.items()}


class _Search:
    """Measures the loss of widths, each rounded layer made once."""

    def __init__(self, settings: ExpertBits, trial: Trial, data: Sequence[Any], experts: Experts) -> None:
        self.settings, self.trial, self.data, self.experts = settings, trial, data, experts
        self.objective = Objective(trial.model, None)
        self._layers: dict[tuple[str, int], list[Replace]] = {}
        self.said, self.values = "", dict[str, Any]()

    def widths_of_all(self) -> dict[str, int]:
        """The bits of every expert."""
        least, *higher = self.settings.widths
        original = self.loss({})
        bound = original * (1 + self.settings.tolerance)
        uniform: dict[int, float] = {}
        for base in (least, *higher):
            uniform[base] = self.loss(dict.fromkeys(self.experts, base))
            if uniform[base] <= bound:
                break
        bits, loss = dict.fromkeys(self.experts, base), uniform[base]
        importance: dict[str, float] = {}
        if loss <= bound and base > least:
            importance = self.importance(base) if self.settings.importance == "loss" else self.errors()
        ranked = sorted(importance, key=importance.__getitem__)
        lower = [width for width in reversed(self.settings.widths) if width < base]
        for width in lower:
            ranked, loss = self._lowered(bits, ranked, width, loss, bound)
            bits |= dict.fromkeys(ranked, width)
        kept = f"loss {original:.4f} -> {loss:.4f}, at most {bound:.4f}"
        if uniform[base] > bound:
            kept = f"loss {original:.4f} -> {loss:.4f} is above {bound:.4f}: not even {base} bits keep it"
        counts = ", ".join(f"{list(bits.values()).count(each)} in {each} bits" for each in sorted(set(bits.values())))
        self.said = f"experts: {counts}; {kept}"
        self.values = {
            "loss": original,
            "loss_rounded": loss,
            "uniform": {str(width): found for width, found in uniform.items()},
            "importance": importance,
            "bits": bits,
        }
        return bits

    def _lowered(
        self, bits: Mapping[str, int], ranked: list[str], width: int, loss: float, bound: float
    ) -> tuple[list[str], float]:
        """The most of the least important experts that may have a width, by bisection, and the loss then."""
        low, high = 0, len(ranked) + 1
        while high - low > 1:
            middle = (low + high) // 2
            found = self.loss({**bits, **dict.fromkeys(ranked[:middle], width)})
            if found <= bound:
                low, loss = middle, found
            else:
                high = middle
        return ranked[:low], loss

    def importance(self, base: int) -> dict[str, float]:
        """The loss with each expert alone in the fewest bits."""
        least = self.settings.widths[0]
        return {path: self.loss(dict.fromkeys(self.experts, base) | {path: least}) for path in self.experts}

    def errors(self) -> dict[str, float]:
        """The squared error that the fewest bits make of each expert's share of the output, in one pass."""
        least, model = self.settings.widths[0], self.trial.model
        found = dict.fromkeys(self.experts, 0.0)
        lists = dict.fromkeys(path.rpartition(".")[0] for path in self.experts)

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, index, weights = args
            exact = {e: one(module[e], states, index, weights, e) for e in range(len(module))}  # type: ignore[index, arg-type]
            path = next(path for path in lists if model.get_submodule(path) is module)
            with self.trial([edit for e in exact for edit in self._edits(f"{path}.{e}", least)]):
                for e, before in exact.items():
                    after = one(module[e], states, index, weights, e)  # type: ignore[index]
                    found[f"{path}.{e}"] += float((after - before).double().square().sum())

        with evaluating(model), hooked(model, before=dict.fromkeys(lists, compare)):
            for batch in self.data:
                forward(model, batch)
        return found

    def loss(self, bits: Mapping[str, int]) -> float:
        """The mean loss per label on the data, with experts in so many bits."""
        total, count, model = 0.0, 0, self.trial.model
        edits = [edit for path, width in bits.items() for edit in self._edits(path, width)]
        with self.trial(edits), evaluating(model), widened(model):
            for batch in self.data:
                labels = self.objective.labels(batch)
                total, count = total + float(self.objective(model, batch)) * labels, count + labels
        if not isfinite(total):
            raise NonFiniteError(f"loss: it is {total} on these batches; check the weights and the data.")
        return total / count

    def _edits(self, path: str, bits: int) -> list[Replace]:
        if (path, bits) not in self._layers:
            layer = self.settings.layer
            self._layers[path, bits] = [Replace(each.path, layer(each, bits)) for each in self.experts[path]]
        return self._layers[path, bits]


def one(expert: nn.Module, states: Any, index: Any, weights: Any, e: int) -> Any:
    """What expert e adds to the output of its tokens: [its tokens, hidden]."""
    rows, slots = torch.where(index == e)
    return expert(states[rows], rows) * weights[rows, slots, None]
