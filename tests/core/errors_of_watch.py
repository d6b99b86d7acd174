"""How a user meets the errors of core, the room `watch`: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import batches, build

from actkit.core.forward.batch import BatchContext
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch import importance
from actkit.core.watch.calls import Call
from actkit.core.watch.capture import Observer, plan_memory, record
from actkit.core.watch.damage import layer_damage
from actkit.core.watch.importance import perturbation_importance
from actkit.core.watch.inside_attention import _changed, _eager, _Watch
from actkit.core.watch.intervene import intervene
from actkit.core.watch.passes import Passes
from actkit.core.watch.rows import Keys, _weights
from actkit.core.watch.site_changes import Scale, Zero
from actkit.core.watch.statistics import Gram, Moments
from actkit.testing import tiny_model
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


def changed(changes: Any, kind: str = "llama") -> None:
    model = tiny_model(kind)
    with intervene(model, changes):
        model(**PADDED)


HIDDEN_UNITS = "blocks.0.mlp.hidden"

proof(lambda p: changed({HIDDEN_UNITS: lambda x, at: 3}))


proof(lambda p: changed({HIDDEN_UNITS: torch.zeros(3)}))


proof(lambda p: changed({HIDDEN_UNITS: lambda x, at: x.half()}))


proof(lambda p: changed({HIDDEN_UNITS: lambda x, at: x.mul_(2)}))


proof(lambda p: changed({HIDDEN_UNITS: lambda x, at: x / 0}))


proof(lambda p: changed({HIDDEN_UNITS: lambda x: x}))


proof(lambda p: changed({HIDDEN_UNITS: 3}))


proof(lambda p: changed({HIDDEN_UNITS: Zero(heads=[0])}))


proof(lambda p: changed({"blocks.0.attention.mixed": Zero(heads=[99])}))


proof(lambda p: changed({HIDDEN_UNITS: Scale(torch.ones(9))}))


proof(lambda p: changed({HIDDEN_UNITS: Zero(positions="first")}))  # type: ignore[arg-type]


proof(lambda p: changed({HIDDEN_UNITS: Zero(positions=torch.ones(2, 9, dtype=torch.bool))}))


proof(lambda p: changed({"blocks.0.block.output": lambda x, at: at["blocks.1.block.output"]}))


proof(lambda p: changed({"blocks.0.attention.input": Zero(), "layer.input:model.layers.0.self_attn.v_proj": Zero()}))


proof(lambda p: changed({"blocks.0.ln1.hook_normalized": Zero()}))


proof(lambda p: changed({"hook_embed": Zero()}))


@proof
def places_in_pictures(p: Place) -> None:
    model = build("vit")
    with intervene(model, {HIDDEN_UNITS: Zero(positions="last")}):
        model(**batches("vit")[0])


@proof
def a_row_for_each_picture(p: Place) -> None:
    model = build("bert")
    with intervene(model, {"layer.input:bert.pooler.dense": Zero(positions="last")}):
        model(**PADDED)


@proof
def a_part_that_does_not_run(p: Place) -> None:
    model = build("llama")
    p.patch.setattr(model.model.layers[0], "forward", lambda x, **_: x)
    with intervene(model, {HIDDEN_UNITS: Zero()}):
        model(**PADDED)


@proof
def a_mask_of_some_tokens(p: Place) -> None:
    Passes(build("llama")).begin(torch.nn.Identity(), (), {"input_ids": IDS, "attention_mask": torch.ones(1, 1)})


@proof
def readers_of_different_tensors(p: Place) -> None:
    model = build("llama")
    gate = model.model.layers[0].mlp.gate_proj
    p.patch.setattr(gate, "forward", lambda x: torch.nn.functional.linear(x, gate.weight))
    with intervene(model, {"blocks.0.mlp.input": Zero()}):
        mlp = model.model.layers[0].mlp
        x = torch.ones(1, 2, model.config.hidden_size)
        mlp.gate_proj(x)
        mlp.up_proj(x.clone())


@proof
def scores_block_by_block(p: Place) -> None:
    Observer(anatomy(build("llama")), {Site("attention.scores", 0): Moments()}).hooks()


proof(lambda p: changed({"attention.scores": Zero()}, "falcon"))


proof(lambda p: changed({"attention.scores": Zero()}, "gpt_oss"))


@proof
def an_attention_that_drops_weights(p: Place) -> None:
    model = build("llama", attention_dropout=0.5).train()
    with intervene(model, {"attention.scores": Zero()}):
        model(**PADDED)


@proof
def no_eager_function(p: Place) -> None:
    _eager(torch.nn.Identity())


@proof
def no_weights(p: Place) -> None:
    x = torch.ones(1, 1, 2, 4)
    watch = _Watch({}, lambda tap, value: None)
    _changed(torch.nn.Identity(), (x, x, x), None, {}, x.transpose(1, 2), None, [(watch, ())])


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
