"""How a user meets the errors of `search`: one function per way, which raises it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import batches, build

from actkit.core.store.activation_store import harvest
from actkit.search import journal
from actkit.search.profile import profile as measure_profile
from actkit.search.report import render
from actkit.search.search import optimize
from actkit.search.splits import split_data
from error_proofs import HOST, Place, missing, proof

HEADER = {"settings": {"seed": 0}}


proof(lambda p: measure_profile(build("llama"), []))


@proof
def a_profile_of_batches_and_a_store(p: Place) -> None:
    store = harvest(build("llama"), "block.output", batches("llama"), p.path / "acts", progress=False)
    measure_profile(build("llama"), batches("llama"), store=store)


proof(lambda p: split_data([HOST], build("llama"), None))


proof(lambda p: measure_profile(build("llama"), HOST))


proof(lambda p: optimize(build("llama"), out=p.path / "new", data="random", minutes=1e-9, speed=False, progress=False))


def a_journal(p: Place) -> Path:
    made = journal.Journal.start(p.path / "journal.jsonl", HEADER)
    made.add("candidate", key="a", loss=0.25)
    return made.path


def damaged(p: Place, before: bytes, after: bytes) -> Any:
    path = a_journal(p)
    path.write_bytes(path.read_bytes().replace(before, after))
    return journal.Journal.resume(path, HEADER)


proof(lambda p: journal.Journal.resume(p.file("{", "journal.jsonl"), HEADER))


proof(lambda p: damaged(p, b'"schema": 2', b'"schema": 1'))


proof(lambda p: journal.Journal.resume(a_journal(p), {"settings": {"seed": 1}}))


proof(lambda p: journal.Journal.resume(p.path / "nowhere", HEADER))


proof(lambda p: damaged(p, b"0.25", b"0.26"))


proof(lambda p: damaged(p, b'{"kind": "candidate"', b'{"kind" "candidate"'))


proof(lambda p: (missing("plotly", p), measure_profile(build("llama"), [HOST], progress=False).figure()))


proof(lambda p: (missing("jinja2", p), render(None)))


proof(lambda p: optimize(build("llama"), out=p.file("x", "file")))


proof(lambda p: (p.file("x", "thesis.txt"), optimize(build("llama"), out=p.path)))


proof(lambda p: (p.file("x", "thesis.txt"), optimize(build("llama"), out=p.path, overwrite=True)))


proof(lambda p: optimize(build("mlp"), out=p.path / "new", data=batches("mlp")))
