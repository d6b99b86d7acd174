"""Long texts and several at once on SmolLM2-135M: speed at growing contexts, caches' errors, batches, and the spread.

    python benchmarks/long_texts.py [--quick] [--shared] [--json PATH|-] [--only speeds perplexity batches spread]

speeds: tokens per second at some lengths of context. llama.cpp reads the packaged Q4_1 file and keeps its cache in
float16; actkit has weights of bf16 and of 4 bits, and each kind of cache.
perplexity: of 4,096 tokens that nothing was calibrated on, float32 weights and activations, so that the cache alone
rounds. batches: tokens per second of several sequences at a time, in the middle of a cache of 512. spread: 100 runs
of 40 tokens from an empty cache, how far they lie from their median.

--shared is for a machine that does other work beside: one thread, and seconds of the processor in place of the clock's.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip
from math import exp

import torch
from engines import Engine, take_turns
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
FULL: dict[str, Any] = {"rounds": 2, "tokens": 24, "contexts": CONTEXTS, "scored": 4096, "runs": 100}
QUICK: dict[str, Any] = {"rounds": 1, "tokens": 8, "contexts": CONTEXTS[:2], "scored": 512, "runs": 20}
INT4: dict[str, Any] = {"rtn": {"bits": 4, "group_size": 64}}
RECIPES = {"bf16": [], "int4": [INT4], "int4 + TEAL 50%": [INT4, {"teal": {"sparsity": 0.5}}]}
PARTS = ("speeds", "perplexity", "batches", "spread")


def changed(weights: str, folder: Path) -> Path:
    """The folder of the model after one of RECIPES."""
    if not RECIPES[weights]:
        return Path(zoo.path(MODEL))
    target = folder / weights.split(" ")[-1].strip("%")
    if not target.exists():
        model, tokenizer = actkit.load(MODEL), actkit.load_tokenizer(MODEL)
        data = load_data(None, model, tokenizer, split="calibration", sequences=8, length=256)
        actkit.apply(model, {"actkit": 1, "transforms": RECIPES[weights]}, data)
        actkit.save(model, target, tokenizer=tokenizer)
    return target


def text(split: Any, tokens: int) -> list[int]:
    """Token ids of the embedded text, one document after another."""
    model, tokenizer = actkit.load(MODEL), actkit.load_tokenizer(MODEL)
    batches = load_data(None, model, tokenizer, split=split, sequences=-(-tokens // 256), length=256)
    ids: list[int] = [token for batch in batches for token in batch["input_ids"].flatten().tolist()]
    return (ids * (tokens // len(ids) + 1))[:tokens]


def timing(shared: bool) -> tuple[int, Callable[[], float]]:
    """Threads, and what counts the seconds."""
    return (1, time.process_time) if shared else (torch.get_num_threads(), time.perf_counter)


def speeds(setting: dict[str, Any], folder: Path, shared: bool) -> list[dict[str, Any]]:
    """Tokens per second of each engine at each context: median, first and last decile.

    llama.cpp reads its prompts; our caches hold zeros, which cost what other numbers cost. shared: see the docstring.
    """
    contexts, tokens = setting["contexts"], setting["tokens"]
    threads, clock = timing(shared)
    found = [_llama_cpp(setting, folder, threads, shared)]
    for weights in ("bf16", "int4"):
        for cache in CACHES if weights == "int4" else CACHES[:2]:
            model = actkit.load(changed(weights, folder))
            settings: Any = {"capacity": max(contexts) + tokens, "threads": threads, "cache": cache}
            rates: dict[int, list[float]] = {context: [] for context in contexts}
            with Decoder(model, decode_only=True, **settings) as decoder:
                for number in range(setting["rounds"] + 1):  # the first warms up
                    for context in contexts:
                        decoder.reset()
                        decoder.position = context
                        for token in range(tokens):
                            began = clock()
                            decoder([token])
                            if number:
                                rates[context].append(1 / (clock() - began))
            found.append(_row(f"actkit {weights}, {cache} cache", rates))
    return found


def _llama_cpp(setting: dict[str, Any], folder: Path, threads: int, shared: bool) -> dict[str, Any]:
    contexts, tokens = setting["contexts"], setting["tokens"]
    rows = {str(n): {"prompt": n, "tokens": tokens, "processor_time": shared} for n in contexts}
    engine = Engine("llama.cpp Q4_1", "llama_cpp_worker", "file", rows)
    load: Any = {"folder": str(folder), "text": text("search", max(contexts)), "capacity": max(contexts) + tokens}
    engine.start(source=str(packaged.pieces(MODEL)[0]), threads=threads, **load)
    try:
        if not engine.missing:
            take_turns([engine], 1, "llama.cpp")
    finally:
        engine.stop()
    if engine.missing:
        return {"engine": engine.label, "missing": engine.missing}
    rates = {n: [1 / s for each in engine.found[str(n)] for s in each["token_seconds"]] for n in contexts}
    return _row(engine.label, rates)


def _row(label: str, rates: dict[int, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"engine": label}
    for context, own in rates.items():
        found |= {
            f"{context} tokens": round(median(own), 1),
            f"{context}, deciles": [round(x, 1) for x in common.spread(own)],
        }
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


def batches(setting: dict[str, Any], folder: Path, shared: bool) -> list[dict[str, Any]]:
    """Tokens per second of 1, 2, 4 and 8 sequences at a time, and from how many on more than one pays."""
    found, (threads, clock) = [], timing(shared)
    for name in RECIPES:
        with Decoder(actkit.load(changed(name, folder)), capacity=512, threads=threads, decode_only=True) as decoder:
            batch = decoder.batch()
            every = [batch.rates(clock) for _ in range(setting["rounds"] + 1)][1:]
        rates = {number: median(each[number] for each in every) for number in every[0]}
        pays = pays_from(rates)
        found.append({"weights": name, **{f"{n} at a time": round(rate, 1) for n, rate in rates.items()},
                      "pays from": pays or "never"})  # fmt: skip
    return found


def spread(setting: dict[str, Any], folder: Path, shared: bool) -> list[dict[str, Any]]:
    """The rates of runs from an empty cache, and the share of them within a tenth of their median."""
    found, (threads, clock) = [], timing(shared)
    for name in list(RECIPES)[:2]:
        with Decoder(actkit.load(changed(name, folder)), capacity=64, threads=threads, decode_only=True) as decoder:
            rates = []
            for _ in range(setting["runs"] + 1):
                decoder.reset()
                began = clock()
                for token in range(40):
                    decoder([token])
                rates.append(40 / (clock() - began))
        rates, middle = rates[1:], median(rates[1:])
        share = sum(abs(rate / middle - 1) <= 0.1 for rate in rates) / len(rates)
        low, high = common.spread(rates)
        found.append({"weights": name, "runs": len(rates), "tokens/s": middle, "deciles": f"{low:.1f} to {high:.1f}",
                      "slowest": min(rates), "fastest": max(rates), "within 10%": share})  # fmt: skip
    return found


def main() -> None:
    """Measure what was asked for, print it and record it."""
    shared = "--shared" in sys.argv
    chosen = common.options(__doc__.split("\n")[0], [each for each in sys.argv[1:] if each != "--shared"], PARTS)
    setting, kept = QUICK if chosen.quick else FULL, common.committed("long_texts") or {}
    measured = {part: kept.get(part, []) for part in PARTS[1:]}
    rows = kept.get("rows", [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speeds" in chosen.only:
            rows = speeds(setting, folder, shared)
        if "perplexity" in chosen.only:
            measured["perplexity"] = perplexity(setting)
        if "batches" in chosen.only:
            measured["batches"] = batches(setting, folder, shared)
        if "spread" in chosen.only:
            measured["spread"] = spread(setting, folder, shared)

    def show(console: Console, rows: list[dict[str, Any]]) -> None:
        for entries in (rows, *measured.values()):
            for entry in entries:
                console.print(", ".join(f"{key} {common.cell(value)}" for key, value in entry.items()))

    common.report("long_texts", rows, [], chosen, show=show, shared=shared, **measured)


if __name__ == "__main__":
    main()
