"""Quantizers on one real model: ours beside llm-compressor's and AutoRound's, on the same tokens, bits, groups, layers.

    make bench-quantization                          # the environment of the peers, and this
    python benchmarks/quantization.py [--model gemma3] [--quick] [--json PATH|-] [--folder KEPT] [--only NAME ...]

The model is the off-grid twin of SmolLM2-135M or Gemma 3 270M in bf16: the packaged weights were rounded to 4 bits
before, the twin's lie on no grid. Each quantizer is a process of its own with one thread count for all, gets the same
64 rows of 256 calibration tokens, and rounds the linear layers of the blocks (embedding and head stay, but in the row
that says otherwise). Losses are those of transformers' forward pass on the same held-out rows, which no quantizer saw;
intervals are of the ratio of two perplexities, over resampled rows. Seconds and peak memory (beside the loaded model)
are those of calibration and rounding; bits per rounded weight, with scales, come from the bytes of the weight files;
tokens a second are those of our decoder and (plain) of transformers' forward pass, of one run, so that only large
differences say something. AutoRound runs 200 iterations; llm-compressor's AWQ does not pin memory, which it cannot
without an accelerator. Gemma 3 is run at 8 and 4 bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip
import quantization_page  # isort: skip
import argparse
import json
import os
import subprocess
import tempfile
from math import exp
from typing import Any

import torch
from rich.progress import track

import actkit
from actkit import zoo
from actkit.core.model.anatomy import anatomy
from actkit.data import load_data
from actkit.zoo.off_grid import off_grid_twin

SMALLER = {"smollm2": 0.35, "gemma3": 0.44}  # model -> bytes of bf16 that 4-bit blocks and an 8-bit table may take
ROOT = Path(__file__).parents[1]
WORKERS = Path(__file__).parent / "quantization_workers"
PEERS = ROOT / ".venv-quantization" / "bin" / "python"
GROUP, LENGTH = 64, 256
FULL: dict[str, Any] = {"calibration": 64, "held_out": 64, "iterations": 200}
QUICK: dict[str, Any] = {"calibration": 8, "held_out": 4, "iterations": 2}
TABLE = "actkit gptq, 4 bits and an 8-bit table"
W8A8 = [{"smooth": {}}, {"rtn": {"bits": 8, "group_size": -1, "symmetric": True}}, {"round_inputs": {}}]
QUALITY = ("perplexity", "x bf16", "interval")
COLUMNS = (*QUALITY, "bits", "seconds", "peak MB", "weights MB", "resident MB", "tokens/s", "plain tokens/s")
DRAWS = 2000


def jobs(model: str = "smollm2") -> dict[str, dict[str, Any]]:
    """What is compared on a model, by its name."""
    found: dict[str, dict[str, Any]] = {"bf16": {"recipe": []}}
    found["actkit rtn, 8 bits"] = {"recipe": [{"rtn": {"bits": 8, "group_size": GROUP}}]}
    ends = {"bits": 4, "group_size": GROUP, "embedding": {"bits": 8}}
    found[TABLE] = {"recipe": [{"gptq": ends}]}
    for bits in (4, 3) if model == "smollm2" else (4,):
        grid = {"bits": bits, "group_size": GROUP}
        ours: dict[str, list[dict[str, Any]]] = {
            "rtn": [{"rtn": grid}],
            "awq": [{"awq": grid}],
            "gptq": [{"gptq": grid}],
            "smoothquant_plus": [{"smoothquant_plus": grid}],
            "awq scales, gptq": [{"awq": {**grid, "round": False}}, {"gptq": grid}],
        }
        found |= {f"actkit {name}, {bits} bits": {"recipe": recipe} for name, recipe in ours.items()}
        found |= {f"llm-compressor {name}, {bits} bits": {"method": name, **grid} for name in ("rtn", "gptq", "awq")}
        found[f"AutoRound, {bits} bits"] = {"method": "autoround", **grid}
    found["actkit smooth, W8A8"] = {"recipe": W8A8}
    found["llm-compressor smooth, W8A8"] = {"method": "smooth w8a8", "bits": 8}
    for job in found.values():
        job["group"] = GROUP
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantizers on one real model, ours beside the peers'.")
    parser.add_argument("--model", choices=list(SMALLER), default="smollm2", help="the off-grid twin of which model")
    parser.add_argument("--quick", action="store_true", help="few tokens: whether all runs")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--folder", type=Path, help="keep models and results there; what is there is not run again")
    parser.add_argument("--calibration", type=int, help="rows of calibration text, for a smaller run")
    parser.add_argument("--held-out", type=int, help="rows of held-out text, for a smaller run")
    parser.add_argument("--only", nargs="+", choices=list(jobs()), help="run these alone")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the Python of the peers' environment")
    chosen = parser.parse_args()
    sizes = dict(QUICK if chosen.quick else FULL)
    smaller = {key: value for key in ("calibration", "held_out") if (value := getattr(chosen, key)) is not None}
    sizes |= smaller
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        given = prepare(chosen.model, folder, sizes)
        rows = {}
        for name, job in track(jobs(chosen.model).items(), "Quantizing"):
            if chosen.only is None or name in {"bf16", *chosen.only}:
                rows[name] = run(name, job, given, sizes, folder, chosen.peers)
    keep = not chosen.quick and chosen.only is None and not smaller
    table = judged(rows, given)
    found = targets(rows, table, chosen.model, chosen.quick)
    name = "quantization" if chosen.model == "smollm2" else f"quantization-{chosen.model}"
    common.report(name, table, found, chosen, keep=keep, **sizes, group=GROUP, model=chosen.model)
    if keep and chosen.model == "smollm2":
        quantization_page.main()


def prepare(model: str, folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """The twin's folder and the tokens that all get."""
    original, tokenizer = zoo.load(model, dtype=torch.bfloat16), zoo.tokenizer(model)
    twin = folder / "twin"
    if not twin.exists():
        actkit.save(off_grid_twin(original), twin, tokenizer=tokenizer)
    given: dict[str, Any] = {"model": str(twin), "threads": torch.get_num_threads()}
    linears = [linear for block in anatomy(original).blocks for linear in block.linears()]
    given["rounded"] = sum(linear.in_features * linear.out_features for linear in linears)
    given["others"] = sum(parameter.nbytes for parameter in original.parameters()) - 2 * given["rounded"]
    for name, split in (("calibration", "calibration"), ("held_out", "test")):
        batches = load_data(None, original, tokenizer, split=split, sequences=sizes[name], length=LENGTH)  # type: ignore[arg-type]
        given[name] = [row for batch in batches for row in batch["input_ids"].tolist()]
    return given


