"""One recipe of actkit on one model: seconds, peak memory, bytes, and its losses on held-out rows.

    python actkit_worker.py JOB.json        # writes the result to the job's "result"

As peer_worker.py, whose function measures the losses: the same rows through the same forward pass of transformers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peer_worker import losses, memory

import actkit
from actkit.core.measure.cost import folder_bytes

BATCH = 8


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = actkit.load(job["model"])
    rows = torch.tensor(job["calibration"])
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in rows.split(BATCH)]
    loaded, started = memory("VmRSS"), time.perf_counter()
    applied = actkit.apply(model, {"actkit": 1, "transforms": job["recipe"]}, batches, undo="off")
    seconds, peak = time.perf_counter() - started, memory("VmHWM") - loaded
    actkit.save(model, job["folder"], overwrite=True)
    result = {
        "seconds": seconds,
        "peak MB": peak,
        "disk MB": folder_bytes(Path(job["folder"])) / 1e6,
        "losses": losses(model, job["held_out"]),
        "notes": applied.report.notes[:3],
    }
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
