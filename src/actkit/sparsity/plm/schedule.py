"""WSDC: a learning rate that warms up, stays, decays, and goes on at its lowest (2025, arXiv:2503.12167).

    rate / peak = (t + 1) / W                                    t < W            warm-up
                  1                                              t < W + S        stable
                  m + (1 - m) f((t - W - S) / D)                 t < W + S + D    decay, f falls from 1 to 0
                  m                                              after that       constant

When to use it: if you do not know yet how long you will train, or keep better data for the end: what comes with the
last, constant rate can go on for as long as there are data. `actkit train` has it as `schedule`:
'wsdc:stable=0.6,decay=0.2', in shares of the training. This function is for a loop of your own, in steps.
Cost: none.
Our own reading: the name is the paper's, the shape of the decay is not stated in what we read, and is an argument; the
step counts of the paper are unknown to us.
"""

from __future__ import annotations

from collections.abc import Callable

from actkit.core.recipe.schedule import Shape, Wsdc


def wsdc_lambda(
    warmup: int, stable: int, decay: int, total: int, *, min_ratio: float = 0.1, shape: Shape = "linear"
) -> Callable[[int], float]:
    """Return what `torch.optim.lr_scheduler.LambdaLR` multiplies the peak with.

    Args:
        warmup: steps in which the rate rises.
        stable: steps at the peak.
        decay: steps in which it falls.
        total: steps of the training; what is left of them is at the lowest rate.
        min_ratio: the lowest, as a share of the peak.
        shape: of the decay, 'linear', 'cosine' or '1-sqrt'.

    Returns:
        A function of the step, from 0.

    Raises:
        ValueError: a number is negative, or they are more than `total`.
    """
    for name, steps in (("warmup", warmup), ("stable", stable), ("decay", decay)):
        if steps < 0:
            raise ValueError(f"{name}: {steps} was given; give 0 or more steps.")
    if total < max(1, warmup + stable + decay):
        raise ValueError(
            f"total: {total} was given; give at least the {max(1, warmup + stable + decay)} steps of warm-up, stable "
            f"and decay."
        )
    course = Wsdc(stable / total, decay / total, min_ratio, shape)

    def ratio(step: int) -> float:
        return (step + 1) / warmup if step < warmup else course.ratio((step - warmup) / total)

    return ratio
