"""How a user meets the errors of `catalogue`: one function per way, which raises it."""

from __future__ import annotations

from actkit import catalogue
from error_proofs import proof

ENTRY = "[[paper]]" + catalogue.CATALOGUE.read_text(encoding="utf-8").split("[[paper]]")[1]


proof(lambda p: catalogue.paper("nothing"))


proof(lambda p: catalogue.papers(family="nothing"))


proof(
    lambda p: (
        p.file("{", "wina.json"),
        p.patch.setattr(catalogue, "EVIDENCE", p.path),
        catalogue.paper("wina").evidence,
    )
)


proof(
    lambda p: (
        p.file("{}", "wina.json"),
        p.patch.setattr(catalogue, "EVIDENCE", p.path),
        catalogue.paper("wina").evidence,
    )
)


proof(lambda p: catalogue.load(p.file("[", "papers.toml")))


proof(lambda p: catalogue.load(p.file("[[paper]]\nslug = 'a'\n", "papers.toml")))


proof(lambda p: catalogue.load(p.file(ENTRY + "odd = 1\n", "papers.toml")))


proof(lambda p: catalogue.load(p.file(ENTRY + ENTRY, "papers.toml")))
