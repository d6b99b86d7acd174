"""The first token: prompts of 128 and 1,024 tokens beside transformers, llama.cpp and OpenVINO, and the memory then.

    python benchmarks/prompts.py [--quick] [--shape 0.5B] [--rounds 5] [--json PATH|-]

Random weights at a 135M, a 0.5B and a 1.1B Llama shape, one prompt at a time, two threads. Each engine is a process of
its own (`decode_workers/`), and in every round each runs once, in a new order. Our integer weights have groups of 64
inputs, as recipes make them, and meet inputs of 8 bits, as llama.cpp's and OpenVINO's do. `resident MB` is of the
process that read the prompts; a worker has made its random model first, and keeps what that took
(`benchmarks/decode.py` has the memory of processes that only decode). A peer that is not installed is a row that says
so.

The targets were set before the first run: bf16 no later than transformers' bf16; int8 and int4 no later than OpenVINO's
int8, and in 0.6 of the time of llama.cpp's Q4_0.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip
import argparse

from engines import Engine, take_turns
from rich.console import Console
from rich.progress import track

SHAPES, LENGTHS = ("135M", "0.5B", "1.1B"), (128, 1024)
ROWS: dict[str, dict[str, Any]] = {str(length): {"prompt": length, "tokens": 0} for length in LENGTHS}
TRANSFORMERS, LLAMA_CPP, OPENVINO = "transformers bf16", "llama.cpp Q4_0", "OpenVINO int8"
OURS = ("bf16", "int8", "int4")


def engines() -> list[Engine]:
    """Those that are compared."""
    return [
        Engine(TRANSFORMERS, "torch_worker", "eager", dict(ROWS)),
        Engine(LLAMA_CPP, "llama_cpp_worker", "q4_0", dict(ROWS)),
        Engine(OPENVINO, "openvino_worker", "int8", dict(ROWS)),
        *(Engine(f"actkit {kind}", "actkit_worker", f"{kind}-prompts", dict(ROWS), own=True) for kind in OURS),
    ]


def measure(shape: str, threads: int, rounds: int, folder: str) -> list[dict[str, Any]]:
    """One row per engine at one shape."""
    compared = engines()
    load: dict[str, Any] = {"shape": shape, "threads": threads, "folder": folder}
    try:
        for engine in track(compared, f"{shape}: loading", console=Console(stderr=True), transient=True):
            engine.start(**load, **({} if engine.script == "openvino_worker" else {"capacity": max(LENGTHS)}))
        take_turns(compared, rounds, f"{shape}: measuring")
    finally:
        for engine in compared:
            engine.stop()
    rows = []
    for engine in compared:
        if engine.missing:
            rows.append({"shape": shape, "row": engine.label, "missing": engine.missing})
            continue
        row: dict[str, Any] = {"shape": shape, "row": engine.label}
        for length in LENGTHS:
            seconds = [found["first_token_seconds"] for found in engine.found[str(length)]]
            row[f"s at {length}"] = median(seconds)
            row[f"s at {length}, deciles"] = [round(value, 3) for value in common.spread(seconds)]
        about = {"about": engine.loaded["about"], "versions": engine.loaded["versions"]}
        rows.append({**row, "resident MB": engine.resident / 1e6, **about})
    return rows


def targets_of(rows: list[dict[str, Any]], shape: str) -> list[dict[str, Any]]:
    """What was set before the run, at one shape; a row that is missing has no target."""
    by_name = {row["row"]: row for row in rows if row["shape"] == shape and "missing" not in row}
    found = []
    for kind in OURS:
        for other, bound in ((TRANSFORMERS, 1.0),) if kind == "bf16" else ((OPENVINO, 1.0), (LLAMA_CPP, 0.6)):
            for length in LENGTHS if other in by_name else ():
                value = by_name[f"actkit {kind}"][f"s at {length}"] / by_name[other][f"s at {length}"]
                found.append(common.target(f"{shape}: {kind} at {length}, over {other}", value, at_most=bound))
    return found


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table of each shape."""
    from rich.table import Table

    names = [name for length in LENGTHS for name in (f"s at {length}", f"s at {length}, deciles")] + ["resident MB"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = Table("engine", *names, title=f"{shape} parameters", title_justify="left")
        for row in [row for row in rows if row["shape"] == shape]:
            missing = ["missing", row["missing"][:60]] if "missing" in row else None
            table.add_row(row["row"], *(missing or [common.cell(row.get(name)) for name in names]))
        console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few rounds, under a minute; no targets")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="only these; the recorded result is left alone")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where GGUF files are kept between runs; a temporary one otherwise")
    chosen = parser.parse_args(arguments)
    shapes = ("tiny",) if chosen.quick else tuple(chosen.shape or SHAPES)
    with tempfile.TemporaryDirectory() as temporary:
        run = (chosen.threads, 2 if chosen.quick else chosen.rounds, chosen.folder or temporary)
        rows = [row for shape in shapes for row in measure(shape, *run)]
    targets = [] if chosen.quick else [found for shape in shapes for found in targets_of(rows, shape)]
    return common.report("prompts", rows, targets, chosen, keep=not (chosen.quick or chosen.shape), show=show)


if __name__ == "__main__":
    main()
