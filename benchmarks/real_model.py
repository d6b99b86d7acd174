"""A real language model: SmolLM2-135M through actkit, llama.cpp, transformers and torchao, speed beside quality.

    make bench                                       # the environment of the peers, and this too
    python benchmarks/real_model.py [--quick] [--json PATH|-] [--sparsity 0.25] [--folder KEPT]

llama.cpp reads the packaged Q4_1 file itself and two of our exports, transformers and torchao the same weights in bf16
(torchao rounds them when it loads), actkit what its recipes saved. Each engine is a process of its own with two
threads, which take turns in an order that changes from round to round; all get the same prompts, cut from one text.
llama.cpp runs with the better of mapped and unmapped memory.

Perplexity is on one text that nothing was calibrated on, over the same tokens behind the same first ones, and each
engine's own logits give it; actkit's are those of the model's forward pass, in which every token selects its inputs,
and its first row is decoded token by token as well. The file's weights were rounded to 4 bits in groups of 32 before:
bf16 stands for these rounded weights, and 4 bits here are rounded a second time, to another grid.
torchao rounds the output layer too, llama.cpp's file has it in Q8_0, and actkit and our exports keep it in bf16.

The preparation (rounding, AWQ, thresholds) is not timed; --folder keeps what it made for another run. A full run
writes docs/real-model.md and its picture.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip
import argparse
import os
from math import exp

import torch
from engines import Engine, start_best, take_turns
from rich.console import Console
from rich.progress import track

import actkit
from actkit import zoo
from actkit.core.measure.cost import folder_bytes
from actkit.core.measure.quality import resampled_totals
from actkit.data import load_data
from actkit.zoo import packaged

MODEL = "smollm2"
REFERENCE = "llama.cpp, the file (Q4_1)"
TRANSFORMERS = "transformers bf16"
SPEEDS, FIRST = (16, 1024), (128, 1024)  # tokens of context at which steps and first tokens are timed
LENGTH = 256  # tokens of a row of text
FULL: dict[str, Any] = {"rounds": 5, "tokens": 24, "rows": 12}
QUICK: dict[str, Any] = {"rounds": 2, "tokens": 8, "rows": 2}
ALLOWED = 1.01  # of the file's perplexity, for the targets on speed
AWQ4 = {"awq": {"bits": 4, "group_size": 64, "search_tokens": 1024}}  # as `actkit optimize` tries it
RTN8 = {"rtn": {"bits": 8, "group_size": 64}}
RTN4 = {"rtn": {"bits": 4, "group_size": 64}}
BLOCKS = {"group_size": 32, "symmetric": True}  # of Q8_0 and Q4_0


# -- what is compared --------------------------------------------------------------------------------------------------


class Models:
    """The files and folders that the engines load, made where they are not there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.original = zoo.path(MODEL)
        self.file = packaged.pieces(MODEL)[0]
        self.tokenizer = actkit.load_tokenizer(MODEL)
        model = actkit.load(MODEL)
        self.calibration = load_data(None, model, self.tokenizer, split="calibration", sequences=32, length=LENGTH)
        self.prompt = load_data(None, model, self.tokenizer, split="search", sequences=1, length=max(FIRST))
        self.model = model

    def text(self, rows: int) -> tuple[list[list[int]], list[list[int]], str]:
        """Rows of held-out token ids, the places that count (behind a token of the same document), and what it is."""
        batches = load_data(None, self.model, self.tokenizer, split="test", sequences=rows, length=LENGTH)
        ids = [row for batch in batches for row in batch["input_ids"].tolist()]
        owners = [row for batch in batches.document_ids for row in batch.tolist()]
        scored = [[at for at in range(1, len(row)) if row[at] == row[at - 1]] for row in owners]
        return ids, scored, batches.description

    def changed(self, recipe: Sequence[Mapping[str, Any]]) -> Path:
        """The folder of the model after a recipe; what was applied before the last transform is used again."""
        if not recipe:
            return self.original
        folder = self.folder / _name(recipe)
        if not folder.exists():
            model = actkit.load(self.changed(recipe[:-1]))
            actkit.apply(model, {"actkit": 1, "transforms": [dict(recipe[-1])]}, self.calibration)
            actkit.save(model, folder, tokenizer=self.tokenizer)
        return folder

    def exported(self, recipe: Sequence[Mapping[str, Any]]) -> Path:
        """The GGUF file of the model after a recipe."""
        folder = self.folder / f"{_name(recipe)}-gguf"
        if not folder.exists():
            model = actkit.load(self.changed(recipe))
            actkit.export(model, folder, "gguf", tokenizer=self.tokenizer, proof=False)
        return next(folder.glob("*.gguf"))


