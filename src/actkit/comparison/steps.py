"""What a training step of each arm costs: time in turns with the others, arithmetic, and bytes kept for backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from actkit.core.forward.hooks import hooked
from actkit.core.layers.activations import flops_of, is_activation, without_inner
from actkit.core.measure.saved_tensors import saved_tensors

WARM, ROUNDS = 3, 15  # steps of each arm that are not, and that are timed
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class StepCost:
    """Of one training step, a mean over the parts of a task.

    Attributes:
        milliseconds: median over the rounds: forward, backward and the optimizer.
        slowest: of the rounds.
        flops: of forward and backward, for each row or token; matrix products and convolutions alone.
        saved_bytes: that the forward pass keeps for the backward pass, parameters left out.
        function_flops: of the activations in a forward pass, for each row or token, as their records count them; None
            if nobody counted those of one.
    """

    milliseconds: float
    slowest: float
    flops: float
    saved_bytes: float
    function_flops: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Everything, as JSON takes it."""
        return asdict(self)

    @classmethod
    def mean_of(cls, costs: Sequence[StepCost]) -> StepCost:
        """The mean over parts.

        Args:
            costs: one for each.
        """
        columns = zip(*(asdict(each).values() for each in costs), strict=True)
        found: list[Any] = [None if None in column else mean(column) for column in columns]
        return cls(*found)


def measure_steps(
    models: Mapping[str, nn.Module], loss: Loss, rows: int, rate: float, *, rounds: int = ROUNDS
) -> dict[str, StepCost]:
    """Measure a training step of each model, in turns.

    Args:
        models: by arm; they are trained by the steps that are timed.
        loss: of a model, on a batch that is the same for all.
        rows: of the batch.
        rate: of AdamW, small enough that nothing overflows.
        rounds: in which each model makes a step.

    Returns:
        The costs, by arm.
    """
    optimizers = {name: torch.optim.AdamW(model.parameters(), rate) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for each in range(WARM + rounds):
        for name, model in models.items():
            model.train()
            started = time.perf_counter()
            optimizers[name].zero_grad()
            loss(model).backward()
            optimizers[name].step()
            if each >= WARM:
                times[name].append(1000 * (time.perf_counter() - started))
    found = {}
    for name, model in models.items():
        products, functions = _flops(model, loss)
        each_row = None if functions is None else functions / rows
        found[name] = StepCost(median(times[name]), max(times[name]), products / rows, _saved(model, loss), each_row)
    return found


def _flops(model: nn.Module, loss: Loss) -> tuple[float, float | None]:
    """Of products, forward and backward; and of activations, forward."""
    functions: list[int | None] = []

    def count(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        each = flops_of(module)
        functions.append(None if each is None else each * output.numel())

    # torch knows products that are added to something, but not those that are added in place
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_product})
    # a module that stands at several paths is hooked once, and fires at each of its calls
    places = {module: path for path, module in without_inner(model) if is_activation(module)}
    with hooked(model, after=dict.fromkeys(places.values(), count)), counter:
        loss(model).backward()
    counted = [each for each in functions if each is not None]
    return float(counter.get_total_flops()), float(sum(counted)) if len(counted) == len(functions) else None


def _of_product(added: Any, one: Any, other: Any, *more: Any, **named: Any) -> int:
    """FLOPs of a product of two matrices, by their shapes."""
    return 2 * int(one[0] * one[1] * other[1])


def _saved(model: nn.Module, loss: Loss) -> float:
    with saved_tensors(model) as saved:
        kept: Any = loss(model)  # its graph lives until it is counted
    found = saved.bytes
    del kept
    return float(found)
