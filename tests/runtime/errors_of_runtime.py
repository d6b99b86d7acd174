"""How a user meets the errors of `runtime`: one function per way, which raises it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from decoded import family
from tiny_models import batches, build
from torch import nn

from actkit import verbs
from actkit.compression.svd import Svd
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.model.anatomy import Linear, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.kernels import batch_step
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rotate import Rotate
from actkit.runtime import batch, packed
from actkit.runtime import decoder as cpu
from actkit.runtime.latent import refuse
from actkit.runtime.packing import export_packed
from actkit.runtime.shards import kind_of, part_of
from actkit.sparsity.teal import Teal
from error_proofs import NAN, Place, proof


def a_decoder(**values: Any) -> Any:
    """The CPU's decoder without its kernels: what it checks before they run."""
    made = object.__new__(cpu.Decoder)
    made.__dict__.update({"capacity": 8, "position": 0, "vocabulary_in": 50, "threads": 1, **values})
    return made


proof(lambda p: a_decoder()([]))


proof(lambda p: a_decoder()([1] * 9))


proof(lambda p: a_decoder()([99]))


proof(lambda p: a_decoder().generate([1, 2], max_new_tokens=99))


@proof
def nothing_finite(p: Place) -> None:
    work = SimpleNamespace(logits=np.zeros(4), finite=np.array([NAN]))
    for running in ("_step", "_turn"):
        p.patch.setattr(cpu.Decoder, running, lambda self, token: None)
    a_decoder(_work=work, vocabulary=4, few=1)([1])


proof(lambda p: cpu.Decoder(build("gpt2")))


proof(lambda p: kind_of(nn.Identity(), 1, 1))


proof(lambda p: part_of(ActLinear(LowRankWeight(torch.ones(4, 2), torch.ones(2, 4)))))


@proof
def factors_and_a_number_of_inputs(p: Place) -> None:
    model = build("llama")
    apply(model, [Svd(), Teal(mode="top_k")], batches("llama"), progress=False)
    cpu.Decoder(model)


@proof
def factors_that_queries_absorb(p: Place) -> None:
    layer = Linear("kv_b_proj", "layer", ActLinear(LowRankWeight(torch.ones(4, 2), torch.ones(2, 4))))
    refuse(SimpleNamespace(linear=lambda name: layer))  # type: ignore[arg-type]


proof(
    lambda p: (
        p.patch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=9)),
        cpu.Decoder(build("llama")),
    )
)


@proof
def not_side_by_side(p: Place) -> None:
    p.patch.setattr(cpu.steps, "step", lambda *_: False)
    p.patch.setattr(cpu.Decoder, "_follow_threads", lambda self: None)
    a_decoder(_plan=None, _work=None, _formats=None, _embedding=None, _table=None, _by_row=False)._step(1)


@proof
def other_codes(p: Place) -> None:
    model = build("llama")
    apply(model, QuantizeCache(bits=4), progress=False)
    cpu.codes_of_cache(model, anatomy(model).blocks)


@proof
def rotated_keys(p: Place) -> None:
    model = build("llama")
    apply(model, [Rotate(sites=("R3",)), QuantizeCache(bits=8)], progress=False)
    cpu.codes_of_cache(model, anatomy(model).blocks)


def packed_folder(p: Place, change: Any = lambda header: None, **files: bytes) -> Any:
    """A packed llama, its header changed, and the model that stands for it."""
    folder = p.path / "packed"
    export_packed(build("llama"), folder, proof=False)
    (folder / "actkit.sha256").unlink()
    header = json.loads((folder / "packed.json").read_text())
    change(header)
    (folder / "packed.json").write_text(json.dumps(header))
    for name, content in files.items():
        (folder / f"packed.{name}").write_bytes(content)
    return packed.open_packed(folder)


proof(lambda p: packed_folder(p, lambda header: header["layout"].update({"byte order": "big"})))


proof(lambda p: packed_folder(p, json=b"{"))


proof(lambda p: packed_folder(p, bin=b"x"))


proof(lambda p: packed_folder(p, lambda header: header["file"].update(digests=["x"])))


proof(lambda p: cpu.Decoder(packed_folder(p, lambda header: header.update(products=3))))


proof(lambda p: cpu.Decoder(packed_folder(p, lambda header: header.update(threads=99))))


proof(lambda p: packed_folder(p)(1))


proof(lambda p: checkpoint.load(packed_folder(p).folder))


@proof
def no_room_for_a_cache(p: Place) -> None:
    p.patch.setattr(packed.psutil, "virtual_memory", lambda: SimpleNamespace(available=9))
    cpu.Decoder(packed_folder(p))


@proof
def another_form(p: Place) -> None:
    p.patch.setattr(packed, "FORMS", {})
    packed_folder(p)


@proof
def other_logits(p: Place) -> None:
    tokens = iter(range(99))
    p.patch.setattr(cpu.Decoder, "__call__", lambda self, new: torch.tensor(next(tokens)))
    export_packed(build("llama"), p.path / "packed")


proof(lambda p: verbs.export(build("llama"), p.path / "packed", "packed", measure=True))


proof(lambda p: verbs.generate(packed_folder(p).folder, "a", dtype="float32"))


for given in (
    ("int4", False, False, False),
    ("bfloat16", True, False, False),
    ("int8", False, True, False),
    ("int8", False, False, True),
):
    proof(lambda p, given=given: cpu._choose_cache(*given))  # type: ignore[misc]


proof(lambda p: export_packed(family("opt"), p.path / "packed", proof=False))


def a_batch(**values: Any) -> Any:
    """Places for two sequences, without kernels."""
    made = object.__new__(batch.Batch)
    made.__dict__.update({"decoder": a_decoder(), "sequences": 2, "positions": np.zeros(2, np.int64), **values})
    return made


proof(lambda p: batch.Batch(a_decoder(), 9))


proof(lambda p: a_batch()([1, 2, 3]))


proof(lambda p: a_batch()([1, 99]))


proof(lambda p: a_batch(positions=np.array([8, 0]))([1, 2]))


proof(lambda p: a_batch().generate([[1] * 6], max_new_tokens=4))


proof(lambda p: a_batch().generate([[1]], max_new_tokens=4, together=3))


proof(lambda p: a_batch(_rows=SimpleNamespace(step=lambda tokens, positions: torch.tensor(NAN)))([1, 2]))


def keeping(latent: int) -> Any:
    """A decoder with a cache."""
    kept = ("keys", "cached", "key_scales", "value_scales", "latent_cache", "latent_keys", "latent_values")
    work = SimpleNamespace(**dict.fromkeys(kept, np.ones(2)))
    return a_decoder(_plan=SimpleNamespace(latent=np.full(8, latent)), _work=work, _rotaries=[0])


proof(lambda p: batch.Batch(keeping(1)))


@proof
def no_room_for_sequences(p: Place) -> None:
    p.patch.setattr(batch.psutil, "virtual_memory", lambda: SimpleNamespace(available=9))
    batch.Batch(keeping(0))


@proof
def a_batch_not_side_by_side(p: Place) -> None:
    rows = object.__new__(batch._Rows)
    given = dict.fromkeys(("_mixtures", "positions", "_own", "work", "threads"))
    follows = SimpleNamespace(_follow_threads=lambda: None)
    rows.__dict__.update(given | {"_places": [0], "_scratch": SimpleNamespace(out=np.zeros(1)), "decoder": follows})
    p.patch.setattr(batch._Rows, "_products", lambda *_: [])
    p.patch.setattr(batch_step, "attend_stage", lambda *_: False)
    rows._mixed(0, [], 0)
