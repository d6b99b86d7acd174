"""compressed-tensors: quantized weights as plain transformers (with the package of that name) and vLLM read them.

Formats, after the source of compressed-tensors 0.20 and of vLLM's loader:

    pack-quantized   weight_packed int32 [out, ceil(in * bits / 32)], codes from the low bits up, unsigned
                     weight_scale float32 [out, groups], weight_shape int64 [2]
                     asymmetric also weight_zero_point int32 [ceil(out * bits / 32), groups], packed down the outputs
    int-quantized    of layers that round their inputs to 8 bits: weight int8 [out, in], weight_scale float32 [out, 1],
                     and input_scale float32 [1] if one scale serves all tokens; readers round the inputs

    float-quantized        weight float8_e4m3fn [out, in], weight_scale float32 [out, 1]
    nvfp4-pack-quantized   weight_packed uint8 [out, in / 2], weight_scale float8_e4m3fn [out, in / 16],
                           weight_global_scale float32 [1], by which that is divided
    mxfp4-pack-quantized   weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32], exponents + 127

A code stands for (code - zero) * scale on both sides, so codes move over as they are. Containers have 2, 3, 4 or 8
bits; 5 to 7 are written in 8. compressed-tensors packs 3 bits side by side from 0.18 on, earlier versions otherwise,
and the config says the version. Scales are float32; a reader that computes in 16 bits rounds them to its dtype when it
loads.

Keys and values in fp8 (`quantize_cache: {format: fp8}`) are a `kv_cache_scheme` and k_scale, v_scale [1] of each
attention, by which readers round what enters the cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.grids.floats import FloatGrid, fp8, mxfp4, nvfp4
from actkit.core.grids.packing import pack_codes
from actkit.core.ground.errors import ExportError
from actkit.core.layers.cache_rounding import CHILD, CacheRounding
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import CodedWeight, DenseWeight, FloatWeight, IntegerWeight
from actkit.formats.plain import Plain

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
FLOATS = {"float-quantized": fp8(), "nvfp4-pack-quantized": nvfp4(), "mxfp4-pack-quantized": mxfp4()}
NEED_16_BITS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")  # the package widens them to bfloat16
KERNEL_GROUPS = (-1, 32, 64, 128)  # group sizes that vLLM's kernels for packed weights take
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one layer each in vLLM, so one scheme each
LAYOUT = "0.20.0"  # the version of compressed-tensors whose layout this is; readers tell old packings of 3 bits by it
CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
READER = 127.5  # what transformers divides the range of a token by; vLLM takes 127


@dataclass(frozen=True)
class Scheme:
    """How one layer's weight is stored.

    Attributes:
        bits: of the container: 2, 3, 4 or 8.
        symmetric: no zero point.
        group_size: -1 is one scale per row.
        inputs: what shares a scale of the inputs, if they are rounded to 8 bits.
        floats: the name of a format of floats; None for integers.
    """

    bits: int
    symmetric: bool
    group_size: int
    inputs: Literal["token", "tensor"] | None = None
    floats: str | None = None

    @classmethod
    def of(cls, weight: IntegerWeight | FloatWeight, inputs: RoundedInputs | None = None) -> Scheme:
        """The scheme of a quantized weight, and of the inputs that it is multiplied with."""
        if isinstance(weight, FloatWeight):
            return cls(weight.grid.bits, True, int(weight.grid.group_size), None, _format_of(weight))
        bits = 8 if inputs is not None or weight.grid.bits > 4 else weight.grid.bits
        size = weight.grid.size(weight.shape[1])  # only groups along the inputs are exported
        shared = None if inputs is None else "token" if inputs.scale is None else "tensor"
        return cls(bits, weight.grid.symmetric, -1 if size == weight.shape[1] else size, shared)  # type: ignore[arg-type]

    @property
    def format(self) -> str:
        """The name that the format has for it."""
        return self.floats or (PACKED if self.inputs is None else INTEGER)

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        """A config group; only keys that every reader knows, as their models forbid others."""
        grouped: dict[str, Any] = {"strategy": "channel"}
        if self.group_size != -1:
            grouped = {"strategy": "group", "group_size": self.group_size}
        if self.floats == "nvfp4-pack-quantized":
            grouped |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        elif self.floats == "mxfp4-pack-quantized":
            grouped |= {"scale_dtype": "torch.uint8"}
        kind = "int" if self.floats is None else "float"
        weights = {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric, "dynamic": False, **grouped}
        inputs = None
        if self.inputs is not None:
            shared = {"dynamic": self.inputs == "token", "strategy": self.inputs}
            inputs = {"num_bits": 8, "type": "int", "symmetric": True, **shared}
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }

    def describe(self, codes: int) -> str:
        """'4 bits, groups of 128 inputs, symmetric'. codes: the bits that the codes have."""
        if self.floats is not None:
            return FLOATS[self.floats].describe()
        inside = f"{codes} bits" if codes == self.bits else f"{codes} bits in containers of {self.bits}"
        groups = "one scale per row" if self.group_size == -1 else f"groups of {self.group_size} inputs"
        by = "per token" if self.inputs == "token" else "by one scale"
        inputs = "" if self.inputs is None else f", inputs rounded to 8 bits {by}"
        return f"{inside}, {groups}, {'symmetric' if self.symmetric else 'with zero points'}{inputs}"


def write(plain: Plain, folder: Path, max_shard: int | str) -> dict[str, Any]:
    """Write weights and config into an existing folder.

    Args:
        plain: the model.
        folder: where to write.
        max_shard: largest size of a file.

    Returns:
        quantized, dense and notes, as `Exported` has them.

    Raises:
        ExportError: no layer can be written quantized, or a layer rounds its inputs as no reader does.
    """
    schemes: dict[str, Scheme] = {}
    quantized: dict[str, str] = {}
    dense: dict[str, str] = {}
    tensors = plain.other_tensors()
    dense |= dict.fromkeys(plain.convolutions, "a convolution; this format holds linear layers")
    for path, layer in plain.layers.items():
        reason = _unsaid(path, plain)
        if layer.inputs is not None:
            _check_inputs(path, layer, reason)
        if reason is not None:
            dense[path] = reason
            tensors |= plain.dense_tensors(path)
            continue
        weight = _coded(layer)
        scheme = schemes[path] = Scheme.of(weight, layer.inputs)
        quantized[path] = scheme.describe(weight.grid.bits)
        tensors |= {f"{path}.{name}": tensor for name, tensor in layer_tensors(weight, scheme).items()}
        if layer.inputs is not None and layer.inputs.scale is not None:
            tensors[f"{path}.input_scale"] = layer.inputs.scale.cpu()
        tensors |= plain.bias(path)
    if not quantized:
        why = "; ".join(dict.fromkeys(dense.values())) or "nothing on it is quantized; apply rtn or awq first"
        raise ExportError(f"compressed-tensors: no layer of the model can be written quantized: {why}.")
    kinds = set(schemes.values())
    if len(kinds) > 1 and not all(scheme.symmetric for scheme in kinds):
        raise ExportError(
            f"compressed-tensors: the model has {len(kinds)} kinds of weights, some with zero points, and transformers "
            f"reads all of them as the first kind then. Quantize symmetrically, or all layers alike."
        )
    if len(kinds) > 1 and plain.corrections:
        raise ExportError(
            f"compressed-tensors: the model has {len(kinds)} kinds of weights, and transformers reads all of them as "
            f"the first kind if it is to unpack them for an adapter. Quantize all layers alike, or export it as dense."
        )
    if plain.caches and (plain.corrections or not all(scheme.symmetric for scheme in kinds)):
        what = "an adapter" if plain.corrections else "zero points"
        raise ExportError(
            f"compressed-tensors: the keys and values of the model are rounded beside {what}, for which transformers "
            f"unpacks the weights while it loads; then it rounds no cache, and says nothing of it. Quantize "
            f"symmetrically and without corrections, or leave quantize_cache out."
        )
    for path, cache in plain.caches.items():
        assert cache.key is not None and cache.value is not None
        tensors |= {f"{path}.k_scale": cache.key.cpu(), f"{path}.v_scale": cache.value.cpu()}
    dense |= dict.fromkeys(plain.other_linears(), "not quantized by the recipe")
    plain.skeleton.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(
        schemes, list(dense), bool(plain.corrections), bool(plain.caches)
    )
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {"quantized": quantized, "dense": dense, "notes": _notes(plain, schemes)}


class _ReadInputs(RoundedInputs):
    """Inputs as transformers' reader rounds them: in their own dtype, and a token's range divided by 127.5."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / READER if self.scale is None else self.scale.to(x.dtype)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        return (x / scale).clamp(-128, 127).round() * scale

    @property
    def half_range(self) -> None:
        """No kernel of ours multiplies them, as it rounds in float32."""


