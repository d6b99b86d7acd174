"""A folder in transformers' own format: which class it is, which dtype its tensors have, and that every key matches.

What the tensors say counts, and not what `config.json` says of them: its `dtype` may be another one. Quantized weights
are read as the numbers that they stand for (`quantized_source.py`). If `config.json` names no class, a language
model whose head is tied to its embedding holds the same tensors as one without a head; such a folder is refused.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from actkit.core.edit.changes import SourceGrid
from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.modules import tied_names
from actkit.core.layers.hidden_act import enter_those_of
from actkit.core.layers.keeps_dtype import SHORT, at_least_float32, kept_parameters
from actkit.core.store.pretrained import find_class
from actkit.core.store.quantized_source import is_code, quantization_of, read_dequantized, refuse_unread

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADAPTER = "adapter_config.json"


def load_folder(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[nn.Module, SourceGrid | None]:
    """Load a folder that holds a config.json and safetensors files.

    Args:
        folder: a local one.
        dtype: None for that of the tensors: the one with the most bytes, to which the others are cast.
        trust_remote_code: run code that the folder brings.

    Returns:
        The model, and how its weights were quantized, None if they were not.

    Raises:
        CheckpointError: naming the file or the keys.
    """
    import transformers

    settings, config = _config(folder, trust_remote_code)
    quantization = quantization_of(settings)
    if quantization is not None:
        refuse_unread(quantization, folder)
    files = weight_files(folder)
    grid = None
    try:
        kinds = kinds_of(files)
        cls = class_of(config, folder, list(kinds), trust_remote_code)
        dtype = dtype or stored_dtype(kinds, folder, quantized=quantization is not None)
        given: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": True}
        if quantization is not None:
            tensors, grid = read_dequantized(files, quantization, dtype)
            given = {"pretrained_model_name_or_path": None, "config": _dense(config), "state_dict": tensors}
        loaded: Any = cls.from_pretrained(
            **given,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: its weights are not readable ({error}); copy or download the folder again."
        ) from error
    model, info = loaded
    _check_keys(model, info, folder)
    _widen_coefficients(model, files)
    if quantization is not None and model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    for note in () if grid is None else grid.notes:
        warnings.warn(f"{folder}: {note}.", stacklevel=4)  # at the call of actkit.load
    return model, grid


def _config(folder: Path, trust_remote_code: bool) -> tuple[dict[str, Any], Any]:
    """The entries of config.json, and the config that transformers makes of them."""
    import transformers
    from transformers import CONFIG_MAPPING

    refuse_adapter(folder)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if settings.get("model_type") not in CONFIG_MAPPING and settings.get("model_type") in registry.model_names():
            registry.model_class(settings["model_type"])  # a class of ours over transformers makes itself known
        if "AutoConfig" in (settings.get("auto_map") or {}) and settings.get("model_type") not in CONFIG_MAPPING:
            _trusted(folder, trust_remote_code)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        enter_those_of(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} does not read it ({error}); copy or "
            f"download the folder again, or install a transformers that knows the model."
        ) from error
    return settings, config


def build_empty(folder: Path) -> tuple[nn.Module, list[Path]] | str:
    """Build the model of a folder in transformers' own format without its values, and list the files that hold them.

    Args:
        folder: a local one.

    Returns:
        The model, in the dtype of its tensors, and the files; or why its tensors cannot be put in one by one.

    Raises:
        CheckpointError: as `load_folder`.
    """
    import transformers
    from transformers.initialization import no_init_weights

    settings, config = _config(folder, False)
    if settings.get("auto_map"):
        return "its model class may be code in the repository"
    if quantization_of(settings) is not None:
        return "its weights are quantized by another package, and are dequantized when they are read"
    files = weight_files(folder)
    try:
        kinds = kinds_of(files)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: its weights are not readable ({error}); copy or download the folder again."
        ) from error
    cls, before = class_of(config, folder, list(kinds), False), torch.get_default_dtype()
    config.dtype = stored_dtype(kinds, folder)
    torch.set_default_dtype(config.dtype)
    try:
        with no_init_weights():
            model: Any = cls(config)
    except Exception as error:  # each config class checks its values in its own way; `load_folder` says what is wrong
        return f"no {cls.__name__} can be built from its config ({error})"
    finally:
        torch.set_default_dtype(before)
    if (
        kept_parameters(model)
        or model._keep_in_fp32_modules_strict
        or (model._keep_in_fp32_modules and config.dtype == torch.float16)
    ):
        return f"a {cls.__name__} keeps some of its weights in float32"
    model.tie_weights()
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, files


def _widen_coefficients(model: nn.Module, files: list[Path]) -> None:
    """Give coefficients that keep float32 the values of the files again, which transformers rounds to `dtype`."""
    kept = {name: model.get_parameter(name) for name in kept_parameters(model)}
    short = {name for name, parameter in kept.items() if parameter.dtype in SHORT}
    for path in files if short else ():
        with safe_open(path, framework="pt") as file:
            for name in short & set(file.keys()):
                kept[name].data = at_least_float32(file.get_tensor(name))
    for name in short:  # those that a quantized or an older file has by another name
        kept[name].data = at_least_float32(kept[name].data)


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder of PEFT's, which holds an adapter."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: it holds an adapter ({ADAPTER}), which changes another model's layers. Merge it first: "
            f"peft.AutoPeftModel.from_pretrained(folder).merge_and_unload().save_pretrained(merged), and give that "
            f"folder, or the merged model."
        )


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that hold the model: those of the index, the one file, or all.

    Args:
        folder: of a model.

    Raises:
        CheckpointError: there is none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not readable ({error}); copy or download the folder again.") from error
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            f"{folder}: it holds no *.safetensors file; actkit reads no pickle, convert the weights first."
        )
    return found


def kinds_of(files: list[Path]) -> dict[str, tuple[str, int]]:
    """Return tensor -> (dtype as safetensors names it, number of values), from the files' headers alone.

    Args:
        files: of safetensors.
    """
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_dtype(), math.prod(part.get_shape())
    return found


def stored_dtype(kinds: dict[str, tuple[str, int]], folder: Path, *, quantized: bool = False) -> torch.dtype:
    """Return the dtype that most bytes of the floating tensors have; float32 without any.

    Args:
        kinds: tensor -> (dtype as safetensors names it, values).
        folder: named in errors.
        quantized: codes and their scales do not count.

    Raises:
        CheckpointError: float8 weights that nothing says the scale of.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name, (kind, values) in kinds.items():
        if kind.startswith("F8") and not quantized:
            raise CheckpointError(
                f"{folder}: {name} is stored in float8, and config.json does not say how it is scaled "
                f"(quantization_config); load the original weights."
            )
        if kind in FLOATS and not (quantized and is_code(name)):
            sizes[FLOATS[kind]] += values * FLOATS[kind].itemsize
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def class_of(config: Any, folder: Path, names: list[str], trust_remote_code: bool) -> Any:
    """Return the model class of a folder.

    Args:
        config: of the model.
        folder: that holds it.
        names: of its tensors.
        trust_remote_code: whether code that it brings may be run.

    Raises:
        CheckpointError: nothing says which class it is, or its code is not trusted.
    """
    import transformers

    stated = (getattr(config, "architectures", None) or [None])[0]
    cls = find_class(stated) if stated else None
    if cls is not None:
        return cls
    if getattr(config, "auto_map", None):
        return remote_class(config.auto_map, stated, folder, trust_remote_code)
    headless: Any = transformers.MODEL_MAPPING.get(type(config), None)
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if stated is None and causal is None:
        return transformers.AutoModel
    if stated is None and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        prefix = f"{causal.base_model_prefix}."  # of names that were written from a model with a head
        if any(name.startswith(prefix) for name in names):
            return causal  # if its head is not tied, a missing one is refused by name
    given = "names no class" if stated is None else f"names the class {stated}, which transformers does not have,"
    known = " or ".join(f'["{found.__name__}"]' for found in (causal, headless) if found is not None)
    raise CheckpointError(
        f"{folder / 'config.json'}: it {given} in architectures, so that nothing says which head the model has; "
        f"write {known or 'its class'} there, with or without the head."
    )


