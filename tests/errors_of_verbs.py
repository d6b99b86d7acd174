"""How a user meets the errors of `verbs`: one function per way, which raises it."""

from __future__ import annotations

from types import SimpleNamespace

from tiny_models import build

from actkit import verbs
from actkit.cli.main import _prompts
from error_proofs import HOST, STACK, Place, proof

proof(lambda p: verbs.generate(build("llama"), "a"))


proof(lambda p: verbs.train(build("llama"), [HOST]))


@proof
def no_proof(p: Place) -> None:
    failed = SimpleNamespace(passed=False, describe=lambda: "folder DOES NOT RELOAD")
    p.patch.setattr("actkit.core.measure.proof.prove", lambda *_, **__: failed)
    verbs.apply_and_save(build("llama"), STACK, p.path / "new")


proof(lambda p: verbs.profile(build("llama"), sequnces=3))


proof(lambda p: _prompts(None, None, None))


proof(lambda p: _prompts("one", None, 2))


proof(lambda p: _prompts(None, p.path / "nowhere", None))


@proof
def an_empty_line(p: Place) -> None:
    (p.path / "prompts.txt").write_text("one\n\nthree\n")
    _prompts(None, p.path / "prompts.txt", None)