class _ReadFloats(FloatGrid):
    """Floats of 8 bits as transformers' reader rounds to them: in the dtype of the values."""

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        assert scale is not None
        scale = scale.to(x.dtype)
        return (x / scale).clamp(-self.largest, self.largest).to(torch.float8_e4m3fn).to(x.dtype) * scale


def as_read(plain: Plain, quantized: Iterable[str]) -> dict[str, nn.Module]:
    """What transformers' reader computes in place of the quantized layers: scales and rounded inputs in its dtype.

    Args:
        plain: the exported model.
        quantized: paths of the layers that `write` wrote quantized.

    Returns:
        Path -> the layer as it is read, or what rounds the keys and values of an attention.
    """
    found: dict[str, nn.Module] = {}
    for path in quantized:
        weight = _coded(plain.layers[path])
        # With `dequantize` in the config a layer is widened before the cast, else after it.
        before = weight.zero is not None or bool(plain.corrections)
        scale = weight.scales() if before else weight.scales().to(plain.dtype).float()
        if weight.whole is not None:
            scale = weight.scale.view(torch.float8_e4m3fn).float() / _divisor(weight)
        inputs = plain.layers[path].inputs
        read = None if inputs is None else _ReadInputs(inputs.grid, inputs.scale)
        found[path] = ActLinear.of(plain.layers[path], weight=weight.rescaled(scale), inputs=read)
    for path, cache in plain.caches.items():
        read_cache = CacheRounding(scales=(cache.key, cache.value))  # type: ignore[arg-type]
        read_cache.grid = _ReadFloats(4, 3, reserved="nan", scope="tensor")
        found[f"{path}.{CHILD}"] = read_cache
    return found


