"""Experts that come from a store, against the resident model of the same codes, bit for bit; and memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actkit.core.ground.errors import CheckpointError, DataError, MemoryLimitError, UnsupportedModelError
from actkit.core.layers.linear import pack_for_decode
from actkit.core.model.expert_places import expert_places
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.store.expert_source import AbsentExperts, ExpertSource
from actkit.core.store.expert_store import ExpertStore, Unwanted
from actkit.sparsity.edgemoe.expert_bits import ExpertBits
from actkit.sparsity.edgemoe.offloaded_moe import OffloadedMoE
from actkit.sparsity.edgemoe.path_predictor import PathPredictor, record_traces
from actkit.sparsity.edgemoe.throttled_store import ThrottledStore
from actkit.testing import check_runtime, tiny_model

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
IDS = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(0))
DEEP = {"num_hidden_layers": 4, "initializer_range": 0.3}  # so that routers differ from token to token


class Case:
    """A model's folder, a store with mixed widths, and the resident model of the same codes."""

    def __init__(self, kind: str, path: Path, dtype: torch.dtype, layout: Any) -> None:
        self.folder = path / kind
        tiny_model(kind, **(DEEP if kind == "mixtral" else {})).to(dtype).save_pretrained(self.folder)
        self.original = checkpoint.load(self.folder)
        paths = [f"{place.path}.{e}" for place in expert_places(self.original) for e in range(4)]
        self.bits = {each: (8, 4, 2, 3)[i % 4] for i, each in enumerate(paths)}
        self.store = ExpertStore.create(self.folder, path / f"{kind}.bin", self.bits, layout=layout, progress=False)
        resident = apply(checkpoint.load(self.folder), [ExpertBits(bits=self.bits)], progress=False).model
        # A copy, in memory of its own: loaded weights lie where the file has them, and products of one row with weights
        # that are aligned in another way differ in their last bits.
        self.resident = copy.deepcopy(resident)
        if layout == "kernel":
            pack_for_decode(self.resident)
        text = [{"input_ids": torch.randint(3, 40, (8, 20), generator=torch.Generator().manual_seed(1))}]
        self.predictor = PathPredictor.fit(record_traces(self.original, text), 4)

    def offloaded(self, budget: int | None = None, **settings: Any) -> OffloadedMoE:
        budget = 3 * self.store.largest if budget is None else budget
        return OffloadedMoE.open(self.folder, self.store, budget=budget, **settings)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: dict[str, Case] = {}

    def case(kind: str, dtype: torch.dtype = torch.float32, layout: str = "kernel") -> Case:
        name = f"{kind} {dtype} {layout}"
        if name not in made:
            made[name] = Case(kind, tmp_path_factory.mktemp("case"), dtype, layout)
        return made[name]

    yield case
    for each in made.values():
        each.store.close()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def step_by_step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each token, from a cache: a prompt of four, then one by one, for all texts side by side."""
    found, cache = [], None
    for part in (ids[:, :4], *ids[:, 4:].split(1, 1)):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        *((kind, torch.float32, "kernel") for kind in KINDS),
        *((kind, torch.bfloat16, "codes") for kind in KINDS),
        ("mixtral", torch.bfloat16, "kernel"),
        ("mixtral", torch.float32, "codes"),
    ],
)
def test_logits_are_those_of_the_resident_model_bit_for_bit(
    kind: str, dtype: torch.dtype, layout: str, cases: Any
) -> None:
    case = cases(kind, dtype, layout)
    with case.offloaded(predictor=case.predictor) as offloaded:
        for ids in (IDS, IDS[:1]):
            whole, stepped = logits(case.resident, ids), step_by_step(case.resident, ids)
            with offloaded.running() as model:
                assert torch.equal(logits(model, ids), whole)
                assert torch.equal(step_by_step(model, ids), stepped)
        assert offloaded.statistics.most_bytes <= offloaded.budget
        assert offloaded.statistics.reads > 0 and not torch.equal(whole, logits(case.original, IDS[:1]))


@pytest.mark.parametrize("policy", ["edgemoe", "lru", "lfu", "fifo"])
def test_no_setting_changes_what_is_computed(policy: Any, cases: Any) -> None:
    case = cases("mixtral")
    expected = step_by_step(case.resident, IDS[:1])
    smallest = sum(sorted((r.nbytes for r in case.store.records.values()), reverse=True)[:2])
    for budget, workers, preload in ((smallest, 1, 3), (case.store.nbytes, 2, 1), (3 * case.store.largest, 2, 3)):
        settings = {"policy": policy, "workers": workers, "preload": preload, "predictor": case.predictor}
        with case.offloaded(budget, **settings) as offloaded, offloaded.running() as model:
            assert torch.equal(step_by_step(model, IDS[:1]), expected)
            found = offloaded.statistics
            assert found.most_bytes <= budget and offloaded.held <= budget
            if budget == case.store.nbytes:
                # A preload that the predictor gave up is read again if the expert is needed after all.
                assert found.evictions == 0 and found.reads <= len(case.store.records) + found.broken_off


def test_preloads_are_hits_if_the_predictor_is_right(cases: Any) -> None:
    case = cases("mixtral")
    predictor = PathPredictor.fit(record_traces(case.original, [{"input_ids": IDS[:1]}]), 4)
    slow = ThrottledStore(case.store, bandwidth=case.store.largest / 0.004)
    stalls = {}
    for preload in (0, 2):
        with OffloadedMoE.open(
            case.folder, slow, budget=4 * case.store.largest, predictor=predictor, preload=preload, least=0.3
        ) as offloaded:
            for token in IDS[0].tolist():
                offloaded([token])
                time.sleep(0.01)
            found = offloaded.statistics
            stalls[preload] = found.misses
            assert (found.preloads > 0) == (preload > 0) and found.stall_seconds > 0
    assert stalls[2] < stalls[0]


def test_a_slower_disk_takes_its_time_and_breaks_off(cases: Any) -> None:
    store = cases("mixtral").store
    size = store.record(0, 0).nbytes
    slow = ThrottledStore(store, bandwidth=size / 0.05, latency=0.01)
    begun = time.perf_counter()
    slow.load(0, 0, torch.float32)
    assert time.perf_counter() - begun >= 0.06
    unwanted = threading.Event()
    threading.Timer(0.02, unwanted.set).start()
    begun = time.perf_counter()
    with pytest.raises(Unwanted) as broken:
        slow.load(0, 0, torch.float32, unwanted)
    assert 0 < broken.value.done < size and time.perf_counter() - begun < 0.06


def test_a_store_that_was_given_by_its_path_is_closed(cases: Any) -> None:
    case = cases("mixtral")
    with OffloadedMoE.open(case.folder, case.store.path, budget="1MB") as offloaded:
        store = offloaded.store
        offloaded([1])
    with pytest.raises(CheckpointError, match="was closed"):
        store.load(0, 0, torch.float32)
    with case.offloaded():
        pass
    case.store.load(0, 0, torch.float32)


def test_it_generates_what_the_resident_model_generates(cases: Any) -> None:
    case = cases("mixtral")
    with case.offloaded(predictor=case.predictor) as offloaded:
        found = list(offloaded.generate(IDS[0], max_new_tokens=8, end=()))
        resident = case.resident.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert found == resident[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_it_is_a_runtime(kind: str, tmp_path: Path) -> None:
    """With experts as they were its logits are the model's own; a store for each model that the checks make."""

    def make(model: Any, **settings: Any) -> OffloadedMoE:
        reason = OffloadedMoE.supports(model)
        if reason is not None:
            return OffloadedMoE(model, None, budget=0)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            copy.deepcopy(model).save_pretrained(folder)  # which writes into the config
            store = ExpertStore.create(folder, Path(folder) / "store", 16, progress=False)
        return OffloadedMoE(model, store, budget=4 * store.largest, **settings)

    found = check_runtime(make, tiny_model(kind), IDS[0].tolist(), tolerance=1e-5)
    assert [each.name for each in found if each.outcome == "does not apply"] == ["memory is as planned"]


