"""How a user meets the errors of `s2a`, side paths and prompts: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import build
from torch import nn

from actkit.core.layers import known_functions as known
from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.coded import FrozenNorm, coded_slopes
from actkit.core.layers.packed_codes import AffineCodes, DerivativeCode
from actkit.core.recipe.runner import apply
from actkit.core.train.choice import trained_parameters
from actkit.finetuning.adapters import AdaptedLayer
from actkit.finetuning.low_rank_training import train_adapter
from actkit.finetuning.s2a.prompts import AddPrompts
from actkit.finetuning.s2a.s2a import S2A
from actkit.finetuning.s2a.side_path import AddSidePath
from error_proofs import Place, proof


@proof
def nothing_to_train(p: Place) -> None:
    with trained_parameters(nn.Sequential(nn.ReLU()), [S2A()]):
        pass


proof(lambda p: S2A().attach(nn.Sequential(nn.Linear(2, 2))))


@proof
def attention_of_its_own(p: Place) -> None:
    model = build("bert")
    model.set_attn_implementation("eager")
    S2A().attach(model)


proof(lambda p: FrozenNorm(nn.BatchNorm2d(3, track_running_stats=False)))


@proof
def second_derivative(p: Place) -> None:
    x = torch.ones(3, requires_grad=True)
    y = coded_slopes(nn.functional.gelu, x, DerivativeCode.fit(known.GELU, 4, grid=64))
    torch.autograd.grad(y.sum(), x, create_graph=True)


proof(lambda p: AffineCodes(bits=9))


proof(lambda p: AffineCodes(group=1))


proof(lambda p: DerivativeCode.fit(known.SOFTMAX))


@proof
def infinite_slope(p: Place) -> None:
    pieces, limits = known.TANH.pieces, (0.0, 0.0)
    DerivativeCode.fit(
        ActivationFunction(name="root", function=torch.sqrt, derivative=torch.rsqrt, limits=limits, pieces=pieces)
    )


@proof
def more_than_the_adapter(p: Place) -> None:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    layers = {"bert.encoder.layer.0.output.dense": AdaptedLayer(2, 4.0)}
    train_adapter(
        build("bert"), [batch], validation=[batch], layers=layers, merge=False, out=p.path / "a", rules=["s2a"], steps=1
    )


proof(lambda p: apply(build("llama"), AddPrompts(), progress=False))


proof(lambda p: apply(build("bert"), AddSidePath(reduction=1000), progress=False))
