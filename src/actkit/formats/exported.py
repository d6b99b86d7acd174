"""What an export did: which layers are quantized and how, which are dense and why, and whether it was read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actkit.core.ground.memory import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from actkit.formats.reading import Reading


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        folder: what was written.
        format: 'compressed-tensors', 'gguf' or 'dense'.
        quantized: path -> how its weight is stored.
        dense: path -> why it is not quantized.
        notes: what else a user of the files must know.
        disk_bytes: of the whole folder.
        reading: what plain transformers read back in a fresh process; None without a proof.
    """

    folder: Path
    format: str
    quantized: dict[str, str]
    dense: dict[str, str]
    notes: tuple[str, ...]
    disk_bytes: int
    reading: Reading | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "folder": str(self.folder),
            "format": self.format,
            "quantized": self.quantized,
            "dense": self.dense,
            "notes": list(self.notes),
            "disk_bytes": self.disk_bytes,
            "reading": None if self.reading is None else self.reading.to_dict(),
        }

    def table(self) -> Table:
        """Layers by how they are stored, dense ones by reason, notes, bytes, and what was read back."""
        from rich.text import Text

        from actkit.core.ground.tables import PlainTable

        found = PlainTable(show_header=False, title=f"{self.folder}, {self.format}", title_justify="left", box=None)
        found.add_column(no_wrap=True)
        found.add_column(overflow="fold")
        for line in summary(self.quantized):
            found.add_row("quantized", Text(line))
        for line in summary(self.dense):
            found.add_row("left dense", Text(line))
        for note in self.notes:
            found.add_row("note", Text(note))
        found.add_row("on disk", format_bytes(self.disk_bytes))
        found.add_row("read back", Text("not requested" if self.reading is None else self.reading.describe()))
        return found


def summary(entries: dict[str, str]) -> list[str]:
    """One line per text, with how many paths have it: '42 layers (first ... last): 4 bits, ...'."""
    grouped: dict[str, list[str]] = {}
    for path, text in entries.items():
        grouped.setdefault(text, []).append(path)
    return [f"{_layers(paths)}: {text}" for text, paths in grouped.items()]


def _layers(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} layers ({paths[0]} ... {paths[-1]})"
