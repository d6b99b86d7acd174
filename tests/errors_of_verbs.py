"""How a user meets the errors of `verbs`: one function per way, which raises it."""

from __future__ import annotations

from types import SimpleNamespace

from tiny_models import build

from actkit import verbs
from error_proofs import HOST, STACK, Place, proof

proof(lambda p: verbs.generate(build("llama"), "a"))


proof(lambda p: verbs.train(build("llama"), [HOST]))


@proof
def no_proof(p: Place) -> None:
    failed = SimpleNamespace(passed=False, describe=lambda: "folder DOES NOT RELOAD")
    p.patch.setattr("actkit.core.measure.proof.prove", lambda *_, **__: failed)
    verbs.apply_and_save(build("llama"), STACK, p.path / "new")


proof(lambda p: verbs.profile(build("llama"), sequnces=3))
