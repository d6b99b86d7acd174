"""Long texts and several at once on SmolLM2-135M: speed at growing contexts, caches' errors, batches, and the spread.

    python benchmarks/long_texts.py [--quick] [--json PATH|-] [--only speeds perplexity batches spread]

speeds: tokens per second at some lengths of context, engines in turns as in `real_model.py`, llama.cpp reading the
packaged Q4_1 file with its cache in float16; actkit with weights of bf16 and of 4 bits and each kind of cache.
perplexity: of 4,096 tokens that nothing was calibrated on, float32 weights and activations, so that the cache alone
rounds. batches: tokens per second of several sequences at a time, in the middle of a cache of 512. spread: 100 runs
of 40 tokens from an empty cache in a process of its own, how far they lie from their median.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip
from math import exp

import torch
from engines import Engine, start_best, take_turns
from rich.console import Console
from torch.nn import functional as F

import actkit
from actkit import zoo
from actkit.core.measure.texts import pays_from
from actkit.data import load_data
from actkit.runtime.decoder import Decoder
from actkit.zoo import packaged

MODEL = "smollm2"
CONTEXTS = (16, 1024, 4096, 8160)  # the model's context is 8,192
CACHES = ("float32", "bfloat16", "int8")
FULL: dict[str, Any] = {"rounds": 3, "tokens": 24, "contexts": CONTEXTS, "scored": 4096, "runs": 100}
QUICK: dict[str, Any] = {"rounds": 1, "tokens": 8, "contexts": CONTEXTS[:2], "scored": 512, "runs": 20}
INT4 = "rtn:bits=4,group_size=64"
RECIPES = {"bf16": "", "int4": INT4, "int4 + TEAL 50%": f"{INT4},teal:sparsity=0.5"}
PARTS = ("speeds", "perplexity", "batches", "spread")


def changed(recipe: str, folder: Path) -> Path:
    """The folder of the model after a recipe."""
    if not recipe:
        return Path(zoo.path(MODEL))
    target = folder / "".join(letter if letter.isalnum() else "-" for letter in recipe)
    if not target.exists():
        model, tokenizer = actkit.load(MODEL), actkit.load_tokenizer(MODEL)
        data = load_data(None, model, tokenizer, split="calibration", sequences=8, length=256)
        actkit.apply(model, recipe, data)
        actkit.save(model, target, tokenizer=tokenizer)
    return target


def text(split: Any, tokens: int) -> list[int]:
    """Token ids of the embedded text, one document after another."""
    model, tokenizer = actkit.load(MODEL), actkit.load_tokenizer(MODEL)
    batches = load_data(None, model, tokenizer, split=split, sequences=-(-tokens // 256), length=256)
    ids: list[int] = [token for batch in batches for token in batch["input_ids"].flatten().tolist()]
    return (ids * (tokens // len(ids) + 1))[:tokens]


def speeds(setting: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Tokens per second of each engine at each context: median, first and last decile."""
    contexts, tokens = setting["contexts"], setting["tokens"]
    rows = {str(n): {"prompt": n, "tokens": tokens} for n in contexts}
    load = {"threads": torch.get_num_threads(), "folder": str(folder), "text": text("search", max(contexts)),
            "capacity": max(contexts) + tokens}  # fmt: skip
    engines = [Engine("llama.cpp Q4_1", "llama_cpp_worker", "file", dict(rows))]
    file = str(packaged.pieces(MODEL)[0])
    start_best(engines[0], prompt=16, tokens=tokens, counts=[load["threads"]], source=file, **load)
    try:
        for weights in ("bf16", "int4"):
            for cache in CACHES if weights == "int4" else CACHES[:2]:
                engine = Engine(f"actkit {weights}, {cache} cache", "actkit_worker", "folder", dict(rows), own=True)
                engine.start(source=str(changed(RECIPES[weights], folder)), cache=cache, **load)
                engines.append(engine)
        take_turns(engines, setting["rounds"], "Speeds")
        return [_row(engine, contexts) for engine in engines]
    finally:
        for engine in engines:
            engine.stop()