def remote_class(auto_map: dict[str, Any], stated: str | None, folder: Path, trust_remote_code: bool) -> Any:
    """Return the model class that a folder's own code defines.

    Args:
        auto_map: of config.json.
        stated: the name of the class, as config.json has it.
        folder: that holds the code.
        trust_remote_code: whether it may be run.

    Raises:
        CheckpointError: the code is not trusted.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    _trusted(folder, trust_remote_code)
    models = {name: ref for name, ref in auto_map.items() if name.startswith("AutoModel")}
    by_name = [name for name, ref in models.items() if str(ref).rpartition(".")[2] == stated]
    auto = next((name for name in (*by_name, "AutoModelForCausalLM", "AutoModel", *models) if name in models), None)
    if auto is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: auto_map names no model class; copy or download the folder again."
        )
    cls: Any = get_class_from_dynamic_module(models[auto], folder)
    cls.register_for_auto_class(auto)  # so that transformers writes the code beside what it saves
    return cls


def _trusted(folder: Path, trust_remote_code: bool) -> None:
    if not trust_remote_code:
        raise CheckpointError(
            f"{folder}: its model class is code in the repository; pass trust_remote_code=True (--trust-remote-code) "
            f"if you trust it."
        )


def _dense(config: Any) -> Any:
    """The config without what it says of quantized weights."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def _check_keys(model: nn.Module, info: dict[str, Any], folder: Path) -> None:
    tied = set(tied_names(model))
    found = {
        "missing": sorted(set(info["missing_keys"]) - tied),
        "unexpected": sorted(
            key for key in info["unexpected_keys"] if not key.endswith((".position_ids", "rotary_emb.inv_freq"))
        ),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    problems = [f"{what}: {', '.join(keys[:8])}" for what, keys in found.items() if keys]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit {type(model).__name__}; {'; '.join(problems)}.")
