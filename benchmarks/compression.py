"""What compression methods cost and save, beside the same model without them.

    python benchmarks/compression.py [--quick] [--json PATH|-]

flashsvd: one block of BERT-Base's shape (768 channels, 12 heads, 3,072 units), 32 x 256 tokens, random weights, factors
of rank 40 per head and 240 elsewhere: bytes of tensors that are alive at once in the block (weights and its input
left out), dense, with factors, and with the same factors in tiles, all three with torch's fused attention; and
milliseconds, in turns. Pass: tiles at most 0.30 times the factors without, and counts within 10 % of the meter.

The targets were set before the first run.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import torch
from transformers import BertConfig, BertModel

from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes, block_peaks
from actkit.compression.svd import Svd
from actkit.core.recipe.runner import apply

RANKS: dict[str, Any] = {"query": 40, "key": 40, "value": 40, "output": 240, "up": 240, "down": 240}


def flashsvd(batch: int, length: int, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of one block of BERT-Base."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig(num_hidden_layers=1, vocab_size=1000)).eval()
    plain = copy.deepcopy(dense)
    apply(plain, Svd(rank=RANKS, per_head=True), progress=False)
    tiled = copy.deepcopy(plain)
    apply(tiled, FlashSvd(), progress=False)
    ids = {"input_ids": torch.randint(1000, (batch, length))}
    models = {"dense": dense, "factors": plain, "factors in tiles": tiled}
    peaks = {name: max(block_peaks(model, ids).values()) for name, model in models.items()}
    with torch.no_grad():
        seconds = common.interleaved({name: lambda m=model: m(**ids) for name, model in models.items()}, rounds)
    counts = activation_bytes(tiled, ids)
    rows = [
        {
            "model": f"BERT-Base block, {batch} x {length}",
            "row": name,
            "MB at once": round(peaks[name] / 1e6, 1),
            "over factors": round(peaks[name] / peaks["factors"], 3),
            "ms": round(median(seconds[name]) * 1e3, 1),
            "time over factors": round(common.ratio(seconds[name], seconds["factors"])["ratio"], 3),
        }
        for name in models
    ]
    targets = [
        common.target("flashsvd: bytes at once, over factors", rows[2]["over factors"], at_most=0.30),
        common.target("flashsvd: counts off by", round(counts.off, 4), at_most=0.10),
    ]
    return rows, targets


def main() -> None:
    """Measure, print and record."""
    chosen = common.options(__doc__ or "")
    batch, length, rounds = (4, 128, 3) if chosen.quick else (32, 256, 7)
    rows, targets = flashsvd(batch, length, rounds)
    common.report("compression", rows, targets, chosen)


if __name__ == "__main__":
    main()
