"""The activation store: what is kept is what the model gave, whole or not at all, in any batches and order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

from actkit.core.forward.batch import forward
from actkit.core.ground.errors import CheckpointError, DataError, MemoryLimitError
from actkit.core.model.sites import Joined, Site
from actkit.core.store import activation_store
from actkit.core.store.activation_store import ActivationStore, harvest
from actkit.core.store.shuffled import Shuffle
from actkit.core.watch.capture import record
from actkit.core.watch.joined import Difference
from actkit.core.watch.statistics import AbsMax, Extremes, Gram, Moments, Quantiles, Sample

SITES = ("block.output", "mlp.hidden", "attention.mixed")
HIDDEN = "blocks.1.block.output"


def padded(count: int = 6, side: str = "right") -> list[dict[str, torch.Tensor]]:
    """Batches of two rows with padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        lengths = (7, 3 + number % 4)
        mask = torch.tensor([[at < n if side == "right" else at >= 7 - n for at in range(7)] for n in lengths])
        found.append({"input_ids": torch.randint(2, 50, (2, 7), generator=generator), "attention_mask": mask.long()})
    return found


def by_hand(model: Any, given: Any, block: int) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    handle = model.model.layers[block].register_forward_hook(
        lambda module, args, output: rows.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        for batch in given:
            forward(model, batch)
    handle.remove()
    pairs = zip(rows, given, strict=True)
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in pairs])


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_model_with_their_tokens(tmp_path: Path, side: str, dtype: torch.dtype) -> None:
    model, given = build("llama").to(dtype), padded(side=side)
    store = harvest(model, SITES, given, tmp_path / "acts", shard_rows=20, progress=False)
    assert len(store) == 3 and store.bytes == sum(path.stat().st_size for path in tmp_path.glob("acts/*.safetensors"))
    expected = by_hand(model, given, 1)
    parts = list(store.read(HIDDEN))
    found = torch.cat([x for x, _ in parts])
    assert found.dtype == dtype and torch.equal(found, expected) and store.count(HIDDEN) == len(expected)
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in given])
    assert torch.equal(torch.cat([rows.token_ids for _, rows in parts]), ids)
    masks = torch.cat([batch["attention_mask"] for batch in given]).bool()
    sequences, columns = masks.nonzero().T
    assert torch.equal(torch.cat([rows.sequences for _, rows in parts]), sequences)
    assert torch.equal(torch.cat([rows.positions for _, rows in parts]), columns)
    places = (masks.long().cumsum(1) - 1)[masks]
    assert torch.equal(torch.cat([rows.places for _, rows in parts]), places)
    tokens, at = store.context(HIDDEN, 9, before=2, after=2)
    mine = [each for each in range(7, 12) if sequences[each] == sequences[9]]
    assert tokens == ids[mine].tolist() and tokens[at] == int(ids[9])
    store.verify()
    store.check(model)


def test_passes_end_at_the_last_site_unless_a_module_runs_again(tmp_path: Path) -> None:
    model, given = build("llama"), padded()
    runs = {"model.layers.1": 0, "model.layers.0": 0, "lm_head": 0}
    for path in runs:
        model.get_submodule(path).register_forward_hook(lambda m, a, o, path=path: runs.update({path: runs[path] + 1}))
    store = harvest(model, "blocks.0.block.output", given, tmp_path / "one", progress=False)
    runs_of_one = dict(runs)
    assert runs_of_one == {"model.layers.0": len(given), "model.layers.1": 1, "lm_head": 1}  # the first is whole
    assert torch.equal(next(store.read("blocks.0.block.output"))[0], by_hand(model, given, 0))

    model = build("llama")
    inner = model.model.layers[0].mlp
    model.model.layers[0].mlp.forward = lambda x, own=inner.forward: own(own(x))  # type: ignore[method-assign]
    store = harvest(model, "layer.output:model.layers.0.mlp.down_proj", given, tmp_path / "two", progress=False)
    assert store.count("layer.output:model.layers.0.mlp.down_proj") == 2 * sum(
        int(batch["attention_mask"].sum()) for batch in given
    )


def test_the_order_of_rows_does_not_depend_on_the_batches(tmp_path: Path) -> None:
    model = build("llama")
    ids = torch.randint(50, (12, 6), generator=torch.Generator().manual_seed(0))
    stores = [
        harvest(model, SITES, [{"input_ids": part} for part in ids.split(size)], tmp_path / f"{size}", progress=False)
        for size in (1, 4, 12)
    ]
    for site in stores[0].sites:
        first, *others = ([torch.cat(part) for part in zip(*_flat(store, site), strict=True)] for store in stores)
        for other in others:
            torch.testing.assert_close(other[0], first[0], rtol=1e-5, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(other[1:], first[1:], strict=True))