def quantization_config(
    schemes: dict[str, Scheme], ignore: list[str], unpack: bool = False, cache: bool = False
) -> dict[str, Any]:
    """The entry of config.json.

    Args:
        schemes: path -> its scheme.
        ignore: linear layers that are dense.
        unpack: whether transformers unpacks the weights while it loads.
        cache: whether keys and values are rounded to fp8.
    """
    kinds = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, kind in enumerate(kinds):
        targets = ["Linear"] if len(kinds) == 1 else [path for path, scheme in schemes.items() if scheme == kind]
        groups[f"group_{index}"] = kind.to_dict(targets)
    found: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": LAYOUT,
        "format": kinds[0].format if len({kind.format for kind in kinds}) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": CACHE if cache else None,
    }
    if unpack or not all(kind.symmetric for kind in kinds):
        # This makes transformers unpack while it loads; vLLM reads other keys only. peft looks for weights, and packed
        # layers have none before the first call. With zero points transformers 5 fails otherwise: it builds the packed
        # layers on the meta device, on which the package (0.20) does not pack zero points, so that shapes clash.
        found["dequantize"] = True
    return found


def layer_tensors(weight: IntegerWeight | FloatWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer by their local names, as the table at the head of this file has them."""
    if scheme.floats is not None:
        return _float_tensors(weight, scheme)
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
    """Codes uint8 [rows, n] -> int32 [rows, ceil(n * bits / 32)], side by side, the first in the lowest bits."""
    packed = pack_codes(codes, bits)
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)


def _float_tensors(weight: CodedWeight, scheme: Scheme) -> dict[str, Tensor]:
    codes, scale = weight.codes.cpu(), weight.scale.cpu()
    if scheme.bits == 8:
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    if weight.whole is None:
        return {"weight_packed": codes, "weight_scale": scale}
    packed = {"weight_packed": codes, "weight_scale": scale.view(torch.float8_e4m3fn)}
    return packed | {"weight_global_scale": _divisor(weight).cpu()}


def _divisor(weight: CodedWeight) -> Tensor:
    """What a reader divides the scales of NVFP4 by: float32 [1]."""
    assert weight.whole is not None
    return 1 / weight.whole


def _format_of(weight: FloatWeight) -> str | None:
    """The format that says what a weight in floats holds, or None."""
    if weight.shift is not None:
        return None
    return next((name for name, grid in FLOATS.items() if grid == weight.grid), None)


def _coded(layer: ActLinear) -> IntegerWeight | FloatWeight:
    assert isinstance(layer.storage, IntegerWeight | FloatWeight)
    return layer.storage


def _unsaid(path: str, plain: Plain) -> str | None:
    """Why a changed layer must be written dense, or None."""
    layer = plain.layers[path]
    if isinstance(layer.storage, DenseWeight):
        return "its weight is not quantized"
    if isinstance(layer.storage, FloatWeight) and path not in plain.transposed:
        found = _format_of(layer.storage)
        if found is None:
            return f"its weight is {layer.storage.describe()}; of floats the format has fp8 by rows, NVFP4 and MXFP4"
        if found in NEED_16_BITS and plain.dtype == torch.float32:
            return f"{found} is read into models of 16 bits only; cast this one to bfloat16"
        return None
    if not isinstance(layer.storage, IntegerWeight | FloatWeight):
        return f"its weight is stored as {layer.storage.kind}, which is not written here"
    if path in plain.transposed:
        return "it is a Conv1D in the plain model, and readers of compressed-tensors quantize Linear layers only"
    if layer.storage.grid.group_axis == "output":
        return "its scales are per input channel and group of outputs, and compressed-tensors groups inputs only"
    return None


def _check_inputs(path: str, layer: ActLinear, dense: str | None) -> None:
    """Raise ExportError if no reader rounds a layer's inputs so. dense: why its weight is not written quantized."""
    inputs = layer.inputs
    assert inputs is not None
    only = "readers round inputs to 8 bits without zero points, over symmetric weights with one scale per row only"
    way = (
        "Apply rtn with bits: 8, group_size: -1, symmetric: true and round_inputs as it stands, or keep the model with "
        "actkit.save."
    )
    if inputs.shift is not None or inputs.divisor is not None:
        raise ExportError(
            f"{path}: its inputs are shifted or divided per channel while it runs, which no reader does. Keep the "
            f"model with actkit.save, or use a method that folds this into a norm."
        )
    if dense is not None:
        raise ExportError(f"{path}: its inputs are rounded, and its weight would be dense, as {dense}; {only}. {way}")
    if inputs.half_range is None:
        raise ExportError(f"{path}: its inputs are on another grid ({inputs.describe()}); {only}. {way}")
    stored = layer.storage
    if not isinstance(stored, IntegerWeight):
        raise ExportError(f"{path}: its inputs are rounded, and its weight is in floats; {only}. {way}")
    grid = stored.grid
    if not grid.symmetric or grid.size(layer.in_features) != layer.in_features:
        whole = grid.size(layer.in_features) == layer.in_features
        groups = "one scale per row" if whole else f"groups of {grid.group_size}"
        zeros = "symmetric" if grid.symmetric else "with zero points"
        raise ExportError(f"{path}: its inputs are rounded, and its weight has {groups}, {zeros}; {only}. {way}")


def _notes(plain: Plain, schemes: dict[str, Scheme]) -> tuple[str, ...]:
    """What a reader will do, and what vLLM would not load though transformers does."""
    notes = ["scales are stored in float32; a reader that computes in 16 bits rounds them to its dtype"]
    notes += plain.rewritten(schemes)
    tokens = [path for path, scheme in schemes.items() if scheme.inputs == "token"]
    if tokens:
        ours = {float(plain.layers[path].inputs.half_range or 0) for path in tokens}  # type: ignore[union-attr]
        notes.append(
            f"the range of a token is divided by {' or '.join(f'{each:g}' for each in sorted(ours))} in this model, by "
            f"127.5 in transformers, by 127 in vLLM: with another number the inputs are rounded a little differently"
        )
    few = sorted({scheme.bits for scheme in schemes.values()} & {2, 3})
    if few:
        said = " and ".join(map(str, few))
        notes.append(
            f"vLLM: its kernels take 4 and 8 bits, not {said}; transformers reads them, 3 bits from "
            f"compressed-tensors 0.18 on, which packs them side by side"
        )
    if any(not scheme.symmetric and scheme.bits == 8 for scheme in schemes.values()):
        notes.append("vLLM: its kernels take no zero points with 8 bits; use symmetric weights there")
    sizes = sorted({each.group_size for each in schemes.values() if each.floats is None} - set(KERNEL_GROUPS))
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
