"""Fits a small model to inputs and targets that are all there, or drawn anew for each step: Adam or LBFGS.

For functions, formulas and fields: a data set is a few thousand points and one step sees all of it, or each step draws
some points of an image or a shape. Everything else is `training.py`. A validation split is asked for, and the values
that do best on it are kept; what is reported of a fit should come from a third split.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fitted:
    """What a fit did.

    Attributes:
        steps: that were taken.
        best_step: whose values the model has now; 0 for those that it came with.
        loss: on the training points at the last step.
        validation: loss on the validation points at the best step.
        history: (step, loss, validation) for each time that it was validated.
        stopped: why it ended early, or None.
    """

    steps: int
    best_step: int
    loss: float
    validation: float
    history: tuple[tuple[int, float, float], ...]
    stopped: str | None = None


def fit(
    model: nn.Module,
    points: Pair | Callable[[int], Pair],
    *,
    validation: Pair,
    steps: int = 1000,
    method: Literal["adam", "lbfgs"] = "adam",
    rate: float | None = None,
    loss: Loss = F.mse_loss,
    evaluate_every: int = 50,
    penalty: Callable[[int], Tensor | None] | None = None,
    schedule: Literal["cosine", "constant", "tenth"] = "cosine",
    keep: Literal["best", "last"] = "best",
) -> Fitted:
    """Fit a model in place.

    Args:
        model: inputs -> outputs; its trainable parameters are fitted.
        points: inputs and targets, used whole in every step; or a function that is given the number of a step, from 1,
            and draws those of that step.
        validation: other inputs and targets, which choose the step that is kept.
        steps: of the optimizer; one of LBFGS is up to 20 evaluations.
        method: which optimizer.
        rate: learning rate; None for 0.003 (Adam) or 1 with a line search (LBFGS).
        loss: of outputs and targets.
        evaluate_every: steps from one validation to the next.
        penalty: called with the number of a step before its loss; what it returns is added.
        schedule: of Adam's rate; a cosine falls to 0, `tenth` by the same factor per step to a tenth.
        keep: the values of the best step, or of the last one.

    Returns:
        What was done; the model holds the best values.

    Raises:
        ValueError: no steps, an unknown method, inputs and targets of different numbers, or no validation points.
    """
    if steps < 1 or evaluate_every < 1:
        raise ValueError(f"steps, evaluate_every: {steps} and {evaluate_every} were given; give at least 1.")
    if method not in ("adam", "lbfgs"):
        raise ValueError(f"method: {method!r} was given, allowed are 'adam' and 'lbfgs'.")
    given = {} if callable(points) else {"points": points}
    for name, (inputs, targets) in {**given, "validation": validation}.items():
        if not len(inputs) or len(inputs) != len(targets):
            raise ValueError(
                f"{name}: {len(inputs)} inputs and {len(targets)} targets were given; give as many of both, and one at "
                f"least."
            )
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer: torch.optim.Optimizer
    falling: torch.optim.lr_scheduler.LRScheduler | None = None
    if method == "adam":
        optimizer = torch.optim.Adam(parameters, rate or 3e-3)
        if schedule == "cosine":
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        elif schedule == "tenth":
            falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / steps))
    else:
        optimizer = torch.optim.LBFGS(parameters, rate or 1.0, line_search_fn="strong_wolfe")
    step, now = 0, validation

    def closure() -> Tensor:
        optimizer.zero_grad()
        more = None if penalty is None else penalty(step)
        found = loss(model(now[0]), now[1])
        total = found if more is None else found + more
        total.backward()
        return found.detach()

    best, best_step, least = copy.deepcopy(model.state_dict()), 0, _validated(model, validation, loss)
    history = [(0, math.nan, least)]
    last, stopped = math.nan, None
    for step in range(1, steps + 1):
        now = points(step) if callable(points) else points
        last = float(optimizer.step(closure))  # type: ignore[arg-type]
        if falling is not None:
            falling.step()
        if not math.isfinite(last):
            stopped = f"the loss was no longer finite at step {step}"
            break
        if step % evaluate_every == 0 or step == steps:
            score = _validated(model, validation, loss)
            history.append((step, last, score))
            if score < least or not math.isfinite(least) or keep == "last":
                best, best_step, least = copy.deepcopy(model.state_dict()), step, score
    model.load_state_dict(best)
    return Fitted(step, best_step, last, least, tuple(history), stopped)


@torch.no_grad()
def _validated(model: nn.Module, validation: Pair, loss: Loss) -> float:
    training = model.training
    model.eval()
    found = float(loss(model(validation[0]), validation[1]))
    model.train(training)
    return found
