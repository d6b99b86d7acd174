"""How a user meets the errors of core, the room `forward`: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import HIDDEN, Perceptron, batches, build
from torch import nn
from transformers import AttentionMaskInterface

from actkit.core.forward.batch import check_batch, forward
from actkit.core.forward.example import Inputs
from actkit.core.measure import generation
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.data import load_data
from error_proofs import HOST, IDS, PADDED, Place, Words, _t5, proof, run, train


def _counting() -> nn.Module:
    """A model that looks positions up and cannot be told them."""
    model = nn.Sequential(nn.Embedding(9, 4))
    model.positions = nn.Embedding(9, 4)
    return model


LONG = {"input_ids": torch.ones(1, 33, dtype=torch.long)}


proof(lambda p: run("teal", [object()]))


proof(lambda p: run("teal", [{"input_ids": IDS.tolist()}]))


proof(lambda p: apply(_t5(), "teal", [HOST], progress=False))


proof(lambda p: apply(_t5(), "teal", [{**PADDED, "decoder_input_ids": IDS}], progress=False))


proof(lambda p: Inputs.of(nn.Identity()).batch())


proof(lambda p: run("teal", [LONG]))


proof(lambda p: train(p, [LONG]))


proof(lambda p: measure_quality(build("llama"), [LONG], progress=False))


proof(lambda p: load_data([LONG], build("llama"), None))


proof(lambda p: load_data([{"input_ids": torch.ones(2, 0, dtype=torch.long)}], build("llama"), None))


proof(lambda p: run("teal", [{"input_ids": IDS + 60}]))


proof(lambda p: load_data([{"input_ids": IDS + 60}], build("llama"), None))


proof(lambda p: run("teal", [{**HOST, "attention_mask": IDS * 0}]))


proof(lambda p: load_data([{**HOST, "attention_mask": torch.ones(2, 3)}], build("llama"), None))


proof(lambda p: forward(_counting(), {"input_ids": IDS, "attention_mask": PADDED["attention_mask"].flip(1)}))


proof(lambda p: load_data(p.file('{"text": 1}', "a.jsonl"), build("llama"), Words()))


proof(lambda p: load_data(p.file('{"text": "\\ud83d"}', "a.jsonl"), build("llama"), Words()))


proof(lambda p: generation.generate(build("llama"), Words(), "\udcff"))


proof(lambda p: generation.generate(build("llama"), Words(), [1, 2]))  # type: ignore[arg-type]


FSDPModule = type("FSDPModule", (Perceptron,), {})


proof(lambda p: apply(torch.compile(build("llama")), "teal", batches("llama"), progress=False))


proof(lambda p: apply(FSDPModule(), "teal", batches("mlp"), progress=False))


DTensor = type("DTensor", (nn.Parameter,), {})


@proof
def in_pieces(p: Place) -> None:
    model = build("mlp")
    model.up._parameters["weight"] = DTensor(torch.ones(3, 3))
    apply(model, "teal", batches("mlp"), progress=False)


proof(lambda p: apply(nn.DataParallel(build("mlp")), "teal", batches("mlp"), progress=False))


proof(lambda p: measure_quality(_untensored(), [torch.ones(2, HIDDEN)], task="classification", progress=False))


def _untensored() -> Any:
    model = build("mlp")
    model.forward = lambda x: "words"
    return model


@proof
def padding_without_a_mask(p: Place) -> None:
    p.patch.delitem(AttentionMaskInterface._global_mapping, "sdpa")
    ids = torch.ones(1, 4, dtype=torch.int64)
    check_batch(build("llama"), {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])})
