"""How a user meets the errors of core, the room `model`: one function per way, which raises it."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny_models import batches, build
from torch import nn

from actkit.core.model.anatomy import Site, anatomy
from actkit.core.model.architectures import MlpRow
from actkit.core.model.gpt_rows import GPT2
from actkit.core.model.reading import BlockReader
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.testing import tiny_model
from error_proofs import HOST, STACK, Place, offloaded, proof, run

proof(lambda p: next(iter(anatomy(offloaded()).blocks[0].mlp.inputs)).weight)


proof(lambda p: run(STACK, None, kind="mlp"))


@proof
def dummy_inputs_fail(p: Place) -> None:
    model = build("mlp")
    model.dummy_inputs = torch.ones(1, 3)
    anatomy(model)


@proof
def an_unread_layer(p: Place) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    _ = next(x for x in anatomy(model).blocks[0].mlp.inputs if x.path.endswith("up_proj")).weight


@proof
def not_like_its_family(p: Place) -> None:
    model = build("llama")
    del model.model.layers[0].mlp.up_proj
    anatomy(model)


@proof
def a_wrapper_of_nothing(p: Place) -> None:
    model = build("llama")
    model.model.layers[0].mlp = type("Around", (nn.Module,), {"wraps": "inner"})()
    anatomy(model)


@proof
def other_experts(p: Place) -> None:
    model = build("mixtral")
    del model.model.layers[0].mlp.experts.down_proj
    anatomy(model)


IMAGES = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 1)), torch.zeros(1, 1, 4, 4)


proof(lambda p: anatomy(*IMAGES).tap(Site("layer.output", path="0")))


proof(lambda p: anatomy(*IMAGES).tap(Site("activation.output", path="1")))


proof(lambda p: anatomy(build("mlp"), batches("mlp")[0]).block(3))


proof(lambda p: record(build("llama"), {"mlp.nothing": Moments()}, [HOST]))


@proof
def fused_layers_of_other_sizes(p: Place) -> None:
    model = tiny_model("gpt2")
    model.config.num_key_value_heads = 2
    anatomy(model)


@proof
def layers_that_are_never_called(p: Place) -> None:
    anatomy(tiny_model("bloom", slow_but_exact=True, pretraining_tp=2))


@proof
def rows_without_up(p: Place) -> None:
    row = replace(GPT2, mlp=MlpRow("mlp", down="mlp.c_proj", activation="mlp.act"))
    BlockReader(tiny_model("gpt2"), row, 0, "transformer.h.0").read(None)
