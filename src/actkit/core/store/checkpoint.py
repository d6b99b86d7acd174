"""Save and load: a changed model is its base architecture, a list of edits, and a strict set of tensors.

A folder holds `actkit.json` (schema, edits, recipe, files), the weights in `actkit-*.safetensors`, and for a
transformers model its config and whatever stood beside the original weights (tokenizer, chat template, generation
config, processor, pooling); `actkit.sha256` holds the digests of them all, which loading checks. Writing goes to a
temporary folder that is renamed at the end, so that a killed or failed save leaves the old checkpoint whole. No pickle;
names in a file resolve only among installed classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Hashable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.edit.changes import Changes, Source, SourceGrid
from actkit.core.edit.edits import ATTENTION, describe_module, get_module, place_of, replay, set_module
from actkit.core.forward.hooks import refuse_compiled_or_sharded
from actkit.core.forward.named_functions import unknown_function
from actkit.core.ground import offload, processes, registry
from actkit.core.ground.errors import ActkitError, CheckpointError, RecipeError
from actkit.core.ground.machine import versions
from actkit.core.ground.memory import format_bytes, parameter_bytes, parse_bytes
from actkit.core.ground.modules import is_pretrained, is_within, memory_of
from actkit.core.ground.whole_folder import complete_or_nothing, recover
from actkit.core.layers.attention_function import AttentionFunction, describe_function, function_of, make_function
from actkit.core.layers.foreign_layers import refuse_foreign_layers
from actkit.core.layers.hidden_act import enter_those_of, own_names
from actkit.core.store import checksums, pretrained
from actkit.core.store.card import Measured, card_of
from actkit.core.store.filling import fill
from actkit.core.store.mapped_arrays import HEADER
from actkit.core.store.pretrained import base_type
from actkit.core.store.transformers_folder import ADAPTER, load_folder, refuse_adapter, remote_class

SCHEMA = 2
MANIFEST = "actkit.json"
MODELS = (MANIFEST, "config.json", ADAPTER)  # a folder with one of these holds a model, or a part of one
GRID = "source_grid.json"  # beside a plain checkpoint whose weights came from a quantized source
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".msgpack", ".gguf", ".index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
CHAT_TEMPLATES = "additional_chat_templates"  # as transformers names the folder
CODE = ".py"  # of a repository that brings its own; run only if it is trusted
BESIDE = (".txt", ".jinja", ".model", ".vocab", ".merges", ".tiktoken")  # and .json: tokenizers, templates
SETTINGS = (MANIFEST, "config.json", "generation_config.json", GRID)
NOT_COPIED = ("config.json", "README.md", MANIFEST, "training.json", GRID)


# -- saving ------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    card: str | None = None,
    evaluation: Measured | None = None,
    results: dict[str, Any] | None = None,
    max_shard: int | str = "4GB",
    keep_others: bool = False,
) -> Path:
    """Write a model to a folder that `load` reads back exactly.

    A transformers model that actkit has not changed is written in transformers' own format. Several processes
    (`core.ground.processes.together`) all call it; the first one writes, and the others wait for it.

    Args:
        model: of transformers, or your own.
        folder: to write.
        tokenizer: saved beside it; that of the model's source comes along by itself.
        overwrite: replace an existing checkpoint, only once the new one is complete.
        card: text of README.md; by default it says what the model is and what `evaluation` measured.
        evaluation: what `evaluate` gave.
        results: further measured numbers, kept in actkit.json.
        max_shard: largest weights file, bytes or '4GB'.
        keep_others: of a replaced folder, keep the files that are not the model's (a tokenizer).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists or is no checkpoint, the disk is full, a tensor has no values, the `spec()`
            of your model is no JSON, or the model computes what loading would not build again.
        UnsupportedModelError: the model is compiled or sharded, or has adapters or quantized layers of another package.
    """
    check_savable(model)
    folder = Path(folder)
    processes.on_first(
        f"saved to {folder.name}",
        lambda: _save(model, folder, tokenizer, overwrite, card, evaluation, results, max_shard, keep_others),
    )
    return folder


def check_savable(model: nn.Module) -> None:
    """Refuse a model that a folder cannot hold; ask before long work, not after it.

    Args:
        model: to be saved.

    Raises:
        UnsupportedModelError: it is compiled or sharded, or has adapters or quantized layers of another package.
        CheckpointError: a function or a module computes what loading would not build again, or the config builds a
            model with other tensors.
    """
    refuse_compiled_or_sharded(model)
    refuse_foreign_layers(model)
    function = unknown_function(model, known=(AttentionFunction,))
    if function is not None:
        raise CheckpointError(
            f"save: no folder holds what this model computes: {function}, save, and set yours again after loading."
        )
    if not is_pretrained(model):
        return
    known = changes.of(model)
    edits = known.edits if known else []
    _check_attention(model, edits)
    replaced = tuple(f"{path}." for edit in edits if (path := place_of(edit)))
    base = getattr(type(model), "actkit_base", type(model))
    houses = {"torch", "transformers", "actkit", base.__module__.partition(".")[0]}
    named = own_names(model.config.to_dict()).values()  # type: ignore[union-attr, operator]
    for path, module in model.named_modules():
        known_class = type(module).__module__.partition(".")[0] in houses or type(module) in named
        if not known_class and not f"{path}.".startswith(replaced or ("\0",)):
            raise CheckpointError(
                f"save: a {type(module).__name__} stands at {path}, which loading a {base.__name__} would not build "
                f"again; change the model through actkit.apply only, or take out what was put in."
            )
    from actkit.core.store.skeleton import check_rebuilds

    check_rebuilds(model, edits)  # type: ignore[arg-type]


def _check_attention(model: nn.Module, edits: list[dict[str, Any]]) -> None:
    """Refuse a model whose attention loading would compute by another function, if one of the two is of ours."""
    function = function_of(model)
    now = None if function is None else describe_function(function)
    recorded = next((edit["value"] for edit in reversed(edits) if edit.get("configure") == ATTENTION), None)
    made = None if recorded is None else make_function(recorded)
    then = None if made is None else describe_function(made)
    if now != then:
        raise CheckpointError(
            f"save: attention is computed by {now or model.config._attn_implementation!r}, "  # type: ignore[union-attr]
            f"loading the folder would compute it by {then or 'the function of the model'!s}; change it by a transform "
            f"or an edit (actkit.apply), which are recorded, not by set_attn_implementation."
        )


def _save(
    model: nn.Module,
    folder: Path,
    tokenizer: Any,
    overwrite: bool,
    card: str | None,
    evaluation: Measured | None,
    results: dict[str, Any] | None,
    max_shard: int | str,
    keep_others: bool,
) -> None:
    check_target(folder, overwrite=overwrite)
    if folder.exists() and not replaceable(folder):
        raise CheckpointError(
            f"folder: {folder} holds something else than a checkpoint, which overwriting would delete; "
            f"choose another folder, or remove this one yourself."
        )
    _check_space(model, folder)
    with complete_or_nothing(folder) as temporary:
        copy_companions(model, temporary)
        if keep_others and folder.exists():
            _copy_others(folder, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        known = changes.of(model)
        plain = is_pretrained(model) and (known is None or not known.edits)
        if plain:
            model.save_pretrained(temporary)  # type: ignore[operator]
            grid = changes.source_grid(model)
            if grid is not None:
                write_grid(temporary / GRID, grid)
        else:
            _write(model, temporary, parse_bytes(max_shard), {**_measured(evaluation), **(results or {})})
        readme = temporary / "README.md"
        if card is not None or evaluation is not None or not readme.exists():
            readme.write_text(card_of(model, evaluation).text() if card is None else card, encoding="utf-8")
        checksums.write(temporary, leave_out=("README.md",))  # a card is there to be edited


def _measured(evaluation: Measured | None) -> dict[str, Any]:
    return {} if evaluation is None else {"evaluation": evaluation.to_dict()}


def check_target(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise CheckpointError if a folder exists and is not to be replaced; ask before long work, not after it."""
    folder = Path(folder)
    recover(folder)
    if folder.exists() and not overwrite:
        raise CheckpointError(
            f"folder: {folder} exists already; choose another one, or pass overwrite=True (--overwrite)."
        )


