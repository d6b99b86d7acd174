"""How a user meets the errors of `kernels`: one function per way, which raises it."""

from __future__ import annotations

import torch

from actkit.kernels import operators, process
from error_proofs import Place, proof


@proof
def a_gradient(p: Place) -> None:
    operators.check_gradient(torch.ones(1, requires_grad=True))


@proof
def forked(p: Place) -> None:
    p.patch.setattr(process, "_started_in", -1)
    process.follow_torch_threads(9)
