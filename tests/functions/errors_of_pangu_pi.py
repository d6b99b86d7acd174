"""How a user meets the errors of `pangu-pi`: one function per way, which raises it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from tiny_models import batches, build
from torch import nn

from actkit.core.model.anatomy import anatomy
from actkit.functions.pangu_pi import collapse
from actkit.functions.pangu_pi.add_nonlinearity import AddNonlinearity, without_nonlinearity
from actkit.functions.pangu_pi.collapse import collapse_bound, lipschitz_of
from actkit.functions.pangu_pi.diversity import diversity
from error_proofs import Place, proof, run

ROWS = {"input_ids": torch.full((2, 4), 5)}


@proof
def nothing_to_switch_off(p: Place) -> None:
    with without_nonlinearity(build("llama")):
        pass


proof(lambda p: diversity(build("mlp"), batches("mlp"), progress=False))


proof(lambda p: diversity(build("llama"), [{"input_ids": torch.full((1, 2), 5)}], progress=False))


proof(lambda p: diversity(build("llama"), [ROWS], progress=False).at(0, "elsewhere"))


proof(lambda p: collapse_bound(build("llama"), {**ROWS, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}))


proof(lambda p: collapse_bound(build("mlp"), batches("mlp")[0]))


@proof
def an_unknown_layout(p: Place) -> None:
    attention = anatomy(build("llama")).block(0).attention
    assert attention is not None
    collapse._values(replace(attention, value=None, query_key_value=SimpleNamespace(), value_rows=None))


proof(lambda p: lipschitz_of(nn.Softmax(-1)))


proof(lambda p: run(AddNonlinearity(ratio=10_000)))
