"""compressed-tensors: integer weights as plain transformers (with the package of that name) and vLLM read them.

Two formats, after the source of compressed-tensors 0.20 and of vLLM's loader:

    pack-quantized   weight_packed int32 [out, ceil(in * bits / 32)], codes from the low bits up, unsigned
                     weight_scale float32 [out, groups], weight_shape int64 [2]
                     asymmetric also weight_zero_point int32 [ceil(out * bits / 32), groups], packed down the outputs
    int-quantized    weight int8 [out, in], weight_scale float32 [out, 1]; activations are rounded by whoever runs it,
                     per token, to 8 bits

A code stands for (code - zero) * scale on both sides, so codes move over as they are. Containers have 4 or 8 bits:
other widths are packed differently by different versions of the package. Scales stay float32; a reader that computes
in 16 bits rounds them to its dtype when it loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import ExportError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Selection
from actkit.core.layers.weights import DenseWeight, IntegerWeight
from actkit.formats.plain import Plain

PACKED, INTEGER = "pack-quantized", "int-quantized"
KERNEL_GROUPS = (-1, 32, 64, 128)  # group sizes that vLLM's kernels for packed weights take
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one layer each in vLLM, so one scheme each
Activations = Literal["int8"]


@dataclass(frozen=True)
class Scheme:
    """How one layer's weight is stored.

    Attributes:
        bits: of the container, 4 or 8.
        symmetric: no zero point.
        group_size: -1 is one scale per row.
        activations: how the reader rounds activations; None for not at all.
    """

    bits: int
    symmetric: bool
    group_size: int
    activations: Activations | None = None

    @classmethod
    def of(cls, weight: IntegerWeight, activations: Activations | None) -> Scheme:
        """The scheme of a quantized weight, with the activations that go with it."""
        bits = 8 if activations is not None or weight.grid.bits > 4 else 4
        size = weight.grid.size(weight.shape[1])  # only groups along the inputs are exported
        return cls(bits, weight.grid.symmetric, -1 if size == weight.shape[1] else size, activations)

    @property
    def format(self) -> str:
        """The name that the format has for it."""
        return PACKED if self.activations is None else INTEGER

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        """A config group; only keys that every reader knows, as their models forbid others."""
        grouped: dict[str, Any] = {"strategy": "channel"}
        if self.group_size != -1:
            grouped = {"strategy": "group", "group_size": self.group_size}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False, **grouped}
        inputs = None
        if self.activations is not None:
            inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }

    def describe(self, codes: int) -> str:
        """'4 bits, groups of 128 inputs, symmetric'. codes: the bits that the codes have."""
        inside = f"{codes} bits" if codes == self.bits else f"{codes} bits in containers of {self.bits}"
        groups = "one scale per row" if self.group_size == -1 else f"groups of {self.group_size} inputs"
        inputs = "" if self.activations is None else ", activations rounded to 8 bits per token by the runtime"
        return f"{inside}, {groups}, {'symmetric' if self.symmetric else 'with zero points'}{inputs}"


def write(plain: Plain, folder: Path, activations: Activations | None, max_shard: int | str) -> dict[str, Any]:
    """Write weights and config into an existing folder.

    Args:
        plain: the model.
        folder: where to write.
        activations: 'int8' to have the reader round activations.
        max_shard: largest size of a file.

    Returns:
        quantized, dense and notes, as `Exported` has them.

    Raises:
        ExportError: no layer can be written quantized, or the weights do not allow the activations.
    """
    schemes: dict[str, Scheme] = {}
    quantized: dict[str, str] = {}
    dense: dict[str, str] = {}
    tensors = plain.other_tensors()
    for path, layer in plain.layers.items():
        reason = _unsaid(path, plain)
        if reason is not None:
            dense[path] = reason
            tensors |= plain.dense_tensors(path)
            continue
        weight = _integer(layer)
        if activations is not None:
            _check_activations(path, weight)
        scheme = schemes[path] = Scheme.of(weight, activations)
        quantized[path] = scheme.describe(weight.grid.bits)
        tensors |= {f"{path}.{name}": tensor for name, tensor in layer_tensors(weight, scheme).items()}
        tensors |= plain.bias(path)
    if not quantized:
        why = "; ".join(dict.fromkeys(dense.values())) or "nothing on it is quantized; apply rtn or awq first"
        raise ExportError(f"compressed-tensors: no layer of the model can be written quantized: {why}.")
    if len(set(schemes.values())) > 1 and not all(scheme.symmetric for scheme in schemes.values()):
        raise ExportError(
            f"compressed-tensors: the model has {len(set(schemes.values()))} kinds of weights, some with zero points, "
            f"and transformers reads all of them as the first kind then. Quantize symmetrically, or all layers alike."
        )
    dense |= dict.fromkeys(plain.other_linears(), "not quantized by the recipe")
    plain.skeleton.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(schemes, list(dense))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {"quantized": quantized, "dense": dense, "notes": _notes(plain, schemes)}


class RoundedTokens(Selection):
    """Inputs rounded to 8 bits, one scale per token, as transformers' reader of compressed-tensors does it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to the values that its codes stand for: round(x / scale) * scale, scale = max|x| / 127.5."""
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        return (x / scale).clamp(-128, 127).round() * scale

    def spec(self) -> dict[str, Any]:
        return {"kind": "rounded_tokens"}


