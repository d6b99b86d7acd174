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
from actkit.core.store.quantized_source import ADAPTER
from actkit.formats import compressed_tensors, dense, gguf_file, gguf_settings, peft_adapter
from actkit.formats.exported import Exported, summary
from actkit.formats.plain import Plain

if TYPE_CHECKING:
    from actkit.core.measure.evaluation import Evaluation

# name -> the package that reads it beside transformers
FORMATS = {"compressed-tensors": "compressed_tensors", "gguf": "gguf", "dense": None}
SAME = {"transformers": "dense"}  # other names of a format


def export(
    model: nn.Module,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    adapter: bool = False,
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
        format: 'compressed-tensors' (transformers, vLLM), 'gguf' (llama.cpp) or 'dense' (transformers), which may be
            called 'transformers' too.
        adapter: write low-rank corrections as a peft adapter, in the folder `adapter` inside; compressed-tensors only.
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
        ValueError: the format is unknown, or has no adapter.
    """
    folder, format = Path(folder), SAME.get(format, format)
    check(format, folder, overwrite=overwrite, proof=proof, adapter=adapter)
    plain = read(model, format, adapter=adapter)
    file = f"{folder.resolve().name}.gguf" if format == "gguf" else None
    with complete_or_nothing(folder) as temporary:
        if file is not None:
            said = gguf_file.write(plain, temporary / file, tokenizer)
        else:
            copy_companions(model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            writer = dense if format == "dense" else compressed_tensors
            said = writer.write(plain, temporary, max_shard)
            if adapter:
                said["notes"] = (*said["notes"], peft_adapter.write(plain, temporary / ADAPTER))
        notes = [*summary(said["quantized"]), *summary(said["dense"]), *said["notes"]]
        card = card_of(model, evaluation, **_card(model, format, file, adapter), notes=notes, **(measured or {}))
        (temporary / "README.md").write_text(card.text(), encoding="utf-8")
    reading = None
    unread = None if file is None else gguf_settings.unread(plain)
    if unread is not None:
        said["notes"] = (*said["notes"], f"not read back: {unread}")
    elif proof:
        from actkit.formats.reading import compare

        if file is not None:
            as_read = gguf_file.as_read(plain, said["quantized"])
        elif format == "dense":
            as_read = dense.as_read(plain)
        else:
            as_read = compressed_tensors.as_read(plain, said["quantized"])
        if adapter:
            as_read = peft_adapter.as_read(plain, as_read)
        reading = compare(model, folder, as_read=as_read, gguf_file=file)
        if not reading.passed:
            raise ExportError(f"{folder}: {reading.describe()}. The folder is left for inspection; report it.")
    return Exported(folder, format, disk_bytes=folder_bytes(folder), reading=reading, **said)


def _card(model: nn.Module, format: str, file: str | None, adapter: bool) -> dict[str, Any]:
    """What the card of an exported model says differently from that of a saved one."""
    base_class = getattr(type(model), "actkit_base", type(model)).__name__
    if format == "gguf":
        return {
            "library": "gguf",
            "tags": ["gguf"],
            "made": f"A `{base_class}` written by actkit as GGUF; llama.cpp and what builds on it load it.",
            "use": f'from llama_cpp import Llama\n\nmodel = Llama("path/to/this/folder/" + {file!r})\n',
        }
    use = f'from transformers import {base_class}\n\nmodel = {base_class}.from_pretrained("path/to/this/folder")\n'
    if format == "dense":
        made = f"A `{base_class}` written by actkit with dense weights; transformers loads it without actkit."
        return {"library": "transformers", "tags": [], "made": made, "use": use}
    if adapter:
        use = f"from peft import PeftModel\n{use}"
        use += f'model = PeftModel.from_pretrained(model, "path/to/this/folder/{ADAPTER}")\n'
    return {
        "library": "transformers",
        "tags": ["compressed-tensors"],
        "made": f"A `{base_class}` written by actkit as compressed-tensors; transformers (with the package "
        f"compressed-tensors{' and peft' if adapter else ''}) and vLLM load it without actkit.",
        "use": use,
    }


def read(model: nn.Module, format: str, *, adapter: bool = False) -> Plain:
    """Read what a format would write of a model; raise ExportError if it would not."""
    plain = Plain.of(model, corrections=adapter or format == "dense")
    if format == "gguf":
        gguf_settings.refuse(plain)
    elif format == "dense":
        dense.refuse(plain)
    if adapter:
        peft_adapter.refuse(plain)
    return plain


def check(format: str, folder: str | Path, *, overwrite: bool, proof: bool, adapter: bool = False) -> None:
    """Raise what `export` would raise before it looks at the model."""
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} was given, allowed are {', '.join(FORMATS)}.")
    if adapter and format != "compressed-tensors":
        raise ValueError(
            f"adapter: True was given with the format {format!r}; an adapter is written beside 'compressed-tensors' "
            f"only. Leave it out: 'dense' merges corrections into the weights."
        )
    needed = [FORMATS[format]] if proof or format == "gguf" else []
    for package in (*needed, *(["peft"] if adapter and proof else [])):
        if package is not None and importlib.util.find_spec(package) is None:
            extra = "finetune" if package == "peft" else "export"
            instead = "" if format == "gguf" else ", or pass proof=False to write without reading back"
            raise ImportError(
                f"format {format!r}: the package {package} is missing; pip install 'actkit[{extra}]'{instead}."
            )
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    if folder.exists() and not (replaceable(folder) or any(folder.glob("*.gguf"))):
        raise CheckpointError(
            f"folder: {folder} holds something else than a model, which overwriting would delete; choose another "
            f"folder, or remove this one yourself."
        )
