"""How a user meets the errors of `vanillanet`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import build
from torch import nn

from actkit.core.recipe.runner import apply
from actkit.functions.vanillanet import deepen
from actkit.functions.vanillanet.deepen import Collapse, Deepen
from actkit.functions.vanillanet.faded import FadeActivations
from error_proofs import Place, proof, run

proof(lambda p: FadeActivations().attach(build("mlp")))


proof(lambda p: run(Deepen(where="nothing"), kind="mlp"))


proof(lambda p: run(Collapse(), kind="mlp"))


@proof
def collapsed_too_early(p: Place) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    apply(model, Deepen(), [torch.randn(2, 3)], progress=False)
    model[0].act.strength.fill_(0.5)  # type: ignore[union-attr, operator]
    apply(model, Collapse(), [torch.randn(2, 3)], progress=False)


@proof
def a_fold_that_differs(p: Place) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    apply(model, Deepen(), [torch.randn(2, 3)], progress=False)
    p.patch.setattr(deepen, "_largest_gap", lambda module, new: 1.0)
    apply(model, Collapse(), [torch.randn(2, 3)], progress=False)
