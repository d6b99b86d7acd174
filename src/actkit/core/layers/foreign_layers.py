"""Layers of other packages that are no plain weight: adapters, and layers that keep codes. They are refused by name.

A method that read them would change the wrong tensor, and a saved folder would hold what nobody can load.
"""

from __future__ import annotations

import torch
from torch import nn

from actkit.core.ground.errors import UnsupportedModelError

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool)
CODED = ("torch.ao.nn", "torchao", "bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "optimum.quanto")


def refuse_foreign_layers(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model with adapters or quantized layers of another package."""
    refuse_adapters(model)
    refuse_quantized(model)


def refuse_adapters(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model of PEFT's, or with PEFT's layers (LoRA) inside."""
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__ if _is_of(base, "peft")}
        if "PeftModel" in kinds:
            raise UnsupportedModelError(
                f"model: {name or 'it'} is a {type(module).__name__} of PEFT, which keeps its adapter beside the "
                f"weights. Merge it first: model = model.merge_and_unload()."
            )
        if kinds:
            raise UnsupportedModelError(
                f"model: an adapter layer of PEFT ({type(module).__name__}) stands at {name}. Merge it first: "
                f"merge_and_unload() of the PeftModel; or of each such layer call merge() and put its "
                f"get_base_layer() in its place."
            )


def refuse_quantized(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose layers keep codes of another package, and no plain weight."""
    for name, module in model.named_modules():
        how = _coded(module)
        if how is not None:
            raise UnsupportedModelError(
                f"model: the {type(module).__name__} at {name or 'the top'} is quantized ({how}), so that it has no "
                f"weight to read. Give the original model, or dequantize it (transformers: model.dequantize()); of a "
                f"folder in compressed-tensors, fp8, mxfp4 or GGUF give actkit the folder, which is read dequantized."
            )


def _coded(module: nn.Module) -> str | None:
    """What says that a module keeps codes: its class, or its weight's dtype or class."""
    for package in CODED:
        if any(_is_of(base, package) for base in type(module).__mro__):
            return package
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or "weight" not in name:
            continue
        for package in CODED:
            if _is_of(type(tensor), package):
                return f"{name} is a {type(tensor).__name__} of {package}"
        if tensor.dtype not in PLAIN:
            return f"{name} is {tensor.dtype}"
    return None


def _is_of(cls: type, package: str) -> bool:
    return f"{cls.__module__}.".startswith(f"{package}.")
