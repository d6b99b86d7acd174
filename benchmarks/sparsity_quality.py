"""Quality at equal bytes: TEAL, WINA, CATS and R-Sparse on the models of the zoo, every token sparse.

    python benchmarks/sparsity_quality.py            # about half an hour on one core, and as long for smollm2 on two
    python benchmarks/sparsity_quality.py --only smollm2
    python benchmarks/sparsity_quality.py --quick

Bytes are those of the weights of the blocks' linear layers that one token reads (embedding and head are not counted):
the size of a weight times the share of its inputs, or of its output rows, that are read, plus R-Sparse's factors. The
share is measured, token by token, not taken from the setting: each method's own setting is solved until the saving on
the calibration text meets the level, and the saving on held-out text is printed beside it. Biases, scores and
thresholds are left out for all. CATS skips rows of the up matrix and columns of the down matrix where the gate is zero;
without a gate only the latter. R-Sparse's alphas come from a small search on the calibration text (26 evaluations of
the loss at most, 10 on smollm2; the first 7 give the best alpha shared by all layers). Each model is measured under
settings of its own; one that is measured again alone leaves what is recorded of the others. Writes
docs/sparsity/quality.md and its plot.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import common

import torch
from torch import nn

from actkit.claims.subject import Subject
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.watch.capture import observe
from actkit.core.edit.edits import Edit, temporarily
from actkit.core.forward.batch import BatchContext
from actkit.core.forward.hooks import hooked
from actkit.core.layers.linear import ActLinear
from actkit.core.ground.machine import machine, versions
from actkit.core.ground.progress import track
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Trial
from actkit.core.watch.statistics import Density
from actkit.core.recipe.transform import Transform
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina

DOCS = Path(__file__).parents[1] / "docs" / "sparsity"
MODELS = ("smollm2", "swiglu", "relu", "minilm")
METHODS = ("TEAL", "WINA", "CATS", "R-Sparse, one alpha", "R-Sparse, searched")
LEVELS = (0.25, 0.4, 0.5, 0.65)
SMALL: dict[str, Any] = {"levels": LEVELS, "seeds": (0, 1, 2), "search": {"generations": 3, "population": 8}}
REAL: dict[str, Any] = {"levels": (0.25, 0.5), "seeds": (0,), "search": {"generations": 1, "population": 4}}
FULL: dict[str, dict[str, Any]] = {  # rows: of calibration and held-out text
    "smollm2": {**REAL, "rows": (2, 16)},
    "swiglu": {**SMALL, "rows": (8, 40)},
    "relu": {**SMALL, "rows": (8, 40)},
    "minilm": {**SMALL, "rows": (64, 256)},
}
LEAST: dict[str, Any] = {"levels": (0.4,), "seeds": (0,), "search": {"generations": 1, "population": 2}}
QUICK: dict[str, dict[str, Any]] = {
    "smollm2": {**LEAST, "rows": (1, 1)},
    "swiglu": {**LEAST, "rows": (2, 4)},
    "relu": {**LEAST, "rows": (2, 4)},
    "minilm": {**LEAST, "rows": (8, 16)},
}
TOLERANCE = 0.002  # between a level and the saving on calibration text
MOST = 0.995  # of a setting: beyond it a method is said not to reach a level
GATE = "mlp.gate"


@dataclass
class Bench:
    """A model with its text: measures what a method saves and what it costs."""

    name: str
    subject: Subject
    view: Anatomy = field(init=False)
    original: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.view = anatomy(self.subject.model)
        self.original = copy.deepcopy(self.subject.model)
        self.language = self.name != "minilm"

    def measure(self, edits: Iterable[Edit], batches: Any, gated: bool = False) -> tuple[float, float]:
        """The loss (perplexity, or 1 - mean cosine) and the share of the bytes saved. gated: rows are skipped by the
        zeros of the gate, as CATS does."""
        model = self.subject.model
        with temporarily(model, edits):
            view = anatomy(model)
            blocks = [view.block(block.index) for block in view.blocks]
            wanted: dict[Site, Any] = {}
            for block in blocks:
                for linear in block.linears():
                    if isinstance(linear.module, ActLinear) and linear.module.select is not None:
                        wanted[Site("layer.input", path=linear.path)] = Density(linear.module.select.mask)
                if gated and block.mlp is not None:
                    wanted[Site(GATE if block.mlp.gated else "mlp.hidden", block.index)] = Density()
            with observe(view, wanted) as observer:

                def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    observer.begin(BatchContext.of({"inputs": args[0], **kwargs} if args else kwargs))

                with hooked(model, before={"": begin}):
                    loss = self._loss(batches)
            seen = observer.statistics
            total = read = 0.0
            for block in blocks:
                shares: dict[str, float] = {}
                if gated and block.mlp is not None:
                    density = seen[Site(GATE if block.mlp.gated else "mlp.hidden", block.index)].density
                    shares[block.mlp.down.path] = density
                    if block.mlp.gated:
                        shares[block.mlp.up.path] = density
                for linear in block.linears():
                    site, module = Site("layer.input", path=linear.path), linear.module
                    share = seen[site].density if site in seen else shares.get(linear.path, 1.0)
                    total += linear.weight.nbytes
                    read += linear.weight.nbytes * share
                    if isinstance(module, ActLinear) and module.correction is not None:
                        read += module.correction.nbytes
        return loss, 1 - read / total

    def _loss(self, batches: Any) -> float:
        settings: dict[str, Any] = {"resamples": 1, "progress": False}
        if self.language:
            quality = measure_quality(self.subject.model, batches, task="language", **settings)
            return quality.metrics["perplexity"].value
        quality = measure_quality(self.subject.model, batches, reference=self.original, task="embedding", **settings)
        return 1 - quality.metrics["fidelity"].value


@dataclass(frozen=True)
class Solved:
    """A method at the setting whose saving on calibration text is `saved`. outcome: 'met', 'natural' (it saves more at
    no cost: zeros that the model has by itself), or 'out of reach'."""

    method: Transform
    saved: float
    outcome: str


def solve(bench: Bench, make: Callable[[float], Transform], level: float, seed: int, reach: float) -> Solved:
    """Find the sparsity whose measured saving is the level, by secants. reach: about the saving per sparsity."""
    gated = isinstance(make(0.0), Cats)

    def saved(sparsity: float) -> float:
        return bench.measure(bench.subject.edits(make(sparsity), seed), bench.subject.calibration(seed), gated)[1]

    if gated:
        if (natural := saved(0.0)) >= level:
            return Solved(make(0.0), natural, "natural")
        if (most := saved(MOST)) < level:
            return Solved(make(MOST), most, "out of reach")
    low, high = (0.0, 0.0), (1.0, 1.0)  # (sparsity, saving) on both sides of the level
    sparsity = min(level / reach, MOST)
    for _ in range(8):
        found = saved(sparsity)
        if abs(found - level) <= TOLERANCE:
            return Solved(make(sparsity), found, "met")
        low, high = ((sparsity, found), high) if found < level else (low, (sparsity, found))
        guess = sparsity + (level - found) / reach
        inside = low[0] < guess < high[0]
        if not inside or (low[0] > 0 and high[0] < 1):  # both sides are measured: interpolate between them
            guess = low[0] + (high[0] - low[0]) * (level - low[1]) / (high[1] - low[1])
        sparsity = min(guess, MOST)
    return Solved(make(sparsity), saved(sparsity), "met")


def measure(bench: Bench, level: float, seed: int, search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per method."""
    reach = 0.5 if bench.language else 0.3
    solved = {
        "TEAL": solve(bench, lambda s: Teal(sparsity=s), level, seed, 1.0),
        "WINA": solve(bench, lambda s: Wina(sparsity=s), level, seed, 1.0),
        "CATS": solve(bench, lambda s: Cats(sparsity=s), level, seed, reach),
    }
    start: Any = solve(bench, lambda s: RSparse(sparsity=s, alpha=1.0), level, seed, 1.0).method
    batches = bench.subject.calibration(seed)
    searching = RSparse(sparsity=start.sparsity, alpha="search", seed=seed, **search)
    found = searching.search(Trial(bench.view, batches), batches, factors=bench.subject.factors, progress=False)
    for name, alpha in ((METHODS[3], found.uniform), (METHODS[4], found.alphas)):
        solved[name] = solve(bench, lambda s, a=alpha: RSparse(sparsity=s, alpha=a), level, seed, 1.0)  # type: ignore[misc]
    rows = []
    for name, each in solved.items():
        settings: dict[str, Any] = {"sparsity": round(each.method.sparsity, 4)}  # type: ignore[attr-defined]
        if name.startswith("R-Sparse"):
            alphas = each.method.alpha  # type: ignore[attr-defined]
            settings["alpha"] = alphas if isinstance(alphas, float) else round(mean(alphas.values()), 4)
        loss = saved = None
        if each.outcome != "out of reach":
            loss, saved = bench.measure(
                bench.subject.edits(each.method, seed), bench.subject.held_out, isinstance(each.method, Cats)
            )
            if (
                each.outcome == "met" and level == 0.4 and seed == 0 and bench.name != "smollm2"
            ):  # there it takes minutes
                _agrees_with_apply(bench, each.method, seed, loss)
        rows.append(
            {
                "model": bench.name,
                "level": level,
                "method": name,
                "seed": seed,
                "outcome": each.outcome,
                "loss": loss,
                "saved, held-out": saved,
                "saved, calibration": each.saved,
                "settings": settings,
            }
        )
    return rows


