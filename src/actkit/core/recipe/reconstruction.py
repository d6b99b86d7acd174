"""Block reconstruction: values that a block computes with are learned, so that it gives what it gave before.

    minimize over v:   mean over i of  h_i * (block(x; v)_i - y_i)^2

y is what the untouched block gave (`Seen.targets`), x what reaches the block now, v is learned in float32 apart from
the frozen weights, and h says how much an output matters (1 if nothing is given). The block runs on tensors that v
makes, put in place of its parameters and buffers for a call (`torch.func.functional_call`); nothing in the model
changes until the transform yields edits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import cos, isfinite, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from actkit.core.edit.edits import get_module
from actkit.core.forward.batch import first_tensor
from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.progress import track
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen
from actkit.core.watch.calls import Call

MOMENTS = 4  # float32 numbers that a learned one takes: itself, its gradient, Adam's two moments; one more is kept
KEPT = 1
Rate = float | Callable[[float], float]  # a function gives it for the share of the steps that are done


class Learned(nn.Module):
    """What is learned for a block. Its parameters are float32."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors that stand in place of parameters and buffers of the block, by their name in the model."""

    @abstractmethod
    def rates(self) -> Iterable[tuple[Sequence[nn.Parameter], Rate]]:
        """Return parameters, each with its learning rate."""

    def penalty(self, progress: float) -> Tensor | float:
        """Return what is added to the error.

        Args:
            progress: share of the steps that are done.
        """
        return 0.0

    def next_step(self, generator: torch.Generator) -> None:
        """Draw what is random in a step.

        Args:
            generator: of the random numbers.
        """


@dataclass(frozen=True)
class Example:
    """Some rows that a block is called with, and what it should give.

    Attributes:
        call: of the block.
        targets: whose squared errors are added up; shaped like the output.
        original: hidden states of the original stream, for `drop`; None if there are none.
        importance: h, broadcastable to the output; None for 1.
    """

    call: Call
    targets: tuple[Tensor, ...]
    original: Tensor | None = None
    importance: Tensor | None = None

    def rows(self, start: int, stop: int) -> Example:
        """Return some rows of it."""
        return Example(
            self.call.rows(start, stop),
            tuple(target[start:stop] for target in self.targets),
            None if self.original is None else self.original[start:stop],
            self.importance if self.importance is None or len(self.importance) == 1 else self.importance[start:stop],
        )

    def cut(self, rows: int) -> list[Example]:
        """Return it in parts of so many rows at most."""
        size = self.call.context.batch_size
        return [self.rows(start, min(start + rows, size)) for start in range(0, size, rows)]

    def error(self, output: Tensor) -> Tensor:
        """Return the weighted mean squared error of an output, over real tokens."""
        total = output.new_zeros((), dtype=torch.float32)
        for target in self.targets:
            squared = (output.float() - target.float()).square()
            if self.importance is not None:
                squared = squared * self.importance
            total = total + self.call.real(squared).mean()
        return total


@dataclass
class Learning:
    """How learning went.

    Attributes:
        losses: of each step.
        stopped: the step at which the loss was no longer finite; the values of the step before stand. None if none was.
    """

    losses: list[float] = field(default_factory=list)
    stopped: int | None = None

    def curve(self, length: int) -> list[float]:
        """Return the mean loss of each `length` steps, such as those of an epoch."""
        parts = (self.losses[i : i + length] for i in range(0, len(self.losses), length))
        return [sum(part) / len(part) for part in parts]


def examples(
    seen: Seen,
    rows: int,
    *,
    stream: str = "edited",
    also: Sequence[Sequence[Tensor]] = (),
    originals: bool = False,
    importance: Sequence[Tensor] | Tensor | None = None,
) -> list[Example]:
    """Return what a block is taught from: its calls, and what it gave untouched on the original stream.

    Args:
        seen: of the block.
        rows: of an example, at most; if rows cannot be told apart in this model, an example is a whole batch.
        stream: of the calls.
        also: more targets, a tensor per call.
        originals: give each example the hidden states of the original stream too.
        importance: h, one for all, or a tensor per call.
    """
    apart = seen.rows_apart(rows)
    others = seen.calls_of_block("original") if originals else None
    found = []
    for index, call in enumerate(seen.calls_of_block(stream)):
        one_for_all = importance is None or isinstance(importance, Tensor)
        example = Example(
            call,
            (seen.targets[index], *(each[index] for each in also)),
            None if others is None else others[index].hidden,
            importance if one_for_all else importance[index],  # type: ignore[index, arg-type]
        )
        found += example.cut(rows) if apart else [example]
    return found


