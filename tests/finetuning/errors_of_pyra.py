"""How a user meets the errors of `merge_tokens`, PYRA and modules that train whole: one function per way."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actkit.core.recipe.runner import apply
from actkit.finetuning.adapters import AdaptedLayer, Lora
from actkit.finetuning.low_rank_training import train_adapter
from actkit.finetuning.pyra.merge_tokens import MergeTokens
from actkit.finetuning.pyra.merging import bipartite_match
from actkit.finetuning.pyra.modulator import PyraModulator
from actkit.finetuning.pyra.token_sources import token_sources
from actkit.finetuning.s2a.prompts import AddPrompts
from actkit.testing import tiny_batches, tiny_model
from error_proofs import Place, proof


def merged(kind: str = "vit", **settings: Any) -> Any:
    return apply(tiny_model(kind), MergeTokens(**{"schedule": (1,), **settings}), progress=False).model


proof(lambda p: bipartite_match(torch.ones(1, 5, 4), -1))


proof(lambda p: PyraModulator(4, 0))


proof(lambda p: merged("llama"))


@proof
def another_attention(p: Place) -> None:
    model = tiny_model("vit")
    model.config._attn_implementation = "flex_attention"
    apply(model, MergeTokens(schedule=(1,)), progress=False)


proof(lambda p: merged(schedule="high"))


proof(lambda p: merged(schedule=(1, 1, 1)))


proof(lambda p: merged(schedule=(9,)))


proof(lambda p: merged().vit.layers[0](torch.ones(1, 5, 16), torch.zeros(1, 1, 5, 5)))


proof(lambda p: token_sources(tiny_model("vit"), tiny_batches("vit")[0]))


@proof
def prompts_where_tokens_are_merged(p: Place) -> None:
    apply(merged(), AddPrompts(), progress=False)


# -- modules that train whole ------------------------------------------------------------------------------------------


def adapted(also: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    train_adapter(model, [], validation=[], layers={"0": AdaptedLayer(1, 1.0)}, also=[also])


proof(lambda p: Lora(also=("nowhere",)).whole(nn.Linear(2, 2)))


proof(lambda p: adapted("1"))


proof(lambda p: adapted("0"))
