"""What calibration costs: statistics beside the plain forward pass, memory and time of recipes at a 1.1B Llama shape.

    python benchmarks/calibration.py [--quick] [--shape swiglu|1.1B|recipes] [--json PATH|-] [--threads 2]

A pass: the five statistics that `profile` records at all of its sites (block.output, attention.input, attention.mixed,
mlp.input, mlp.gate, mlp.hidden of every block) in one `record` call, against the model alone on the same batch, in
turns; then each statistic alone. swiglu: 8 x 512 random tokens, in float32 and in bf16; 1.1B: random weights in bf16, 2
x 256 tokens. Gram and Spectrum are opt-in per site, and measured apart at the widths of a block.

recipes: AWQ and TEAL on the 1.1B shape, 16 x 256 tokens, and GPTQ, 64 x 256, each in a process of its own. Peak memory
is the largest resident size of that process, the interpreter and torch included, minus the bytes of the model's
parameters. Nothing is kept to undo with, as with a model that was loaded from a folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "decode_workers"))

import common  # isort: skip - sets the waiting policy before torch is imported
import torch
from protocol import SHAPES
from rich.console import Console

del sys.path[:2]  # where kernels.py lies, which transformers would take for the package of that name

from actkit import zoo
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.watch.capture import record
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.memory import parameter_bytes
from actkit.core.recipe.runner import apply
from actkit.core.watch.statistics import AbsMax, Density, Gram, Moments, Quantiles, Sample, Spectrum, Statistic
from actkit.testing.random_llama import random_llama

SITES = ("block.output", "attention.input", "attention.mixed", "mlp.input", "mlp.gate", "mlp.hidden")
SAMPLED = 1 << 19  # values that the profile's sample keeps per site
KINDS: tuple[type[Statistic], ...] = (AbsMax, Moments, Density, Quantiles, Sample)
PASSES = {  # shape -> its passes: model, dtype, sequences, tokens of each, rounds
    "swiglu": (("swiglu", torch.float32, 8, 512, 15), ("swiglu", torch.bfloat16, 8, 512, 15)),
    "1.1B": (("1.1B", torch.bfloat16, 2, 256, 7),),
}
QUICK = {"swiglu": (("swiglu", torch.bfloat16, 8, 512, 5),), "1.1B": ()}
RECIPES = ("awq", "teal", "gptq")
SEQUENCES, LENGTH = {"awq": 16, "teal": 16, "gptq": 64}, 256
MOST = 1.5  # times the plain pass
MEMORY, MINUTES = 1.5e9, {"awq": 30.0, "gptq": 15.0}


# -- a pass ------------------------------------------------------------------------------------------------------------


def random_batch(vocabulary: int, sequences: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(vocabulary, (sequences, length), generator=generator)}


def statistics_of(kind: type[Statistic], width: int) -> Statistic:
    return Sample(min(2048, max(64, SAMPLED // width))) if kind is Sample else kind()


def widths_of(view: Anatomy) -> dict[Site, int]:
    """The sites of the profile and their channels."""
    config = view.model.config
    wide = ("mlp.gate", "mlp.hidden")
    found = (site for site in view.sites() if site.name in SITES)
    return {site: config.intermediate_size if site.name in wide else config.hidden_size for site in found}


def measure_pass(name: str, dtype: torch.dtype, sequences: int, length: int, rounds: int) -> dict[str, Any]:
    """The pass with all statistics, with each alone, and without."""
    model: Any = zoo.load(name, dtype=dtype) if name in zoo.names() else random_llama(SHAPES[name], dtype=dtype)
    batch = random_batch(model.config.vocab_size, sequences, length)
    view = anatomy(model)
    widths = widths_of(view)

    def plain() -> None:
        with evaluating(model):
            forward(model, batch)

    def recorded(kinds: tuple[type[Statistic], ...]) -> Callable[[], Any]:
        wanted = {site: [statistics_of(kind, width) for kind in kinds] for site, width in widths.items()}
        return lambda: record(model, wanted, [batch], anatomy=view, progress=False)

    variants = {"plain": plain, "all": recorded(KINDS)} | {kind.__name__: recorded((kind,)) for kind in KINDS}
    seconds = common.interleaved(variants, rounds)
    values = sum(widths.values()) * sequences * length
    against = {variant: common.ratio(each, seconds["plain"]) for variant, each in seconds.items() if variant != "plain"}
    extra = {variant: median(a - b for a, b in zip(each, seconds["plain"])) for variant, each in seconds.items()}
    return {
        "pass": f"{name}, {str(dtype).removeprefix('torch.')}",
        "tokens": f"{sequences} x {length}",
        "sites": len(widths),
        "values, M": values / 1e6,
        "plain, s": median(seconds["plain"]),
        "all, s": median(seconds["all"]),
        "all / plain": against["all"]["ratio"],
        "deciles": against["all"]["deciles"],
        **{f"{kind.__name__} alone / plain": against[kind.__name__]["ratio"] for kind in KINDS},
        "all, ns per value": 1e9 * extra["all"] / values,
        "rounds, s": seconds,
    }


def measure_opt_in(rows: int, widths: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Gram and Spectrum on rows of these widths: seconds for a site, and the bytes that it holds."""
    return [row for width in widths for row in _opt_in_at(rows, width, repeats)]


