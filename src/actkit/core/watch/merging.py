"""Statistics of several processes as those of one: each has seen its share of the batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from actkit.core.ground import processes
from actkit.core.watch.streaming import Statistic


def merge(statistics: Mapping[Any, Statistic | Iterable[Statistic]]) -> None:
    """Turn statistics of each process's share into those of all, in place and in the same order everywhere.

    Args:
        statistics: by site, the same ones in all processes; one that stands at several sites is merged once.
    """
    if not processes.several():
        return
    done: set[int] = set()
    for site, value in statistics.items():
        for statistic in [value] if isinstance(value, Statistic) else value:
            if id(statistic) not in done:
                done.add(id(statistic))
                _merge(f"{type(statistic).__name__} of {site}", statistic)


def _merge(label: str, statistic: Statistic) -> None:
    merged = statistic.empty()
    for _, state in processes.everyone(label, statistic.state()):
        if statistic.channels is not None:
            state = {name: tensor.to(statistic._device) for name, tensor in state.items()}
        merged.merge(statistic.empty().load_state(state))
    statistic.load_state(merged.state())
