"""What two processes do together, compared with what each does alone; run by test_processes.py in both of them.

Arguments: a folder for results. The environment is the one that torchrun gives. Each check is run in both processes;
what came of it is written to RANK.json.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import traceback
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from tiny_models import HIDDEN, VOCABULARY, build
from torch import nn

from actkit.core.edit.edits import Note
from actkit.core.ground import processes, registry
from actkit.core.ground.errors import CheckpointError, NonFiniteError, ProcessError, RecipeError
from actkit.core.ground.fingerprint import fingerprint
from actkit.core.ground.processes import together
from actkit.core.measure.cost import measure_cost
from actkit.core.measure.evaluation import evaluate
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store.checkpoint import load, save
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax, Density, Gram, Moments, Quantiles, Sample, Spectrum
from actkit.quantization.adadim.adadim import AdaDim
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.sparsing_law.perplexity_sparsity import PerplexitySparsity
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina

FOLDER = Path(sys.argv[1])
STATISTICS = [Moments(), AbsMax(), Quantiles(), Density(), Gram(), Spectrum(), Spectrum(4, True), Sample(7)]


def text(count: int = 3) -> list[Any]:
    """Batches of unequal sizes and lengths, with padding: the shares of two processes are uneven."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        ids = torch.randint(1, VOCABULARY, (2 + index % 2, 9 - index), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def close(a: Any, b: Any, where: str) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-9, equal_nan=True, msg=where)


