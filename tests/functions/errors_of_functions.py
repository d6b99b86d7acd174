"""How a user meets the errors of `functions`: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build
from torch import nn

from actkit.comparison.compare import compare_functions
from actkit.core.ground import registry
from actkit.core.layers import known_functions
from actkit.core.layers.activations import Activation
from actkit.core.layers.moments import Density
from actkit.core.recipe.runner import apply
from actkit.core.univariate.bases import BSplines
from actkit.functions.af_kan.af_kan_layer import AfKanLayer
from actkit.functions.af_kan.replace import AfKan
from actkit.functions.crrelu import eafo
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.gr_kan import GrKan
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.qkan.daruan import Daruan
from actkit.functions.qkan.network import Qkan
from actkit.functions.qkan.qkan_layer import QkanLayer
from actkit.functions.rbfnet.field import DifGrid
from actkit.functions.rbfnet.fit_field import fit_image, fit_sdf
from actkit.functions.rbfnet.radial import RadialDecoder, RadialUnits
from actkit.functions.s_kan.basis_choice import basis_choice
from actkit.functions.s_kan.choose_basis import ChooseBasis
from actkit.functions.s_kan.s_kan_layer import SKanLayer
from actkit.functions.selu.self_normalize import SelfNormalize
from actkit.functions.selu.self_normalizing import self_normalizing
from actkit.functions.selu.selu import AlphaDropout
from actkit.functions.softplus_attention.weights import softplus_attention
from actkit.functions.swap import Swap
from actkit.functions.vanillanet.folding import DeepPair
from error_proofs import Place, proof, run

proof(lambda p: Swap.of(build("mlp"), "*", "no_function"))


proof(lambda p: CRReLU()(torch.ones(2, 8, dtype=torch.long)))


proof(lambda p: GroupRational(10, 4))


proof(lambda p: SeriesActivation("silu", 0))


proof(lambda p: AlphaDropout(1.0))


proof(lambda p: eafo.correct(known_functions.SILU, Density.normal()))


proof(lambda p: Density.measured(torch.ones(9)))


proof(lambda p: BSplines(0))


proof(lambda p: AfKanLayer(4, 3, combine="cube"))


proof(lambda p: SKanLayer(3, 4, ()))


proof(lambda p: DeepPair(nn.Linear(3, 4), nn.Linear(4, 2), "relu", 0.9999).merged())


proof(lambda p: softplus_attention(*(torch.rand(1, 1, 3, 1),) * 3))


proof(lambda p: softplus_attention(*(torch.rand(1, 1, 3, 4),) * 3, power=0.5))


proof(lambda p: compare_functions("silu,relu", on="digits-mlp", seeds=1))


proof(lambda p: run([Swap(where=("act",), new="silu"), Swap(where=("act",), new="relu")], kind="conv"))


proof(lambda p: Swap.of(build("mlp"), nn.GELU, "relu"))


proof(lambda p: run(Swap(where=("silu*x",), new="relu")))


proof(lambda p: run(Swap(where=("model.layers.0.mlp",), new="relu")))


proof(lambda p: Swap.of(build("mlp"), "*", lambda: 3))


proof(lambda p: Swap.of(build("mlp"), "*", 3))


class Picky(Activation):
    """One that is told its channels and refuses them."""

    def __init__(self, channels: int) -> None:
        if channels != 3:
            raise ValueError(f"channels: {channels} was given, allowed is 3.")
        super().__init__("relu")

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Activation:
        return cls(**spec)


@proof
def channels_that_do_not_fit(p: Place) -> None:
    p.patch.setattr(registry, "module_class", lambda name: Picky)
    run(Swap(where=("silu",), new={"module": "picky", "spec": {"channels": 4}}))


@proof
def channels_that_nobody_tells(p: Place) -> None:
    model = nn.Sequential(nn.Bilinear(2, 2, 3), nn.ReLU())
    p.patch.setattr(registry, "module_name", lambda cls: "picky")
    p.patch.setattr(registry, "module_class", lambda name: Picky)
    apply(model, Swap(where=("relu",), new={"module": "picky", "spec": {}}), progress=False)


proof(lambda p: eafo.eafo(nn.Sequential(nn.Linear(3, 3)), [torch.ones(2, 3)], progress=False))


@proof
def nothing_is_reached(p: Place) -> None:
    real = eafo.record

    def none(model: Any, wanted: Any, batches: Any, **settings: Any) -> Any:
        return {site: eafo.Histogram() for site in real(model, wanted, batches, **settings)}

    p.patch.setattr(eafo, "record", none)
    eafo.eafo(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), [torch.ones(2, 3)], progress=False)


class Called(nn.Module):
    """A function that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


proof(lambda p: apply(Called(), SelfNormalize(), [torch.ones(2, 3)], progress=False))


proof(lambda p: run(SelfNormalize()))


proof(lambda p: self_normalizing(nn.Sequential(nn.Linear(3, 3)), [torch.ones(2, 3)], progress=False))
proof(lambda p: run(GrKan(groups=5)))


proof(lambda p: run(AfKan(where=("model.layers.0.mlp",))))


proof(lambda p: basis_choice(build("mlp")))


proof(lambda p: ChooseBasis().attach(build("mlp")))


proof(lambda p: Qkan((2, 1), reps=3).extended(2))


proof(lambda p: QkanLayer(2, 2, group=2, trainable=()))


proof(lambda p: Daruan(1, ansatz="px")(torch.full((2, 1), 1.5)))


proof(lambda p: Daruan(1, measure="fast").spectrum(0))


proof(lambda p: Qkan((2, 1)).pruned(torch.randn(9, 2), edges=1e9))


proof(lambda p: Qkan((2, 1)).to_kan(torch.ones(9, 2)))


proof(lambda p: Qkan((2, 1)).pruned(torch.ones(0, 2)))


proof(lambda p: DifGrid(2)(torch.full((4, 2), 1.2)))


proof(lambda p: DifGrid(4))


proof(lambda p: fit_image(torch.rand(1, 4, 3)))


proof(lambda p: fit_image(torch.rand(4, 4, 3) + 255))


proof(lambda p: fit_sdf(lambda x: x, points=64))


proof(lambda p: RadialUnits(3, 4).place(torch.rand(2, 3)))


proof(lambda p: RadialUnits(3, 4).place(torch.ones(9, 3)))


proof(lambda p: SKanLayer(3, 4).pruned())


@proof
def neurons_that_are_not_finite(p: Place) -> None:
    decoder = RadialDecoder(3, 2, 4)
    nn.init.constant_(decoder.units.beta, float("nan"))
    decoder.units_table()
