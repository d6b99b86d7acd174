"""Training sparse autoencoders on a store: what is learned, held out, resumed, written and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actkit.core.ground.errors import CheckpointError
from actkit.core.store.activation_store import ActivationStore, harvest
from actkit.core.train import training as loop
from actkit.core.watch.intervene import intervene
from actkit.interpretation.dark_matter.error_split import split_error
from actkit.interpretation.sparse_autoencoder.contexts import latent_contexts
from actkit.interpretation.sparse_autoencoder.files import read_autoencoder
from actkit.interpretation.sparse_autoencoder.kinds import KINDS
from actkit.interpretation.sparse_autoencoder.training import train_autoencoder
from actkit.testing import tiny_model

SITE = "blocks.1.block.output"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    ids = torch.randint(0, 40, (60, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(10)]
    return harvest(tiny_model("llama"), SITE, batches, tmp_path_factory.mktemp("store") / "acts", progress=False)


def trained(store: ActivationStore, **settings: Any) -> Any:
    given: dict[str, Any] = {"latents": 48, "steps": 40, "size": 64, "learning_rate": 1e-2, "progress": False}
    if settings.get("kind", "topk") in ("topk", "batchtopk", "matryoshka"):
        given["settings"] = {"k": 4}
    return train_autoencoder(store, **{**given, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns(kind: str, store: ActivationStore) -> None:
    few = trained(store, kind=kind, steps=1)
    more = trained(store, kind=kind)
    assert more.report.explained_variance > max(0.2, few.report.explained_variance)
    assert more.autoencoder.kind == ("jumprelu" if kind in ("batchtopk", "matryoshka") else kind)
    assert more.report.active > 0 and 0 <= more.report.dead < 1
    assert not more.autoencoder.training
    torch.testing.assert_close(more.autoencoder.decoder.norm(dim=1), torch.ones(48))
    assert more.table().row_count == 3 and json.loads(json.dumps(more.to_dict()))["report"]["latents"] == 48


def test_no_document_is_on_both_sides(store: ActivationStore) -> None:
    learned, measured = store.split(SITE, 0.25, skip=3)
    assert not set(learned.tolist()) & set(measured.tolist())
    keys = next(store.read(SITE))[1]
    assert int(keys.places[learned].min()) == int(keys.places[measured].min()) == 3
    assert not set(keys.documents[learned].tolist()) & set(keys.documents[measured].tolist())
    assert len(measured) == pytest.approx(0.25 * 60 * 13, abs=13)
    batches = store.batches(SITE, 50, rows=learned)
    found = torch.cat([batches[index] for index in range(len(batches))])
    whole = next(store.read(SITE))[0]
    rows = {tuple(row) for row in whole[learned].tolist()}
    assert all(tuple(row) in rows for row in found.tolist()) and len(found) == len(learned) // 50 * 50
    other = store.batches(SITE, 50, rows=learned[:-1])
    assert batches.fingerprint != other.fingerprint == store.batches(SITE, 50, rows=learned[:-1]).fingerprint


def test_a_training_that_was_killed_ends_as_if_nobody_had(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"kind": "batchtopk", "steps": 12, "evaluate_every": 4}
    whole = trained(store, out=tmp_path / "whole", **settings)
    update = loop._Loop.update

    def killed(self: Any) -> None:
        if self.step == 9:
            raise RuntimeError("killed")
        update(self)

    monkeypatch.setattr(loop._Loop, "update", killed)
    with pytest.raises(RuntimeError, match="killed"):
        trained(store, out=tmp_path / "cut", **settings)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="was not finished"):
        trained(store, out=tmp_path / "cut", **settings)
    with pytest.raises(CheckpointError, match="resume: rules"):
        trained(store, out=tmp_path / "cut", resume=True, **{**settings, "settings": {"k": 5}})
    with pytest.raises(CheckpointError, match=r"resume: (batches|data)"):
        trained(store, out=tmp_path / "cut", resume=True, skip=1, **settings)
    again = trained(store, out=tmp_path / "cut", resume=True, **settings)
    for name, value in whole.autoencoder.state_dict().items():
        assert torch.equal(value, again.autoencoder.state_dict()[name]), name
    one, two = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.report == again.report


def test_what_is_written_is_what_was_measured(store: ActivationStore, tmp_path: Path) -> None:
    found = trained(store, out=tmp_path / "sae")
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {
        *("cfg.json", "sae_weights.safetensors", "actkit.sha256", "training.json", "report.json")
    }
    assert not (tmp_path / "sae.training").exists()
    opened = read_autoencoder(tmp_path / "sae")
    x = next(store.read(SITE))[0]
    assert torch.equal(opened(x), found.autoencoder(x)) and (opened.site, opened.model) == (SITE, store.model)
    report = json.loads((tmp_path / "sae" / "report.json").read_text())
    assert report["explained_variance"] == found.report.explained_variance
    with pytest.raises(CheckpointError, match="exists already"):
        trained(store, out=tmp_path / "sae")
    trained(store, out=tmp_path / "sae", overwrite=True, kind="gated")
    assert read_autoencoder(tmp_path / "sae").kind == "gated"


def test_the_scale_of_activations_does_not_matter(store: ActivationStore) -> None:
    """Trained on activations that are 100 times as large, it reconstructs 100 times as much."""

    class Larger(ActivationStore):
        def take(self, site: Any, index: Any) -> Any:
            return 128 * super().take(site, index)

    larger = Larger(store.folder, store.sites, store.shards, store.model)
    x = next(store.read(SITE))[0]
    one, other = (trained(each, kind="jumprelu", steps=10).autoencoder for each in (store, larger))
    torch.testing.assert_close(128 * one(x), other(128 * x), rtol=1e-3, atol=1e-2)


def test_the_store_is_not_read_through_before_it_starts(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    take = ActivationStore.take

    def counted(self: Any, site: Any, index: Any) -> Any:
        nonlocal taken
        taken += 1
        return take(self, site, index)

    monkeypatch.setattr(ActivationStore, "take", counted)
    trained(store, steps=3, size=8)  # 108 batches for training
    assert taken < 45


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "deep"}, "kind: 'deep'"),
        ({"settings": {"sparsity": 1.0}}, "settings: "),
        ({"site": "blocks.0.block.output"}, "is not in the store"),
        ({"size": 10_000}, "size: 10000"),
        ({"held_out": 0.0}, "share, skip"),
        ({"skip": 16}, "none would be left"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str, store: ActivationStore) -> None:
    with pytest.raises(ValueError, match=text):
        trained(store, **settings)


def test_contexts_are_where_a_latent_is_largest(store: ActivationStore) -> None:
    autoencoder = trained(store).autoencoder
    found = latent_contexts(autoencoder, store, count=2, before=2, after=1, progress=False)
    x, keys = next(store.read(SITE))
    latents = autoencoder.encode(x).detach()
    assert found.rows == len(x) and len(found.latents) == 48
    for each in found.latents:
        values = latents[:, each.latent]
        assert each.density == pytest.approx(float((values > 0).float().mean()))
        expected = [value for value in values.topk(2).values.tolist() if value > 0]
        assert [context.value for context in each.contexts] == pytest.approx(expected)
        for context in each.contexts:
            assert context.value == pytest.approx(float(values[context.row]))
            assert context.tokens[context.place] == f"{int(keys.token_ids[context.row])} "
            assert f"[{context.tokens[context.place]}]" in context.text and len(context.tokens) <= 4
            first = context.row - context.place
            assert context.values == pytest.approx(values[first : first + len(context.tokens)].tolist())
            assert keys.sequences[first : first + len(context.tokens)].unique().tolist() == [
                int(keys.sequences[context.row])
            ]
    assert found.table("density", most=5).row_count == 5 and found.to_dict()["rows"] == len(x)
    page = found.page(most=5)
    densities = [row[1] for row in page.parts[0].rows]
    assert len(densities) == 5 and densities == sorted(densities, reverse=True)
    assert "Shown are the 5 that fire most often" in page.html()
    halves = (store.batches(SITE, 64, rows=rows) for rows in store.split(SITE, 0.5))
    split = split_error(autoencoder, *halves)
    text = found.page(most=5, split=split).html()
    assert "What the latents leave out" in text and f"{split.fvu_linear:.1%}, which more latents may find" in text
    few = latent_contexts(autoencoder, store, latents=[3], text=lambda ids: f"<{ids[0]}>", progress=False)
    assert [each.latent for each in few.latents] == [3]
    with pytest.raises(ValueError, match="latents are 0 to 47"):
        latent_contexts(autoencoder, store, latents=[48])
    with pytest.raises(ValueError, match="sort: 'size'"):
        found.table("size")  # type: ignore[arg-type]


def test_rows_far_longer_than_others_are_left_out(tmp_path: Path) -> None:
    """Attention sinks, wherever they stand; without them it is as if they had never been in the store."""
    model, ids = tiny_model("llama"), torch.randint(0, 40, (60, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(10)]

    def sinks(value: torch.Tensor, at: Any) -> torch.Tensor:
        value = value.clone()
        value[:, 0] *= 1000
        value[3, 5] *= 1000
        return value

    with intervene(model, {SITE: sinks}):
        store = harvest(model, SITE, batches, tmp_path / "acts", progress=False)
    rows = torch.cat([x for x, _ in store.read(SITE)])
    norms = rows.norm(dim=1)
    usual = store.numbers(SITE, longest=10.0)
    assert torch.equal(usual, (norms <= 10 * norms.median()).nonzero()[:, 0]) and len(usual) == 60 * 15 - 6
    assert len(store.numbers(SITE)) == 960 and len(store.numbers(SITE, skip=1, longest=10.0)) == 894
    found = trained(store)
    assert found.report.left_out == 66 and found.table().row_count == 4
    assert trained(store, longest=math.inf).report.left_out == 0
    assert found.report.explained_variance > 0.2
    read = latent_contexts(found.autoencoder, store, before=15, after=15, progress=False)
    places = {context.row for each in read.latents for context in each.contexts}
    assert all(context.values[0] == 0 for each in read.latents for context in each.contexts)  # a sink
    assert read.rows == 894 and places <= set(usual.tolist())
    with pytest.raises(ValueError, match="longest: "):
        trained(store, longest=1.0)
