"""Opens a language model with its weights left in their files (`pending.py`), if its folder allows that.

What stays out are the weights of linear layers, their low-rank corrections, and embeddings; these are on the meta
device. Names, shapes, kinds and ties of all tensors are checked against the files at once, and so are the digests that
`actkit.sha256` lists. A folder whose tensors transformers would rename, split or dequantize, that brings code of its
own, or whose modules cannot be made without values, is loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.changes import SOURCE, Changes, Source
from actkit.core.edit.edits import replay
from actkit.core.ground.errors import ActkitError
from actkit.core.ground.modules import tied_names
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.linear import ActLinear
from actkit.core.store import checkpoint, checksums, pretrained
from actkit.core.store.filling import assign, fitting, tie
from actkit.core.store.pending import PENDING, Pending
from actkit.core.store.tensor_source import TensorSource
from actkit.core.store.transformers_folder import build_empty


def open_pending(folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Open a language model with its weights left in their files; the whole model if its folder does not allow that.

    Args:
        folder: a local one, as `checkpoint.load` takes it.
        trust_remote_code: run code that the folder brings.

    Returns:
        A model in evaluation mode; `pending_of` says what it lacks.

    Raises:
        CheckpointError: as `checkpoint.load`.
    """
    folder = Path(folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    manifest = (folder / checkpoint.MANIFEST).exists()
    if not (folder / "config.json").exists():  # a model of the user's own, or none
        return checkpoint.load(folder, **options)
    checksums.verify(folder, checkpoint.of_the_model)
    found = _changed(folder) if manifest else _plain(folder)
    if found is None:
        return checkpoint.load(folder, **options)
    model, files, tied, known = found
    source = TensorSource(files)
    shapes = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in source.tensors.items()
    }
    if known is None and set(shapes) | set(tied) != set(model.state_dict()):
        return checkpoint.load(folder, **options)  # by other names, which transformers knows how to read
    fits, tied = fitting(model, shapes, tied, folder)
    outside = set(_held_back(model))
    weights = Pending(folder, source, options=options)
    for name, in_file in zip(fits, shapes):  # in the same order
        if name in outside:
            like = _cast(fits[name], model, known)
            assign(model, name, like)
            weights.stored[name], weights.dtypes[name] = in_file, like.dtype
        else:
            assign(model, name, _cast(source.read(in_file), model, known))
    tie(model, tied)
    weights.tied = {alias: name for alias, name in tied.items() if name in outside}
    left = [name for name, value in _tensors(model) if value.is_meta and not weights.names(name)]
    if left:  # values that no file holds, of a module that computes them where it is made
        return checkpoint.load(folder, **options)
    if known is not None:
        model.config.dtype = model.dtype  # type: ignore[union-attr]
        pretrained.restore(model, known)
    model.__dict__[PENDING] = weights
    model.__dict__[SOURCE] = Source(str(folder), {}, options)
    return model.eval()


Found = tuple[nn.Module, list[Path], dict[str, str], Changes | None]


def _plain(folder: Path) -> Found | None:
    """An empty model, its files, ties of names that the files leave out, and what was changed on it."""
    built = build_empty(folder)
    if isinstance(built, str):
        return None
    model, files = built
    present = TensorSource(files).tensors
    tied = {alias: name for alias, name in tied_names(model).items() if alias not in present}
    return model, files, tied, None


def _changed(folder: Path) -> Found | None:
    manifest = checkpoint.read_manifest(folder)
    if manifest["base_class"] is None or pretrained.find_class(manifest["base_class"]) is None:
        return None
    model = checkpoint.build_pretrained(folder, manifest, False)
    try:
        with torch.device("meta"):
            replay(model, manifest["edits"])
    except (ActkitError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return None  # a module that cannot be made without values; `checkpoint.load` says it if the edits are wrong
    known = Changes(manifest["edits"], manifest["recipe"], manifest["architecture"], manifest["base_class"])
    return model, checkpoint.files_of(folder, manifest), manifest["tied"], known


def _held_back(model: nn.Module) -> Iterator[str]:
    """Names of the tensors that stay in the files."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, ActLinear | QuantizedEmbedding):
            inner = {"storage": module.storage, "correction": getattr(module, "correction", None)}
            for part, stored in inner.items():
                if stored is not None:
                    yield from (f"{prefix}{part}.{name}" for name, _ in _tensors(stored))
        elif isinstance(module, nn.Linear | nn.Embedding):
            yield f"{prefix}weight"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _cast(value: Tensor, model: nn.Module, known: Changes | None) -> Tensor:
    """A tensor of a plain folder in the dtype that most of its bytes have; one of ours as it is."""
    config: Any = model.config
    return value if known is not None or not value.is_floating_point() else value.to(config.dtype)