def _name(recipe: Sequence[Mapping[str, Any]]) -> str:
    """Of a folder, after all settings."""
    parts = [f"{name}-{'-'.join(map(str, settings.values()))}" for step in recipe for name, settings in step.items()]
    return "-".join(parts)


def engines(models: Models, sparsity: float, quick: bool, tokens: int) -> list[tuple[Engine, Path, int]]:
    """The engines, with what each loads and its bytes on disk."""
    contexts = sorted({*SPEEDS, *FIRST})
    rows = {str(n): {"prompt": n, "tokens": tokens if n in SPEEDS else 0} for n in contexts}
    found: list[tuple[Engine, Path, int]] = []

    def add(engine: Engine, source: Path) -> None:
        size = source.stat().st_size if source.is_file() else folder_bytes(source)
        found.append((engine, source, size))

    def llama_cpp(label: str, file: Path) -> None:
        add(Engine(label, "llama_cpp_worker", "file", dict(rows)), file)

    def peer(label: str, variant: str) -> None:
        add(Engine(label, "torch_worker", variant, dict(rows)), models.original)

    def ours(label: str, *recipe: Mapping[str, Any]) -> None:
        add(Engine(f"actkit {label}", "actkit_worker", "folder", dict(rows), own=True), models.changed(recipe))

    teal, wina = ({name: {"sparsity": sparsity}} for name in ("teal", "wina"))
    llama_cpp(REFERENCE, models.file)
    if quick:
        peer(TRANSFORMERS, "eager")
        ours("bf16")
        ours(f"int4 (rtn) + WINA {sparsity:.0%}", RTN4, wina)
        return found
    llama_cpp("llama.cpp, our export, Q8_0", models.exported([{"rtn": {"bits": 8, **BLOCKS}}]))
    llama_cpp("llama.cpp, our export, Q4_0 (AWQ)", models.exported([{"awq": {**AWQ4["awq"], **BLOCKS}}]))
    peer(TRANSFORMERS, "eager")
    peer("torchao int8", "int8")
    peer("torchao int4", "int4")
    for label, before in (("bf16", ()), ("int8", (RTN8,)), ("int4 (AWQ)", (AWQ4,))):
        ours(label, *before)
        ours(f"{label} + TEAL {sparsity:.0%}", *before, teal)
    ours(f"int4 (AWQ) + WINA {sparsity:.0%}", AWQ4, wina)
    return found


# -- the measurement ---------------------------------------------------------------------------------------------------


