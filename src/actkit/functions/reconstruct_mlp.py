"""Another activation function, and MLPs that are fitted to it: from APHQ-ViT (2025, arXiv:2504.02508).

    minimize over up, down:   |h^(1/2) (down f(up x) - y)|^2 + c |h^(1/2) (down min(f(up x), b) - y)|^2

y is what the MLP gave with its own function, x what it reads in the unchanged model, f the new function, h how much
each element of y matters to the model's output (`core/watch/importance.py`), b the `quantile` of the positive values
that the old function gave. The first term makes up for the new function, the second one teaches the MLP to do without
its largest values, so that its hidden units are easy to round. No labels are needed.
When to use it: to replace GELU or SiLU by ReLU in a trained model without training the whole: before `aphq_vit` or
another rounding of activations, or for exact zeros. To swap and train afterwards, `swap` is enough.
Cost: `steps` steps of each MLP alone, and (`importance: aph`) two passes back per MLP over the calibration data, in
float64.
As in the release: Adam at a rate that falls to 0 along a cosine, b from the outputs of the old function (the text of
the paper says those of the new one), all MLPs on the float model's states, h of mean square 1, c = 2, `quantile` 0.99
(0.98 in one of its settings).
Settled here: 1,000 steps in place of 20,000, at a rate so much higher; the error is a mean over all elements; a gate is
fitted with up and down, and its outputs are what b bounds.
Our own reading: the norm in front of the MLP is trained in the release too, but no gradient reaches it there; it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.edit.edits import Edit, Note, Set, Skip, get_module
from actkit.core.edit.folding import set_weight
from actkit.core.layers.activations import Activation, activation_function, name_of
from actkit.core.model.anatomy import Block, Linear, Mlp
from actkit.core.recipe.reconstruction import Example, Learned, Rate, cosine, learn, learned_bytes
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.calls import Call
from actkit.core.watch.importance import Divergence, Mode, perturbation_importance
from actkit.functions.swap import Swap

FEWEST = 200  # steps that a rate is found for
TRAVEL = 0.8  # steps times rate in the release
SAMPLED = 1 << 22  # values that a quantile is found from


class ReconstructMlp(Transform):
    """Replace the activation function of MLPs, and fit their layers to what they gave before.

    Attributes:
        new: the name of an element-wise function (entry-point group `actkit.functions`).
        quantile: of the positive values of the old function, the bound of the second term.
        clamp: weight of the second term.
        steps: per MLP; 0 swaps alone.
        rows: of a step, at most.
        rate: learning rate, which falls to 0 along a cosine; None for 0.8 / steps, 0.004 at most.
        importance: 'aph' averaged over samples (over tokens too, if the data are text), 'ph' of each sample, or 'mse'
            for none.
        mode: how it is found, 'perturb', 'hvp' or 'hutchinson'.
        loss: what it is the importance for: 'kl' of class probabilities, or 'mse' of the model's outputs.
        temperature: of 'kl'.
        importance_tokens: of how many tokens, or images, 'aph' is the average; None for all.
        seed: of the order of rows.

    Raises:
        ValueError: a value is out of bounds, or the function is unknown or mixes.
    """

    new: str = "relu"
    quantile: float = Field(0.99, gt=0, le=1)
    clamp: float = Field(2.0, ge=0)
    steps: int = Field(1000, ge=0)
    rows: int = Field(32, ge=1)
    rate: Annotated[float, Field(gt=0)] | None = None
    importance: Literal["aph", "ph", "mse"] = "aph"
    mode: Mode = "perturb"
    loss: Literal["kl", "mse"] = "kl"
    temperature: float = Field(20.0, gt=0)
    importance_tokens: int | None = Field(4096, ge=1)
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(needs_data=True, stream="original", records_calls=True, least_coverage=0.25)
    not_proposed: ClassVar[str] = "another activation function pays by what is done with it; use recipes="
    _swap: Swap | None = PrivateAttr(default=None)  # None if no MLP is to change
    _importance: dict[str, list[Tensor]] = PrivateAttr(default_factory=dict)  # of the output of each down

    @field_validator("new")
    @classmethod
    def _known(cls, new: str) -> str:
        Activation(new)  # raises what is wrong with it
        return new

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        planned = self.model_copy()
        mlps = [block.mlp for block in trial.anatomy.blocks if block.mlp is not None and self._reason(block) is None]
        if not mlps:
            return planned
        planned._swap = Swap(where=tuple(mlp.activation for mlp in mlps), new=self.new).plan(trial, data)
        if self.importance != "mse" and self.steps:
            planned._importance = perturbation_importance(
                trial.model,
                [mlp.down.path for mlp in mlps],
                data,
                divergence=Divergence(self.loss, self.temperature),
                mode=self.mode,
                average="auto" if self.importance == "aph" else None,
                tokens=self.importance_tokens,
                seed=self.seed,
            )
        return planned

    def passes(self, tokens: int, rows: int) -> float:
        return 2 + 3.0 * self.steps * min(self.rows, rows) / max(1, rows)

    def memory(self, block: Block, length: int) -> int:
        if block.mlp is None:
            return 0
        weights = sum(linear.in_features * linear.out_features for linear in _linears(block.mlp))
        copied = 8 * sum(parameter.numel() for parameter in block.root.parameters())
        return copied + learned_bytes(weights) + 4 * (4 * length * self.rows * block.mlp.width + SAMPLED)

    def targets(self, block: Block) -> Iterable[Linear]:
        return () if block.mlp is None else _linears(block.mlp)

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"it would train what the {earlier.slots[0]} slot was filled for; put it first"
        return super().conflicts(earlier)

    def _reason(self, block: Block) -> str | None:
        """Why a block's MLP is left as it is, or None."""
        if block.mlp is None:
            return "experts are left as they are" if block.experts is not None else "the block has no MLP that is known"
        if block.mlp.up_rows is not None:
            return "one layer computes gate and up"
        if name_of(get_module(block.root, block.mlp.activation)) == self.new:
            return f"its function is {self.new} already"
        return None

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        reason = self._reason(block)
        if reason is not None or block.mlp is None or self._swap is None:
            yield Skip(block.path or "model", reason or "nothing to swap")
            return
        mlp = block.mlp
        if self.steps:
            calls = seen.calls(mlp.up.path)
            bound = positive_quantile(mlp, block.root, calls, self.quantile, self.seed)
            fitted = FittedMlp(mlp, self.new, self.rate or TRAVEL / max(FEWEST, self.steps))
            lessons = self._lessons(block, mlp, calls)

            def loss(example: Example, generator: torch.Generator) -> Tensor:
                direct, clamped = fitted(example.call.hidden.float(), bound)
                return example.error(direct) + self.clamp * example.error(clamped)

            swapped = fitted.error(lessons)
            learning = learn(mlp.down.path, fitted, lessons, loss, steps=self.steps, seed=self.seed + block.index)
            left = fitted.error(lessons) / (swapped or 1.0)
            text = f"{self.new}: {left:.3g} of the swap's squared error is left; units learn to end at {bound:.3g}"
            if learning.stopped is not None:
                text += f"; stopped at step {learning.stopped}, as the loss was no longer finite"
            values = {"loss": learning.curve(max(1, len(lessons))), "left": left, "bound": bound}
            yield Note(mlp.down.path, text, values)
            yield from fitted.edits()
        yield from self._swap.edit(block, seen)

    def _lessons(self, block: Block, mlp: Mlp, calls: Sequence[Call]) -> list[Example]:
        """What the MLP read and gave, a few rows at a time."""
        found: list[Example] = []
        importances = self._importance.get(mlp.down.path, [])
        squares = [each.double().square().mean() for each in importances]
        norm = float(torch.stack(squares).mean().sqrt()) if squares else 0.0
        with torch.no_grad():
            for index, call in enumerate(calls):
                target = get_module(block.root, mlp.down.path)(_hidden(mlp, block.root, call.hidden)[1])
                h = None if norm == 0 else importances[index if len(importances) > 1 else 0] / norm
                example = Example(call, (target,), None, h)
                cuts = call.hidden.dim() > 1 and len(call.hidden) == call.context.batch_size
                found += example.cut(self.rows) if cuts else [example]
        return found