def _flat(store: ActivationStore, site: str) -> Any:
    for x, rows in store.read(site):
        yield x, rows.documents, rows.sequences, rows.positions, rows.places, rows.token_ids


def test_statistics_of_a_store_are_those_of_a_forward_pass(tmp_path: Path) -> None:
    model, given = build("llama"), padded()
    store = harvest(model, SITES, given, tmp_path / "acts", shard_rows=20, progress=False)
    exact = [AbsMax(), Quantiles(), Sample(9), Extremes(4)]
    wanted = {"block.output": [*exact, Moments(), Gram()], HIDDEN: AbsMax(), "blocks.0.mlp.hidden": exact}
    direct = record(model, wanted, given, progress=False)
    stored = record(model, wanted, store=store, progress=False)
    assert list(direct) == list(stored)
    for site, statistics in direct.items():
        for one, other in zip(statistics, stored[site], strict=True):
            assert one.count == other.count
            for a, b in zip(one.state().values(), other.state().values(), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert stored[HIDDEN][0].value.equal(direct[HIDDEN][0].value)
    with pytest.raises(MemoryLimitError):
        record(model, wanted, store=store, max_memory=10)
    with pytest.raises(ValueError, match="batches were given beside it"):
        record(model, wanted, given, store=store)
    with pytest.raises(ValueError, match=r"blocks.0.attention.input is not in the store"):
        record(model, {"attention.input": AbsMax()}, store=store)
    joined = Joined(Site("block.output", 0), Site("block.output", 1))
    with pytest.raises(ValueError, match="whose rows come apart there"):
        record(model, {joined: Difference()}, store=store)
    other = build("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(CheckpointError, match="holds the activations of another model"):
        record(other, wanted, store=store)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_experts_and_other_families(tmp_path: Path, kind: str) -> None:
    model, given = build(kind), padded()
    store = harvest(model, "mlp.hidden", given, tmp_path / "acts", shard_rows=20, progress=False)
    direct = record(model, {"mlp.hidden": [AbsMax(), Sample(50)]}, given, progress=False)
    stored = record(model, {"mlp.hidden": [AbsMax(), Sample(50)]}, store=store, progress=False)
    for site, statistics in direct.items():
        if statistics[0].count:
            assert torch.equal(statistics[0].value, stored[site][0].value)
            assert torch.equal(statistics[1].rows, stored[site][1].rows)


def test_one_tensor_is_kept_once(tmp_path: Path) -> None:
    model, given = build("llama"), padded()
    names = ["blocks.0.mlp.hidden", "layer.input:model.layers.0.mlp.down_proj"]
    store = harvest(model, names, given, tmp_path / "a", progress=False)
    assert list(store.sites) == names and {*store.sites.values()} == {names[0]}
    assert torch.equal(next(store.read(names[0]))[0], next(store.read(names[1]))[0])


# -- whole or not there ------------------------------------------------------------------------------------------------


def test_a_harvest_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("llama"), padded()
    whole = harvest(model, SITES, given, tmp_path / "whole", shard_rows=20, progress=False)
    write, done = activation_store._write, []

    def cut(folder: Path, number: int, *rest: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(number)
        write(folder, number, *rest)

    monkeypatch.setattr(activation_store, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, SITES, given, tmp_path / "cut", shard_rows=20, progress=False)
    (tmp_path / "cut" / ".store.json.9.partial").write_bytes(b"half")
    (tmp_path / "cut" / ".shard-00001.9.partial").mkdir()
    (tmp_path / "cut" / ".shard-00001.9.partial" / ".tmp8RxZ2k").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="2 of 3 shards are not written yet"):
        ActivationStore.open(tmp_path / "cut")
    monkeypatch.setattr(activation_store, "_write", write)
    said: list[str] = []
    harvest(model, SITES, given, tmp_path / "cut", shard_rows=20, progress=False, announce=said.append)
    assert "in 2 shards" in said[0]
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole") and len(whole) == 3
    harvest(model, SITES, given, tmp_path / "cut", shard_rows=20, progress=False, announce=said.append)
    assert len(said) == 1  # nothing was left to do


def test_one_that_was_cut_off_before_it_began_begins(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / ".store.json.9.partial").write_bytes(b"half")
    harvest(build("llama"), SITES, padded(), tmp_path / "acts", progress=False)
    assert {path.name for path in (tmp_path / "acts").iterdir()} == {
        "store.json",
        "shard-00000.safetensors",
        "shard-00000.json",
    }


def test_two_processes_write_shards_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it were alone in its place; together they leave what one process does."""
    model, given = build("llama"), padded()
    harvest(model, SITES, given, tmp_path / "one", shard_rows=20, progress=False)
    monkeypatch.setattr(activation_store.processes, "mine", lambda number: number % 2 == 1)
    with pytest.raises(CheckpointError, match="2 of 3 shards are not written yet"):
        harvest(model, SITES, given, tmp_path / "two", shard_rows=20, progress=False)
    assert [path.name for path in sorted((tmp_path / "two").glob("*.json"))] == ["shard-00001.json", "store.json"]
    monkeypatch.setattr(activation_store.processes, "mine", lambda number: number % 2 == 0)
    harvest(model, SITES, given, tmp_path / "two", shard_rows=20, progress=False)
    assert kept(tmp_path / "two") == kept(tmp_path / "one")


@pytest.mark.parametrize(("first", "second"), [(2, 3), (4, 1), (1, 12)])
def test_a_run_goes_on_with_another_batch_size(tmp_path: Path, first: int, second: int) -> None:
    """Keys are equal, rows but for rounding; a shard equals to the byte that of a run with its batch size."""
    model, whole = build("llama"), (HIDDEN, "blocks.1.mlp.hidden")
    mask = torch.cat([batch["attention_mask"] for batch in padded()])
    ids = torch.cat([batch["input_ids"] for batch in padded()])

    def given(size: int) -> list[dict[str, torch.Tensor]]:
        parts = zip(ids.split(size), mask.split(size), strict=True)
        widths = ((part, real, int(real.sum(1).max())) for part, real in parts)  # padded as far as each batch needs
        return [
            {"input_ids": part[:, :width].where(real[:, :width].bool(), 9 + size), "attention_mask": real[:, :width]}
            for part, real, width in widths
        ]

    stores = {
        size: harvest(model, whole, given(size), tmp_path / f"{size}", shard_rows=16, progress=False)
        for size in (first, second)
    }
    assert len({len(store) for store in stores.values()}) == 1 and len(stores[first]) > 3
    one, other = (kept(tmp_path / f"{size}") for size in (first, second))
    assert one["store.json"] == other["store.json"]
    for number in (1, 2):  # as if it had been killed; the first and the last are there
        for suffix in ("json", "safetensors"):
            (tmp_path / f"{first}" / f"shard-{number:05d}.{suffix}").unlink()
    resumed = harvest(model, whole, given(second), tmp_path / f"{first}", shard_rows=16, progress=False)
    for site in whole:
        for size in (first, second):
            for mine, theirs in zip(_flat(resumed, site), _flat(stores[size], site), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True))
                torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert all(kept(tmp_path / f"{first}")[name] == other[name] for name in other if "-00001." in name)


def test_where_padding_stands_is_data_and_what_stands_there_is_not(tmp_path: Path) -> None:
    model, given, out = build("llama"), padded(), tmp_path / "acts"
    harvest(model, SITES, given, out, progress=False)
    for batch in given:
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), 1)
    harvest(model, SITES, given, out, progress=False)
    with pytest.raises(CheckpointError, match="was begun with other data"):
        harvest(model, SITES, padded(side="left"), out, progress=False)


def test_images_go_on_with_another_batch_size(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    site, out = "layer.output:0", tmp_path / "acts"
    before = harvest(model, site, list(x.split(4)), out, shard_rows=3, progress=False)
    expected = torch.cat([rows for rows, _ in before.read(site)])
    torch.testing.assert_close(expected, model[0](x).detach())
    for path in out.glob("shard-00002.*"):
        path.unlink()
    after = harvest(model, site, list(x.split(5)), out, shard_rows=3, progress=False)
    torch.testing.assert_close(torch.cat([rows for rows, _ in after.read(site)]), expected)


def test_another_model_data_or_sites_are_refused(tmp_path: Path) -> None:
    model, given, out = build("llama"), padded(), tmp_path / "acts"
    harvest(model, SITES, given, out, progress=False)
    for name, change in (
        ("other data", lambda: harvest(model, SITES, given[:-1], out, progress=False)),
        ("other sites", lambda: harvest(model, "block.output", given, out, progress=False)),
        ("another shard_rows", lambda: harvest(model, SITES, given, out, shard_rows=3, progress=False)),
    ):
        with pytest.raises(CheckpointError, match=f"was begun with {name}"):
            change()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(CheckpointError, match="was begun with another model"):
        harvest(model, SITES, given, out, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"there is no store.json"):
        harvest(model, SITES, given, tmp_path / "other", progress=False)


def test_damage_and_full_disks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, out = build("llama"), padded(), tmp_path / "acts"
    with pytest.raises(CheckpointError, match=r"max_disk: the store takes .*, 1KB was given"):
        harvest(model, SITES, given, out, max_disk="1KB", progress=False)
    monkeypatch.setattr(activation_store.shutil, "disk_usage", lambda path: type("Free", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="10 B are free there"):
        harvest(model, SITES, given, out, progress=False)
    monkeypatch.undo()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_store, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*harvest again, which goes on there"):
        harvest(model, SITES, given, out, progress=False)
    monkeypatch.undo()
    store = harvest(model, SITES, given, out, shard_rows=1 << 15, progress=False)
    shard = store.shards[0].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="the file is not as it was written"):
        ActivationStore.open(out).verify()
    shard.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="so that the store is damaged"):
        next(ActivationStore.open(out).read(HIDDEN))
    shard.unlink()
    with pytest.raises(CheckpointError, match="the file is missing"):
        ActivationStore.open(out)
    about = shard.with_suffix(".json")
    about.write_text("{")
    with pytest.raises(CheckpointError, match="not readable"):
        ActivationStore.open(out)
    (out / "store.json").write_text(json.dumps({"actkit": 99}))
    with pytest.raises(CheckpointError, match="of another version"):
        ActivationStore.open(out)
    with pytest.raises(DataError, match="batches: 0 were given"):
        harvest(model, SITES, [], tmp_path / "none")
    with pytest.raises(ValueError, match="shard_rows: 0 was given"):
        harvest(model, SITES, given, tmp_path / "none", shard_rows=0)


# -- in a random order -------------------------------------------------------------------------------------------------


def test_shuffled_batches_are_all_rows_once_and_the_same_from_any_index(tmp_path: Path) -> None:
    model, given = build("llama"), padded()
    store = harvest(model, SITES, given, tmp_path / "acts", shard_rows=20, progress=False)
    rows = torch.cat([x for x, _ in store.read(HIDDEN)])
    order = store.batches(HIDDEN, 5, seed=3)
    assert len(order) == len(rows) // 5
    taken = torch.cat(list(order))
    at = order.order(torch.arange(len(taken)))
    assert torch.equal(rows[at], taken) and len(at.unique()) == len(taken)
    assert at.tolist() != sorted(at.tolist())
    again = ActivationStore.open(tmp_path / "acts").batches(HIDDEN, 5, seed=3)
    assert torch.equal(again[4], order[4]) and torch.equal(again[-1], order[len(order) - 1])
    assert [torch.equal(a, b) for a, b in zip(order[1:3], again[1:3], strict=True)] == [True, True]
    assert not torch.equal(store.batches(HIDDEN, 5, seed=4)[0], order[0])
    with pytest.raises(IndexError, match="batch: 99 was given"):
        order[99]
    with pytest.raises(ValueError, match="size: 1000 was given"):
        store.batches(HIDDEN, 1000)
    with pytest.raises(ValueError, match="row: 1000 was given"):
        store.context(HIDDEN, 1000)
    with pytest.raises(ValueError, match="it is empty"):
        store.take(HIDDEN, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4096, 5000])
def test_a_shuffle_is_a_permutation(n: int) -> None:
    found = Shuffle(n, seed=7)(torch.arange(n))
    assert torch.equal(found.sort().values, torch.arange(n))
    assert torch.equal(Shuffle(n, seed=7)(torch.arange(n)[-3:]), found[-3:])


def test_a_shuffle_looks_random() -> None:
    """Neighbours are sent as far apart as by chance, and two seeds agree nowhere more than by chance."""
    n = 20_000
    first, second = (Shuffle(n, seed)(torch.arange(n)) for seed in (0, 1))
    distance = first.diff().abs().double().mean() / n
    assert abs(float(distance) - 1 / 3) < 0.01
    assert int((first == second).sum()) < 10
    correlation = torch.corrcoef(torch.stack((torch.arange(n).double(), first.double())))[0, 1]
    assert abs(float(correlation)) < 0.03
    with pytest.raises(ValueError, match="n: 0 was given"):
        Shuffle(0)