def replaceable(folder: Path) -> bool:
    """Whether a folder is empty or a checkpoint, so that replacing it deletes nothing else."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or any((folder / name).exists() for name in MODELS)


def _copy_others(folder: Path, temporary: Path) -> None:
    for path in folder.iterdir():
        own = path.name in (*SETTINGS, checksums.NAME) or path.name.endswith(WEIGHTS_SUFFIXES)
        if own or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, temporary / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, temporary / path.name)


def _write(model: nn.Module, folder: Path, max_shard: int, results: dict[str, Any]) -> None:
    known, grid = changes.of(model) or Changes(), changes.source_grid(model)
    tensors, tied = _tensors(model)
    files = _write_shards(model, tensors, folder, max_shard)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "base_class": None,
        "model_class": type(model).__name__,
        "model": _own_model(model),
        "architecture": known.architecture,
        "edits": _current(model, known.edits),
        "recipe": known.recipe,
        "tied": tied,
        "files": files,
        "results": results,
        "source_grid": None if grid is None else grid.to_dict(),
        "versions": versions(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if is_pretrained(model):
        base = getattr(type(model), "actkit_base", type(model))
        manifest["base_class"] = base.__name__
        config = model.config.to_dict()  # type: ignore[union-attr, operator]
        config["architectures"] = [type(model).__name__]
        config.pop("_name_or_path", None)
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str), encoding="utf-8")
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _own_model(model: nn.Module) -> dict[str, Any] | None:
    """The registered name and the spec of a user's own model; None if it is not registered.

    Raises:
        CheckpointError: what `spec()` gives is not what JSON gives back.
    """
    name = registry.model_name(type(model))
    if name is None:
        return None
    spec = model.spec()  # type: ignore[operator]
    try:
        same = json.loads(json.dumps(spec)) == spec
    except (TypeError, ValueError):
        same = False
    if not same or not isinstance(spec, dict):
        raise CheckpointError(
            f"save: the spec() of {type(model).__name__} is {spec!r}; give a dict that JSON gives back as it was, with "
            f"text as keys and no tuples."
        )
    return {"name": name, "spec": spec}


def _current(model: nn.Module, edits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The edits with the specs of the modules as they are now: the model may have got another dtype since."""
    current: list[dict[str, Any]] = []
    later: list[str] = []  # paths that a later edit replaces
    for edit in reversed(edits):
        key = "insert" if "insert" in edit else "replace"
        path = edit.get(key)
        if path is not None:
            if not any(is_within(path, other) for other in later):
                described = describe_module(get_module(model, path))
                if described["module"] != edit["module"]:
                    raise CheckpointError(
                        f"save: a {described['module']} stands at {path}, where the edits put a {edit['module']}; "
                        f"change the model through actkit.apply only."
                    )
                edit = {key: path, **described}
            later.append(path)
        current.append(edit)
    return current[::-1]


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The persistent tensors, each once, and alias -> name for tied ones; offloaded ones are on the meta device."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    offloaded = {name: names[0] for names in offload.shared_tensors(model) for name in names}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            if offload.place_of(model, name) is None:
                raise CheckpointError(f"save: {name} is on the meta device and has no values; load the weights first.")
            same: Hashable = offloaded.get(name, name)
        else:
            same = memory_of(name, tensor)
        if same in first:
            tied[name] = first[same]
            continue
        first[same] = name
        tensors[name] = tensor.detach() if tensor.is_meta else tensor.detach().cpu().contiguous()
    return tensors, tied