class FittedMlp(Learned):
    """The layers of an MLP, with another function between them.

    Args:
        mlp: whose layers are learned.
        new: the name of the function.
        rate: of learning, at first; it falls to 0 along a cosine.
    """

    def __init__(self, mlp: Mlp, new: str, rate: float) -> None:
        super().__init__()
        self.mlp, self.rate = mlp, rate
        self.function = activation_function(new).function
        self.linears = _linears(mlp)
        self.weights = nn.ParameterList(nn.Parameter(x.weight.detach().float().clone()) for x in self.linears)
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(x.out_features) if x.bias is None else x.bias.detach().float().clone())
            for x in self.linears
        )
        for linear, bias in zip(self.linears, self.biases, strict=True):
            bias.requires_grad_(linear.bias is not None)

    def rates(self) -> Iterator[tuple[Sequence[nn.Parameter], Rate]]:
        yield [parameter for parameter in self.parameters() if parameter.requires_grad], cosine(self.rate)

    def forward(self, x: Tensor, bound: float = inf) -> tuple[Tensor, Tensor]:
        """Return what the MLP gives for x [..., in], and what it gives if its function's outputs end at `bound`."""
        *inputs, down = zip(self.weights, self.biases, strict=True)
        bent = self.function(F.linear(x, *inputs[0]))
        factor = F.linear(x, *inputs[1]) if len(inputs) > 1 else 1.0
        return F.linear(bent * factor, *down), F.linear(bent.clamp(max=bound) * factor, *down)

    @torch.no_grad()
    def error(self, lessons: Sequence[Example]) -> float:
        """Return the weighted error on lessons, unclamped."""
        return sum(float(each.error(self(each.call.hidden.float())[0])) for each in lessons)

    def tensors(self) -> Mapping[str, Tensor]:
        return {linear.path: weight for linear, weight in zip(self.linears, self.weights, strict=True)}

    def edits(self) -> Iterator[Set]:
        """Yield the layers as they were learned, in their dtype."""
        for linear, weight, bias in zip(self.linears, self.weights, self.biases, strict=True):
            yield set_weight(linear, weight.detach().to(linear.weight.dtype))
            if linear.bias is not None:
                yield Set(f"{linear.path}.bias", bias.detach().to(linear.bias.dtype))


