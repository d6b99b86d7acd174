"""Dense: every weight as the numbers that it stands for, in the model's dtype; plain transformers alone reads it.

A low-rank correction is merged into its weight, in float32 and rounded once. Nothing is smaller then: it is a way to
other tools, and to formats that hold no corrections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from actkit.core.ground.errors import ExportError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.formats.plain import Plain


def refuse(plain: Plain) -> None:
    """Raise ExportError for a layer that rounds its inputs, or a rounded cache, which no weight says."""
    if plain.caches:
        raise ExportError(
            f"{next(iter(plain.caches))}: its keys and values are rounded to fp8, which a dense folder does not say. "
            f"Export the model as compressed-tensors, or leave quantize_cache out."
        )
    rounded = next((path for path, layer in plain.layers.items() if layer.inputs is not None), None)
    if rounded is not None:
        raise ExportError(
            f"{rounded}: it rounds its inputs, which a dense folder does not say. Export the model as "
            f"compressed-tensors, keep it with actkit.save, or export one on which only the weights were rounded."
        )


def write(plain: Plain, folder: Path, max_shard: int | str) -> dict[str, Any]:
    """Write weights and config into an existing folder.

    Args:
        plain: of a model that `refuse` takes.
        folder: where to write.
        max_shard: largest size of a file.

    Returns:
        quantized, dense and notes, as `Exported` has them.
    """
    tensors = plain.other_tensors()
    dense: dict[str, str] = {}
    for path, layer in plain.layers.items():
        merged = _merged(plain, path)
        tensors[f"{path}.weight"] = merged.t().contiguous() if path in plain.transposed else merged
        tensors |= plain.bias(path)
        also = ", its correction merged" if path in plain.corrections else ""
        dense[path] = f"{layer.storage.describe()} in this model{also}"
    others: dict[str, Any] = {**plain.tables, **plain.convolutions}
    dense |= {path: f"{module.storage.describe()} in this model" for path, module in others.items()}
    plain.skeleton.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard)
    notes = ["every weight takes the bytes of the model's dtype, whatever it was rounded to"]
    return {"quantized": {}, "dense": dense, "notes": tuple(notes)}


def as_read(plain: Plain) -> dict[str, nn.Module]:
    """The layers whose correction is merged, path -> the layer as it is read."""
    return {
        path: ActLinear(DenseWeight(nn.Parameter(_merged(plain, path), requires_grad=False)), plain.layers[path].bias)
        for path in plain.corrections
    }


def _merged(plain: Plain, path: str) -> Tensor:
    """The weight [out, in] with its correction."""
    weight = plain.layers[path].dequantized().detach()
    if path in plain.corrections:
        left, right = (factor.detach().float() for factor in plain.corrections[path].factors())
        weight = weight.float() + left @ right
    return weight.to(plain.dtype)
