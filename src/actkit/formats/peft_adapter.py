"""A peft adapter: low-rank corrections beside a folder of weights that cannot hold them.

    y = W x + B A x        A [rank, in] is a correction's right factor, B [out, rank] its left one

adapter_model.safetensors has `base_model.model.PATH.lora_A.weight` and `.lora_B.weight`, adapter_config.json the paths
and ranks; `lora_alpha` is the rank, so that peft's factor in front of B A is 1. Factors in 8 bits are written as the
numbers that they stand for. peft computes them in float32 in a model of 16 bits, and rounds the sum.

Its adapter reads what the layer is given; a correction of ours reads what the weight reads. The two differ if the layer
rounds its inputs, and such a layer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.errors import ExportError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.weights import DenseWeight, WeightStorage
from actkit.formats.plain import Plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refuse(plain: Plain) -> None:
    """Raise ExportError for a model without corrections, or with one that peft would compute from other inputs."""
    if not plain.corrections:
        raise ExportError("adapter: no layer of the model has a low-rank correction; leave adapter out.")
    for path in plain.corrections:
        if plain.layers[path].inputs is not None:
            raise ExportError(
                f"{path}: its low-rank correction reads rounded inputs, and peft's adapter would read them before they "
                f"are rounded. Keep the model with actkit.save, or apply the recipe without round_inputs."
            )


def write(plain: Plain, folder: Path) -> str:
    """Write the corrections of a model into a new folder.

    Args:
        plain: of a model that `refuse` takes.
        folder: of the adapter.

    Returns:
        A note.
    """
    folder.mkdir()
    ranks = {path: correction.left.shape[1] for path, correction in plain.corrections.items()}
    largest = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != largest}
    tensors: dict[str, Tensor] = {}
    for path, correction in plain.corrections.items():
        left, right = correction.factors()
        tensors[f"base_model.model.{path}.lora_A.weight"] = right.detach().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = left.detach().contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(plain.skeleton).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": None,  # the folder above, which may move
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return (
        f"the corrections of {len(ranks)} layers (rank {largest}, {size:,} bytes) are a peft adapter in "
        f"{folder.name}/; without it the folder computes what the rounded weights alone give"
    )


class _Read(WeightStorage):
    """A weight and its correction as peft computes them: the correction in float32, rounded with the sum."""

    kind = DenseWeight.kind

    def __init__(self, storage: WeightStorage, correction: LowRank) -> None:
        super().__init__()
        self.storage, self.correction = storage, correction
        self.shape, self.nbytes = storage.shape, storage.nbytes + correction.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.storage.linear(x, bias)
        wide = torch.promote_types(y.dtype, torch.float32)
        left, right = (factor.to(wide) for factor in self.correction.factors())
        return (y + F.linear(F.linear(x.to(wide), right), left)).to(y.dtype)


def as_read(plain: Plain, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What is computed in place of the layers when peft reads the adapter.

    Args:
        plain: the exported model.
        layers: path -> what is read there without the adapter, of those that are read otherwise than they stand.

    Returns:
        Path -> the layer as it is read.
    """
    found = dict(layers)
    for path, correction in plain.corrections.items():
        layer: Any = layers.get(path, plain.layers[path])
        found[path] = ActLinear.of(layer, weight=_Read(layer.storage, correction))
    return found
