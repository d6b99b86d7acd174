"""What fine-tuning and training methods cost for each step, beside the plain step and their peers.

    python benchmarks/finetuning.py [--quick] [--json PATH|-]

tract: a vision transformer of ViT-S's shape (patches of 16 x 16 x 3, 384 wide, 12 blocks) and the digits CNN; a step is
forward, backward and SGD, interleaved, two threads. Beside them the released package `torch_tract` (its `inverse`), if
it is installed in `.venv-bench`: its layer in place of the first one. Pass: at most 1.10 times the plain step, and no
slower than the package.

s2a: MiniLM with a new classifier (16 rows of 128 tokens, dropout as configured), full training, LoRA of rank 8 by peft
on all linear layers of the blocks, full training under gradient checkpointing, biases, and S2A with side paths;
mobiletl: transformers' MobileNetV2 (8 images of 96 x 96, random weights), all of it, its last five blocks with the
classifier as torch trains them, and MobileTL. A step is forward, backward and AdamW. Bytes kept for the backward pass
and bytes of the optimizer's state stand apart. Pass: S2A keeps at most 0.25 times the bytes of full training and 0.4
times those of LoRA.

The targets were set before the first run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from actkit import zoo
from actkit.claims.s2a import ARMS, RULES, arranged
from actkit.core.edit.edits import get_module
from actkit.core.forward.batch import first_tensor
from actkit.core.measure.saved_tensors import saved_tensors
from actkit.core.train.choice import trained_parameters
from actkit.core.train.rules import attached
from actkit.core.train.training_setup import prepare_modes
from actkit.finetuning.mobiletl import MobileTL
from actkit.finetuning.tract import Tract, first_layer
from actkit.zoo.cnn import DigitsCNN

PLAIN, OURS, PACKAGE = "plain", "tract", "torch_tract"
CHECKPOINTED = "full training, checkpointed"
Arm = tuple[nn.Module, Iterable[Any], Any]  # the model, its rules, and what trains if no rule says


def vit(blocks: int) -> nn.Module:
    """A vision transformer of ViT-S's width, with random weights."""
    shape: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=blocks, num_labels=10))


def packaged(model: nn.Module) -> None:
    """Put the package's layer in place of the first one.

    Raises:
        ImportError: the package is not there.
    """
    site = next((HERE.parent / ".venv-bench").glob("lib/python*/site-packages"), None)
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))
    from torch_tract import TrActConv2d

    path = first_layer(model)
    old: Any = get_module(model, path)
    new = TrActConv2d(
        old.in_channels, old.out_channels, old.kernel_size[0], stride=old.stride, padding=old.padding, lambda_=0.1
    )
    new.load_state_dict(old.state_dict())
    model.set_submodule(path, new)


def step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(first_tensor(model(x)), labels).backward()
        optimizer.step()

    return run


