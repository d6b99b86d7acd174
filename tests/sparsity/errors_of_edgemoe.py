"""How a user meets the errors of stores of experts, and of what runs from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build

from actkit.core.store import expert_store
from actkit.core.store.expert_source import ExpertSource
from actkit.core.store.expert_store import PAGE, ExpertStore
from actkit.core.store.tensor_source import TensorSource
from actkit.sparsity.edgemoe import offloaded_moe
from actkit.sparsity.edgemoe.expert_cache import ExpertCache
from actkit.sparsity.edgemoe.expert_fetcher import ExpertFetcher
from actkit.sparsity.edgemoe.offloaded_moe import OffloadedMoE
from actkit.sparsity.edgemoe.path_predictor import PathPredictor, record_traces
from actkit.sparsity.edgemoe.simulate import simulate
from actkit.sparsity.edgemoe.throttled_store import ThrottledStore
from error_proofs import NAN, Place, proof


def folder(p: Place) -> Path:
    if not (p.path / "moe").exists():
        build("mixtral", num_hidden_layers=1).save_pretrained(p.path / "moe")
    return p.path / "moe"


def edited(p: Place, change: Any) -> Path:
    """The folder with other tensors."""
    file = folder(p) / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder(p)


def store(p: Place, bits: Any = 4, **settings: Any) -> ExpertStore:
    return ExpertStore.create(folder(p), p.path / "store", bits, progress=False, **settings)


def damaged(p: Place, at: int) -> ExpertStore:
    """An opened store with a byte changed, counted from the start or the end."""
    path = store(p).path
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    return ExpertStore.open(path)


def offloaded(p: Place, **settings: Any) -> OffloadedMoE:
    return OffloadedMoE.open(folder(p), store(p), **{"budget": "1MB", **settings})


def lacking(p: Place) -> Any:
    return edited(p, lambda tensors: {n: x for n, x in tensors.items() if "experts.1.w2" not in n})


def cut(p: Place) -> Any:
    source = TensorSource([folder(p) / "model.safetensors"])
    os.truncate(folder(p) / "model.safetensors", 5000)
    return [source.read(name) for name in source.tensors]


def gone(p: Place) -> Any:
    source = TensorSource([folder(p) / "model.safetensors"])
    (folder(p) / "model.safetensors").unlink()
    return source.read("model.norm.weight")


def changed(p: Place) -> Any:
    opened = store(p)
    os.truncate(opened.path, 9 * PAGE)
    return opened.load(0, 0, torch.float32)


def closed(p: Place) -> Any:
    opened = store(p)
    opened.close()
    return opened.load(0, 0, torch.float32)


def other(p: Place) -> Any:
    model = build("mixtral", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.add_(1)
    return store(p).check_model(model)


def full(p: Place) -> Any:
    def refuse(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    p.patch.setattr(expert_store, "_write", refuse)
    return store(p)


def settings(p: Place, **values: Any) -> Path:
    file = folder(p) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder(p)


def strange(p: Place) -> Any:
    """A family whose attention transformers converts, which no row has."""
    from transformers import conversion_mapping, core_model_loading

    merged = core_model_loading.WeightConverter(
        ["q_proj.weight"], "q_proj.weight", [core_model_loading.Transpose(0, 1)]
    )
    made = folder(p)
    p.patch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [merged])
    return ExpertSource(made)


def no_memory(p: Place) -> Any:
    opened = store(p)
    p.patch.setattr(offloaded_moe.psutil, "virtual_memory", lambda: SimpleNamespace(available=9))
    return OffloadedMoE.open(folder(p), opened, budget="1MB")


def not_finite(p: Place) -> Any:
    runs = offloaded(p)
    with torch.no_grad():
        runs.model.model.norm.weight.fill_(NAN)
    return runs([1])


def after_close(p: Place) -> Any:
    runs = offloaded(p)
    runs.close()
    return runs([1])


def fetcher_after_close(p: Place) -> Any:
    fetcher = ExpertFetcher(lambda key, unwanted: key, {(0, 0): 1}, ExpertCache(1, layers=1))
    fetcher.close()
    return fetcher.get((0, 0))


def twice(p: Place) -> Any:
    cache = ExpertCache(9, layers=1)
    cache.add((0, 0), 1)
    return cache.add((0, 0), 1)


def not_a_store(p: Place) -> Any:
    (p.path / "text").write_text("a text that is long enough")
    return ExpertStore.open(p.path / "text")


def short_store(p: Place) -> Any:
    os.truncate(store(p).path, 2 * PAGE)
    return ExpertStore.open(p.path / "store")


def unreadable(p: Place) -> Any:
    opened = store(p)
    p.patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    return opened.load(0, 0, torch.float32)


def without_pread(p: Place) -> Any:
    p.patch.delattr(os, "pread")
    return ExpertStore.open(p.path / "store")


def saved_by_actkit(p: Place) -> Any:
    (folder(p) / "actkit.json").write_text("{}")
    return ExpertSource(folder(p))


TRACE = np.zeros((2, 2, 1), dtype=int)

for raises in (lacking, cut, gone, changed, closed, other, full, strange, no_memory, not_finite, after_close):
    proof(raises if raises is not lacking else lambda p: ExpertSource(lacking(p)))
for raises in (fetcher_after_close, twice, not_a_store, short_store, unreadable, without_pread, saved_by_actkit):
    proof(raises)

proof(lambda p: TensorSource([folder(p) / "model.safetensors"]).read("other"))
proof(lambda p: TensorSource([folder(p) / "config.json"]))
proof(lambda p: TensorSource([folder(p) / "missing.safetensors"]))
proof(lambda p: ExpertSource(edited(p, lambda t: {n: x[:3] if "w1" in n else x for n, x in t.items()})).expert(0, 0))
proof(
    lambda p: ExpertSource(
        edited(p, lambda tensors: {n: x for n, x in tensors.items() if "q_proj" not in n})
    ).model_without_experts()
)
proof(lambda p: ExpertSource(settings(p, quantization_config={"quant_method": "fp8"})))
proof(lambda p: ExpertSource(p.path / "nowhere"))
proof(lambda p: ExpertSource(folder(p)).model_without_experts()(input_ids=torch.tensor([[1]])))
proof(lambda p: (store(p), store(p)))
proof(lambda p: ExpertStore.create(folder(p), p.path / "nowhere" / "store", progress=False))
proof(lambda p: store(p, 9))
proof(lambda p: store(p, layout="other"))
proof(lambda p: store(p, {"a": 4}))
proof(lambda p: damaged(p, PAGE).load(0, 0, torch.float32))
proof(lambda p: damaged(p, -1))
proof(lambda p: ExpertStore.open(p.path / "nowhere"))
proof(lambda p: store(p).load(0, 99, torch.float32))
proof(lambda p: store(p, 16).load(0, 0, torch.bfloat16))
proof(lambda p: record_traces(build("llama"), []))
proof(lambda p: record_traces(build("mixtral"), []))
proof(lambda p: PathPredictor.fit([], 4))
proof(lambda p: PathPredictor.fit([TRACE], 4).predict(9, [(0,)]))
proof(lambda p: PathPredictor.load(folder(p) / "config.json"))
proof(lambda p: offloaded(p, predictor=PathPredictor.fit([TRACE], 4)))
proof(lambda p: ExpertCache(9, "random", layers=1))  # type: ignore[arg-type]
proof(lambda p: ExpertCache(9, "belady", layers=1))
proof(lambda p: simulate([TRACE], {(0, 0): 9, (1, 0): 9}, 1, bandwidth=1.0))
proof(lambda p: ThrottledStore(store(p), 0))
proof(lambda p: OffloadedMoE(build("llama"), store(p), budget="1MB"))
proof(lambda p: offloaded(p, workers=0))
proof(lambda p: offloaded(p, capacity=0))
proof(lambda p: offloaded(p)([]))
proof(lambda p: offloaded(p)([99]))
proof(lambda p: record_traces(build("mixtral", num_hidden_layers=0), [{"input_ids": torch.ones(1, 2)}]))
