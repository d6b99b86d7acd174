"""`export`: a changed model as a folder that loads without actkit, and a report of what the format could not say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.ground.errors import CheckpointError, ExportError
from actkit.core.ground.whole_folder import complete_or_nothing
from actkit.core.measure.cost import folder_bytes
from actkit.core.store.card import card_of
from actkit.core.store.checkpoint import check_target, copy_companions, replaceable
from actkit.formats import compressed_tensors, gguf_file
from actkit.formats.exported import Exported, summary
from actkit.formats.plain import Plain

if TYPE_CHECKING:
    from actkit.core.measure.evaluation import Evaluation

FORMATS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf"}  # name -> the package that reads it


def export(
    model: nn.Module,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    tokenizer: Any = None,
    evaluation: Evaluation | None = None,
    measured: dict[str, Any] | None = None,
    overwrite: bool = False,
    proof: bool = True,
    max_shard: int | str = "4GB",
) -> Exported:
    """Write a model to a folder that others read without actkit.

    Args:
        model: a changed model.
        folder: where to write.
        format: 'compressed-tensors' (transformers, vLLM) or 'gguf' (llama.cpp).
        tokenizer: written beside the weights, into the file for GGUF.
        evaluation: what `evaluate` measured of the model, for the card (README.md).
        measured: the same as fields of a card.
        overwrite: replace a checkpoint at `folder`.
        proof: load the folder in a fresh process with transformers alone and compare outputs.
        max_shard: largest size of a file, bytes or '4GB'.

    Returns:
        What is quantized, what is dense and why, and the proof.

    Raises:
        ExportError: the format cannot say something (the folder is then not written), or the proof fails (it is left
            for inspection).
        CheckpointError: the folder exists or cannot be written.
        ImportError: the package that the format needs is missing.
        ValueError: the format is unknown.
    """
    folder = Path(folder)
    check(format, folder, overwrite=overwrite, proof=proof)
    plain = read(model, format)
    file = f"{folder.resolve().name}.gguf" if format == "gguf" else None
    with complete_or_nothing(folder) as temporary:
        if file is not None:
            said = gguf_file.write(plain, temporary / file, tokenizer)
        else:
            copy_companions(model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            said = compressed_tensors.write(plain, temporary, max_shard)
        notes = [*summary(said["quantized"]), *summary(said["dense"]), *said["notes"]]
        card = card_of(model, evaluation, **_card(model, format, file), notes=notes, **(measured or {}))
        (temporary / "README.md").write_text(card.text(), encoding="utf-8")
    reading = None
    unread = None if file is None else gguf_file.unread(plain)
    if unread is not None:
        said["notes"] = (*said["notes"], f"not read back: {unread}")
    elif proof:
        from actkit.formats.reading import compare

        if file is None:
            as_read = compressed_tensors.as_read(plain, said["quantized"])
        else:
            as_read = gguf_file.as_read(plain, said["quantized"])
        reading = compare(model, folder, as_read=as_read, gguf_file=file)
        if not reading.passed:
            raise ExportError(f"{folder}: {reading.describe()}. The folder is left for inspection; report it.")
    return Exported(folder, format, disk_bytes=folder_bytes(folder), reading=reading, **said)


def _card(model: nn.Module, format: str, file: str | None) -> dict[str, Any]:
    """What the card of an exported model says differently from that of a saved one."""
    base_class = getattr(type(model), "actkit_base", type(model)).__name__
    if format == "gguf":
        return {
            "library": "gguf",
            "tags": ["gguf"],
            "made": f"A `{base_class}` written by actkit as GGUF; llama.cpp and what builds on it load it.",
            "use": f'from llama_cpp import Llama\n\nmodel = Llama("path/to/this/folder/" + {file!r})\n',
        }
    return {
        "library": "transformers",
        "tags": ["compressed-tensors"],
        "made": f"A `{base_class}` written by actkit as compressed-tensors; transformers (with the package "
        f"compressed-tensors) and vLLM load it without actkit.",
        "use": f"from transformers import {base_class}\n\n"
        f'model = {base_class}.from_pretrained("path/to/this/folder")\n',
    }


def read(model: nn.Module, format: str) -> Plain:
    """Read what a format would write of a model; raise ExportError if it would not."""
    plain = Plain.of(model)
    if format == "gguf":
        gguf_file.refuse(plain)
    return plain


def check(format: str, folder: str | Path, *, overwrite: bool, proof: bool) -> None:
    """Raise what `export` would raise before it looks at the model."""
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} was given, allowed are {', '.join(FORMATS)}.")
    needed = FORMATS[format]
    if (proof or format == "gguf") and importlib.util.find_spec(needed) is None:
        instead = "" if format == "gguf" else ", or pass proof=False to write without reading back"
        raise ImportError(f"format {format!r}: the package {needed} is missing; pip install 'actkit[export]'{instead}.")
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    if folder.exists() and not (replaceable(folder) or any(folder.glob("*.gguf"))):
        raise CheckpointError(
            f"folder: {folder} holds something else than a model, which overwriting would delete; choose another "
            f"folder, or remove this one yourself."
        )
