"""aTLAS: compose task vectors with one learned coefficient per vector and parameter block (2024, arXiv:2407.02880).

    theta^(j) = theta_0^(j) + sum over vectors i of lambda_i^(j) tau_i^(j),   tau_i = theta_i - theta_0

A block j is one parameter. The n x m numbers lambda begin at 0 and are all that trains; afterwards the sum is the
model's weight, so that nothing is left of them at inference.

When to use it: to merge several fine-tuned models of one base with less interference than one number per model gives
(`mode="isotropic"`, task arithmetic), or to adapt to a new task from few labelled examples and the vectors of others.
Cost: each step composes all weights, n products of the model's size; vectors are summed in place, one at a time. Sparse
and low-rank vectors stay what they are between.
Settled here: vectors are matched by name, and their base by its fingerprint (the release zips parameters and entries of
the state by position, so that a batch norm's statistics shift the pairing). A tied parameter is one block. While
coefficients train, the model is in evaluation mode, without dropout, and statistics of batch norms stay those of the
base. `mode="partition"` splits the entries of each matrix at random into `groups`, one split for all matrices of a
shape, as the release does, and leaves other blocks at the base. Weights are composed in float32 or wider. Coefficients
decay as the weights of a layer do. The penalty is 0.5 x the mean over blocks of the p-norm of their coefficients.
Our own reading: a task is forgotten with `loss=` and `score=` of the training, without a loop of its own.
Not built: the linearised variant and the label-free objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn.utils import parametrize

from actkit.core.forward.hooks import hooked
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.store.deltas import PIECE, Delta, Dense, Part, moved, product
from actkit.core.train.training_setup import modes_restored

Mode = Literal["block", "isotropic", "partition"]
GRID = tuple(index / 20 for index in range(21))


class Sum(torch.autograd.Function):
    """A block of the base plus its vectors times coefficients, with a gradient for the coefficients alone."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, coefficients: Tensor, parts: Sequence[Part | None], groups: Tensor | None
    ) -> Tensor:
        """Add the parts in place, one at a time.

        Args:
            ctx: of autograd.
            base: the parameter.
            coefficients: [vectors, groups].
            parts: of each vector; None for no change.
            groups: which group each entry belongs to, of the parameter's shape; None if there is one.
        """
        ctx.parts, ctx.groups, ctx.shape = parts, groups, coefficients.shape
        total = base.detach().to(torch.promote_types(base.dtype, torch.float32), copy=True)
        for part, own in zip(parts, coefficients, strict=True):
            if part is None or not bool(own.any()):
                continue
            index = None if groups is None else groups.flatten().split(PIECE)
            pieces = zip(total.view(-1).split(PIECE), part.dense().flatten().split(PIECE), strict=True)
            for at, (piece, values) in enumerate(pieces):  # a whole part in float32 would be the largest weight again
                piece += values.to(piece) * (float(own) if index is None else own[index[at]])
        return total.to(base.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        """Return the inner products of the gradient with each part."""
        found = torch.zeros(ctx.shape, dtype=torch.float32, device=gradient.device)
        for index, part in enumerate(ctx.parts):
            if part is None:
                continue
            if gradient.is_sparse:  # of an embedding: the rows that were read
                rows, values = gradient._indices()[0], gradient._values()
                each = (values.double() * part.dense()[rows].double()).flatten()
                to = each.new_zeros(ctx.shape[1])
                own = torch.zeros_like(rows)[:, None].expand_as(values) if ctx.groups is None else ctx.groups[rows]
                found[index] = to.index_add(0, own.flatten(), each)
            elif ctx.groups is None:
                found[index] = product(Dense(gradient), part)
            else:
                each = (gradient.float() * part.dense().to(gradient)).flatten()
                found[index] = torch.zeros_like(found[index]).index_add(0, ctx.groups.flatten(), each)
        return None, found, None, None


class Composed(nn.Module):
    """The parametrization of one block, while its coefficients train.

    Args:
        parts: of each vector; None for no change.
        coefficients: [vectors, groups], shared by all blocks if isotropic.
        groups: which group each entry belongs to; None if there is one.
    """

    def __init__(self, parts: Sequence[Part | None], coefficients: nn.Parameter, groups: Tensor | None) -> None:
        super().__init__()
        self.parts, self.coefficients, self.groups = list(parts), coefficients, groups

    def forward(self, base: Tensor) -> Tensor:
        """The block as the model uses it."""
        found: Tensor = Sum.apply(base, self.coefficients, self.parts, self.groups)  # type: ignore[no-untyped-call]
        return found


class Atlas(TrainingRule):
    """Train coefficients of task vectors in place of a model's weights.

    Attributes:
        vectors: files that `Delta.save` wrote; `Atlas.of(deltas)` takes those in memory.
        mode: 'block' has a coefficient for each vector and parameter, 'isotropic' one for each vector, 'partition'
            `groups` for each vector and matrix.
        groups: of a partition.
        blocks: patterns of the parameters that are composed; None for all that a vector changes.
        penalty: weight of a norm of the coefficients.
        norm: 1 or 2, of the penalty.
        seed: of the partition.

    Raises:
        CheckpointError: a vector is of another base, or its file is not readable.
        ValueError: no vectors, patterns that fit none of them, or a partition without matrices.
    """

    vectors: tuple[str, ...] = ()
    mode: Mode = "block"
    groups: int = Field(4, ge=2)
    blocks: tuple[str, ...] | None = None
    penalty: float = Field(0.0, ge=0)
    norm: Literal[1, 2] = 1
    seed: int = Field(0, ge=0)
    _given: tuple[Delta, ...] = PrivateAttr(default=())

    @classmethod
    def of(cls, vectors: Iterable[Delta], **settings: Any) -> Self:
        """Make the rule of deltas in memory.

        Args:
            vectors: of one base.
            settings: the others.
        """
        rule = cls(**settings)
        rule._given = tuple(vectors)
        return rule

    def trainable(self, model: nn.Module) -> list[str]:
        return []  # the coefficients, which are not there yet

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedAtlas:
        vectors = self._given or tuple(Delta.load(path) for path in self.vectors)
        return AttachedAtlas(self, model, vectors)


class AttachedAtlas(AttachedRule):
    """The rule at work.

    Args:
        rule: its settings.
        model: the base, whose blocks are composed until `detach`.
        vectors: of it.
    """

    def __init__(self, rule: Atlas, model: nn.Module, vectors: Sequence[Delta]) -> None:
        self.rule, self.model = rule, model
        self.composed: dict[str, Composed] = {}
        self._evaluated = ExitStack()
        self._embeddings: list[nn.Embedding] = []
        self._places: list[tuple[nn.Module, str]] = []
        self._orders = [(module, list(module._parameters)) for module in model.modules()]
        blocks = _blocks(rule, model, vectors)
        device = next(iter(blocks.values())).device
        shared = nn.Parameter(torch.zeros(len(vectors), 1, device=device)) if rule.mode == "isotropic" else None
        splits: dict[tuple[int, ...], Tensor] = {}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        try:
            for name, parameter in blocks.items():
                groups = None
                if rule.mode == "partition":
                    generator = torch.Generator().manual_seed(rule.seed)
                    drawn = torch.randint(rule.groups, tuple(parameter.shape), generator=generator)
                    groups = splits.setdefault(tuple(parameter.shape), drawn.to(parameter.device))
                size = (len(vectors), 1 if groups is None else rule.groups)  # a matrix, so that it decays
                own = shared if shared is not None else nn.Parameter(torch.zeros(size, device=parameter.device))
                parts = [_part(vector, names[id(parameter)], parameter.device) for vector in vectors]
                self.composed[name] = Composed(parts, own, groups)
                for each in names[id(parameter)]:
                    path, _, attribute = each.rpartition(".")
                    parametrize.register_parametrization(
                        model.get_submodule(path), attribute, self.composed[name], unsafe=True
                    )
                    self._places.append((model.get_submodule(path), attribute))
                self._read_by_row(names[id(parameter)])
            self._evaluated.enter_context(modes_restored(model))
            self._evaluated.enter_context(hooked(model, before={"": lambda *_: model.eval()}))
        except BaseException:
            self._remove()
            raise

    def _read_by_row(self, names: Sequence[str]) -> None:
        """Let an embedding give the gradient of the rows that were read, not of its whole table."""
        module = self.model.get_submodule(names[0].rpartition(".")[0])
        if len(names) > 1 or not isinstance(module, nn.Embedding):
            return
        if module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
            module.sparse = True
            self._embeddings.append(module)

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """By block: [vectors, groups]."""
        return {name: each.coefficients.detach() for name, each in self.composed.items()}

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        if not self.rule.penalty:
            return None
        norms = [torch.linalg.vector_norm(each.coefficients, self.rule.norm) for each in self.composed.values()]
        return self.rule.penalty * 0.5 * torch.stack(norms).mean()

    def report(self) -> dict[str, Any]:
        """Return the mean coefficient of each vector, over blocks."""
        means = torch.stack([each.mean(1) for each in self.coefficients.values()]).mean(0)
        return {"coefficients": [round(value, 6) for value in means.tolist()]}

    @torch.no_grad()
    def detach(self) -> None:
        """Put what was composed into the weights, and the plain modules back."""
        if not self._places:
            return
        for name, each in self.composed.items():
            original = self._original(name)
            original.copy_(each(original))
        self._remove()

    def _original(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        module: Any = self.model.get_submodule(path)
        found: Tensor = module.parametrizations[attribute].original
        return found

    def _remove(self) -> None:
        self._evaluated.close()
        for embedding in self._embeddings:
            embedding.sparse = False
        self._embeddings = []
        for module, attribute in reversed(self._places):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        if self._places:
            for module, names in self._orders:  # what was parametrized has come to stand last
                for name in names:
                    module._parameters[name] = module._parameters.pop(name)
        self._places = []


def _blocks(rule: Atlas, model: nn.Module, vectors: Sequence[Delta]) -> dict[str, nn.Parameter]:
    """The parameters that are composed, by their first names."""
    if not vectors:
        raise ValueError("vectors: none were given; give files of deltas, or Atlas.of(deltas).")
    bases = {vector.base for vector in vectors if vector.base is not None}
    if bases and bases != {found := model_fingerprint(model, widened=True)}:
        raise CheckpointError(
            f"vectors: their bases are {', '.join(sorted(each[:12] for each in bases))}, the model is {found[:12]}; "
            f"give task vectors of this model."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = [
        name
        for vector in vectors
        for name, part in vector.parts.items()
        if name not in parameters or tuple(parameters[name].shape) != part.shape
    ]
    if wrong:
        raise ValueError(
            f"vectors: {', '.join(dict.fromkeys(wrong))} differ in name or shape from the model's; give task "
            f"vectors of this model."
        )
    changed = {id(parameters[name]) for vector in vectors for name in vector.parts}
    found_blocks = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in changed
        and (rule.blocks is None or any(fnmatchcase(name, pattern) for pattern in rule.blocks))
        and (rule.mode != "partition" or parameter.dim() == 2)
    }
    if not found_blocks:
        raise ValueError(
            f"blocks: mode={rule.mode!r} and {list(rule.blocks or ['*'])} leave no parameter that a vector changes; "
            f"give other patterns."
        )
    return found_blocks


def _part(vector: Delta, names: Sequence[str], device: torch.device) -> Part | None:
    """The change of the parameter with these names, beside its weight."""
    part = next((vector.parts[name] for name in names if name in vector.parts), None)
    return None if part is None else moved(part, device)


# -- one number for all ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """What a search over one coefficient for all vectors found.

    Attributes:
        coefficient: the best.
        scores: of all that were tried.
    """

    coefficient: float
    scores: Mapping[float, float]


def isotropic_search(
    model: nn.Module,
    vectors: Sequence[Delta],
    evaluate: Callable[[nn.Module], float],
    *,
    grid: Sequence[float] = GRID,
) -> Searched:
    """Search the one coefficient for all vectors with which the composed model is best: task arithmetic.

    Args:
        model: the base; it holds the best composition afterwards.
        vectors: of it.
        evaluate: a score of the model on a validation split, higher is better.
        grid: the coefficients that are tried.

    Raises:
        CheckpointError: a vector is of another base.
        ValueError: no vectors or coefficients, or names and shapes that differ.
    """
    if not grid:
        raise ValueError("grid: none were given; give the coefficients to try.")
    running = Atlas.of(vectors, mode="isotropic").attach(model)
    shared = next(iter(running.composed.values())).coefficients
    scores: dict[float, float] = {}
    try:
        with torch.no_grad():
            for value in grid:
                shared.fill_(value)
                scores[float(value)] = float(evaluate(model))
            best = max(scores, key=lambda value: scores[value])
            shared.fill_(best)
    except BaseException:
        with torch.no_grad():
            shared.zero_()
        raise
    finally:
        running.detach()
    return Searched(best, scores)
