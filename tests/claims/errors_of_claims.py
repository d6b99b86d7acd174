"""How a user meets the errors of `claims`: one function per way, which raises it."""

from __future__ import annotations

import actkit
from actkit import catalogue, claims
from error_proofs import Place, proof

proof(lambda p: actkit.reproduce(next(x.slug for x in catalogue.papers() if x.slug not in claims.slugs())))


proof(lambda p: actkit.reproduce("wina", subject="nothing"))


@proof
def read_only(p: Place) -> None:
    p.patch.setattr(claims.os, "access", lambda *_: False)
    claims.reproduce("wina", record=True)
