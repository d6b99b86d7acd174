"""What compression methods cost and save, beside the same model without them.

    python benchmarks/compression.py [--quick] [--json PATH|-] [--only flashsvd repavit]

flashsvd: one block of BERT-Base's shape (768 channels, 12 heads, 3,072 units), 32 x 256 tokens, random weights, factors
of rank 40 per head and 240 elsewhere: bytes of tensors that are alive at once in the block (weights and its input
left out), dense, with factors, and with the same factors in tiles, all three with torch's fused attention; and
milliseconds, in turns. Pass: tiles at most 0.30 times the factors without, and counts within 10 % of the meter.

repavit: random vision transformers, 8 images of 197 tokens, two threads, torch's fused attention in both: a block of
ViT-Base's and ViT-Large's shape, and the whole ViT-Large, plain and folded after 75 % idle channels; milliseconds, in
turns. Pass: a block at most 0.6 times as long, attention included, and the whole at least 1.5 times as fast.

The targets were set before the first run.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes, block_peaks
from actkit.compression.repavit.folded import Reparameterize
from actkit.compression.repavit.idle import Repavit
from actkit.compression.svd import Svd
from actkit.core.recipe.runner import apply

PARTS = ("flashsvd", "repavit")
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


def repavit(rounds: int, large: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of blocks, and of the whole ViT-Large if it is wanted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    shapes = {"ViT-Base, a block": (768, 12, 1), "ViT-Large, a block": (1024, 16, 1)}
    if large:
        shapes["ViT-Large"] = (1024, 16, 24)
    rows, targets = [], []
    try:
        for name, (features, heads, depth) in shapes.items():
            models = {"plain": vision_transformer(features, heads, depth)}
            models["folded"] = copy.deepcopy(models["plain"])
            for transform in (Repavit(idle=0.75), Reparameterize()):
                apply(models["folded"], transform, undo="off", progress=False)
            images = {"pixel_values": torch.randn(8, 3, 224, 224)}
            tokens = torch.randn(8, 197, features)
            calls = {
                row: partial(model, **images) if depth > 1 else partial(model.layers[0], tokens)
                for row, model in models.items()
            }
            with torch.inference_mode():
                seconds = common.interleaved(calls, rounds if depth == 1 else max(3, rounds // 8))
            over = common.ratio(seconds["folded"], seconds["plain"])
            rows += [
                {
                    "model": f"{name}, 8 x 197",
                    "row": row,
                    "weights, M": round(sum(each.numel() for each in model.parameters()) / 1e6, 1),
                    "ms": round(median(seconds[row]) * 1e3, 1),
                    "time over plain": round(over["ratio"], 3) if row == "folded" else 1.0,
                    "deciles": over["deciles"] if row == "folded" else None,
                }
                for row, model in models.items()
            ]
            if depth == 1:
                targets.append(common.target(f"repavit: {name}, time over plain", round(over["ratio"], 3), at_most=0.6))
            else:
                faster = round(1 / over["ratio"], 2)
                targets.append(common.target(f"repavit: whole {name}, times as fast", faster, at_least=1.5))
    finally:
        torch.set_num_threads(threads)
    return rows, targets


def vision_transformer(features: int, heads: int, depth: int) -> ViTModel:
    """A random one for images of 224 x 224 pixels in patches of 16."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": features, "intermediate_size": 4 * features, "num_attention_heads": heads}
    config = ViTConfig(**shape, num_hidden_layers=depth, attn_implementation="sdpa")
    return ViTModel(config, add_pooling_layer=False).eval()


def show(console: Any, rows: list[dict[str, Any]]) -> None:
    """Print a table for each part."""
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if own:
            fields = [field for field in own[0] if field != "part"]
            table = common.Table(*fields, title=part)
            for row in own:
                table.add_row(*(common.cell(row[field]) for field in fields))
            console.print(table)


def main() -> None:
    """Measure, print and record."""
    chosen = common.options(__doc__ or "", parts=PARTS)
    batch, length, rounds = (4, 128, 3) if chosen.quick else (32, 256, 7)
    measure = {
        "flashsvd": lambda: flashsvd(batch, length, rounds),
        "repavit": lambda: repavit(5 if chosen.quick else 24, large=not chosen.quick),
    }
    before = common.committed("compression") or {"rows": [], "targets": [], "measured": {}}
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    measured: dict[str, Any] = {} if chosen.quick else dict(before["measured"])
    for part in PARTS:
        if part in chosen.only:
            own, goals = measure[part]()
            rows += [{"part": part, **row} for row in own]
            targets += [{"part": part, **goal} for goal in goals]
            measured[part] = {"date": f"{common.datetime.now(common.UTC):%Y-%m-%d}", "commit": common.commit()}
        elif not chosen.quick:
            rows += [row for row in before["rows"] if row["part"] == part]
            targets += [goal for goal in before["targets"] if goal["part"] == part]
    common.report("compression", rows, targets, chosen, show=show, measured=measured)


if __name__ == "__main__":
    main()
