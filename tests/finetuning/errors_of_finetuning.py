"""How a user meets the errors of `finetuning`: one function per way, which raises it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import batches, build

from actkit import verbs
from actkit.core.store import checkpoint
from actkit.core.store.adapter_folder import BASE, WEIGHTS
from actkit.core.watch.spectrum import Spectrum
from actkit.finetuning.adapters import AdaptedLayer, Lora, parse_adapter
from actkit.finetuning.eva import Eva
from actkit.finetuning.explained_variance import explained_variance
from actkit.finetuning.low_rank_training import train_adapter, train_low_rank
from actkit.zoo.cnn import DigitsCNN
from actkit.zoo.loading import load
from error_proofs import HOST, Place, missing, proof

UP = "model.layers.0.mlp.up_proj"


def trained(p: Place, layers: Any = None, **settings: Any) -> Path:
    """The folder of an adapter, of a model in memory or of one that was saved."""
    model = settings.pop("model", None) or build("llama", num_hidden_layers=1)
    layers = {UP: AdaptedLayer(1, 1.0)} if layers is None else layers
    given: dict[str, Any] = {"steps": 1, "merge": False, "out": p.path / "adapter", **settings}
    held_out = batches("llama", padding=False)
    train_adapter(model, batches("llama"), validation=held_out, layers=layers, progress=False, **given)
    return p.path / "adapter"


proof(
    lambda p: (
        missing("peft", p),
        train_low_rank(build("llama"), [HOST], validation=batches("llama"), roles=("gate",), steps=1),
    )
)


proof(lambda p: parse_adapter(["lora"]))


proof(lambda p: parse_adapter("lora:rank=0"))


proof(lambda p: Lora().layers(build("mixtral"), batches("mixtral")))


proof(lambda p: trained(p, {}))


proof(lambda p: trained(p, {UP: AdaptedLayer(1, 1.0, torch.ones(2, 2))}))


proof(lambda p: trained(p, resume=True))


proof(lambda p: trained(p, trainable="*"))


proof(lambda p: trained(p, out=None))


proof(lambda p: verbs.train(build("llama"), [HOST], merge=True))


# -- an adapter's folder -----------------------------------------------------------------------------------------------


proof(lambda p: load(trained(p)))


@proof
def a_base_that_was_moved(p: Place) -> None:
    base = p.copy("plain")
    adapter = trained(p, model=checkpoint.load(base))
    base.rename(p.path / "moved")
    load(adapter)


proof(lambda p: load(trained(p), base=lambda: build("llama")))


@proof
def of_a_later_version(p: Place) -> None:
    folder = trained(p)
    content = json.loads((folder / BASE).read_text())
    (folder / BASE).write_text(json.dumps({**content, "actkit": 99}))
    load(folder)


@proof
def a_damaged_adapter(p: Place) -> None:
    folder = trained(p)
    (folder / WEIGHTS).write_bytes(b"nothing")
    load(folder, base=lambda: build("llama", num_hidden_layers=1))


@proof
def an_unreadable_base(p: Place) -> None:
    folder = trained(p)
    (folder / BASE).write_text("{")
    load(folder)


@proof
def opened_without_peft(p: Place) -> None:
    folder = trained(p)
    missing("peft", p)
    load(folder, base=lambda: build("llama", num_hidden_layers=1))


# -- EVA ---------------------------------------------------------------------------------------------------------------


proof(lambda p: Eva().plan(build("llama"), [], progress=False))


proof(lambda p: Eva(rank=30).plan(build("llama"), batches("llama"), progress=False))


proof(lambda p: Eva(rank=8).plan(build("llama"), [HOST], progress=False))


proof(lambda p: explained_variance(build("llama"), {}, batches("llama"), progress=False))


proof(lambda p: explained_variance(build("llama"), {UP: torch.ones(1, 1)}, batches("llama"), progress=False))


@proof
def directions_of_too_few_channels(p: Place) -> None:
    spectrum = Spectrum()
    spectrum.update(torch.ones(3, 2))
    spectrum.directions(3)


def picture(value: float) -> None:
    model = DigitsCNN(channels=(2, 2), hidden=4)
    Eva(rank=1).plan(model, [{"pixel_values": torch.full((2, 1, 8, 8), value)}], progress=False)


proof(lambda p: picture(float("nan")))


@proof
def no_figure(p: Place) -> None:
    plan = Eva(rank=1).plan(build("llama"), batches("llama"), progress=False)
    found = explained_variance(build("llama"), plan, batches("llama"), progress=False)
    missing("plotly", p)
    found.figure()
