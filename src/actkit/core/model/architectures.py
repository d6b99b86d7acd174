"""One declarative row per architecture family, by model_type.

A model_type is listed only if its modeling file has exactly this layout and a test reads every site of it. What
depends on the configuration or differs between the blocks of a model is a small function beside the row (`adapt`).
"""

from __future__ import annotations

from actkit.core.model import gpt_rows, llama_rows
from actkit.core.model.architecture_rows import (
    Architecture,
    AttentionRow,
    ExpertsRow,
    LayersRow,
    MlpRow,
    NormRow,
    Role,
)

__all__ = [
    "Architecture",
    "AttentionRow",
    "ExpertsRow",
    "LayersRow",
    "MlpRow",
    "NormRow",
    "Role",
    "find_architecture",
    "known_model_types",
    "register_architecture",
]

_rows: dict[str, Architecture] = {}


def register_architecture(row: Architecture) -> None:
    """Make a family known.

    Args:
        row: describes it.

    Raises:
        ValueError: another row describes one of its model types already.
    """
    for model_type in row.model_types:
        if _rows.get(model_type, row) != row:
            raise ValueError(f"model_types: {model_type!r} is described already by the row {_rows[model_type].name!r}.")
    _rows.update(dict.fromkeys(row.model_types, row))


def find_architecture(model_type: str | None) -> Architecture | None:
    """Return the row of a model type, or None.

    Args:
        model_type: of the config; a model changed by actkit ('actkit_llama') has the row of its base.
    """
    return _rows.get((model_type or "").removeprefix("actkit_"))


def known_model_types() -> tuple[str, ...]:
    """Return all model types that have a row, sorted."""
    return tuple(sorted(_rows))


for _row in (*llama_rows.ROWS, *gpt_rows.ROWS):
    register_architecture(_row)
