"""How a user meets the errors of `quantization`: one function per way, which raises it."""

from __future__ import annotations

from actkit.quantization import awq, smoothquant_plus
from error_proofs import NAN, Place, proof, run


@proof
def no_ratio(p: Place) -> None:
    p.patch.setattr(awq, "_squared_error", lambda *_: (NAN, 1))
    run(awq.Awq(bits=4, group_size=8, n_grid=2))


@proof
def no_strength(p: Place) -> None:
    p.patch.setattr(smoothquant_plus, "_loss", lambda *_: (NAN, 1))
    run(smoothquant_plus.SmoothQuantPlus(group_size=8, steps=2))
