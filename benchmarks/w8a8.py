"""Weights and inputs of 8 bits on a sentence encoder: MiniLM, 32 rows of 128 tokens, one call.

    python benchmarks/w8a8.py [--quick] [--json PATH|-]

Variants, interleaved: float32 and bfloat16 as torch runs them, and the same with 8 bits (rtn by rows, round_inputs per
token). Embedding, norms, attention and activation functions stay as they were. How far the sentence embeddings move is
printed as 1 - cosine. Beside them torchao's int8 (dynamic inputs, weights by row), compiled, in a process of
`.venv-bench` that takes its turns, if that environment is there (`make bench`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip  (before torch: it sets how idle threads wait)
import torch

import actkit
from actkit.core.measure.cost import measure_cost

WEIGHTS = {"rtn": {"bits": 8, "group_size": -1, "symmetric": True}}
RECIPE = {"actkit": 1, "transforms": [WEIGHTS, {"round_inputs": {}}]}  # no norm of MiniLM can take a scale
ROWS, TOKENS, REPEATS = 32, 128, 15
TORCHAO = "torchao int8, bfloat16, compiled"


def encoder(dtype: str, recipe: dict[str, Any] | None = None) -> Any:
    model = actkit.load("minilm", dtype=dtype)
    if recipe is not None:
        actkit.apply(model, recipe, undo="off", progress=False)
    return model.eval()


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(1 - torch.nn.functional.cosine_similarity(found, exact).mean())


def torchao(model: Any, rows: int, folder: Path) -> Callable[[], Any] | None:
    """One call of torchao's int8 model in a process of its own, or None if its environment does not run."""
    python = HERE.parent / ".venv-bench" / "bin" / "python"
    model.save_pretrained(folder)
    command = [
        str(python),
        "-P",  # this folder has modules called as packages are
        str(HERE / "w8a8_peer.py"),
        str(folder),
        str(rows),
        str(TOKENS),
        str(torch.get_num_threads()),
    ]
    try:
        peer = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None
    assert peer.stdin is not None and peer.stdout is not None
    into, out = peer.stdin, peer.stdout
    if out.readline().strip() != "ready":
        return None

    def once() -> str:
        into.write("\n")
        into.flush()
        return out.readline()

    return once


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and report."""
    chosen = common.options(__doc__, arguments)
    rows, repeats = (8, 5) if chosen.quick else (ROWS, REPEATS)
    ids = torch.randint(1000, 20000, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = {
        "float32": encoder("float32"),
        "bfloat16": encoder("bfloat16"),
        "w8a8": encoder("float32", RECIPE),
        "w8a8, bfloat16": encoder("bfloat16", RECIPE),
    }
    temporary = tempfile.TemporaryDirectory()
    peer = torchao(models["bfloat16"], rows, Path(temporary.name))
    with torch.inference_mode():
        pooled = {name: model(**batch).last_hidden_state.float().mean(1) for name, model in models.items()}
        runs: dict[str, Callable[[], Any]] = {
            name: lambda model=model: model(**batch) for name, model in models.items()
        }
        seconds = common.interleaved(runs | ({} if peer is None else {TORCHAO: peer}), repeats)
    found = []
    for name in seconds:
        model = models.get(name)
        found.append(
            {
                "variant": name,
                "milliseconds": 1e3 * median(seconds[name]),
                "x float32": common.ratio(seconds["float32"], seconds[name])["ratio"],
                "deciles": common.ratio(seconds["float32"], seconds[name])["deciles"],
                "x bfloat16": common.ratio(seconds["bfloat16"], seconds[name])["ratio"],
                "weights MB": None if model is None else measure_cost(model, progress=False).weight_bytes / 1e6,
                "1 - cosine": None if model is None else distance(pooled[name], pooled["float32"]),
            }
        )
    ours = max((row for row in found if row["variant"].startswith("w8a8")), key=lambda row: row["x float32"])
    targets = [
        common.target("w8a8 over float32", ours["x float32"], at_least=2.0),
        common.target("w8a8 over bfloat16", ours["x bfloat16"], at_least=1.25),
    ]
    return common.report("w8a8", found, targets, chosen, rows_of_tokens=[rows, TOKENS])


if __name__ == "__main__":
    main()