def as_read(plain: Plain, quantized: Iterable[str], activations: Activations | None) -> dict[str, nn.Module]:
    """What transformers' reader computes in place of the quantized layers: scales in its dtype, rounded activations.

    Args:
        plain: the exported model.
        quantized: paths of the layers that `write` wrote quantized.
        activations: as in `write`.

    Returns:
        Path -> the layer as it is read.
    """
    select = None if activations is None else RoundedTokens()
    found: dict[str, nn.Module] = {}
    for path in quantized:
        weight = _integer(plain.layers[path])
        # A layer with zero points is widened before the cast (`dequantize` in the config), another one after it.
        scale = weight.scales() if weight.zero is not None else weight.scales().to(plain.dtype).float()
        found[path] = ActLinear.of(plain.layers[path], weight=weight.rescaled(scale), select=select)
    return found


def quantization_config(schemes: dict[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """The entry of config.json. schemes: path -> its scheme. ignore: linear layers that are dense."""
    kinds = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, kind in enumerate(kinds):
        targets = ["Linear"] if len(kinds) == 1 else [path for path, scheme in schemes.items() if scheme == kind]
        groups[f"group_{index}"] = kind.to_dict(targets)
    found: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": kinds[0].format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
    if not all(kind.symmetric for kind in kinds):
        # transformers 5 builds the compressed layers on the meta device, on which the package (0.20) does not pack zero
        # points, so that their shapes clash; this makes it unpack while it loads. vLLM reads other keys only.
        found["dequantize"] = True
    return found


def layer_tensors(weight: IntegerWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer by their local names, as the table at the head of this file has them."""
    codes, scale = weight.integers().cpu(), weight.scales().cpu().contiguous()
    middle = 2 ** (weight.grid.bits - 1)
    if scheme.format == INTEGER:
        return {"weight": (codes.short() - middle).to(torch.int8), "weight_scale": scale}
    if weight.zero is None:  # symmetric codes mean code - middle, and the reader takes the container's middle
        codes = codes + (2 ** (scheme.bits - 1) - middle)
    found = {
        "weight_packed": pack(codes, scheme.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        found["weight_zero_point"] = pack(weight.zero.cpu().t(), scheme.bits).t().contiguous()
    return found


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, n] of 4 or 8 bits -> int32 [rows, ceil(n * bits / 32)], the first in the lowest bits."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    words = padded.reshape(codes.shape[0], -1, per_word).to(torch.int64) << (bits * torch.arange(per_word))
    total = words.sum(-1)
    return torch.where(total < 2**31, total, total - 2**32).to(torch.int32)


def _integer(layer: ActLinear) -> IntegerWeight:
    assert isinstance(layer.storage, IntegerWeight)
    return layer.storage


def _unsaid(path: str, plain: Plain) -> str | None:
    """Why a changed layer must be written dense, or None."""
    layer = plain.layers[path]
    if isinstance(layer.storage, DenseWeight):
        return "its weight is not quantized"
    if not isinstance(layer.storage, IntegerWeight):
        return f"its weight is stored as {layer.storage.kind}, which is not written here"
    if path in plain.transposed:
        return "it is a Conv1D in the plain model, and readers of compressed-tensors quantize Linear layers only"
    if layer.storage.grid.group_axis == "output":
        return "its scales are per input channel and group of outputs, and compressed-tensors groups inputs only"
    return None


def _check_activations(path: str, weight: IntegerWeight) -> None:
    grid = weight.grid
    if not grid.symmetric or grid.group_size not in (-1, weight.shape[1]):
        groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
        raise ExportError(
            f"activations: 'int8' was given, and {path} has {groups}, "
            f"{'symmetric' if grid.symmetric else 'with zero points'}; readers take int8 activations over symmetric "
            f"weights with one scale per row only. Apply rtn with bits: 8, group_size: -1, symmetric: true."
        )


def _notes(plain: Plain, schemes: dict[str, Scheme]) -> tuple[str, ...]:
    """What a reader will do, and what vLLM would not load though transformers does."""
    notes = ["scales are stored in float32; a reader that computes in 16 bits rounds them to its dtype"]
    if any(scheme.activations for scheme in schemes.values()):
        notes.append(
            "activations are rounded by the runtime, not by actkit: the function differs from the model's in memory. "
            "Readers differ too: transformers divides the range by 127.5, vLLM by 127"
        )
    if any(not scheme.symmetric and scheme.bits == 8 for scheme in schemes.values()):
        notes.append("vLLM: its kernels take no zero points with 8 bits; use symmetric weights there")
    sizes = sorted({scheme.group_size for scheme in schemes.values()} - set(KERNEL_GROUPS))
    if sizes:
        known = ", ".join(map(str, KERNEL_GROUPS[1:]))
        notes.append(f"vLLM: its kernels take groups of {known} or whole rows, not of {', '.join(map(str, sizes))}")
    for path in plain.layers:
        parent, _, leaf = path.rpartition(".")
        for names in FUSED:
            if leaf == names[0]:
                found = {schemes.get(f"{parent}.{name}") for name in names}
                if len(found) > 1:
                    notes.append(f"vLLM: {', '.join(names)} of {parent} are one layer there and need one scheme")
    return tuple(notes)
