"""What compression methods cost and save, beside the same model without them.

    python benchmarks/compression.py [--quick] [--json PATH|-] [--only PART ...]

widths: SmolLM2-135M and the zoo's SwiGLU language model in float32, 20, 30 and 50 % of the units of their MLPs cut by
CFSP, by its controls (random, magnitude, Wanda-SP's score, with and without FLAP's bias) and by the packages
torch-pruning and optipfair, without and with data, if they are in `.venv-bench`; exact widths, so that parameters are
equal to within a unit a block. Each arm in a process of its own (`pruning_worker.py`), on the same 16 x 256 tokens; its
seconds and the peak over what was resident are those of the change alone, on a machine that others use. Perplexity on
32 x 256 held-out tokens. Pass: on SmolLM2 CFSP's is at most that of each package's better variant.

factors: the same models and texts, 75 and 50 % of the numbers of each weight kept by `svd` in its three norms, and what
`widths` says of the cuts.

decode: SmolLM2-135M as it is stored, with half of the units of its MLPs (one width, exported as a plain checkpoint of
transformers), and with half of the numbers of each weight in two factors (whitened norm): a prompt of 128 tokens and 32
new ones, each model in a process of its own, in turns, two threads; one text in our CPU decoder and two in
transformers. Bytes on disk, and the peak of the process. Pass: half of the units decode one text at least 1.28 times as
fast, 0.9 of what their weights allow.

cost: CFSP at 30 % on the same rows beside one pass of the model over them, in turns. Pass: at most 1.6 times.

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
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import pruning_worker
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from actkit import zoo
from actkit.claims.subject import Subject
from actkit.compression.cfsp import Cfsp
from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes, block_peaks
from actkit.compression.repavit.folded import Reparameterize
from actkit.compression.repavit.idle import Repavit
from actkit.compression.svd import Svd
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating
from actkit.core.measure.speed import measure_speed
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.data import Split
from actkit.formats.export import export

PARTS = ("flashsvd", "repavit", "widths", "factors", "decode", "cost")
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


# -- widths of MLPs ----------------------------------------------------------------------------------------------------

SHARES = (0.2, 0.3, 0.5)
MODELS = ("smollm2", "swiglu")
PEERS = HERE.parent / ".venv-bench" / "bin" / "python"


def subject(name: str, calibration: int, held_out: int) -> Subject:
    """A language model of the zoo in float32, with its text."""
    split: Split = "calibration" if name == "smollm2" else "train"
    model = zoo.load(name, dtype=torch.float32)
    return Subject(name, calibration=calibration, split=split, held_out=held_out, model=model)


@contextmanager
def for_workers(given: Subject) -> Iterator[tuple[Path, Path]]:
    """The folder of a model and a file of its calibration text, for the processes that change it."""
    with TemporaryDirectory() as folder:
        base, text = Path(folder) / "base", Path(folder) / "text.safetensors"
        given.model.save_pretrained(base)  # type: ignore[operator]
        save_file({"input_ids": torch.cat([batch["input_ids"] for batch in given.calibration(0)])}, text)
        yield base, text


def widths(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Perplexities of models whose MLPs were cut, and what the cut took."""
    rows, targets = [], []
    for name in MODELS[quick:]:
        given = subject(name, 4 if quick else 16, 8 if quick else 32)
        with for_workers(given) as (base, text):
            rows.append({"model": name, "row": "whole", "cut": 0.0, **judged(given.model, given)})
            for share in SHARES[quick:]:
                own = [{"model": name, "row": arm, "cut": share, **cut(arm, base, text, share, given)} for arm in ARMS]
                rows += own
                if name == "smollm2":
                    targets += beside_peers(own, share)
    return rows, targets


ARMS = (*pruning_worker.OURS, *pruning_worker.PEERS)
BUDGETS = (0.75, 0.5)