def same_model(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    assert {p: type(m) for p, m in a.named_modules()} == {p: type(m) for p, m in b.named_modules()}
    for name, tensor in first.items():
        if tensor.is_floating_point():
            close(tensor, second[name], name)
        else:
            assert torch.equal(tensor, second[name]), name


def same_everywhere(model: nn.Module) -> None:
    """All tensors have the same bits in both processes."""
    bits = fingerprint(dict(model.state_dict()))
    assert len({theirs for theirs, _ in processes.everyone("bits", about=bits)}) == 1


# -- the checks --------------------------------------------------------------------------------------------------------


def check_scope() -> None:
    assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
    rank = int(sys.argv[2])
    sys.modules.pop("torch.distributed.nn.functional")  # as in a process that has not loaded a model yet
    with together():
        importlib.import_module("torch.distributed.nn.functional")
        assert (processes.count(), processes.rank(), processes.is_first()) == (2, rank, rank == 0)
        with together():
            assert processes.count() == 2
        assert [index for index in range(5) if processes.mine(index)] == list(range(rank, 5, 2))
    assert not processes.several()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads  # they may abort the process as it ends


def check_exchange() -> None:
    rank = int(sys.argv[2])
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    with together():
        own = {f"{rank} {kind}": torch.arange(3 + rank).to(kind) for kind in kinds} | {"none": torch.zeros(0, 4)}
        for source, (about, tensors) in enumerate(processes.everyone("all kinds", own, {"from": rank})):
            assert about == {"from": source}
            assert set(tensors) == {"none", *(f"{source} {kind}" for kind in kinds)}
            for kind in kinds:
                found = tensors[f"{source} {kind}"]
                assert found.dtype == kind and torch.equal(found, torch.arange(3 + source).to(kind))
            assert tensors["none"].shape == (0, 4)
        assert processes.total("sum", torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
        assert processes.on_first("one", lambda: processes.rank()) == (0 if rank == 0 else None)


def check_statistics() -> None:
    model, calls = build("llama"), []
    model.set_attn_implementation("eager")
    wanted = {"mlp.hidden": STATISTICS, "blocks.1.attention.input": STATISTICS, "attention.weights": Density()}
    for count in (3, 1, 4):
        data = text(count)
        alone = record(model, wanted, iter(data), progress=False)
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        with together():
            shared = record(model, wanted, iter(data), progress=False)
        handle.remove()
        assert len(calls) == len(data[int(sys.argv[2]) :: 2])  # each ran its share only
        calls.clear()
        assert list(shared) == list(alone)
        for site in alone:
            pairs = zip(alone[site], shared[site]) if isinstance(alone[site], list) else [(alone[site], shared[site])]
            for one, two in pairs:
                exact = isinstance(one, AbsMax | Density | Quantiles | Sample)
                assert one.count == two.count > 0
                for name, tensor in one.state().items():
                    where = f"{type(one).__name__} {name} of {site}, {count} batches"
                    if exact and name not in ("rows", "documents", "positions"):
                        assert torch.equal(tensor, two.state()[name]), where
                    elif not exact:
                        close(two.state()[name], tensor, where)
                if isinstance(one, Sample):
                    assert torch.equal(one.rows, two.rows) and torch.equal(one.documents, two.documents)
                    assert torch.equal(one.positions, two.positions)
                if isinstance(one, Spectrum):
                    close(two.values, one.values, f"singular values of {site}")


def check_edits() -> None:
    greedy = Teal(sparsity=0.5, allocation="greedy", step=0.25)
    recipes: list[tuple[str, Any, int]] = [
        ("llama", [Teal(sparsity=0.5)], 3),
        ("llama", [greedy], 3),
        ("llama", [Awq(group_size=8, clip_tokens=10, n_grid=6, search_tokens=20), Wina(sparsity=0.4)], 3),
        ("llama", [Awq(group_size=8, n_grid=4)], 1),  # the second process has no batch
        ("mixtral", [Awq(group_size=8, n_grid=4, clip_tokens=5)], 3),
        ("loose", [Awq(group_size=8, n_grid=4), Teal(sparsity=0.5)], 2),
        ("llama", [RSparse(sparsity=0.5, alpha="search", generations=1, population=2)], 3),
        ("llama", [PerplexitySparsity(p=5.0, sample=16)], 3),
        ("llama", [Gptq(group_size=8)], 3),
        ("mixtral", [Gptq(group_size=8)], 1),
        ("llama", [AdaDim(group_size=8, search_tokens=20)], 3),
        ("mlp", [Wina(sparsity=0.5)], 3),
    ]
    for kind, recipe, count in recipes:
        small = {} if kind in ("loose", "mlp") else {"num_hidden_layers": 2}
        model, data = build(kind, **small), text(count)
        if kind == "mlp":
            torch.manual_seed(5)
            data = [torch.randn(4, HIDDEN) for _ in range(count)]
        alone = apply(copy.deepcopy(model), recipe, data, min_coverage=0, progress=False)
        with together():
            shared = apply(model, recipe, data, min_coverage=0, progress=False)
            same_everywhere(shared.model)
        assert [(e.get("replace"), e.get("set")) for e in shared.edits] == [
            (e.get("replace"), e.get("set")) for e in alone.edits
        ]
        assert shared.report.changed == alone.report.changed and shared.report.skipped == alone.report.skipped
        notes = [note for note in shared.report.notes if "processes" not in note]
        assert notes == alone.report.notes, (notes, alone.report.notes)
        assert len(notes) == len(shared.report.notes) - (count == 1)
        same_model(shared.model, alone.model)
        shared.undo()
        same_model(model, build(kind, **small))


def check_quality() -> None:
    model, data = build("llama"), text()
    changed = apply(copy.deepcopy(model), [Teal(sparsity=0.5)], data, progress=False).model
    for count in (1, 3):
        alone = measure_quality(changed, text(count), reference=model, progress=False)
        with together():
            shared = measure_quality(changed, text(count), reference=model, progress=False)
        assert shared == alone  # values and intervals, bit for bit
    one = measure_cost(changed, data, progress=False)
    with together():
        two = measure_cost(changed, iter(data), progress=False)
    assert one.layers == two.layers and (one.density_p05, one.density_p95) == (two.density_p05, two.density_p95)
    assert one.density is not None and two.density is not None
    close(one.density, two.density, "density")
    alone_all = evaluate(changed, data, reference=model, progress=False)
    with together():
        shared_all = evaluate(changed, data, reference=model, progress=False)
    assert shared_all.quality == alone_all.quality and shared_all.generation == alone_all.generation


def check_saving() -> None:
    model = build("llama")
    with together():
        changed = apply(model, [Awq(group_size=8, n_grid=3)], text(), progress=False).model
        folder = save(changed, FOLDER / "saved")
        same_model(load(folder), changed)
    refused(CheckpointError if sys.argv[2] == "0" else ProcessError, "exists already", lambda: save(changed, folder))
    assert len(list(FOLDER.glob("*saved*"))) == 1


class _Careless(Transform):
    """Goes by recorded calls and does not say that it adds up."""

    tags: ClassVar[Tags] = Tags(needs_data=True, records_calls=True)

    def edit(self, block: Any, seen: Any) -> Any:
        yield Note(block.path, str(len(seen.block_calls)))


class _Silent(_Careless):
    tags: ClassVar[Tags] = Tags(needs_data=True)


def register(*classes: type) -> None:
    """They are known by name, as those of an installed package are."""
    real = registry._entries
    own = {
        cls.__name__: (EntryPoint(cls.__name__, f"{cls.__module__}:{cls.__qualname__}", registry.METHODS),)
        for cls in classes
    }
    registry._entries = lambda group: real(group) | (own if group == registry.METHODS else {})  # type: ignore[assignment]


def refused(error: type[Exception], words: str, do: Any) -> None:
    try:
        with together():
            do()
    except error as raised:
        assert words in str(raised), str(raised)
    else:
        raise AssertionError(f"{error.__name__} was expected")
    assert not processes.several()


def check_errors() -> None:
    rank, model, data = int(sys.argv[2]), build("llama"), text()

    def fail() -> None:
        if rank == 1:
            raise KeyError("only here")
        record(model, {"mlp.hidden": Moments()}, data, progress=False)

    refused(*((ProcessError, "process 1 failed: KeyError: 'only here'") if rank == 0 else (KeyError, "only")), fail)

    mlp, rows = build("mlp"), [torch.randn(3, HIDDEN) for _ in range(2)]
    rows[1][2, 3] = float("nan")
    kind = ProcessError if rank == 0 else NonFiniteError
    before = copy.deepcopy(mlp.state_dict())
    refused(kind, "NaN", lambda: apply(mlp, [Teal(sparsity=0.5)], [torch.nan_to_num(rows[0]), rows[1]], progress=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())

    other = [*data[:2], {key: value.roll(rank, 1) for key, value in data[2].items()}]
    for use in (
        lambda: record(model, {"mlp.hidden": Moments()}, other, progress=False),
        lambda: apply(copy.deepcopy(model), [Teal(sparsity=0.5)], other, progress=False),
        lambda: measure_quality(model, other, progress=False),
    ):
        refused(ProcessError, "data: process 1 was given another one", use)
    edited = copy.deepcopy(model)
    edited.lm_head.weight.data[7, 3] += rank  # one value, past the version counter
    refused(ProcessError, "model: process 1", lambda: measure_quality(edited, data, progress=False))

    def apart() -> None:
        if rank == 0:
            record(model, {"mlp.hidden": Moments()}, data, progress=False)
        else:
            processes.total("something else", torch.zeros(1))

    refused(ProcessError, "went different ways", apart)
    refused(ProcessError, "'the end'", lambda: rank or processes.total("alone", torch.zeros(1)))
    register(_Careless, _Silent)
    for careless in (_Careless(), _Silent()):
        name = type(careless).__name__
        refused(
            RecipeError,
            f"{name}: it goes by recorded calls",
            lambda careless=careless: apply(model, [careless], data, progress=False),
        )
    refused(ValueError, "without torchrun", lambda: evaluate(model, data, folder=".", speed=True, progress=False))


def main() -> None:
    found: dict[str, str] = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                found[name] = "holds"
            except Exception:
                found[name] = traceback.format_exc()
            if not dist.is_initialized():  # the first check has made its own
                method = f"file://{FOLDER.resolve() / 'group'}"
                dist.init_process_group("gloo", init_method=method, rank=int(sys.argv[2]), world_size=2)
    dist.destroy_process_group()
    (FOLDER / f"{sys.argv[2]}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
