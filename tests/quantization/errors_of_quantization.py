"""How a user meets the errors of `quantization`: one function per way, which raises it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import VOCABULARY, build

from actkit.core.grids.powers import PowerGrid
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe import rounded_attention
from actkit.core.recipe.reconstruction import Example
from actkit.core.recipe.runner import apply
from actkit.core.watch.statistics import Gram
from actkit.formats.export import export
from actkit.quantization import awq, smoothquant_plus
from actkit.quantization.adadim import adadim
from actkit.quantization.adadim.sensitivity import weight_sensitivity
from actkit.quantization.agile_quant import token_pruner
from actkit.quantization.agile_quant.agile_quant import AgileQuant
from actkit.quantization.agile_quant.low_bits import LowBits
from actkit.quantization.agile_quant.prune_schedule import PruneSchedule
from actkit.quantization.agile_quant.token_pruner import TokenPruner
from actkit.quantization.aphq_vit.aphq_vit import AphqVit
from actkit.quantization.fake_quantize import FakeQuantize, TrainedInputs
from actkit.quantization.freeze import Freeze
from actkit.quantization.gptq import SecondOrder
from actkit.quantization.ofq.ofq import Ofq
from actkit.quantization.omniquant import OmniQuant
from actkit.quantization.oscillation import OscillationTracker
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rotate import Rotate
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.runtime.decoder import codes_of_cache
from error_proofs import HOST, NAN, Place, proof, run, train


@proof
def no_ratio(p: Place) -> None:
    p.patch.setattr(awq, "_squared_error", lambda *_: (NAN, 1))
    run(awq.Awq(bits=4, group_size=8, n_grid=2))


@proof
def no_strength(p: Place) -> None:
    p.patch.setattr(smoothquant_plus, "_loss", lambda *_: (NAN, 1))
    run(smoothquant_plus.SmoothQuantPlus(group_size=8, steps=2))


@proof
def no_axis(p: Place) -> None:
    p.patch.setattr(adadim, "_squared_error", lambda *_: (NAN, 1))
    run(adadim.AdaDim(group_size=8))


@proof
def nothing_to_learn_from(p: Place) -> None:
    p.patch.setattr(Example, "error", lambda self, output: output.sum() * NAN)
    run(OmniQuant(group_size=8, epochs=1))


@proof
def no_gradient(p: Place) -> None:
    weight_sensitivity(build("llama"), [HOST], loss=lambda model, batch: model(**batch).logits.sum() * NAN)


@proof
def no_second_moment(p: Place) -> None:
    huge = torch.full((2, 4), 1e25)
    gram = Gram(torch.float32)
    gram.update(huge)
    SecondOrder.of(Site("mlp.input", 0), gram)


proof(lambda p: run(Lorc()))


proof(lambda p: run(Freeze()))


proof(lambda p: OscillationTracker().attach(build("llama")))


proof(lambda p: run(Ofq(inputs=TrainedInputs(by="lsq"))))


proof(lambda p: run(Ofq(inputs=None, operands=False, query_key=True)))


@proof
def attention_of_another_kind(p: Place) -> None:
    model = build("vit")
    module = model.vit.layers[0].attention
    p.patch.setattr(type(module), "forward", lambda self, hidden_states, **_: (hidden_states, None))
    apply(model, Ofq(inputs=None, operands=False, query_key=True), progress=False)


@proof
def trained_as_integers(p: Place) -> None:
    train(p, model=run([FakeQuantize(), Freeze()]).model)


@proof
def exported_in_training(p: Place) -> None:
    export(run(FakeQuantize()).model, p.path / "out", format="compressed-tensors")


@proof
def rounded_before(p: Place) -> None:
    model = build("llama")
    apply(model, "rtn", progress=False)
    apply(model, Lorc(), progress=False)


proof(lambda p: run(QuantizeCache(), kind="bert"))


proof(lambda p: run([Rotate(sites=("R3",)), QuantizeCache(format="fp8")]))
proof(lambda p: run(OmniQuant(group_size=8, cache_bits=8), kind="bert"))


proof(lambda p: run(Rotate(sites=("R1",)), kind="gpt2"))


proof(lambda p: run(Rotate(sites=("R3",)), kind="bert"))


proof(lambda p: apply(build("llama", intermediate_size=22), Rotate(sites=("R4",)), progress=False))


@proof
def another_norm(p: Place) -> None:
    model = build("llama")
    norm = type(model.model.norm)
    real = norm.forward
    p.patch.setattr(norm, "forward", lambda self, x: real(self, x) + 0.1 * x.abs())
    apply(model, Rotate(sites=("R1",)), progress=False)


# -- agile-quant


def small(attention: str = "eager", kind: str = "llama", **settings: Any) -> Any:
    """A Llama, or one of its kin, whose attention forms its weights."""
    model = build(kind, **settings)
    model.set_attn_implementation(attention)
    return model


proof(lambda p: run(AgileQuant(), kind="mlp"))
proof(lambda p: apply(small(), AphqVit(steps=0), [HOST], progress=False))


@proof
def asked_by_no_attention(p: Place) -> None:
    p.patch.setattr(rounded_attention, "child_path", lambda block: f"{block.mlp.path}.attention_rounding")
    run(AgileQuant())


@proof
def capped_scores(p: Place) -> None:
    given = torch.ones(1, 1, 2, 4)
    AttentionRounding(weights=PowerGrid(4)).attend(torch.nn.Identity(), given, given, given, None, softcap=30.0)


proof(lambda p: AttentionRounding(bits=8))


@proof
def operands_of_the_decoder(p: Place) -> None:
    model = apply(build("llama"), AgileQuant(bits=None), [HOST], progress=False).model
    codes_of_cache(model, anatomy(model).blocks)


proof(lambda p: TokenPruner(build("gpt2")))
proof(lambda p: TokenPruner(run(QuantizeCache()).model, PruneSchedule({0: 0.5})))
proof(lambda p: TokenPruner(small(), PruneSchedule({9: 0.5})))
proof(lambda p: TokenPruner(small(), low=LowBits({0: 0.5})))
proof(lambda p: TokenPruner(small(kind="mixtral"), low=LowBits({0: 0.5})))
proof(lambda p: TokenPruner(small())([]))
proof(lambda p: TokenPruner(small())([VOCABULARY]))
proof(lambda p: TokenPruner(small()).read(torch.tensor([1, 2])))
proof(lambda p: TokenPruner(small()).losses([{**HOST, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}]))
proof(lambda p: TokenPruner(small()).losses([]))


@proof
def no_memory_for_a_cache(p: Place) -> None:
    p.patch.setattr(token_pruner.psutil, "virtual_memory", lambda: SimpleNamespace(available=9))
    TokenPruner(small())


@proof
def logits_of_nothing(p: Place) -> None:
    model = small()
    model.model.norm.weight.data.fill_(NAN)
    TokenPruner(model)([1, 2])