def _write_shards(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, max_shard: int
) -> dict[str, dict[str, Any]]:
    """Write the tensors to as many files as needed; returns file -> its size and its tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > max_shard:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files: dict[str, dict[str, Any]] = {}
    for index, shard in enumerate(shards, start=1):
        file = folder / f"actkit-{index:05d}-of-{len(shards):05d}.safetensors"
        here = {name: offload.value_of(model, name, tensor).contiguous() for name, tensor in shard.items()}
        save_file({name: tensor.clone() if _is_view(tensor) else tensor for name, tensor in here.items()}, file)
        files[file.name] = {"bytes": file.stat().st_size, "tensors": sorted(shard)}
    return files


def _is_view(tensor: Tensor) -> bool:
    return tensor.nbytes != tensor.untyped_storage().nbytes()


def copy_companions(model: nn.Module, folder: Path) -> None:
    """Copy what stood beside the original weights: tokenizer, templates, processor, pooling modules."""
    origin = changes.source(model)
    source = Path(origin.options.get("files", origin.name)) if origin else None
    if origin is None or source is None or not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        if (
            path.name in NOT_COPIED
            or path.name.endswith(WEIGHTS_SUFFIXES)
            or path.name.startswith((".", "actkit-", "__"))
        ):
            continue
        if path.is_dir():
            small = all(not p.name.endswith(WEIGHTS_SUFFIXES) for p in path.rglob("*"))
            numbered = path.name[:1].isdigit()  # sentence-transformers' module folders
            if small and (numbered or path.name == CHAT_TEMPLATES):
                shutil.copytree(path, folder / path.name)
        elif path.suffix in (".json", *BESIDE) or (path.suffix == CODE and origin.options.get("trust_remote_code")):
            shutil.copy2(path, folder / path.name)


def _check_space(model: nn.Module, folder: Path) -> None:
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    needed = parameter_bytes(model)
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01 + 2**20:
        raise CheckpointError(
            f"save: {folder} needs {format_bytes(needed)}, {format_bytes(free)} are free there; free some space."
        )


# -- loading -----------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    base: Callable[[], nn.Module] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model in evaluation mode from a local folder or a hub id; every key must match.

    A file that `actkit.sha256` lists must be as it was saved.

    Args:
        source: folder, or hub id.
        device: where its tensors go.
        dtype: default as stored, which is what most bytes of the tensors are; scales and thresholds of changed layers,
            and learned coefficients (`KeepsDtype.keeps`), stay in float32.
        base: builds the unchanged model, for a folder of your own nn.Module whose class is not registered.
        trust_remote_code: run code that a hub repository brings; off unless asked.

    Returns:
        The model.

    Raises:
        CheckpointError: names the file or the keys.
    """
    folder = resolve(source)
    dtype = parse_dtype(dtype)
    checksums.verify(folder, of_the_model)
    grid = None
    if (folder / MANIFEST).exists():
        model, grid = _load_changed(folder, base, trust_remote_code)
        if dtype is not None:
            _cast(model, dtype)
    elif (folder / "config.json").exists():
        model, grid = load_folder(folder, dtype, trust_remote_code)
        if (folder / GRID).exists():
            grid = _grid(folder / GRID, _read_json(folder / GRID))
    else:
        refuse_adapter(folder)
        refuse_packed(folder)
        raise CheckpointError(f"{source}: the folder holds neither {MANIFEST} nor config.json, so it is no checkpoint.")
    model = model.to(device).eval()
    options: dict[str, Any] = {
        "device": str(device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    if base is None:
        options["trust_remote_code"] = trust_remote_code
        model.__dict__[changes.SOURCE] = Source.of(str(folder), model, grid=grid, **options)
    return model


def refuse_packed(folder: Path) -> None:
    """Raise CheckpointError for a folder that was packed for a decoder."""
    if (folder / HEADER).exists():
        raise CheckpointError(
            f"{folder}: it is packed for decoding ({HEADER}), which `actkit generate` reads and nothing else; load the "
            f"model that it was exported from."
        )


def load_into(model: nn.Module, folder: Path) -> None:
    """Bring a model to a later state of itself: a folder that was saved from it after more edits or training.

    Args:
        model: with the edits that it had before; changed in place, on the device where it is.
        folder: that `save` wrote.

    Raises:
        CheckpointError: the folder is damaged, or holds another model.
    """
    checksums.verify(folder, of_the_model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    changed = holds_record(folder)
    later = None if changed else load_folder(folder, None, False)[0]
    _take_back(model, folder, read_manifest(folder)["edits"] if changed else [], later)
    if later is None:
        _load_changed(folder, lambda: model, False)
    else:  # trained, and not changed otherwise
        tensors, shared = _tensors(later)
        fill(model, tensors, shared, folder)
    model.to(device)


def _take_back(model: nn.Module, folder: Path, edits: list[dict[str, Any]], later: nn.Module | None) -> None:
    """Put the layers of a later state in the place of what it restored, and let the model's record forget that."""
    known = changes.of(model)
    kept: list[dict[str, Any]] = []
    gone: list[str] = []
    for edit in known.edits if known else ():
        if len(kept) < len(edits) and _is_same(edit, edits[len(kept)]):
            kept.append(edit)
        else:
            gone.append(str(place_of(edit)))
    if not gone:
        return
    assert known is not None
    later = later or _load_changed(folder, None, False)[0]
    for path in sorted(gone, key=len):  # outer ones first: those inside have gone with them
        if not any(path != other and is_within(path, other) for other in gone):
            set_module(model, path, get_module(later, path))
    pretrained.restore(model, replace(known, edits=kept))


def _is_same(edit: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two described edits change the same place in the same way; the module's settings may be newer."""
    parts = [{name: value for name, value in each.items() if name != "spec"} for each in (edit, other)]
    return parts[0] == parts[1]


def of_the_model(name: str) -> bool:
    """Whether a file of a saved folder is one that the model is built from (and not its tokenizer's)."""
    return name in SETTINGS or name.endswith((*WEIGHTS_SUFFIXES, CODE))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Another dtype for the weights. Buffers that are not saved (rotary tables) keep theirs, as transformers does."""
    kept = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    if is_pretrained(model):
        model.config.dtype = dtype  # type: ignore[union-attr]


def holds_record(folder: str | Path) -> bool:
    """Whether a folder says what was changed: what `save` wrote of a changed model, and not of a plain one."""
    return (Path(folder) / MANIFEST).exists()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a folder's actkit.json.

    Args:
        folder: that `save` wrote.

    Raises:
        CheckpointError: it is missing, malformed or newer.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no {MANIFEST}; it is not a folder that actkit saved.")
    checksums.verify(Path(folder), lambda name: name == MANIFEST)
    manifest = _read_json(path)
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(f"{path}: schema {schema} is newer than this actkit reads ({SCHEMA}); upgrade actkit.")
    kinds = {"schema": int, "model_class": str, "architecture": str, "edits": list, "recipe": list, "tied": dict,
             "files": dict, "results": dict}  # fmt: skip
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    wrong += [] if isinstance(manifest.get("base_class"), str | None) else ["base_class"]
    wrong += [] if _is_own_model(manifest.get("model")) else ["model"]
    wrong += [f"files: {name}" for name in manifest.get("files", {}) if Path(name).name != name] if not wrong else []
    if wrong or not isinstance(schema, int) or schema < 1:
        what = ", ".join(wrong or ["schema"])
        raise CheckpointError(f"{path}: {what} is missing or malformed; the folder is damaged, save the model again.")
    return manifest


def _is_own_model(described: Any) -> bool:
    """Whether this is what `_own_model` wrote; earlier versions wrote nothing."""
    if described is None:
        return True
    kinds = {"name": str, "spec": dict}
    return isinstance(described, dict) and all(isinstance(described.get(key), kind) for key, kind in kinds.items())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); the folder is damaged, save the model again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no JSON object; the folder is damaged, save the model again.")
    return content


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer beside a model.

    Args:
        source: folder, or hub id.
        trust_remote_code: as in `load`.

    Returns:
        The tokenizer of transformers.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    folder = resolve(source)
    if not has_tokenizer(folder):
        raise CheckpointError(f"tokenizer: {folder} has none; give text as token batches, or use --data random.")
    checksums.verify(folder, lambda name: not of_the_model(name))
    if (folder / MANIFEST).exists() and (folder / "config.json").exists():
        return tokenizer_for(folder, _read_json(folder / "config.json"), trust_remote_code)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def tokenizer_for(folder: Path, settings: dict[str, Any], trust_remote_code: bool) -> Any:
    """Load the tokenizer of a changed model: the one that transformers chooses for the model it came from.

    Args:
        folder: that holds its files.
        settings: of the model's config.json.
        trust_remote_code: run code that the folder brings.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    kind = base_type(str(settings.pop("model_type", "")))
    try:
        config = AutoConfig.for_model(kind, **settings)
    except ValueError:  # a model of a repository's own code: the tokenizer's own files say its class
        config = PreTrainedConfig(**settings)
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _load_changed(
    folder: Path, base: Callable[[], nn.Module] | None, trust_remote_code: bool
) -> tuple[nn.Module, SourceGrid | None]:
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder, manifest)
    if base is not None:
        model = base()
        if not isinstance(model, nn.Module):
            raise TypeError(f"base: it gave a {type(model).__name__}; give a function that builds the unchanged model.")
    elif manifest["base_class"] is not None:
        model = build_pretrained(folder, manifest, trust_remote_code)
    else:
        model = _build_own(folder, manifest)
    known = changes.of(model)  # of one that `load_into` goes on with; a base model has none
    try:
        replay(model, manifest["edits"][len(known.edits) if known else 0 :])
    except (ActkitError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the edits do not fit {type(model).__name__}: {error}") from error
    fill(model, tensors, manifest["tied"], folder)
    if is_pretrained(model):
        model.config.dtype = model.dtype  # type: ignore[union-attr]
    pretrained.restore(
        model,
        Changes(manifest["edits"], manifest["recipe"], manifest["architecture"], manifest["base_class"]),
    )
    return model, _grid(folder / MANIFEST, manifest.get("source_grid"))  # earlier versions did not write it


def _build_own(folder: Path, manifest: dict[str, Any]) -> nn.Module:
    """A user's own model, unchanged, from its registered name and its spec."""
    described = manifest.get("model")
    if described is None:  # it was not registered when it was saved, or actkit did not write that yet
        described = {"name": registry.model_name_of_class(manifest["model_class"]), "spec": {}}
    if described["name"] is None:
        raise CheckpointError(
            f"{folder}: it holds a {manifest['model_class']}, which is not a transformers model; pass base= in Python "
            f"(actkit.load), a function that builds the unchanged model, or register its class under actkit.models."
        )
    try:
        cls = registry.model_class(described["name"])
    except RecipeError as error:
        raise CheckpointError(f"{folder}: its model does not load: {error}") from error
    try:
        model = cls.from_spec(described["spec"])
        assert isinstance(model, cls), f"from_spec gave a {type(model).__name__}"
    except Exception as error:  # each class checks its values in its own way
        raise CheckpointError(
            f"{folder}: no {cls.__name__} can be built from its spec {described['spec']} "
            f"({type(error).__name__}: {error}); install the version of its package that saved it, or pass base=."
        ) from error
    return model


def write_grid(path: Path, grid: SourceGrid) -> None:
    """Write how a source was quantized, for a plain checkpoint: `load` reads it beside the weights."""
    path.write_text(json.dumps(grid.to_dict(), indent=2), encoding="utf-8")


def _grid(path: Path, content: dict[str, Any] | None) -> SourceGrid | None:
    try:
        return None if content is None else SourceGrid.from_dict(content)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: source_grid is missing or malformed; the folder is damaged, save the model again."
        ) from error


def build_pretrained(folder: Path, manifest: dict[str, Any], trust_remote_code: bool) -> nn.Module:
    """Build the unchanged transformers model, unfilled; on the CPU, so that rotary tables are computed.

    Args:
        folder: that `save` wrote.
        manifest: as `read_manifest` gives it.
        trust_remote_code: run code that the folder brings.

    Raises:
        CheckpointError: its class is not known, or config.json does not fit it.
    """
    from transformers.initialization import no_init_weights

    settings = _read_json(folder / "config.json")
    name, auto_map = manifest["base_class"], settings.get("auto_map")
    if isinstance(auto_map, dict) and pretrained.find_class(name) is None:
        base: Any = remote_class(auto_map, name, folder, trust_remote_code)
    else:
        base = pretrained.class_by_name(name)
    pretrained.model_class(base)
    for edit in reversed(manifest["edits"]):
        if isinstance(edit, dict) and "before" in edit:  # the base model is built as it was, then replayed
            settings[str(edit.get("configure"))] = edit["before"]
    settings["model_type"] = pretrained.base_type(str(settings.get("model_type", "")))
    try:
        enter_those_of(settings)
        config = base.config_class.from_dict(settings)
        with no_init_weights():
            model = base(config)
    except Exception as error:  # each config class checks its values in its own way
        raise CheckpointError(
            f"{folder / 'config.json'}: no {base.__name__} can be built from it ({error}); copy the folder again, or "
            f"save the model again."
        ) from error
    generation = folder / "generation_config.json"
    if generation.exists() and getattr(model, "generation_config", None) is not None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files_of(folder, manifest):
        try:
            with safe_open(path, framework="pt") as file:
                # copied, because a tensor at an odd place of the file rounds differently (and runs slower)
                tensors |= {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not readable ({error}); copy the folder again, or save the model again."
            ) from error
    return tensors


def files_of(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """List the files that hold a changed model's tensors.

    Args:
        folder: that `save` wrote.
        manifest: as `read_manifest` gives it.

    Raises:
        CheckpointError: one is missing, or has another size than it had.
    """
    found = []
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing; copy the folder again, or save the model again.")
        size = facts.get("bytes") if isinstance(facts, dict) else None
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: it has {path.stat().st_size} bytes, {MANIFEST} says {size}; "
                f"the file is truncated or was changed. Copy the folder again, or save the model again."
            )
        found.append(path)
    return found


def resolve(source: str | Path) -> Path:
    """Find the local folder of a checkpoint; a hub id is downloaded (safetensors and small files only).

    Args:
        source: a folder, or a hub id (owner/name).

    Raises:
        CheckpointError: there is no such folder, or the hub does not give it.
    """
    path = Path(source)
    recover(path)
    if path.is_dir():
        return path
    text = str(source)
    if path.is_file() or text.startswith(("/", ".", "~")) or text.count("/") != 1:
        raise CheckpointError(
            f"model: there is no folder {text!r}; give a folder, a hub id (owner/name) or an embedded model."
        )
    return _download(text)


def _download(name: str) -> Path:
    """The snapshot of a hub model. One attempt: without a network it fails at once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*/config.json", "*.py", checksums.NAME, *(f"*{kind}" for kind in BESIDE)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # the client raises a different type for each way in which a network can fail
        why = f"the download failed ({type(error).__name__}: {error})"
        if isinstance(error, LocalEntryNotFoundError):
            why = "the hub cannot be reached from here, and no earlier download is kept"
        elif isinstance(error, RepositoryNotFoundError | HFValidationError):
            why = "the hub has no such model, or it asks for a login"
        raise CheckpointError(
            f"model: there is no folder {name!r}, and {why}. Check the id and the network, or give a local folder or "
            f"an embedded model."
        ) from error


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Read a dtype from its name.

    Args:
        dtype: a dtype, its name such as 'bfloat16', or None.

    Raises:
        ValueError: it is another name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        dtype.removeprefix("torch.")
    )
    if found is None:
        raise ValueError(f"dtype: {dtype!r} was given, allowed are float32, bfloat16 and float16.")
    return found