def measure(
    compared: Sequence[tuple[Engine, Path, int]],
    prompt: list[int],
    text: tuple[list[list[int]], list[list[int]], str],
    threads: int,
    setting: Mapping[str, Any],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Load all, let them take turns, then ask each for the losses of the text: by label, as the workers say them."""
    tokens, losses = setting["tokens"], {}
    load = {"threads": threads, "folder": str(folder), "text": prompt, "capacity": max(FIRST) + 2 * tokens}
    group = [engine for engine, _, _ in compared]
    rows, scored, _ = text
    bar: dict[str, Any] = {"console": Console(stderr=True), "transient": True}
    try:
        ours_first = sorted(compared, key=lambda each: not each[0].own)  # if one fails, it fails soon
        for engine, source, _ in track(ours_first, "Loading", **bar):
            if engine.script == "llama_cpp_worker":
                start_best(engine, prompt=min(SPEEDS), tokens=2 * tokens, counts=[threads], source=str(source), **load)
            else:
                engine.start(source=str(source), **load)
        take_turns(group, setting["rounds"], "Measuring")
        for engine in track([engine for engine in group if not engine.missing], "Perplexity", **bar):
            try:
                losses[engine.label] = engine.ask("losses", rows=rows, scored=scored)
            except RuntimeError as error:
                engine.fail(error)
            engine.stop()  # so that the next one has the memory
    finally:
        for engine in group:
            engine.stop()
    return losses


def rows_of(
    compared: Sequence[tuple[Engine, Path, int]], losses: Mapping[str, dict[str, Any]], scored: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """One row per engine."""
    counts, rows = [len(places) for places in scored], []
    reference = next(engine for engine, _, _ in compared if engine.label == REFERENCE)
    for engine, _, size in compared:
        if engine.missing:
            rows.append({"row": engine.label, "missing": engine.missing})
            continue
        found, own = engine.found, losses[engine.label]["losses"]
        row: dict[str, Any] = {"row": engine.label}
        for context in SPEEDS:
            seconds = [median(turn["token_seconds"]) for turn in found[str(context)]]
            row[f"tokens/s at {context}"] = 1 / median(seconds)
            row[f"tokens/s at {context}, deciles"] = [round(1 / s, 1) for s in reversed(common.spread(seconds))]
            if not reference.missing:
                against = [median(turn["token_seconds"]) for turn in reference.found[str(context)]]
                compare = common.ratio(against, seconds)
                row[f"x the file at {context}"] = compare["ratio"]
                row[f"x the file at {context}, deciles"] = compare["deciles"]
        for context in FIRST:
            row[f"first token s at {context}"] = median(turn["first_token_seconds"] for turn in found[str(context)])
        row |= {"resident MB": engine.resident / 1e6, "disk MB": size / 1e6}
        row["perplexity"] = exp(sum(own) / sum(counts))
        if not reference.missing:
            table = torch.tensor([own, losses[REFERENCE]["losses"], counts], dtype=torch.float64).T
            row["x the file's perplexity"] = exp(float((table[:, 0] - table[:, 1]).sum()) / sum(counts))
            drawn = resampled_totals(table, 1000, 0)
            ends = torch.quantile((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2], drawn.new_tensor([0.025, 0.975])).exp()
            row["x the file's perplexity, 95 %"] = [round(end, 4) for end in ends.tolist()]
        if "decoded" in losses[engine.label]:
            row["first row's loss, decoded"] = losses[engine.label]["decoded"] / counts[0]
            row["first row's loss, forward"] = own[0] / counts[0]
        row["density"] = found[str(SPEEDS[0])][-1].get("density")
        about = f"{engine.loaded['about']}{'; ' + engine.about if engine.about else ''}"
        row |= {"about": about, "versions": engine.loaded["versions"], "rounds": found}
        rows.append(row)
    return rows


def targets_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was set before the run: speed against llama.cpp on the file, among our rows that are as good as the file;
    and the first token against transformers."""
    by_name = {row["row"]: row for row in rows if "missing" not in row}
    ours = [row for name, row in by_name.items() if name.startswith("actkit")]
    found = []
    if REFERENCE in by_name:
        good = [row for row in ours if row["x the file's perplexity"] <= ALLOWED]
        for kind, bound in (("dense", 1.2), ("sparse", 1.4)):
            some = [row for row in good if (" + " in row["row"]) == (kind == "sparse")]
            for context in SPEEDS:
                key = f"x the file at {context}"
                best = max(some, key=lambda row: row[key], default=None)
                name = f"tokens/s at {context} over llama.cpp on the file, {kind}, at most 1 % more perplexity: "
                name += "no row" if best is None else best["row"]
                found.append(common.target(name, 0.0 if best is None else best[key], at_least=bound))
    if TRANSFORMERS in by_name:
        for row in ours:
            for context in FIRST:
                key = f"first token s at {context}"
                value = by_name[TRANSFORMERS][key] / row[key]
                name = f"{row['row']}: first token after {context}, over transformers bf16"
                found.append(common.target(name, value, at_least=1.0))
    return found


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table."""
    from rich.table import Column, Table

    columns = {f"tok/s {n}": f"tokens/s at {n}" for n in SPEEDS} | {
        f"first {n}": f"first token s at {n}" for n in FIRST
    }
    columns |= {"MB": "resident MB", "disk": "disk MB", "ppl": "perplexity", "x ppl": "x the file's perplexity"}
    columns |= {f"x {n}": f"x the file at {n}" for n in SPEEDS} | {"density": "density"}
    title = f"{MODEL} (x: times llama.cpp on the packaged file; 16, 128, 1024: tokens of context)"
    table = Table(Column("engine", no_wrap=True), *columns, title=title, title_justify="left")
    for row in rows:
        cells = (
            ["missing", row["missing"][:40]]
            if "missing" in row
            else [common.cell(row.get(name)) for name in columns.values()]
        )
        table.add_row(row["row"], *cells)
    console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="few engines, tokens and rows of text; no targets")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--sparsity", type=float, default=0.25, help="of TEAL and WINA, between 0 and 1; 0.25")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where changed models are kept between runs; a temporary one otherwise")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.sparsity < 1:
        parser.error(f"--sparsity: {chosen.sparsity} was given; give a share between 0 and 1.")
    setting = QUICK if chosen.quick else FULL
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = Models(folder)
        compared = engines(models, chosen.sparsity, chosen.quick, setting["tokens"])
        prompt, text = models.prompt[0]["input_ids"][0].tolist(), models.text(setting["rows"])
        del models.model
        before = os.getloadavg()[0]
        losses = measure(compared, prompt, text, chosen.threads, setting, folder)
        rows = rows_of(compared, losses, text[1])
    more = {"load before": before, "text": text[2], "scored": sum(map(len, text[1])), "sparsity": chosen.sparsity}
    targets = [] if chosen.quick else targets_of(rows)
    result = common.report("real_model", rows, targets, chosen, show=show, **more)
    if not chosen.quick:
        from real_model_page import write

        write(result)
    return result


if __name__ == "__main__":
    main()
