"""How a user meets the errors of `polycom`: one function per way, which raises it."""

from __future__ import annotations

from tiny_models import batches, build

from actkit.functions.polycom.degrees import polynomial_degrees
from error_proofs import proof

proof(lambda p: polynomial_degrees(build("llama"), batches("llama"), progress=False))
