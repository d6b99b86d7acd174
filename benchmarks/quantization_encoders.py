"""Quantizers on the embedded encoders: MiniLM, a sentence encoder, and a vision transformer that reads digits.

    python benchmarks/quantization_encoders.py [--quick] [--json PATH|-] [--only minilm|vit]

Each recipe changes a copy of the float32 model, on 64 sentences of at most 256 tokens (or 512 images) for calibration.
MiniLM is measured by the cosine of its sentence embeddings to the model's own, on 400 sentences, the vision
transformer by the share of test images whose digit it finds. Intervals are those of `actkit evaluate`. No peer rounds
these two: llm-compressor and AutoRound are made for language models. Speed is measured by `benchmarks/w8a8.py`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip

import actkit
from actkit.core.measure.quality import measure_quality
from actkit.data import load_data
from actkit.data.images import digits

ROWS8 = {"rtn": {"bits": 8, "group_size": -1, "symmetric": True}}
ROWS4 = {"rtn": {"bits": 4, "group_size": -1}}
INPUTS4 = {"round_inputs": {"bits": 4, "per": "tensor", "symmetric": False}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "rtn, 8 bits": [{"rtn": {"bits": 8}}],
    "rtn, 4 bits": [{"rtn": {"bits": 4}}],
    "gptq, 4 bits": [{"gptq": {"bits": 4}}],
    "rtn, 3 bits": [{"rtn": {"bits": 3}}],
    "gptq, 3 bits": [{"gptq": {"bits": 3}}],
    "W8A8": [ROWS8, {"round_inputs": {}}],
    "W8A8, one scale": [ROWS8, {"round_inputs": {"per": "tensor"}}],
    "W4A4": [ROWS4, INPUTS4],
    "W4A4, noisyquant": [ROWS4, {"noisyquant": {"bits": 4}}],
    "W4A4, llm_fp4": [{"llm_fp4": {}}],
    "W4A4, aphq_vit": [{"aphq_vit": {"bits": 4, "input_bits": 4}}],
}
LEARNED = "W4A4, aphq_vit"  # of the vision transformer alone, and of a full run, for the time
FULL: dict[str, int] = {"calibration": 64, "sentences": 400, "images": 512}
QUICK: dict[str, int] = {"calibration": 2, "sentences": 8, "images": 32}
METRIC = {"minilm": ("embedding", "fidelity"), "vit": ("classification", "accuracy")}


def data(name: str, model: Any, sizes: dict[str, int]) -> tuple[list[Any], list[Any]]:
    """Batches for calibration and for measurement."""
    if name == "vit":
        (train, _), (test, labels) = digits("train"), digits("test")
        calibration = [{"pixel_values": part} for part in train[: sizes["images"]].split(64)]
        parts = zip(test.split(128), labels.split(128), strict=True)
        return calibration, [{"pixel_values": images, "labels": right} for images, right in parts]
    tokenizer = actkit.load_tokenizer(name)
    found = []
    for split, rows in (("calibration", sizes["calibration"]), ("test", sizes["sentences"])):
        batches = load_data(None, model, tokenizer, sequences=rows, length=256, split=split)  # type: ignore[arg-type]
        found.append(list(batches))
    return found[0], found[1]


def measure(name: str, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each recipe on a model, the model as it is among them."""
    exact = actkit.load(name, dtype="float32").eval()
    calibration, held_out = data(name, exact, sizes)
    task, metric = METRIC[name]
    bytes_of = {"float32": sum(each.nbytes for each in exact.parameters())}
    rows = []
    for recipe, transforms in {"float32": [], **RECIPES}.items():
        if recipe == LEARNED and (name == "minilm" or sizes is QUICK):
            continue
        model, started = copy.deepcopy(exact), time.perf_counter()
        row: dict[str, Any] = {"part": name, "row": recipe}
        try:
            if transforms:
                steps = {"actkit": 1, "transforms": transforms}
                actkit.apply(model, steps, calibration, undo="off", progress=False, min_coverage=0.0)
        except actkit.core.ground.errors.ActkitError as error:  # a row that says why
            rows.append({**row, "missing": str(error)[:120]})
            continue
        seconds = time.perf_counter() - started
        found = measure_quality(model, held_out, reference=exact, task=task, progress=False).metrics[metric]
        held = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
        row |= {metric: found.value, "low": found.low, "high": found.high, "seconds": seconds}
        rows.append({**row, "x bytes": sum(held.values()) / bytes_of["float32"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantizers on the embedded encoders.")
    parser.add_argument("--quick", action="store_true", help="little text: whether all runs")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--only", choices=list(METRIC), help="one of the two models")
    chosen = parser.parse_args()
    sizes = QUICK if chosen.quick else FULL
    rows = [row for name in METRIC if chosen.only in (None, name) for row in measure(name, sizes)]
    keep = not chosen.quick and chosen.only is None
    common.report("quantization_encoders", rows, [], chosen, keep=keep, show=common.show_parts, **sizes)


if __name__ == "__main__":
    main()