def reconstruct(
    block: Block,
    learned: Learned,
    lessons: Sequence[Example],
    *,
    steps: int,
    seed: int,
    keep: float = 1.0,
    progress: bool = True,
) -> Learning:
    """Learn, with Adam. Same arguments, same values.

    Args:
        block: as it stands, with the modules in place that learned tensors belong to (`Seen.trial`).
        learned: changed in place.
        lessons: one for a step, in a new order each time all had their turn.
        steps: how many.
        seed: of the order, and of what is dropped.
        keep: share of the elements of the hidden states that come from the edited stream, the others from the original.
        progress: show a bar.

    Raises:
        NonFiniteError: the first loss is NaN or infinite already.
    """
    output = _runner(block, learned)

    def loss(example: Example, generator: torch.Generator) -> Tensor:
        given = example if keep == 1 else _mixed(example, keep, generator)
        return given.error(output(given.call))

    path = block.path or "the model"
    return learn(path, learned, lessons, loss, steps=steps, seed=seed, progress=progress)


def learn(
    path: str,
    learned: Learned,
    lessons: Sequence[Example],
    loss: Callable[[Example, torch.Generator], Tensor],
    *,
    steps: int,
    seed: int,
    progress: bool = True,
) -> Learning:
    """Learn as `reconstruct` does, a loss of any kind: that of a part of a block, of several outputs.

    Args:
        path: of what learns, for errors and the bar.
        learned: changed in place.
        lessons: one for a step, in a new order each time all had their turn.
        loss: of a lesson, to which the penalty is added; it draws from the generator of the run.
        steps: how many.
        seed: of the order, and of what is drawn.
        progress: show a bar.

    Raises:
        NonFiniteError: the first loss is NaN or infinite already.
    """
    parameters, rates = zip(*learned.rates(), strict=True)
    optimizer = torch.optim.Adam([{"params": list(each)} for each in parameters])
    generator = torch.Generator().manual_seed(seed)
    order = _shuffled(len(lessons), generator)
    found = Learning()
    before: list[Tensor] = []
    for step in track(range(steps), f"Learning {path}", enabled=progress):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate(step / steps) if callable(rate) else rate
        example = lessons[next(order)]
        learned.next_step(generator)
        with torch.enable_grad():
            value = loss(example, generator) + learned.penalty(step / steps)
        found.losses.append(float(value.detach()))
        if not isfinite(found.losses[-1]):
            if step == 0:
                raise NonFiniteError(
                    f"{path}: the first loss is {found.losses[0]}, before anything was learned; check the calibration "
                    f"data and the settings of the rounding."
                )
            found.stopped = step
            found.losses.pop()
            with torch.no_grad():
                for parameter, old in zip(learned.parameters(), before, strict=True):
                    parameter.copy_(old)
            break
        before = [parameter.detach().clone() for parameter in learned.parameters()]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
    return found


def cosine(rate: float) -> Callable[[float], float]:
    """Return a rate that falls to 0 along a cosine.

    Args:
        rate: at first.
    """
    return lambda progress: rate * (0.5 + 0.5 * cos(pi * progress))


def error_of(block: Block, learned: Learned, lessons: Sequence[Example]) -> float:
    """Return the mean error over examples, as reconstruction measures it, without learning.

    Args:
        block: as for `reconstruct`.
        learned: the values.
        lessons: what it is measured on.
    """
    output = _runner(block, learned)
    with torch.no_grad():
        errors = [float(example.error(output(example.call))) for example in lessons]
    return sum(errors) / len(errors)


def graph_bytes(block: Block, tokens: int, element_size: int = 4) -> int:
    """Estimate what a block keeps for its gradients on so many tokens: inputs and outputs of its layers, attention.

    Args:
        block: to be learned.
        tokens: of a step.
        element_size: bytes of a number.
    """
    channels = sum(linear.in_features + linear.out_features for linear in block.linears())
    weights = sum(linear.in_features * linear.out_features for linear in block.linears())
    heads = 0 if block.attention is None else block.attention.heads
    return element_size * (2 * tokens * channels + heads * tokens**2) + 4 * 3 * weights


def learned_bytes(numbers: int) -> int:
    """Return what so many learned numbers take: themselves, gradients, two moments, and the state that is kept."""
    return 4 * (MOMENTS + KEPT) * numbers


def _runner(block: Block, learned: Learned) -> Callable[[Call], Tensor]:
    """A function that runs the block on learned tensors; no gradient reaches what is not learned."""
    module = get_module(block.root, block.path)
    prefix = f"{block.path}." if block.path else ""
    frozen = {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}

    def run(call: Call) -> Tensor:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in learned.tensors().items()}
        return first_tensor(functional_call(module, frozen | tensors, call.args, call.kwargs))

    return run


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _mixed(example: Example, keep: float, generator: torch.Generator) -> Example:
    """Elements of the hidden states of both streams, a share `keep` of them from the edited one."""
    hidden: Any = example.call.hidden
    assert example.original is not None
    kept = torch.rand(hidden.shape, generator=generator).to(hidden.device) < keep
    return replace(example, call=example.call.with_hidden(torch.where(kept, hidden, example.original)))