def factors(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Perplexities of models with thin factors in place of weights, and what making them took."""
    rows: list[dict[str, Any]] = []
    for name in MODELS[quick:]:
        given = subject(name, 4 if quick else 16, 8 if quick else 32)
        with for_workers(given) as (base, text):
            rows.append({"model": name, "row": "whole", "kept": 1.0, **judged(given.model, given)})
            for kept in BUDGETS[quick:]:
                for arm in pruning_worker.FACTORS:
                    rows.append({"model": name, "row": arm, "kept": kept, **cut(arm, base, text, kept, given)})
    return rows, []


HALF = {
    "whole": None,
    "CFSP, one width": Cfsp(sparsity=0.5, uniform=True),
    "svd, whiten": Svd(budget=0.5, norm="whiten"),
}


def decode(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tokens per second of smaller models."""
    name, rows, targets = MODELS[quick], [], []
    text = Subject(name, calibration=4 if quick else 16, split="train", held_out=1).calibration(0)
    with TemporaryDirectory() as place:
        folders = {}
        for row, method in HALF.items():
            model = zoo.load(name)
            if method is not None:
                apply(model, method, text, undo="off", progress=False)
            folders[row] = Path(place) / row
            if isinstance(method, Cfsp):
                export(model, folders[row], "transformers", proof=False)
            else:
                checkpoint.save(model, folders[row])
        for texts in (1, 2):
            given: dict[str, Any] = {"prompt": 32 if quick else 128, "max_new_tokens": 8 if quick else 32, "threads": 2}
            found = measure_speed(folders, batch=texts, progress=False, **given)
            for row, speed in found.items():
                size = sum(each.stat().st_size for each in folders[row].rglob("*.safetensors"))
                ratio = None if speed.ratio is None else round(speed.ratio.value, 3)
                rows.append(
                    {
                        "model": name,
                        "row": row,
                        "through": speed.through,
                        "on disk, MB": round(size / 1e6, 1),
                        "tokens/s": round(speed.rate.value, 1),
                        "over whole": ratio,
                        "interval": None if ratio is None else [round(speed.ratio.low, 3), round(speed.ratio.high, 3)],
                        "peak MB": round(speed.peak_bytes / 1e6, 1),
                    }
                )
            if texts == 1:
                ratio = round(found["CFSP, one width"].ratio.value, 3)
                targets.append(common.target(f"decode: {name}, half of the units, over whole", ratio, at_least=1.28))
    return rows, targets


def judged(model: Any, given: Subject) -> dict[str, Any]:
    """What a model gives and takes."""
    other = Subject(given.name, calibration=1, split="train", held_out=1, model=model)
    other.held_out = given.held_out
    size = sum(each.numel() for each in model.parameters())
    return {"perplexity": round(other.perplexity(), 2), "parameters, M": round(size / 1e6, 3)}


def cut(arm: str, base: Path, text: Path, share: float, given: Subject) -> dict[str, Any]:
    """A row of one arm; one that does not run says why in place of the perplexity."""
    peer = arm in pruning_worker.PEERS
    python = str(PEERS) if peer else sys.executable
    if peer and not PEERS.exists():
        return {"perplexity": "no .venv-bench (make bench)"}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [python, str(HERE / "pruning_worker.py"), arm, str(base), str(text), str(share), str(out)]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if ended.returncode:
            return {"perplexity": (ended.stderr.strip().splitlines() or ["it ended without a word"])[-1][:120]}
        found = json.loads(ended.stdout.strip().splitlines()[-1])
        taken = {"seconds": round(found["seconds"], 2), "peak MB": round(found["peak_bytes"] / 1e6, 1)}
        size = sum(each.stat().st_size for each in out.rglob("*.safetensors"))
        return {
            **judged(checkpoint.load(out, dtype=torch.float32), given),
            "on disk, MB": round(size / 1e6, 1),
            **taken,
        }


def beside_peers(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """CFSP's perplexity over that of each package's better variant."""
    found = {row["row"]: row["perplexity"] for row in rows}
    targets = []
    for package in ("torch-pruning", "optipfair"):
        own = [value for arm, value in found.items() if arm.startswith(package) and not isinstance(value, str)]
        if own:
            over = round(found["CFSP"] / min(own), 3)
            targets.append(common.target(f"widths: SmolLM2, {share:.0%} cut, over {package}", over, at_most=1.0))
    return targets


def cost(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds of CFSP beside a pass of the model over the same rows."""
    rows, targets = [], []
    for name in MODELS[quick:]:
        given = subject(name, 4 if quick else 16, 1)
        model, batches = given.model, given.calibration(0)

        def plain(model: Any = model, batches: Any = batches) -> None:
            with evaluating(model):
                for batch in batches:
                    forward(model, batch)

        def change(model: Any = model, batches: Any = batches) -> None:
            apply(model, Cfsp(), batches, undo="memory", progress=False).undo()

        seconds = common.interleaved({"one pass": plain, "CFSP": change}, 3 if quick else 5)
        over = common.ratio(seconds["CFSP"], seconds["one pass"])
        for row, own in seconds.items():
            deciles = [round(each, 2) for each in common.spread(own)]
            rows.append({"model": name, "row": row, "seconds": round(median(own), 2), "deciles": deciles})
        targets.append(common.target(f"cost: {name}, CFSP over one pass", round(over["ratio"], 2), at_most=1.6))
    return rows, targets


# -- all ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and record."""
    chosen = common.options(__doc__ or "", parts=PARTS)
    batch, length, rounds = (4, 128, 3) if chosen.quick else (32, 256, 7)
    measure = {
        "flashsvd": lambda: flashsvd(batch, length, rounds),
        "repavit": lambda: repavit(5 if chosen.quick else 24, large=not chosen.quick),
        "widths": lambda: widths(chosen.quick),
        "factors": lambda: factors(chosen.quick),
        "decode": lambda: decode(chosen.quick),
        "cost": lambda: cost(chosen.quick),
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
    common.report("compression", rows, targets, chosen, show=common.show_parts, measured=measured)


if __name__ == "__main__":
    main()
