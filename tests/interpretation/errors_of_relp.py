"""How a user meets the errors of RelP: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actkit.core.model.parts import Norm
from actkit.interpretation.relp.effects import exact_effects, faithfulness, patch_effects
from actkit.interpretation.relp.metrics import LogitDifference
from actkit.interpretation.relp.relp import relp
from actkit.interpretation.relp.results import Node
from actkit.interpretation.relp.rules import RelevanceRules, _norm
from actkit.testing import tiny_model
from error_proofs import Place, missing, proof

BASE = {"input_ids": torch.tensor([[3, 5, 7], [1, 4, 9]])}


def effects(kind: str = "llama", metric: Any = lambda logits: logits.mean(), patch: Any = BASE, **more: Any) -> Any:
    return patch_effects(tiny_model(kind), BASE, patch, metric, progress=False, **more)


proof(lambda p: effects(method="magic"))


proof(lambda p: effects(method="exact", rules=RelevanceRules()))


proof(lambda p: effects(steps=0))


proof(lambda p: effects(patch={"input_ids": torch.ones(2, 5, dtype=torch.int64)}))


proof(lambda p: effects(sites=[]))


proof(lambda p: effects(sites=["layer.input:lm_head"]))


proof(lambda p: effects(sites=["attention.query"]))


proof(lambda p: effects(metric=lambda logits: logits))


proof(lambda p: effects("mixtral"))


proof(lambda p: LogitDifference(torch.ones(2), torch.ones(3)))


proof(lambda p: faithfulness(tiny_model("llama"), {"input_ids": torch.ones(1, 3).long()}, torch.sum, effects(), [1]))


proof(lambda p: faithfulness(tiny_model("llama"), BASE, lambda logits: logits.sum() * 0, effects(), [1]))


@proof
def a_norm_of_another_kind(p: Place) -> None:
    norm = nn.LayerNorm(4)
    _norm(Norm("norm", norm), norm, torch.arange(4.0), torch.full((4,), 9.0))


@proof
def an_activation_that_is_no_module(p: Place) -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.nn.functional.gelu(self.first(x)))

    from actkit.core.model.anatomy import anatomy

    with RelevanceRules().applied(anatomy(Called(), torch.ones(2, 4))):
        pass


@proof
def no_picture(p: Place) -> None:
    found = effects()
    missing("plotly", p)
    found.figure()


proof(lambda p: relp(tiny_model("llama"), [BASE], progress=False))


proof(lambda p: relp(tiny_model("llama"), [], checked=-1))


@proof
def a_node_beyond_the_inputs(p: Place) -> None:
    node = Node("blocks.0.mlp.output", 999, 0.0)
    exact_effects(tiny_model("llama"), BASE, BASE, lambda logits: logits.mean(), [node], progress=False)