def run(
    name: str, job: dict[str, Any], given: dict[str, Any], sizes: dict[str, Any], folder: Path, peers: Path
) -> dict[str, Any]:
    """Run one quantizer in a process of its own; a failure is a row that says so."""
    stem = name.replace(" ", "-").replace(",", "")
    paths = {"result": str(folder / f"{stem}.json"), "folder": str(folder / stem)}
    if Path(paths["result"]).exists():
        return json.loads(Path(paths["result"]).read_text(encoding="utf-8"))
    described = folder / f"{stem}-job.json"
    described.write_text(json.dumps({**given, **job, **paths, "iterations": sizes["iterations"]}), encoding="utf-8")
    ours = "recipe" in job
    worker = "actkit_worker.py" if ours else "peer_worker.py"
    python = sys.executable if ours else str(peers)
    if not Path(python).exists():
        return {"missing": f"{python} does not exist; run make bench-quantization"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(given["threads"]), "HF_HUB_OFFLINE": "1"}
    command = [python, str(WORKERS / worker), str(described)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"missing": ended.stderr.strip().splitlines()[-1][:200] if ended.stderr.strip() else "it ended early"}
    return json.loads(Path(paths["result"]).read_text(encoding="utf-8"))


def judged(rows: dict[str, dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for the table of each quantizer: perplexity, its ratio to bf16's with an interval, and what it cost."""
    tokens = len(given["held_out"]) * (LENGTH - 1)
    base = torch.tensor(rows["bf16"]["losses"], dtype=torch.float64)
    drawn = torch.randint(len(base), (DRAWS, len(base)), generator=torch.Generator().manual_seed(0))
    found = []
    for name, row in rows.items():
        if "missing" in row:
            found.append({"row": name, **dict.fromkeys(COLUMNS), "missing": row["missing"]})
            continue
        losses = torch.tensor(row["losses"], dtype=torch.float64)
        ratios = ((losses - base)[drawn].mean(1) / (LENGTH - 1)).exp()
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        entry: dict[str, Any] = {"row": name, "perplexity": exp(float(losses.sum()) / tokens)}
        entry["x bf16"] = exp(float((losses - base).sum()) / tokens)
        entry["interval"] = f"{low:.3f} to {high:.3f}"
        entry["bits"] = None if name == TABLE else (row["weights MB"] * 1e6 - given["others"]) * 8 / given["rounded"]
        entry |= {key: None if name == "bf16" else row[key] for key in ("seconds", "peak MB")}
        entry |= {key: row.get(key) for key in ("weights MB", "resident MB", "tokens/s", "plain tokens/s")}
        found.append({**entry, "missing": None})
    return found


def targets(
    rows: dict[str, dict[str, Any]], table: list[dict[str, Any]], model: str, quick: bool
) -> list[dict[str, Any]]:
    """What was set before the first run: gaps of perplexity to bf16, time and peak of gptq, bytes."""
    if quick:
        return []

    def perplexity(name: str) -> float:
        losses = rows.get(name, {}).get("losses")
        return exp(sum(losses) / (len(losses) * (LENGTH - 1))) if losses else float("nan")

    exact, found = perplexity("bf16"), []
    for bits, allowed in ((4, 1.05), (3, 1.10)):
        gap = {name: perplexity(name) - exact for name in rows if name.endswith(f"{bits} bits")}
        auto = gap.get(f"AutoRound, {bits} bits")
        ours = min((value for name, value in gap.items() if name.startswith("actkit")), default=float("nan"))
        for method in ("gptq", "awq"):
            pair = [gap.get(f"{package} {method}, {bits} bits") for package in ("actkit", "llm-compressor")]
            if None not in pair:
                name = f"gap of {method} over llm-compressor's, {bits} bits"
                found.append(common.target(name, pair[0] / pair[1], at_most=1.02))  # type: ignore[operator]
        if auto is not None:
            found.append(common.target(f"gap of our best over AutoRound's, {bits} bits", ours / auto, at_most=allowed))
    if "losses" in rows.get("actkit smooth, W8A8", {}):
        ratio = perplexity("actkit smooth, W8A8") / exact
        found.append(common.target("perplexity of W8A8 with smoothing over bf16", ratio, at_most=1.03))
    theirs, ours_too = (rows.get(f"{name} gptq, 4 bits", {}) for name in ("llm-compressor", "actkit"))
    if "losses" in theirs and "losses" in ours_too:
        faster, peak = theirs["seconds"] / ours_too["seconds"], ours_too["peak MB"] / theirs["peak MB"]
        found.append(common.target("gptq, times as fast as llm-compressor's", faster, at_least=2.0))
        found.append(common.target("peak of gptq over llm-compressor's", peak, at_most=1.0))
    rates = [rows.get(name, {}).get("plain tokens/s") for name in ("actkit gptq, 4 bits", "bf16")]
    if all(rates):
        found.append(common.target("4 bits over bf16, tokens/s of transformers", rates[0] / rates[1], at_least=1.0))
    size = {row["row"]: row for row in table if not row["missing"]}
    for what in ("weights MB", "resident MB"):
        if TABLE in size:
            share = size[TABLE][what] / size["bf16"][what]
            found.append(
                common.target(f"4-bit blocks and an 8-bit table, {what} over bf16", share, at_most=SMALLER[model])
            )
    return found


if __name__ == "__main__":
    main()
