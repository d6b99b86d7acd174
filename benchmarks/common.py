"""What every benchmark shares: options, interleaved timing, targets, and the result as a table and as JSON.

A full run is kept in benchmarks/results/NAME.json. `--quick` ends within a minute on smaller shapes, has targets of its
own, and prints beside them what the committed full run measured, with its date and commit. A target that is missed is
reported, not an error: the exit status is 0 whenever the measurement itself went well.

Import this before torch: it makes OpenMP's idle threads sleep. Spinning ones take the core from whatever else runs, and
on two loaded cores a parallel region of 30 microseconds then takes 6 milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actkit.core.ground.machine import machine, versions

MOST_COLUMNS = 7
RESULTS = Path(__file__).parent / "results"


def options(
    description: str, arguments: Sequence[str] | None = None, parts: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options of every benchmark: .quick (bool) and .json (a path, '-' for standard output, or None).

    parts: what can be measured alone, with --only; .only is then those chosen, all where none is.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller shapes and their own targets, under a minute")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    if parts:
        what = "measure these alone; what is recorded of the others stays"
        parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help=what)
    return parser.parse_args(arguments)


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    before: Callable[[], Any] = lambda: None,
    between: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round: every round calls `before`, then each variant once, in a new random order.

    Whatever disturbs the machine meets all variants alike, so that their ratios hold. `between` runs untimed before
    each variant, to leave the caches in one state for all. One more round warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), Random(0).shuffle
    for repeat in range(repeats + 1):
        before()
        shuffle(order)
        for name in order:
            between()
            start = time.perf_counter()
            variants[name]()
            elapsed = time.perf_counter() - start
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The first and the last decile."""
    deciles = quantiles(values, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """The ratio of two variants' medians, and the deciles of their ratios round by round."""
    deciles = spread([a / b for a, b in zip(numerator, denominator)])
    return {"ratio": median(numerator) / median(denominator), "deciles": [round(value, 3) for value in deciles]}


def target(name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """A condition that was set before the run, and whether it is met."""
    if (at_least is None) == (at_most is None):
        raise ValueError("target: give at_least or at_most.")
    bound, met = (at_least, value >= at_least) if at_least is not None else (at_most, value <= at_most)  # type: ignore[operator]
    return {
        "name": name,
        "value": value,
        "target": bound,
        "sense": "at least" if at_least is not None else "at most",
        "met": bool(met),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache that the system reports; 32 MB where it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def committed(name: str) -> dict[str, Any] | None:
    """The recorded full run, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def report(
    name: str,
    rows: list[dict[str, Any]],
    targets: list[dict[str, Any]],
    chosen: argparse.Namespace,
    *,
    keep: bool | None = None,
    show: Callable[[Console, list[dict[str, Any]]], None] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Print the result; write it to benchmarks/results after a full run, and where --json says. Returns it.

    keep: whether this is a full run; None: not where --quick was given. show: prints the rows; a table where None.
    """
    keep = not chosen.quick if keep is None else keep
    result = {
        "benchmark": name,
        "quick": chosen.quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ["OMP_WAIT_POLICY"],
        "load": os.getloadavg()[0],
        "machine": machine(),
        "versions": versions(),
        **more,
        "targets": targets,
        "rows": rows,
    }
    console = Console(stderr=chosen.json == "-", width=None if sys.stdout.isatty() else 140)
    _show(console, result, show)
    if not keep:
        full = committed(name)
        if full is None:
            console.print(f"No full run is recorded under benchmarks/results/{name}.json; run without --quick.")
        else:
            console.print(f"\nNot measured now: the full run of {full['date']}, commit {full['commit']}", style="bold")
            _show(console, full, show)
    text = json.dumps(result, indent=1) + "\n"
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    if chosen.json == "-":
        sys.stdout.write(text)
    elif chosen.json:
        Path(chosen.json).write_text(text, encoding="utf-8")
    return result


def show_parts(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print a table for each part that rows name in 'part', with the fields that its rows have."""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        fields = list(dict.fromkeys(key for row in own for key in row if key != "part"))
        table = Table(*fields, title=part)
        for row in own:
            table.add_row(*(cell(row.get(key)) for key in fields))
        console.print(table)


def _show(
    console: Console, result: dict[str, Any], show: Callable[[Console, list[dict[str, Any]]], None] | None = None
) -> None:
    where = result["machine"]
    console.print(
        f"{result['benchmark']}: {where['processor']}, {result['threads']} threads, load {result['load']:.1f}, "
        f"torch {result['versions']['torch']}, {result['date']}, commit {result['commit']}"
    )
    rows, targets = result["rows"], result["targets"]
    if show is not None:
        show(console, rows)
        rows = []
    if rows and len(rows[0]) > max(
        MOST_COLUMNS, len(rows)
    ):  # many fields read better down the page, one column per row
        fields = list(rows[0])
        table = Table(fields[0], *(cell(row[fields[0]]) for row in rows))
        for field in fields[1:]:
            table.add_row(field, *(cell(row.get(field)) for row in rows))
        console.print(table)
        rows = []
    for entries in (rows, targets):
        if entries:
            table = Table(*entries[0])
            for entry in entries:
                table.add_row(*(cell(value) for value in entry.values()))
            console.print(table)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "[bold red]no[/]"
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(cell(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def commit() -> str:
    """The commit of this checkout, with '+' where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "--verify", "HEAD") or "none") + ("+" if git("status", "--porcelain") else "")
