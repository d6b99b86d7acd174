"""Amounts of memory: parsed, printed, and planned before work starts. Units are decimal (GB = 10^9) or binary (GiB)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actkit.core.ground.errors import MemoryLimitError

if TYPE_CHECKING:
    from rich.table import Table


LARGE = 2**20  # bytes of a module behind which memory is handed back
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_bytes(value: int | str) -> int:
    """Read bytes from a number or a text such as '2GB', '512 MiB' or '1000'.

    Args:
        value: bytes, or a text with a unit.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"memory: {value!r} was given; give bytes, or a text like '2GB', '512MB' or '1.5GiB'.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(size: int | float) -> str:
    """The size with a decimal unit, three digits: '1.5 GB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


@dataclass(frozen=True)
class MemoryPlan:
    """What a recording will hold.

    Attributes:
        rows: (site, statistic, bytes).
        seconds: estimate for all batches, or None.
    """

    rows: tuple[tuple[str, str, int], ...]
    seconds: float | None = None

    @property
    def total(self) -> int:
        """Bytes of all statistics together."""
        return sum(size for _, _, size in self.rows)

    def table(self) -> Table:
        """The statistics, largest first, and the total."""
        from rich import box
        from rich.text import Text

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(
            title="Memory of the statistics", title_justify="left", box=box.SIMPLE_HEAD, show_footer=True
        )
        table.add_column("bytes", format_bytes(self.total), justify="right", no_wrap=True)
        table.add_column("site", "total", overflow="fold")
        table.add_column("statistic")
        for site, statistic, size in sorted(self.rows, key=lambda row: -row[2]):
            table.add_row(format_bytes(size), Text(site), statistic)
        return table

    def check(self, max_memory: int | str) -> None:
        """Raise MemoryLimitError if the plan needs more than `max_memory` (bytes or a text like '2GB')."""
        cap = parse_bytes(max_memory)
        if self.total <= cap:
            return
        site, statistic, size = max(self.rows, key=lambda row: row[2])
        raise MemoryLimitError(
            f"max_memory: the statistics need {format_bytes(self.total)}, the cap is {format_bytes(cap)}. Largest is "
            f"{statistic} at {site} with {format_bytes(size)}: record fewer sites at a time, a smaller statistic, or "
            f"raise the cap."
        )


def release_memory(*, cycles: bool = True) -> None:
    """Hand what was dropped back to the system; the allocator keeps it otherwise, a GB and more after a calibration.

    Args:
        cycles: collect what only refers to itself before that, which takes some 0.2 s in a large process.
    """
    if cycles:
        gc.collect()
    with suppress(OSError, AttributeError):  # only the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)


def release_behind(module: nn.Module) -> None:
    """Hand back what was dropped while a module was run or changed, if it is large: that takes milliseconds.

    Args:
        module: a block, say.
    """
    if sum(each.nbytes for each in (*module.parameters(), *module.buffers())) >= LARGE:
        release_memory(cycles=False)


def distinct_tensors(model: nn.Module) -> Iterable[Tensor]:
    """List the saved parameters and buffers, tied ones once; offloaded ones are on the meta device."""
    found: dict[Any, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        found.setdefault(id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor)
    return found.values()


def parameter_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers, ties once."""
    return sum(tensor.nbytes for tensor in distinct_tensors(model))
