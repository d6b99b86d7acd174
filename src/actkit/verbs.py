"""The verbs, as Python functions and as the command line calls them: on a model or its name, with data by name.

`model` is a model in memory, a zoo name, a folder or a hub id. `data` is what `load_data` takes: None for the embedded
data of the split that fits the verb, a file or folder, 'random', or batches. The work is done by the functions below
the verbs (`core.runner.apply`, `core.evaluation.evaluate` ...), which take models and batches only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from actkit.core.architectures import find_architecture
from actkit.core.checkpoint import MANIFEST, read_manifest
from actkit.core.summary import Summary, summarise
from actkit.data import Batches, Split, load_data
from actkit.zoo.loading import locate, open_model

Model = nn.Module | str | Path


def open_data(
    data: Any,
    model: nn.Module,
    tokenizer: Any,
    split: Split,
    *,
    sequences: int | None = None,
    length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Batches:
    """Batches for a verb: the `split` of the embedded data, or all of what the user gave."""
    return load_data(
        data,
        model,
        tokenizer,
        sequences=sequences,
        length=length,
        batch_size=batch_size,
        seed=seed,
        split=split if data is None else None,
    )


def show(model: Model, data: Any = None, **options: Any) -> Summary:
    """What a model is: its parts, its coverage, and what actkit changed on it. options: as in `open_model`."""
    opened, tokenizer = open_model(model, **options)
    results = {}
    if not isinstance(model, nn.Module) and (locate(model) / MANIFEST).exists():
        results = read_manifest(locate(model))["results"]
    example = None
    if find_architecture(getattr(getattr(opened, "config", None), "model_type", None)) is None:
        example = open_data(data, opened, tokenizer, "calibration", sequences=1)[0]
    return summarise(opened, example, results)
