"""What one step of a training takes, in a fresh process: seconds of its parts, bytes that it keeps, peak memory.

    with FreshProcess() as process:
        process.load("model")
        found = time_step(process, batch, Way(rules=("s2a",)))
    step = forward + backward + optimizer,   peak = largest resident set meanwhile - resident before

A training in this process would count what else it holds, and what its allocator kept of others. So rules, adapters
and optimizers are given by name, as in a recipe, and prepared as `train` and `train_adapter` prepare them.

When to use it: to compare what ways to train a model cost. Each takes a process of its own, or another `load`, as the
model has taken the steps afterwards. `stepping` takes them in this process, as for interleaved timings.
Cost: one forward pass more, which warms up and on which the kept bytes are counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import mask_of
from actkit.core.forward.hooks import hooked
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.measure.fresh import FreshProcess
from actkit.core.measure.saved_tensors import saved_tensors
from actkit.core.recipe.rule import parse_rules
from actkit.core.train.choice import trained_parameters
from actkit.core.train.objective import Objective
from actkit.core.train.optimizers import chosen_optimizer, make_optimizer
from actkit.core.train.rules import AttachedRules, attached
from actkit.core.train.training_setup import check_parameters, modes_restored, prepare_modes
from actkit.finetuning.adapters import parse_adapter
from actkit.finetuning.low_rank_training import adapter_parameters, adapters_beside

RATE = 1e-4


@dataclass(frozen=True)
class Way:
    """A way to train a model, all by name.

    Attributes:
        rules: such as 'lift:lora_rank=8', or {name: settings}.
        adapter: such as 'lora:rank=8'; it trains alone, beside what `trainable` names.
        trainable: patterns of the parameters that train, beside those that rules name; None for all, if nobody else
            names any.
        optimizer: a class of torch.optim; a rule may bring its own.
        checkpointing: activations are computed again in the backward pass, in models of transformers.
    """

    rules: tuple[Any, ...] = ()
    adapter: Any = None
    trainable: tuple[str, ...] | None = None
    optimizer: Any = "adamw"
    checkpointing: bool = False


def time_step(process: FreshProcess, batch: Any, way: Way | None = None, *, steps: int = 1) -> dict[str, Any]:
    """Take steps of a training in a fresh process and say what they took.

    Args:
        process: with the model loaded, which has taken the steps afterwards.
        batch: of the training, with its labels.
        way: how it is trained; None for all parameters by AdamW.
        steps: that are timed, 1 or more.

    Returns:
        A dictionary with

            - `forward_seconds`, `backward_seconds`, `optimizer_seconds`: a list each, one number per step;
            - `kept_bytes`: what autograd keeps of the forward pass;
            - `optimizer_bytes`: of its state;
            - `trainable`: how many numbers train;
            - `loss`: in the last step;
            - `resident_bytes`: of the process before;
            - `peak_bytes`: the largest meanwhile, with what a first training imports (some 70 MB); None if the system
              lets no process reset its peak.

    Raises:
        ValueError: there are fewer steps than 1.
        FreshProcessError: the training fails; the text says how.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} was given; give 1 or more.")
    found = process.call(f"{__name__}:take_steps", batch, way=asdict(way or Way()), steps=steps)
    return found | process.memory()["request"]


def take_steps(model: nn.Module, batch: Any, *, way: dict[str, Any], steps: int) -> dict[str, Any]:
    """Take steps in this process.

    Args:
        model: that is trained.
        batch: as in `time_step`.
        way: the fields of a `Way`.
        steps: that are timed.

    Returns:
        What `time_step` returns, without the memory of the process.
    """
    device = next(model.parameters()).device
    with own_random_numbers(device, 0), stepping(model, batch, Way(**way)) as step:
        kept = step.kept_bytes()
        parts = [step() for _ in range(steps)]
        forward, backward, update = (list(each) for each in zip(*parts, strict=True))
        return {
            "forward_seconds": forward,
            "backward_seconds": backward,
            "optimizer_seconds": update,
            "kept_bytes": kept,
            "optimizer_bytes": step.optimizer_bytes(),
            "trainable": sum(each.numel() for each in model.parameters() if each.requires_grad),
            "loss": step.loss,
        }


@contextmanager
def stepping(model: nn.Module, batch: Any, way: Way) -> Iterator[Step]:
    """Prepare a model for steps; afterwards adapters and rules are gone, and the weights are those after the steps.

    Args:
        model: in place.
        batch: that each step is taken on.
        way: how it is trained.

    Yields:
        The step, to call.

    Raises:
        ValueError: nothing trains, or what is named does not fit the model.
    """
    rules, trainable = parse_rules(way.rules), way.trainable
    optimizer = chosen_optimizer(rules, way.optimizer)
    whole: Any = model
    with ExitStack() as stack:
        stack.enter_context(modes_restored(model))
        if way.adapter is not None:
            adapter = parse_adapter(way.adapter)
            layers, also = adapter.layers(model, [batch]), adapter.whole(model)
            stack.enter_context(adapters_beside(model, layers, 0, also))
            trainable = (*adapter_parameters(also), *(trainable or ()))
        if way.checkpointing:
            whole.gradient_checkpointing_enable({"use_reentrant": False})
            stack.callback(whole.gradient_checkpointing_disable)
        stack.enter_context(trained_parameters(model, rules, trainable))
        made = make_optimizer(optimizer, model, learning_rate=RATE)
        running = stack.enter_context(attached(rules, model, made, batch, learning_rate=RATE, weight_decay=0.0))
        check_parameters(model)
        step = Step(model, batch, made, running)
        if rules:
            stack.enter_context(hooked(model, after={"": step.see}))
        prepare_modes(model)
        yield step


class Step:
    """One step of a training, on one batch.

    Args:
        model: prepared.
        batch: of the training.
        optimizer: of what trains.
        rules: at work.
    """

    def __init__(self, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, rules: AttachedRules) -> None:
        self.model, self.batch, self.optimizer, self.rules = model, batch, optimizer, rules
        self.objective = Objective(model, None)
        self.device = next(model.parameters()).device
        self.loss = 0.0
        self._output: Any = None

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Keep what the model gave, for penalties."""
        self._output = output

    def __call__(self) -> tuple[float, float, float]:
        """Take a step.

        Returns:
            Seconds of the forward pass, of the backward pass, and of the optimizer.
        """
        self.optimizer.zero_grad()
        self.rules.before_step(0.0)
        times = [self._now()]
        loss = self._forward()
        times.append(self._now())
        loss.backward()
        self.rules.after_backward(0.0)
        times.append(self._now())
        self.optimizer.step()
        self.rules.after_step(0.0)
        times.append(self._now())
        self.loss = float(loss.detach())
        forward, backward, update = (end - start for start, end in pairwise(times))
        return forward, backward, update

    def _forward(self) -> Tensor:
        loss = self.objective(self.model, self.batch)
        loss = self.rules.add(loss, mask_of(self.batch, loss.device), self.batch, self._output)
        self._output = None
        return loss

    def kept_bytes(self) -> int:
        """Count what autograd keeps of a forward pass."""
        with saved_tensors(self.model) as meter:
            self._forward()
        return meter.bytes

    def optimizer_bytes(self) -> int:
        """Count the optimizer's state, which is there after a step."""
        tensors = (each for values in self.optimizer.state.values() for each in values.values())
        return sum(each.nbytes for each in tensors if isinstance(each, Tensor))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
