"""`actkit export MODEL OUT --format packed`: a folder that the decoder maps as it lies, tokenizer and all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actkit.core.ground.errors import CheckpointError, ExportError
from actkit.core.ground.memory import format_bytes
from actkit.core.ground.whole_folder import complete_or_nothing
from actkit.core.model.anatomy import anatomy
from actkit.core.store import checksums
from actkit.core.store.checkpoint import check_target, copy_companions, replaceable
from actkit.runtime import tables
from actkit.runtime.blocks import described
from actkit.runtime.decoder import Decoder
from actkit.runtime.families import form_of
from actkit.runtime.packed import WEIGHTS, is_packed, open_packed, write_packed

if TYPE_CHECKING:
    from rich.table import Table

COMPARED = 8  # tokens that the folder is tried with


@dataclass(frozen=True)
class PackedExport:
    """A packed folder.

    Attributes:
        folder: what was written.
        threads: that it is packed for.
        weight_bytes: of the packed matrices.
        disk_bytes: of the whole folder.
        tokens: whose logits the mapped folder gave bit for bit; 0 if it was not tried.
    """

    folder: Path
    threads: int
    weight_bytes: int
    disk_bytes: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**vars(self), "folder": str(self.folder), "format": "packed"}

    def table(self) -> Table:
        """Threads, bytes and proof."""
        from actkit.core.ground.tables import PlainTable

        found = PlainTable(show_header=False, title=f"{self.folder}, packed", title_justify="left", box=None)
        found.add_row("threads", str(self.threads))
        found.add_row("packed weights", format_bytes(self.weight_bytes))
        found.add_row("on disk", format_bytes(self.disk_bytes))
        tried = f"the logits of {self.tokens} tokens are the same, bit for bit" if self.tokens else "not requested"
        found.add_row("read back", tried)
        return found


def check_packed(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise what `export_packed` would raise before it looks at the model."""
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    if folder.exists() and not (replaceable(folder) or is_packed(folder)):
        raise CheckpointError(
            f"folder: {folder} holds something else than a model, which overwriting would delete; choose another "
            f"folder, or remove this one yourself."
        )


def export_packed(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    threads: int | None = None,
    overwrite: bool = False,
    proof: bool = True,
) -> PackedExport:
    """Write a model as the decoder packs it.

    Args:
        model: that the decoder takes; its weights may still be in its files (`core.store.pending`).
        folder: where to write.
        tokenizer: written beside the weights; that of the model's source comes along by itself.
        threads: that will decode; None for torch's number.
        overwrite: replace a checkpoint at `folder`.
        proof: decode some tokens from the folder, and compare.

    Returns:
        What was written.

    Raises:
        UnsupportedModelError: the decoder does not take the model.
        CheckpointError: the folder exists or cannot be written.
        ExportError: the folder gives other logits than the decoder that it was written from; it is left.
    """
    folder = Path(folder)
    check_packed(folder, overwrite=overwrite)
    config: Any = model.config
    context = config.max_position_embeddings
    tokens = list(range(1, 1 + min(COMPARED, context, config.vocab_size - 1)))
    with Decoder(model, capacity=len(tokens), threads=threads) as decoder:
        blocks = [described(model, block) for block in anatomy(model).blocks]
        with complete_or_nothing(folder) as temporary:
            copy_companions(model, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            for name in ("config.json", "generation_config.json"):  # the header holds both, and no other loader may try
                (temporary / name).unlink(missing_ok=True)
            write_packed(decoder, temporary, tables.rotaries(model, blocks, form_of(model, blocks), context), tokenizer)
            checksums.write(temporary, leave_out=(WEIGHTS,))  # whose digests are in the header
        if proof:
            with Decoder(open_packed(folder), capacity=len(tokens), activations=decoder.activations) as mapped:
                if not all(torch.equal(mapped([token]), decoder([token])) for token in tokens):
                    raise ExportError(
                        f"{folder}: decoded from there, a token's logits are others than before it was written. The "
                        f"folder is left for inspection; report it."
                    )
        return PackedExport(
            folder,
            decoder.threads,
            decoder.nbytes,
            sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            len(tokens) if proof else 0,
        )
