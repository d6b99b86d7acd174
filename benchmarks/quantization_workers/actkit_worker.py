"""One recipe of actkit on one model: seconds, peak memory, bytes, and its losses on held-out rows.

    python actkit_worker.py JOB.json        # writes the result to the job's "result"

As peer_worker.py, whose function measures the losses: the same rows through the same forward pass of transformers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peer_worker import losses, memory, read_once, weights

import actkit
from actkit.runtime.decoder import Decoder

BATCH, NEW = 8, 32


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = actkit.load(job["model"])
    rows = torch.tensor(job["calibration"])
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in rows.split(BATCH)]
    read_once(model)
    loaded, started = memory("VmRSS"), time.perf_counter()
    notes = []
    if job["recipe"]:
        applied = actkit.apply(model, {"actkit": 1, "transforms": job["recipe"]}, batches, undo="off")
        notes = applied.report.notes[:3]
    seconds, peak = time.perf_counter() - started, memory("VmHWM") - loaded
    actkit.save(model, job["folder"], overwrite=True)
    result: dict[str, Any] = {
        "seconds": seconds,
        "peak MB": peak,
        "weights MB": weights(Path(job["folder"])),
        "resident MB": resident(model),
        "losses": losses(model, job["held_out"]),
        "notes": notes,
    }
    result["plain tokens/s"] = plain_rate(model, job["held_out"][0][:16])
    if Decoder.supports(model) is None:
        result["tokens/s"] = rate(model, job["held_out"][0][:16])
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def resident(model: torch.nn.Module) -> float:
    """MB of the parameters and buffers as they are held, each once."""
    held = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
    return sum(held.values()) / 1e6


@torch.no_grad()
def plain_rate(model: Any, prompt: list[int]) -> float:
    """Tokens a second through transformers' own forward pass, one token after the other, the median."""
    found: list[float] = []
    read = model(torch.tensor([prompt]), use_cache=True)
    for _ in range(NEW):
        started = time.perf_counter()
        read = model(read.logits[:, -1:].argmax(-1), past_key_values=read.past_key_values, use_cache=True)
        found.append(1 / (time.perf_counter() - started))
    return median(found[NEW // 4 :])  # the first ones compile


def rate(model: torch.nn.Module, prompt: list[int]) -> float:
    """Tokens a second of the decoder, the median of five times 32 tokens."""
    found = []
    with Decoder(model) as decoder:
        for _ in range(6):
            decoder.reset()
            started = time.perf_counter()
            tokens = list(decoder.generate(prompt, max_new_tokens=NEW, end=()))
            found.append(len(tokens) / (time.perf_counter() - started))
    return median(found[1:])  # the first one compiles


if __name__ == "__main__":
    main()