def _agrees_with_apply(bench: Bench, method: Transform, seed: int, loss: float) -> None:
    """The shortcut in `Subject.edits` is what a user gets from `apply`."""
    model = copy.deepcopy(bench.original)
    apply(model, method, bench.subject.calibration(seed), undo="off", min_coverage=0.0, progress=False)
    other = copy.copy(bench.subject)
    other.model = model
    theirs = Bench(bench.name, other)
    theirs.original = bench.original
    applied = theirs._loss(bench.subject.held_out)
    if abs(applied - loss) > 1e-3 * abs(loss):
        raise AssertionError(f"{bench.name}, {method.label}: {loss} measured, {applied} after apply")


# -- what it says ------------------------------------------------------------------------------------------------------


def order(rows: Sequence[Mapping[str, Any]], better: str, worse: str) -> list[dict[str, Any]]:
    """Per model, in how many runs (level and seed) `better` has the smaller loss, of those that both reach.

    Where `worse` saves more than the level by the model's own zeros, the run is not won: bytes are not equal there.
    """
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        reached = [row for row in rows if row["model"] == model and row["loss"] is not None]
        runs = {(row["method"], row["level"], row["seed"]): row for row in reached}
        pairs = [(runs[better, *run[1:]], row) for run, row in runs.items() if run[0] == worse]
        if pairs:
            wins = sum(a["loss"] < b["loss"] and b["outcome"] == "met" for a, b in pairs)
            ties = sum(a["loss"] == b["loss"] for a, b in pairs)
            change = mean(a["loss"] / b["loss"] - 1 for a, b in pairs)
            named = {"model": model, "better": better, "worse": worse, "runs": len(pairs)}
            found.append({**named, "wins": wins, "ties": ties, "mean change of the loss": change})
    return found