def _opt_in_at(rows: int, width: int, repeats: int) -> list[dict[str, Any]]:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    gram, spectrum = Gram(), Spectrum()
    variants: dict[str, Callable[[], Any]] = {
        "layer": lambda: x @ weight,
        "Gram": lambda: gram.update(x),
        "Spectrum": lambda: spectrum.update(x),
    }
    seconds = {name: median(each) for name, each in common.interleaved(variants, repeats).items()}
    return [
        {
            "opt-in": type(statistic).__name__,
            "channels": width,
            "rows": rows,
            "MB of a site": statistic.memory(width) / 1e6,
            "s": seconds[type(statistic).__name__],
            "/ a float32 layer of that width": seconds[type(statistic).__name__] / seconds["layer"],
        }
        for statistic in (gram, spectrum)
    ]


# -- recipes, each in a process of its own -----------------------------------------------------------------------------


def run_recipe(name: str, blocks: int, threads: int) -> dict[str, Any]:
    """Apply one recipe to the 1.1B shape, here and now."""
    from actkit.quantization.awq import Awq
    from actkit.quantization.gptq import Gptq
    from actkit.sparsity.teal import Teal

    torch.set_num_threads(threads)
    model = random_llama({**SHAPES["1.1B"], "num_hidden_layers": blocks})
    size, loaded = parameter_bytes(model), _peak()
    batches = [random_batch(model.config.vocab_size, 1, LENGTH, seed) for seed in range(SEQUENCES[name])]  # type: ignore[union-attr,operator,arg-type]
    started, cpu = time.perf_counter(), time.process_time()
    applied = apply(model, [{"awq": Awq, "teal": Teal, "gptq": Gptq}[name]()], batches, undo="off")
    return {
        "recipe": f"{name}, {blocks} blocks",
        "tokens": f"{SEQUENCES[name]} x {LENGTH}",
        "minutes": (time.perf_counter() - started) / 60,
        "CPU minutes": (time.process_time() - cpu) / 60,
        "model, GB": size / 1e9,
        "peak, GB": _peak() / 1e9,
        "peak - model, GB": (_peak() - size) / 1e9,
        "before it, GB": loaded / 1e9,
        "planned, GB": applied.report.plan.bytes / 1e9,
        "changed": len(applied.report.changed),
        "threads": threads,
    }


def _peak() -> int:
    """Bytes of the largest resident size so far. On Linux of this program alone: ru_maxrss begins with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_process(name: str, blocks: int, threads: int) -> dict[str, Any]:
    """`run_recipe` in a fresh process; its bar stays on this terminal."""
    command = [sys.executable, __file__, "--worker", name, "--blocks", str(blocks), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- all of it ---------------------------------------------------------------------------------------------------------


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was set before the run."""
    found = []
    for row in rows:
        if "pass" in row:
            found.append(common.target(f"{row['pass']}: all statistics / plain pass", row["all / plain"], at_most=MOST))
        if "recipe" in row:
            name = row["recipe"]
            over = 1e9 * row["peak - model, GB"]
            found.append(common.target(f"{name}: peak beside the model, GB", over / 1e9, at_most=MEMORY / 1e9))
            minutes = MINUTES.get(name.partition(",")[0])
            if minutes is not None:
                found.append(common.target(f"{name}: minutes", row["minutes"], at_most=minutes))
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="swiglu in bf16 and two blocks of TEAL, under a minute")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--shape", choices=["swiglu", "1.1B", "recipes"], help="only this part, kept with the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=22, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        print(json.dumps(run_recipe(chosen.worker, chosen.blocks, chosen.threads)))
        return None
    torch.set_num_threads(chosen.threads)
    parts = [chosen.shape] if chosen.shape else ["swiglu", "1.1B", "recipes"]
    rows: list[dict[str, Any]] = []
    for part in parts:
        if part == "recipes":
            names, blocks = (("teal",), 2) if chosen.quick else (RECIPES, chosen.blocks)
            rows += [_stamped(in_process(name, blocks, chosen.threads)) for name in names]
            continue
        for each in (QUICK if chosen.quick else PASSES)[part]:
            rows.append(_stamped(measure_pass(*each)))
        if part == "1.1B" and not chosen.quick:
            rows += [_stamped(row) for row in measure_opt_in(512, (2048, 5632), 5)]
    if chosen.shape and not chosen.quick:
        rows = _with_the_others(rows)
    return common.report("calibration", rows, targets_of(rows), chosen, show=show)


def _stamped(row: dict[str, Any]) -> dict[str, Any]:
    """With when it was measured: parts may be measured apart."""
    return {**row, "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}


def _with_the_others(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows in place of those of the same name in the recorded run."""

    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("pass", "opt-in", "channels", "recipe"))

    new = {name(row) for row in rows}
    before = (common.committed("calibration") or {"rows": []})["rows"]
    return sorted([row for row in before if name(row) not in new] + rows, key=lambda row: str(name(row)[::-1]))


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table for the passes, one for the opt-in statistics and one for the recipes."""
    from rich.table import Table

    for kind in ("pass", "opt-in", "recipe"):
        found = [row for row in rows if kind in row]
        if not found:
            continue
        table = Table("", *(common.cell(row[kind]) for row in found))
        for field in (field for field in found[0] if field not in (kind, "rounds, s")):
            table.add_row(field, *(common.cell(row.get(field)) for row in found))
        console.print(table)


if __name__ == "__main__":
    main()
