"""Data for calibration, search and measurement: embedded text and digits, and whatever the user brings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actkit.core.forward.stream import Stream as Stream
    from actkit.data.batches import Batches as Batches
    from actkit.data.images import digits as digits
    from actkit.data.loading import load_data as load_data
    from actkit.data.text import SPLITS as SPLITS
    from actkit.data.text import Document as Document
    from actkit.data.text import Split as Split
    from actkit.data.text import documents as documents
    from actkit.data.text import sentences as sentences

# Read on first use, so that the words of the corpus do not cost an import of torch.
_HOMES = {
    "Batches": "actkit.data.batches",
    "Stream": "actkit.core.forward.stream",
    "digits": "actkit.data.images",
    "load_data": "actkit.data.loading",
    "SPLITS": "actkit.data.text",
    "Document": "actkit.data.text",
    "Split": "actkit.data.text",
    "documents": "actkit.data.text",
    "sentences": "actkit.data.text",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