def measure(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each variant of one model."""
    torch.manual_seed(0)
    x, labels = torch.randn(shape), torch.arange(shape[0]) % 10
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        plain, ours, package = (make() for _ in range(3))
        stack.enter_context(attached([Tract()], ours))
        variants = {PLAIN: step(plain, x, labels), OURS: step(ours, x, labels)}
        try:
            packaged(package)
            variants[PACKAGE] = step(package, x, labels)
        except ImportError as error:
            rows.append({"model": name, "row": PACKAGE, "ms": str(error)})
        seconds = common.interleaved(variants, rounds)
    for variant, own in seconds.items():
        over = common.ratio(own, seconds[PLAIN])
        row = {"model": name, "row": variant, "ms": round(median(own) * 1e3, 2), "over plain": round(over["ratio"], 3)}
        rows.append({**row, "deciles": over["deciles"]})
    return sorted(rows, key=lambda row: str(row["row"]))


# -- memory ------------------------------------------------------------------------------------------------------------


def minilm(arm: str) -> nn.Module:
    """MiniLM as an arm trains it."""
    model = arranged(BertForSequenceClassification.from_pretrained(zoo.path("minilm"), num_labels=10), arm, 0)
    if arm == CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def mobilenet() -> nn.Module:
    """MobileNetV2 with random weights."""
    torch.manual_seed(0)
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=96, num_labels=10))


def memory(name: str, arms: Mapping[str, Arm], batch: dict[str, torch.Tensor], rounds: int) -> list[dict[str, Any]]:
    """A row for each arm of one model: kept bytes, bytes of the optimizer, milliseconds of a step."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        variants: dict[str, Callable[[], None]] = {}
        for arm, (model, rules, trainable) in arms.items():
            stack.enter_context(trained_parameters(model, rules, trainable))
            stack.enter_context(attached(rules, model))
            prepare_modes(model)
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

            def run(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()

            with saved_tensors(model) as meter:
                loss = model(**batch).loss
            kept = meter.bytes
            del loss
            run()
            state = sum(
                each.nbytes
                for values in optimizer.state.values()
                for each in values.values()
                if isinstance(each, torch.Tensor)
            )
            variants[arm] = run
            rows.append(
                {"model": name, "row": arm, "kept MB": round(kept / 1e6, 2), "optimizer MB": round(state / 1e6, 2)}
            )
        seconds = common.interleaved(variants, rounds)
    return [{**row, "ms": round(median(seconds[row["row"]]) * 1e3, 1)} for row in rows]


def fine_tuning(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of S2A and MobileTL."""
    rows_, length, rounds = (2, 32, 2) if quick else (16, 128, 5)
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (rows_, length)),
        "attention_mask": torch.ones(rows_, length, dtype=torch.long),
        "labels": torch.arange(rows_) % 10,
    }
    texts = {arm: (minilm(arm), RULES.get(arm, ()), None) for arm in (*ARMS, CHECKPOINTED)}
    rows = memory("MiniLM", texts, batch, rounds)
    side = 64 if quick else 96
    pixels = {
        "pixel_values": torch.randn(rows_ if quick else 8, 3, side, side),
        "labels": torch.arange(rows_ if quick else 8),
    }
    plain = mobilenet()
    blocks = [f"{block.path}.*" for block in MobileTL(blocks=5).chosen(plain)]
    nets: dict[str, Arm] = {
        "full training": (copy.deepcopy(plain), (), None),
        "five blocks": (copy.deepcopy(plain), (), [*blocks, "classifier.*"]),
        "MobileTL": (plain, (MobileTL(blocks=5),), None),
    }
    rows += memory("MobileNetV2", nets, pixels, rounds)
    kept = {(row["model"], row["row"]): row["kept MB"] for row in rows}
    ours = kept["MiniLM", "S2A"]
    targets = [
        common.target(
            "MiniLM: S2A's kept bytes, over full training", ours / kept["MiniLM", "full training"], at_most=0.25
        ),
        common.target("MiniLM: S2A's kept bytes, over LoRA", ours / kept["MiniLM", "LoRA"], at_most=0.4),
    ]
    return rows, targets


def main() -> None:
    """Measure, print and record."""
    chosen = common.options(__doc__ or "")
    blocks, batch, rounds = (2, 4, 3) if chosen.quick else (12, 16, 12)
    rows = measure("ViT-S", lambda: vit(blocks), (batch, 3, 224, 224), rounds)
    rows += measure("digits CNN", DigitsCNN, (64, 1, 8, 8), 10 * rounds)
    targets = []
    for name in ("ViT-S", "digits CNN"):
        own = {row["row"]: row for row in rows if row["model"] == name and "over plain" in row}
        targets.append(common.target(f"{name}: tract, over the plain step", own[OURS]["over plain"], at_most=1.10))
        if PACKAGE in own:
            over = round(own[OURS]["ms"] / own[PACKAGE]["ms"], 3)
            targets.append(common.target(f"{name}: tract, over torch_tract", over, at_most=1.0))
    more, own_targets = fine_tuning(chosen.quick)
    common.report("finetuning", rows + more, targets + own_targets, chosen)


if __name__ == "__main__":
    main()