def positive_quantile(mlp: Mlp, root: nn.Module, calls: Sequence[Call], share: float, seed: int = 0) -> float:
    """Return a quantile of the positive outputs of an MLP's activation function (of a sample, if there are many).

    Args:
        mlp: as it stands.
        root: the model.
        calls: of its up projection.
        share: below it.
        seed: of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    most = max(1, SAMPLED // max(1, len(calls)))
    found = []
    with torch.no_grad():
        for call in calls:
            bent = call.real(_hidden(mlp, root, call.hidden)[0]).flatten()
            positive = bent[bent > 0].float()
            if len(positive) > most:
                positive = positive[torch.randint(len(positive), (most,), generator=generator).to(positive.device)]
            found.append(positive)
    values = torch.cat(found)
    if not len(values):
        return inf
    return float(values.kthvalue(max(1, min(len(values), round(share * len(values))))).values)


def _linears(mlp: Mlp) -> tuple[Linear, ...]:
    """Gate if there is one, up, down."""
    return (*mlp.inputs, mlp.down)


def _hidden(mlp: Mlp, root: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the activation function gives, and what down reads."""
    first, *others = (get_module(root, linear.path)(x) for linear in mlp.inputs)
    bent = get_module(root, mlp.activation)(first)
    return bent, bent * others[0] if others else bent
