"""Pairs of inputs of equal length, from a .jsonl file: what a model is asked, and what it would be asked otherwise.

    {"clean": "The cat sat on the", "corrupted": "The dog sat on the", "right": " mat", "wrong": " bed"}

A line is a pair: two texts that are equally long, token by token, and the next tokens whose logits are compared. All
pairs of a file have one length, so that a position means the same in each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actkit.core.forward.example import Inputs
from actkit.core.forward.limits import TOKENS, check_length
from actkit.core.forward.texts import check_text
from actkit.core.ground.errors import DataError
from actkit.core.ground.progress import say
from actkit.data.batches import Batches

FIELDS = ("clean", "corrupted", "right", "wrong")
WANTED = 'give a .jsonl file of {"clean": text, "corrupted": text, "right": next token, "wrong": next token}'


def read_pairs(
    source: str | Path | None,
    model: nn.Module,
    tokenizer: Any,
    *,
    sequences: int | None = None,
    length: int | None = None,
    batch_size: int = 8,
    **unused: Any,
) -> Batches:
    """Read pairs from a file.

    Args:
        source: the file.
        model: that is called on them.
        tokenizer: the model's.
        sequences: how many pairs, at most; None for all. A line says so if some are left out.
        length: refused, as pairs have their own.
        batch_size: pairs of a batch.
        unused: what does not change how pairs are read, such as a seed.

    Returns:
        Batches of `input_ids` (the corrupted text), `clean_input_ids`, `right` and `wrong` [pairs], and `tokens`, the
        texts of the first row's tokens.

    Raises:
        DataError: there is no file, a line is no pair, texts of a pair or of two pairs differ in length, or an answer
            is more than one token.
    """
    if source is None or not isinstance(source, str | Path):
        given = "nothing" if source is None else type(source).__name__
        raise DataError(f"data: {given} was given and pairs are read; {WANTED}.")
    if length is not None:
        raise DataError(f"length: {length} was given; pairs are as long as their texts, leave it out.")
    path = Path(source)
    if not path.is_file():
        raise DataError(f"source={str(source)!r} is no file; {WANTED}.")
    if tokenizer is None or Inputs.of(model).vocabulary is None:
        raise DataError(f"data: pairs are texts, and {type(model).__name__} takes none; choose a language model.")
    rows: list[dict[str, list[int]]] = []
    left = 0
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and sequences is not None and len(rows) == sequences:
                left += 1
            elif line.strip():
                rows.append(_pair(line, f"{path}, line {number}", tokenizer, rows[0] if rows else None))
    if not rows:
        raise DataError(f"source={str(source)!r} holds no pair; {WANTED}.")
    if left:
        say(f"pairs: {len(rows)} of {len(rows) + left} are read; sequences (--sequences) sets how many.")
    check_length(model, len(rows[0]["clean"]), "data")
    items = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        clean, corrupted, right, wrong = (torch.tensor([row[name] for row in part]) for name in FIELDS)
        shown = tuple(tokenizer.decode([token]) for token in part[0]["corrupted"])
        batch = {TOKENS: corrupted, f"clean_{TOKENS}": clean, "right": right[:, 0], "wrong": wrong[:, 0]}
        items.append({**batch, "tokens": shown})
    return Batches(items, description=f"{path.resolve().name}, {len(rows)} pairs of {len(rows[0]['clean'])} tokens")


def _pair(line: str, where: str, tokenizer: Any, first: dict[str, list[int]] | None) -> dict[str, list[int]]:
    """Token ids of one line. first: those of the first line, whose length all have."""
    try:
        texts = {name: json.loads(line)[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: not a pair ({error}); {WANTED}.") from error
    for name, text in texts.items():
        check_text(text, f'{where}: "{name}"')
    ids = {
        name: list(tokenizer(text, add_special_tokens=name in FIELDS[:2])["input_ids"]) for name, text in texts.items()
    }
    if len(ids["clean"]) != len(ids["corrupted"]):
        raise DataError(
            f"{where}: the clean text has {len(ids['clean'])} tokens and the corrupted one {len(ids['corrupted'])}; "
            f"pairs need equal lengths, token by token."
        )
    if first is not None and len(ids["clean"]) != len(first["clean"]):
        raise DataError(
            f"{where}: its texts have {len(ids['clean'])} tokens and those of the first pair {len(first['clean'])}; "
            f"give all pairs one length, so that a position means the same in each."
        )
    long = next((name for name in ("right", "wrong") if len(ids[name]) != 1), None)
    if long is not None:
        raise DataError(
            f'{where}: "{long}" is {len(ids[long])} tokens, {texts[long]!r}; give one that is one token, often a word '
            f"with a space before it."
        )
    return ids