def test_decode_only_takes_the_experts_out_of_the_model(cases: Any) -> None:
    case = cases("mixtral")
    model = copy.deepcopy(checkpoint.load(case.folder))
    with torch.no_grad():
        expected = case.resident(input_ids=IDS[:1], logits_to_keep=1).logits[0, -1]
    with OffloadedMoE(model, case.store, budget="1MB", decode_only=True) as offloaded:
        assert isinstance(model.model.layers[0].mlp.experts, AbsentExperts)
        assert torch.equal(offloaded(IDS[0].tolist()), expected)
    with pytest.raises(UnsupportedModelError, match="without its experts"):
        logits(model, IDS)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_budgets_and_settings_that_are_refused(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("mixtral")
    model = ExpertSource(case.folder).model_without_experts()
    make = partial(OffloadedMoE, model, case.store)
    with pytest.raises(ValueError, match="the 2 largest experts, which one token may need at once"):
        make(budget=2 * case.store.largest - 1)
    with pytest.raises(ValueError, match="memory: 'much' was given"):
        make(budget="much")
    for wrong in ({"policy": "belady"}, {"workers": 0}, {"preload": -1}, {"least": 3.0}):
        with pytest.raises(ValueError, match="allowed are edgemoe, lru, lfu, fifo"):
            make(budget="1MB", **wrong)
    with pytest.raises(ValueError, match="capacity: 0 was given"):
        make(budget="1MB", capacity=0)
    with pytest.raises(ValueError, match="predictor: it knows 4 layers of 8 experts"):
        make(budget="1MB", predictor=PathPredictor(4, 8, 2))
    other = tiny_model("mixtral", **DEEP)
    with torch.no_grad():
        other.model.layers[3].mlp.gate.weight.mul_(2)
    with pytest.raises(CheckpointError, match="made from another model"):
        OffloadedMoE(other, case.store, budget="1MB")
    with pytest.raises(UnsupportedModelError, match="no plain gated experts"):
        OffloadedMoE(tiny_model("llama"), case.store, budget="1MB")
    with pytest.raises(UnsupportedModelError, match="actkit changed model"):
        OffloadedMoE(case.resident, case.store, budget="1MB")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(MemoryLimitError, match=r"of experts and .* of keys and values for 32 tokens"):
        make(budget="1MB")


def test_a_store_that_is_damaged_changed_or_closed_while_it_runs(cases: Any, tmp_path: Path) -> None:
    case = cases("mixtral")
    path = tmp_path / "store"
    path.write_bytes(case.store.path.read_bytes())
    store = ExpertStore.open(path)
    with OffloadedMoE.open(case.folder, store, budget=2 * store.largest) as offloaded:
        offloaded(IDS[0].tolist())
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(CheckpointError, match="changed while it was open"):
            offloaded(IDS[1].tolist()[:4])
        store.close()
        with pytest.raises(CheckpointError, match="was closed"):
            offloaded(IDS[1].tolist()[:4])
        with pytest.raises(DataError, match="give one or more"):
            offloaded([])
        with pytest.raises(DataError, match="the model embeds 0 to 39"):
            offloaded([40])
    with pytest.raises(ValueError, match="it was closed"):
        offloaded([1])
    with pytest.raises(ValueError, match="bandwidth, latency"):
        ThrottledStore(store, 0)


# -- memory, seen from outside -----------------------------------------------------------------------------------------

RUN = """
import sys, torch
torch.set_num_threads(1)
from actkit.sparsity.edgemoe.offloaded_moe import OffloadedMoE
small, small_store, folder, store, budget = sys.argv[1:]
with OffloadedMoE.open(small, small_store, budget="1MB") as warm:  # imports, and the first use of everything
    warm([1, 2, 3]), warm([4])
print("ready", flush=True); sys.stdin.readline()
with OffloadedMoE.open(folder, store, budget=budget) as offloaded:
    offloaded(range(8))
    for token in range(24):
        offloaded([token % 40])
    found = offloaded.statistics
    print("done", found.most_bytes, found.bytes_read, sum(p.nbytes for p in offloaded.model.parameters()), flush=True)
    sys.stdin.readline()
"""


def peak(pid: int) -> int:
    """The most bytes that a process has held, as the system says: its own memory and what files it mapped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow(reason="a checkpoint of 200 MB is written, stored and run in a process of its own")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_run_stays_within_its_budget_as_the_system_counts(cases: Any, tmp_path: Path) -> None:
    """100 MB of experts run within 16 MB: the process grows by that, the hot weights and some scratch."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "num_hidden_layers": 4}
    tiny_model("mixtral", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "large")
    store = ExpertStore.create(tmp_path / "large", tmp_path / "large.bin", 8, progress=False)
    small, budget = cases("mixtral"), 16_000_000
    arguments = [small.folder, small.store.path, tmp_path / "large", store.path, budget]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        before = peak(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        done, most, read, hot = process.stdout.readline().split()
        grown = peak(process.pid) - before
    finally:
        process.stdin.close()
        process.wait(timeout=60)
    assert done == "done" and int(most) <= budget
    assert store.nbytes > 100e6 and int(read) > 4 * budget  # it went round and round
    # beside budget and hot weights: scratch of the first products of that size, and what the allocator keeps
    assert grown < budget + int(hot) + 40e6, f"{grown / 1e6:.0f} MB, of {store.nbytes / 1e6:.0f} MB of experts"
    store.close()
