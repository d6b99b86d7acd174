"""The data of a search, in three parts that share no document: to calibrate, to choose, to report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from actkit.core.forward.limits import context_length, vocabulary_size
from actkit.core.ground.errors import DataError
from actkit.data import Batches, Split, load_data

LENGTH, ROWS = 256, 8  # tokens per row, rows per batch
CALIBRATION, SEARCH, TEST = 8_192, 12_288, 24_576  # tokens; IMAGES and SENTENCES are rows
IMAGES = {"calibration": 256, "search": 512, "test": 1024}
SENTENCES = {"calibration": 128, "search": 160, "test": 320}  # each is a document, so few give a narrow interval
RANDOM_ROWS = {"calibration": 16, "search": 16, "test": 32}


@dataclass(frozen=True)
class Splits:
    """The three parts of the data of a search.

    Attributes:
        calibration: what transforms and the profile see.
        search: what chooses.
        test: what is reported.
        length: tokens asked for per row; None for images and given batches.
    """

    calibration: Batches
    search: Batches
    test: Batches
    length: int | None = None

    def parts(self) -> dict[str, Batches]:
        """Return the three by name."""
        return {"calibration": self.calibration, "search": self.search, "test": self.test}

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of each part."""
        return {name: part.fingerprint for name, part in self.parts().items()}

    def to_dict(self) -> dict[str, Any]:
        """Return what each part is, as JSON takes it."""
        return {
            name: {"data": part.description, "rows": part.rows, "tokens": part.tokens, "fingerprint": part.fingerprint}
            for name, part in self.parts().items()
        }


def split_data(source: Any, model: nn.Module, tokenizer: Any, *, seed: int = 0) -> Splits:
    """Split a source into three parts.

    - The embedded data and files are split by their own splits.
    - Random values are split by seed.
    - Given batches are split in order: a half, a quarter, a quarter.

    Args:
        source: as in `load_data`.
        model: that the data are for.
        tokenizer: its tokenizer, or None.
        seed: of what is drawn.

    Returns:
        The parts.

    Raises:
        DataError: fewer than 3 batches are given, or `load_data` cannot read the source.
        ActkitError: what else `load_data` raises.
    """
    length = None
    if vocabulary_size(model) is not None:
        length = min(LENGTH, context_length(model) or LENGTH)
    options: dict[str, Any] = {"length": length, "batch_size": ROWS, "seed": seed}
    if source is not None and not isinstance(source, str) and not hasattr(source, "__fspath__"):
        given = load_data(source, model, tokenizer)
        if len(given) < 3:
            raise DataError(
                f"data: {len(given)} batches were given; a search needs at least 3, as it calibrates, chooses and "
                f"reports on different ones."
            )
        last = max(1, len(given) // 4)
        return Splits(given[: len(given) - 2 * last], given[len(given) - 2 * last : len(given) - last], given[-last:])
    parts: dict[str, Batches] = {}
    names: tuple[tuple[Split, int], ...] = (("calibration", CALIBRATION), ("search", SEARCH), ("test", TEST))
    for name, tokens in names:
        rows = RANDOM_ROWS[name] if source == "random" else None
        whole = load_data(source, model, tokenizer, split=name, sequences=rows, **options)
        parts[name] = _first(whole, tokens, (IMAGES if length is None else SENTENCES)[name])
    return Splits(**parts, length=length)


def _first(batches: Batches, tokens: int, rows: int) -> Batches:
    """The first batches, until they hold so many tokens or rows."""
    for count in range(1, len(batches)):
        part = batches[:count]
        if part.tokens >= tokens or part.rows >= rows:
            return Batches(
                part.items,
                part.document_ids,
                f"{batches.description.rsplit(', ', 1)[0]}, {part.rows} rows, {part.tokens:,} tokens or images",
            )
    return batches
