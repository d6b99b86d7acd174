"""How a user meets the errors of core, the room `watch`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import batches, build

from actkit.core.forward.batch import BatchContext
from actkit.core.model.anatomy import Site
from actkit.core.recipe.runner import apply
from actkit.core.watch import importance
from actkit.core.watch.calls import Call
from actkit.core.watch.capture import plan_memory, record
from actkit.core.watch.damage import layer_damage
from actkit.core.watch.importance import perturbation_importance
from actkit.core.watch.intervene import intervene
from actkit.core.watch.rows import Keys, _weights
from actkit.core.watch.statistics import Gram, Moments
from error_proofs import HOST, IDS, PADDED, Place, overflowing, proof

proof(lambda p: record(build("llama"), {"mlp.hidden": Moments()}, []))


proof(lambda p: plan_memory(build("llama"), {"mlp.hidden": Moments()}, []))


proof(lambda p: Call((), {}, BatchContext.of(PADDED)).real(torch.ones(2, 4, 4, 3)))


proof(lambda p: Keys(BatchContext.of(PADDED), torch.device("cpu")).locate(Site("mlp.hidden", 0), (3,)))


proof(
    lambda p: list(
        _weights(
            Site("attention.weights", 0), torch.ones(2, 1, 4, 3), Keys(BatchContext.of(PADDED), torch.device("cpu"))
        )
    )
)


proof(lambda p: Keys(BatchContext.of(PADDED), torch.device("cpu")).choose(Site("mlp.hidden", 0), torch.tensor([99])))


proof(lambda p: apply(overflowing(), "teal", batches("llama"), progress=False))


proof(lambda p: record(build("llama"), {"mlp.hidden": Moments()}, [HOST], progress=False)["mlp.input"])


proof(lambda p: Moments().merge(3))


proof(lambda p: Gram(torch.bfloat16))


@proof
def weights_of_attention(p: Place) -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    with intervene(model, {"attention.weights": torch.zeros(1)}):
        pass


@proof
def no_tensor(p: Place) -> None:
    model = build("llama")
    with intervene(model, {"mlp.hidden": lambda x: None}):  # type: ignore[arg-type, return-value]
        model(IDS)


@proof
def other_shape(p: Place) -> None:
    model = build("llama")
    with intervene(model, {"mlp.hidden": torch.zeros(3)}):
        model(IDS)


proof(lambda p: Moments().mean)


proof(lambda p: perturbation_importance(build("bert").bert, ["encoder.layer.0"], [HOST], progress=False))


@proof
def places_of_sentences(p: Place) -> None:
    perturbation_importance(build("llama"), ["model.layers.0"], [PADDED], average="samples", progress=False)


@proof
def twice(p: Place) -> None:
    layer = torch.nn.Linear(4, 4)
    perturbation_importance(torch.nn.Sequential(layer, layer), ["0"], torch.ones(2, 4), progress=False)


@proof
def no_tensor_given(p: Place) -> None:
    class Names(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "x"

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names, self.layer = Names(), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.names(x)
            return self.layer(x)

    perturbation_importance(Whole(), ["names"], torch.ones(2, 4), progress=False)


@proof
def no_finite_importance(p: Place) -> None:
    p.patch.setattr(importance, "_importance", lambda *_: torch.full((2, 4), torch.inf))
    perturbation_importance(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], torch.ones(2, 4), progress=False)


@proof
def an_exchange_without_a_number(p: Place) -> None:
    broken = torch.nn.Linear(4, 4)
    broken.weight.data.fill_(torch.nan)
    layer_damage(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"a": {"0": broken}}, [torch.ones(2, 4)], progress=False)