def _row(engine: Engine, contexts: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"engine": engine.label}
    for context in contexts:
        rounds = engine.found.get(str(context), [])
        rates = [1 / seconds for measured in rounds for seconds in measured["token_seconds"]]
        low, high = common.spread(rates) if rates else (None, None)
        found |= {f"{context} tokens": round(median(rates), 1) if rates else engine.missing}
        found |= {f"{context}, deciles": f"{low:.1f} to {high:.1f}" if rates else ""}
        firsts = [each["first_token_seconds"] for each in rounds]
        found |= {f"{context}, prompt s": round(median(firsts), 2) if firsts else ""}
    return found


@torch.no_grad()
def perplexity(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Perplexity with each cache; of the second half alone too, whose tokens look back furthest."""
    model = actkit.load(MODEL, dtype="float32")
    ids, found = text("test", setting["scored"] + 1), []
    for cache in CACHES:
        with Decoder(model, capacity=setting["scored"], cache=cache, activations="float32") as decoder:
            losses = []
            for start in range(0, setting["scored"], 512):
                logits = decoder.all_logits(ids[start : start + 512][: setting["scored"] - start])
                losses.append(F.cross_entropy(logits, torch.tensor(ids[start + 1 :][: len(logits)]), reduction="none"))
            every = torch.cat(losses)
            second = every[len(every) // 2 :]
            found.append({"cache": cache, "perplexity": exp(every.mean()), "second half": exp(second.mean()),
                          "bytes per token": decoder.cache_bytes // setting["scored"]})  # fmt: skip
    return found


def batches(setting: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Tokens per second of 1, 2, 4 and 8 sequences at a time, and from how many on more than one pays."""
    found = []
    for name, recipe in RECIPES.items():
        with Decoder(actkit.load(changed(recipe, folder)), capacity=512, decode_only=True) as decoder:
            batch = decoder.batch()
            every = [batch.rates() for _ in range(setting["rounds"] + 1)][1:]
        rates = {number: median(each[number] for each in every) for number in every[0]}
        pays = pays_from(rates)
        found.append({"weights": name, **{f"{n} at a time": round(rate, 1) for n, rate in rates.items()},
                      "pays from": pays or "never"})  # fmt: skip
    return found


def spread(setting: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rates of runs from an empty cache, and the share of them within a tenth of their median."""
    found = []
    for name, recipe in list(RECIPES.items())[:2]:
        with Decoder(actkit.load(changed(recipe, folder)), capacity=64, decode_only=True) as decoder:
            rates = []
            for _ in range(setting["runs"] + 1):
                decoder.reset()
                began = time.perf_counter()
                for token in range(40):
                    decoder([token])
                rates.append(40 / (time.perf_counter() - began))
        rates, middle = rates[1:], median(rates[1:])
        share = sum(abs(rate / middle - 1) <= 0.1 for rate in rates) / len(rates)
        low, high = common.spread(rates)
        found.append({"weights": name, "runs": len(rates), "tokens/s": middle, "deciles": f"{low:.1f} to {high:.1f}",
                      "slowest": min(rates), "fastest": max(rates), "within 10%": share})  # fmt: skip
    return found


def main() -> None:
    """Measure what was asked for, print it and record it."""
    chosen = common.options(__doc__.split("\n")[0], parts=PARTS)
    setting, kept = QUICK if chosen.quick else FULL, common.committed("long_texts") or {}
    measured = {part: kept.get(part, []) for part in PARTS[1:]}
    rows = kept.get("rows", [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speeds" in chosen.only:
            rows = speeds(setting, folder)
        if "perplexity" in chosen.only:
            measured["perplexity"] = perplexity(setting)
        if "batches" in chosen.only:
            measured["batches"] = batches(setting, folder)
        if "spread" in chosen.only:
            measured["spread"] = spread(setting, folder)

    def show(console: Console, rows: list[dict[str, Any]]) -> None:
        for entries in (rows, *measured.values()):
            for entry in entries:
                console.print(", ".join(f"{key} {common.cell(value)}" for key, value in entry.items()))

    common.report("long_texts", rows, [], chosen, show=show, **measured)


if __name__ == "__main__":
    main()
