"""How a user meets the errors of `data`: one function per way, which raises it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny_models import build
from torch import nn

from actkit.data import Batches, load_data, text
from actkit.data.pairs import read_pairs
from error_proofs import HOST, IDS, Place, Words, _t5, missing, proof, raising


def pillow(p: Place) -> None:
    """As if pillow were installed."""
    p.patch.setitem(sys.modules, "PIL", SimpleNamespace(Image=None))


class Marks(Words):
    """One that puts two marks around each text."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


proof(lambda p: Batches([]))


proof(lambda p: load_data(None, _t5(), Words()))


proof(lambda p: load_data(None, build("vit"), Words()))


proof(lambda p: load_data("random", build("llama"), None, length=99))


proof(lambda p: load_data(p.file("words", "a.txt"), build("bert"), Marks(), length=1))


proof(lambda p: load_data("random", build("llama"), None, sequences=0))


proof(lambda p: Batches([HOST], [IDS, IDS]))


proof(lambda p: load_data(p.path / "nowhere.txt", build("llama"), Words()))


proof(lambda p: load_data(p.file("a", "a.csv"), build("llama"), Words()))


proof(lambda p: load_data(p.file(b"\xff\xfe\xff", "a.txt"), build("llama"), Words()))


proof(lambda p: load_data(p.file(" ", "a.txt"), build("llama"), Words()))


proof(lambda p: load_data(p.file('{"a": 1}', "a.jsonl"), build("llama"), Words()))


proof(
    lambda p: (
        p.patch.setattr(Path, "read_text", raising(PermissionError(13, "Permission denied"))),
        load_data(p.file("words", "a.txt"), build("llama"), Words()),
    )
)


proof(lambda p: (pillow(p), load_data(p.path, build("vit"), None)))


proof(lambda p: load_data(p.file("some words", "a.txt"), build("llama"), Words(), sequences=99, length=8))


proof(lambda p: (pillow(p), p.file(b"x", "a.png"), load_data(p.path, build("llama"), None)))


proof(lambda p: load_data("random", nn.Identity(), None))


proof(lambda p: load_data("random", build("llama"), None, split="mine"))


proof(lambda p: load_data([HOST], build("llama"), None, split="test"))


proof(
    lambda p: (
        p.patch.setattr(text, "_library", lambda _: []),
        p.patch.setattr(text, "_topics", list),
        text._corpus.__wrapped__(),
    )
)


proof(lambda p: load_data(None, build("llama"), None))


proof(lambda p: (missing("sklearn.datasets", p), missing("sklearn", p), zoo_digits()))


proof(lambda p: (missing("PIL", p), load_data(p.path, build("vit"), None)))


def zoo_digits() -> Any:
    from actkit.data.images import _all, digits

    _all.cache_clear()
    return digits("test")


# -- pairs -------------------------------------------------------------------------------------------------------------

PAIR = '{"clean": "a b", "corrupted": "a c", "right": "d", "wrong": "e"}'


def pairs(p: Place, text: str, tokenizer: Any = None) -> Any:
    (p.path / "pairs.jsonl").write_text(text)
    return read_pairs(p.path / "pairs.jsonl", build("llama"), tokenizer or Words())


proof(lambda p: read_pairs(None, build("llama"), Words()))


proof(lambda p: read_pairs(p.path, build("llama"), Words(), length=8))


proof(lambda p: read_pairs(p.path / "absent.jsonl", build("llama"), Words()))


@proof
def a_model_without_texts(p: Place) -> None:
    (p.path / "pairs.jsonl").write_text(PAIR)
    read_pairs(p.path / "pairs.jsonl", build("vit"), None)


proof(lambda p: pairs(p, ""))


proof(lambda p: pairs(p, "{"))


proof(lambda p: pairs(p, PAIR.replace("a b", "a b c")))


proof(lambda p: pairs(p, f"{PAIR}\n{PAIR.replace('a b', 'a').replace('a c', 'a')}"))


proof(lambda p: pairs(p, PAIR.replace('"d"', '"d d"')))