def judged(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The orders that are looked at, and as targets those that the papers state."""
    published = order(rows, "WINA", "TEAL") + order(rows, METHODS[4], "CATS")
    targets = [
        common.target(
            f"{each['model']}: {each['better']} better than {each['worse']}, share of {each['runs']} runs",
            each["wins"] / each["runs"],
            at_least=1,
        )
        for each in published
    ]
    return published + order(rows, METHODS[4], METHODS[3]) + order(rows, METHODS[4], "WINA"), targets


def levels_of(rows: Sequence[Mapping[str, Any]], model: str) -> list[float]:
    """The levels at which a model was measured."""
    return sorted({row["level"] for row in rows if row["model"] == model})


def cells(rows: Sequence[Mapping[str, Any]], model: str) -> list[list[str]]:
    """The table of one model: a line per method, a cell per level."""
    levels = levels_of(rows, model)
    lines = []
    for method in METHODS:
        line = [method]
        for level in levels:
            runs = [r for r in rows if (r["model"], r["method"], r["level"]) == (model, method, level)]
            line.append(_cell(model, runs))
        lines.append(line)
    return lines


def _cell(model: str, runs: Sequence[Mapping[str, Any]]) -> str:
    reached = [run for run in runs if run["loss"] is not None]
    if not reached:
        return f"out of reach (at most {max(run['saved, calibration'] for run in runs):.0%})"
    values = [_shown(model, run["loss"]) for run in reached]
    form = ".2f" if model != "minilm" else ".4f"
    low, high = (min(values), max(values))
    text = f"{mean(values):{form}} ({low:{form}} to {high:{form}})" if len(values) > 1 else f"{mean(values):{form}}"
    saved = mean(run["saved, held-out"] for run in reached)
    text += f", saves {saved:.1%}"
    if any(run["outcome"] == "natural" for run in reached):
        text += " by its own zeros"
    if len(reached) < len(runs):
        text += f", {len(reached)} of {len(runs)} seeds"
    return text


def _shown(model: str, loss: float) -> float:
    return loss if model != "minilm" else 1 - loss


def show(console: Any, rows: list[dict[str, Any]]) -> None:
    """A table per model."""
    from rich.table import Table

    for model, _ in groupby(rows, key=lambda row: row["model"]):
        levels = [f"{level:.0%} saved" for level in levels_of(rows, model)]
        measure = "perplexity" if model != "minilm" else "mean cosine with the original"
        table = Table("method", *levels, title=f"{model}: {measure}", title_justify="left", show_lines=True)
        for line in cells(rows, model):
            table.add_row(*line)
        console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    chosen = common.options(__doc__.splitlines()[0], arguments, parts=MODELS)  # type: ignore[union-attr]
    settings = QUICK if chosen.quick else FULL
    rows: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name in chosen.only:
        setting = settings[name]
        calibration, held_out = setting["rows"]
        bench = Bench(name, Subject(name, calibration=calibration, split="calibration", held_out=held_out))
        dense[name], _ = bench.measure([], bench.subject.held_out)
        runs = [(level, seed) for level in setting["levels"] for seed in setting["seeds"]]
        for level, seed in track(runs, f"Measuring {name}"):
            rows += measure(bench, level, seed, setting["search"])
            print(f"{name}, {level:.0%}, seed {seed}: done", file=sys.stderr, flush=True)
        measured[name] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": common.commit(),
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "versions": versions(),
            **{key: list(value) if isinstance(value, tuple) else value for key, value in setting.items()},
        }
    recorded = None if chosen.quick else common.committed("sparsity_quality")
    if recorded is not None:
        rows += [row for row in recorded["rows"] if row["model"] not in chosen.only]
        dense, measured = {**recorded["dense"], **dense}, {**recorded["measured"], **measured}
    rows.sort(key=lambda row: MODELS.index(row["model"]))
    orders, targets = judged(rows)
    more = {"dense": in_order(dense), "measured": in_order(measured), "order": orders}
    result = common.report("sparsity_quality", rows, targets, chosen, show=show, **more)
    if not chosen.quick:
        from sparsity_quality_page import write

        write(result, DOCS)
    return result


def in_order(by_model: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary in the order of MODELS."""
    return {model: by_model[model] for model in MODELS if model in by_model}


if __name__ == "__main__":
    main()
