"""Statistics of the same rows in one pass: those that the compiled kernel knows together, the others one by one.

A large float32, bfloat16 or float16 tensor on the CPU is read once (`kernels/summaries.py`). Each statistic's own
`update` is the reference: the results are the same bits, of Moments the same to the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from actkit.core.watch.streaming import Rows, Statistic, chunks
from actkit.kernels.operators import has_numba

LEAST = 1 << 15  # values; below, loading the kernel takes longer than what it saves
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds their values exactly


def update_all(statistics: Iterable[Statistic], x: Tensor, rows: Rows | None = None) -> None:
    """Read rows into every statistic, as `statistic.update(x, rows)` does; raises as that.

    Args:
        statistics: of one site.
        x: [n, channels].
        rows: which tokens they are.
    """
    waiting = list(statistics)
    if x.numel() >= LEAST and x.device.type == "cpu" and x.dtype in DTYPES:
        waiting = _in_one_pass(waiting, x, rows)
    for statistic in waiting:
        statistic.update(x, rows)


def _in_one_pass(statistics: list[Statistic], x: Tensor, rows: Rows | None) -> list[Statistic]:
    """Read x into one statistic of each kind that the kernel knows; returns those that it left."""
    together: dict[str, Statistic] = {}
    for statistic in statistics:
        if statistic.kernel_name is not None:
            together.setdefault(statistic.kernel_name, statistic)
    if not together or not has_numba():
        return statistics
    from actkit.kernels.summaries import summarise

    for statistic in together.values():
        statistic.begin(x, rows)
    for part in _readable(x.detach()):
        summarise(part, **{name: statistic.kernel_state(x.dtype) for name, statistic in together.items()})
        for statistic in together.values():
            statistic.count += len(part)
    return [each for each in statistics if each is not together.get(each.kernel_name or "")]


def _readable(x: Tensor) -> Iterator[Tensor]:
    """The rows as the kernel takes them, contiguous, float32 or bfloat16; if that means a copy, a part at a time."""
    if x.is_contiguous() and x.dtype != torch.float16:
        yield x
        return
    for part, _ in chunks(x, None):
        yield (part.float() if x.dtype == torch.float16 else part).contiguous()
