"""Decoding one token after another: actkit's decoder beside transformers, torchao, llama.cpp and OpenVINO.

    make bench                                   # the environment of the peers, and this
    python benchmarks/decode.py [--quick] [--shape 1.1B] [--json PATH|-]

Random weights at a 1.1B and a 0.5B Llama shape, batch 1, two threads, a prompt of 128 random tokens. Each engine is a
process of its own, with the environment that suits it (`decode_workers/`); in every round each runs once, in a new
order, so that whatever disturbs the machine meets all alike. The processes of one round must fit into memory together,
so there are three groups; llama.cpp's Q4_0 is in each, and ratios are formed inside a group. llama.cpp runs with the
better of mapped and unmapped memory, and of one thread and two.

The masks of actkit's sparse rows are as good as random; the column `density` is what was read of the selecting layers.
These rows say how fast it is, and nothing on quality, which `actkit optimize` measures. The yardstick is a pure read of
as many rows, in the same round (`pure_read`). `resident GB` is of the worker, which made the model; `saved` and
`packed` beside it are of processes that decode from such folders and do nothing else; `start s, packed` is from imports
to the first token. The columns `long` are of fewer rounds behind a prompt of 1,024, in turns too. A peer that is not
installed is a row that says so.
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

from engines import Engine, start_best, take_turns
from rich.console import Console
from rich.progress import track

PROMPT = 128
FULL = {"shapes": ("1.1B", "0.5B"), "rounds": 7, "tokens": 16, "long": 1024, "long rounds": 3}
QUICK = {"shapes": ("tiny",), "rounds": 3, "tokens": 8, "long": 512, "long rounds": 1}
LONG = ("first token s, long", "tokens/s, long")
SPARSITIES = (0.0, 0.25, 0.5, 0.7)
REFERENCE = "llama.cpp Q4_0"
USERS = ("resident GB, saved", "resident GB, packed")  # of processes that do nothing but decode from such a folder


def groups(quick: bool, tokens: int) -> list[list[Engine]]:
    """The groups of engines that are measured together."""
    settings: dict[str, Any] = {"prompt": PROMPT, "tokens": tokens}

    def llama_cpp(kind: str) -> Engine:
        label = f"llama.cpp {kind.upper() if kind != 'bf16' else kind}"
        return Engine(label, "llama_cpp_worker", kind, {label: settings})

    def actkit(kind: str) -> Engine:
        rows = {
            f"actkit {kind}, {f'{sparsity:.0%} dropped' if sparsity else 'dense'}": {**settings, "sparsity": sparsity}
            for sparsity in ((0.0, 0.5) if quick else SPARSITIES)
        }
        return Engine(f"actkit {kind}", "actkit_worker", kind, rows, own=True)

    def peer(label: str, script: str, variant: str) -> Engine:
        return Engine(label, script, variant, {label: settings})

    eager = peer("transformers bf16, eager", "torch_worker", "eager")
    if quick:
        return [[llama_cpp("q4_0"), eager, actkit("bf16"), actkit("int4")]]
    bf16 = [
        llama_cpp("q4_0"),
        llama_cpp("bf16"),
        eager,
        peer("transformers bf16, torch.compile", "torch_worker", "compile"),
        actkit("bf16"),
    ]
    integer = [
        llama_cpp("q4_0"),
        llama_cpp("q8_0"),
        peer("torchao int4", "torch_worker", "int4"),
        peer("OpenVINO int4", "openvino_worker", "int4"),
        actkit("int8"),
        actkit("int4"),
    ]
    others = [
        llama_cpp("q4_0"),
        peer("torchao int8", "torch_worker", "int8"),
        peer("OpenVINO int8", "openvino_worker", "int8"),
    ]
    return [bf16, integer, others]


Yardsticks = dict[str, list[dict[str, Any]]]  # by row, one each round


def measure_group(group: list[Engine], shape: str, threads: int, setting: dict[str, Any], folder: str) -> Yardsticks:
    """Load all engines of a group, then let them take turns. Returns the pure reads beside our own rows."""
    yardsticks: Yardsticks = {}
    tokens = setting["tokens"]
    load: dict[str, Any] = {"shape": shape, "threads": threads, "folder": folder, "capacity": setting["long"] + PROMPT}

    def read(engine: Engine, label: str, counts: bool) -> None:
        if engine.own:
            found = engine.ask("yardstick", sparsity=engine.rows[label]["sparsity"])
            if counts:
                yardsticks.setdefault(label, []).append(found)

    try:
        for engine in track(group, f"{shape}: loading", console=Console(stderr=True), transient=True):
            if engine.script == "llama_cpp_worker":
                start_best(engine, prompt=PROMPT, tokens=2 * tokens, counts=sorted({1, threads}), **load)
            elif engine.script == "openvino_worker":  # its cache grows
                engine.start(**{name: value for name, value in load.items() if name != "capacity"})
            else:
                engine.start(**load)
        take_turns(group, setting["rounds"], f"{shape}: measuring", after=read)
        short = [engine.rows for engine in group]
        for engine in group:
            engine.rows = {long(label): {**row, "prompt": setting["long"]} for label, row in engine.rows.items()}
        take_turns(group, setting["long rounds"], f"{shape}: behind {setting['long']:,} tokens")
        for engine, rows in zip(group, short):
            engine.rows = rows
            if engine.own:
                engine.loaded["users"] = engine.ask("users")
    finally:
        for engine in group:
            engine.stop()
    return yardsticks


def long(label: str) -> str:
    """What the rounds of a row are called that have the long prompt."""
    return f"{label}, long"


def rows_of(group: list[Engine], shape: str, yardsticks: Yardsticks) -> list[dict[str, Any]]:
    """One row per engine and setting."""
    reference = next(engine for engine in group if engine.label == REFERENCE)
    against = [median(found["token_seconds"]) for found in reference.found.get(REFERENCE, [])]
    rows = []
    for engine in group:
        for label in engine.rows:
            if engine.missing:
                rows.append({"shape": shape, "row": label, "missing": engine.missing})
                continue
            rounds = engine.found[label]
            seconds = [median(found["token_seconds"]) for found in rounds]
            nbytes = rounds[-1].get("bytes_per_token", engine.loaded["bytes_per_token"])
            row = {
                "shape": shape,
                "row": label,
                "tokens/s": 1 / median(seconds),
                "deciles": [round(value, 1) for value in common.spread([1 / value for value in seconds])],
                "first token s": median(found["first_token_seconds"] for found in rounds),
                "MB/token": nbytes / 1e6,
                "GB/s": nbytes / median(seconds) / 1e9,
                "of the pure read": None,
                "resident GB": engine.resident / 1e9,
                "x Q4_0": common.ratio(against, seconds)["ratio"] if against else None,
                "x Q4_0, deciles": common.ratio(against, seconds)["deciles"] if against else None,
                "density": rounds[-1].get("density"),
                "seconds": seconds,
                "about": f"{engine.loaded['about']}{'; ' + engine.about if engine.about else ''}",
                "versions": engine.loaded["versions"],
            }
            far = engine.found[long(label)]
            firsts = [found["first_token_seconds"] for found in far]
            row |= dict(zip(LONG, (median(firsts), 1 / median(median(found["token_seconds"]) for found in far))))
            if engine.own:
                users = engine.loaded["users"]
                row |= {f"resident GB, {name}": found["resident_bytes"] / 1e9 for name, found in users.items()}
                parts = ("import_seconds", "load_seconds", "first_token_seconds")
                row |= {"start s, packed": sum(users["packed"][part] for part in parts), "users": users}
            if label in yardsticks:
                reads = [read["seconds"] for read in yardsticks[label]]
                row["of the pure read"] = common.ratio(reads, seconds)["ratio"]
                row["pure read GB/s"] = median(read["gigabytes_per_second"] for read in yardsticks[label])
                row["pure read"] = yardsticks[label][-1]["way"]
            rows.append(row)
    return rows


def targets_of(rows: list[dict[str, Any]], shape: str) -> list[dict[str, Any]]:
    """What was set before the run, at one shape; a row that is missing has no target."""
    by_name = {row["row"]: row for row in rows if row["shape"] == shape and "missing" not in row}
    found = []

    def compare(name: str, row: str, other: str, bound: float) -> None:
        """Inside a group: llama.cpp's Q4_0 is measured in each."""
        if row in by_name and other in by_name:
            value = by_name[row]["x Q4_0"] / (1.0 if other == REFERENCE else by_name[other]["x Q4_0"])
            found.append(common.target(f"{shape}: {name}", value, at_least=bound))

    for kind in ("bf16", "int8", "int4"):
        dense = f"actkit {kind}, dense"
        for row in by_name:
            if row.startswith(f"actkit {kind}"):
                value = by_name[row]["of the pure read"]
                found.append(common.target(f"{shape}: {row}, of the pure read", value, at_least=0.75))
        compare(f"{kind}, 50 % over own dense", f"actkit {kind}, 50% dropped", dense, 1.15)
        compare(f"{kind}, 70 % over own dense", f"actkit {kind}, 70% dropped", dense, 1.6)
    for other, kind, bounds in ((REFERENCE, "int4", (1.0, 1.25, 1.7)), ("llama.cpp bf16", "bf16", (0.8, 1.15, 1.7))):
        for share, bound in zip(("dense", "50% dropped", "70% dropped"), bounds):
            compare(f"{kind}, {share}, over {other}", f"actkit {kind}, {share}", other, bound)
    compare("int4, 50 % over llama.cpp Q4_0, the aim beyond", "actkit int4, 50% dropped", REFERENCE, 2.0)
    eager = by_name.get("transformers bf16, eager")
    if eager and "actkit bf16, dense" in by_name:
        value = eager["first token s"] / by_name["actkit bf16, dense"]["first token s"]
        found.append(common.target(f"{shape}: prompt of {PROMPT}, bf16, over transformers", value, at_least=1.0))
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few rows, under a minute; no targets")
    parser.add_argument("--shape", choices=FULL["shapes"], help="only this one; the recorded result is left alone")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where GGUF files are kept between runs (7 GB); a temporary one otherwise")
    chosen = parser.parse_args(arguments)
    setting: dict[str, Any] = QUICK if chosen.quick else FULL
    shapes = (chosen.shape,) if chosen.shape else setting["shapes"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes:
            for group in groups(chosen.quick, setting["tokens"]):
                run = (chosen.threads, setting, chosen.folder or temporary)
                rows += rows_of(group, shape, measure_group(group, shape, *run))
    targets = [] if chosen.quick else [found for shape in shapes for found in targets_of(rows, shape)]
    return common.report("decode", rows, targets, chosen, keep=not (chosen.quick or chosen.shape), show=show)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table of each shape."""
    from rich.table import Table

    sizes = ("MB/token", "density", "GB/s", "of the pure read", "resident GB", *USERS)
    names = ("tokens/s", "deciles", "first token s", *LONG, *sizes, "start s, packed", "x Q4_0")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = Table("engine", *names, title=f"{shape} parameters", title_justify="left")
        for row in rows:
            if row["shape"] != shape:
                continue
            if "missing" in row:
                table.add_row(row["row"], "missing", row["missing"][:60])
            else:
                table.add_row(row["row"], *(common.cell(row.get(name)) for name in names))
        console.print(table)


if __name__ == "__main__":
    main()
