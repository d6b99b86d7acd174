"""What fine-tuning and training methods cost for each step, beside the plain step and their peers.

    python benchmarks/finetuning.py [--quick] [--json PATH|-]

tract: a vision transformer of ViT-S's shape (patches of 16 x 16 x 3, 384 wide, 12 blocks) and the digits CNN; a step is
forward, backward and SGD, interleaved, two threads. Beside them the released package `torch_tract` (its `inverse`), if
it is installed in `.venv-bench`: its layer in place of the first one. Pass: at most 1.10 times the plain step, and no
slower than the package.

The targets were set before the first run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from actkit.core.edit.edits import get_module
from actkit.core.forward.batch import first_tensor
from actkit.core.train.rules import attached
from actkit.finetuning.tract import Tract, first_layer
from actkit.zoo.cnn import DigitsCNN

PLAIN, OURS, PACKAGE = "plain", "tract", "torch_tract"


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
    common.report("finetuning", rows, targets, chosen)


if __name__ == "__main__":
    main()
