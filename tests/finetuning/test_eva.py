"""EVA: exact principal directions, ranks by what they explain, and what peft finds on the same batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.watch.spectrum import Spectrum
from actkit.finetuning.eva import Eva, allocate, inputs_of
from actkit.finetuning.explained_variance import explained_variance
from actkit.finetuning.low_rank_training import adapters_beside, train_adapter
from actkit.testing import tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN

peft = pytest.importorskip("peft")
LENGTHS = ((9, 4, 6), (7, 2), (8, 8))


def read(model: Any, path: str, batches: Any) -> Tensor:
    """What a layer reads at real tokens, [rows, in]."""
    rows = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        kept = batch["attention_mask"].bool()
        if "labels" in batch:
            kept = kept & (batch["labels"] != -100)
        hook = model.get_submodule(path).register_forward_hook(lambda m, x, y, kept=kept: rows.append(x[0][kept]))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_directions_are_those_of_scikit_learn(path: str) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=LENGTHS)
    plan = Eva(rank=3).plan(model, batches, progress=False)
    x = read(model, path, batches).double().numpy()
    found = next(each for each in plan.inputs if path in each.ranks)
    oracle = decomposition.PCA(n_components=6, svd_solver="full").fit(x)
    assert found.tokens == len(x)
    np.testing.assert_allclose(found.explained, oracle.explained_variance_ratio_, rtol=1e-5)
    np.testing.assert_allclose(found.singular, oracle.singular_values_, rtol=1e-5)
    cosines = np.abs((found.directions.numpy() * oracle.components_).sum(1))
    assert cosines.min() >= 0.99999
    assert all(row[row.abs().argmax()] > 0 for row in found.directions)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("labels", [False, True])
def test_ranks_and_directions_are_those_of_peft_on_one_batch(rho: float, labels: bool) -> None:
    model = tiny_model("llama").eval()
    batch = dict(tiny_batches("llama", lengths=((14, 11, 9, 13) * 6,))[0])
    if labels:
        batch["labels"] = batch["input_ids"].where(torch.arange(14) > 2, -100)
    config = peft.LoraConfig(
        r=4,  # with 2 its randomised decomposition is too coarse for a flat spectrum: 0.998
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.99),
    )
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    config.target_modules = names
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    theirs = peft.tuners.lora.eva.get_eva_state_dict(
        model,
        [batch],
        config,
        forward_fn=lambda model, given: model(**inputs),
        show_progress_bar=False,
    )
    plan = Eva(rank=4, rho=rho).plan(model, [batch], progress=False)
    assert set(plan.ranks) == set(theirs)
    for each in plan.inputs:  # of layers that read the same, which one gets more is a matter of order
        assert sorted(each.ranks.values()) == sorted(len(theirs[path]) for path in each.ranks)
        longest = max((theirs[path] for path in each.ranks), key=len)
        x = read(model, next(iter(each.ranks)), [batch])
        values = torch.linalg.svdvals(x - x.mean(0))
        gaps = values[:-1] / values[1:]
        for index, row in enumerate(longest):
            apart = (index == 0 or gaps[index - 1] > 1.05) and gaps[index] > 1.05
            cosine = float(row.double() @ each.directions[index] / row.double().norm())
            assert not apart or cosine >= 0.999, (each.site, index, cosine)


def test_the_ranks_explain_the_most_that_the_budget_can() -> None:
    explained = [torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.6, 0.05, 0.04]), torch.tensor([0.2, 0.2, 0.2])]
    layers, rank = [2, 1, 1], 1
    ranks = allocate(explained, layers, rank)
    values = [own for own, number in zip(explained, layers, strict=True) for _ in range(number)]
    flat = [each for own in ranks for each in own]
    reached = sum(float(own[:r].sum()) for own, r in zip(values, flat, strict=True))
    best = max(
        sum(float(own[:r].sum()) for own, r in zip(values, choice, strict=True))
        for choice in itertools.product(range(4), repeat=4)
        if sum(choice) == 4
    )
    assert sum(flat) == rank * sum(layers) and reached == pytest.approx(best)
    assert ranks == [[2, 1], [1], [0]]  # of equal shares the first layer's win


def test_a_wider_choice_explains_no_less() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    sums = [Eva(rank=3, rho=rho).plan(model, batches, progress=False).explained for rho in (1.0, 1.5, 2.0)]
    assert sums == sorted(sums)
    assert set(Eva(rank=3, rho=1.0).plan(model, batches, progress=False).ranks.values()) == {3}


def test_alpha_keeps_pace_with_the_rank_and_whitening_divides_once() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    plan = Eva(rank=3).plan(model, batches, progress=False)
    layers, whitened = plan.layers(1.5), plan.layers(1.5, whiten=True)
    for each in plan.inputs:
        for path, rank in each.ranks.items():
            if not rank:
                assert path not in layers
                continue
            assert layers[path].alpha == 1.5 * rank and layers[path].start.shape[0] == layers[path].rank == rank
            expected = layers[path].start.double() / each.singular[:rank].sqrt()[:, None]
            assert torch.allclose(whitened[path].start.double(), expected, rtol=1e-5)


def test_without_centring_the_mean_is_a_direction() -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=LENGTHS)
    path = "model.layers.1.mlp.down_proj"
    plan = Eva(rank=2, centred=False).plan(model, batches, progress=False)
    found = next(each for each in plan.inputs if path in each.ranks)
    x = read(model, path, batches).double()
    assert torch.allclose(found.singular, torch.linalg.svdvals(x)[:4], rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit", "mlp"])
def test_other_kinds_of_models(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    plan = Eva(rank=1).plan(model, batches, progress=False)
    assert sum(plan.ranks.values()) == len(plan.ranks)
    found = explained_variance(model, plan, batches, progress=False)
    assert found.explained == pytest.approx(found.most)  # of its own data it is the best


def test_convolutions_begin_at_the_directions_of_their_patches() -> None:
    torch.manual_seed(0)
    model = DigitsCNN(channels=(4, 6), hidden=12)
    batches = [{"pixel_values": torch.rand(5, 1, 8, 8)} for _ in range(3)]
    plan = Eva(rank=3).plan(model, batches, progress=False)
    assert set(plan.ranks) == {"conv1", "conv2", "fc1", "fc2"} and sum(plan.ranks.values()) == 12
    with torch.no_grad():
        images = torch.cat([batch["pixel_values"] for batch in batches])
        hidden = model.act1(model.conv1(images))
    by_hand = hidden.double()
    padded = torch.nn.functional.pad(by_hand, (1, 1, 1, 1))
    rows = torch.stack(
        [
            padded[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten()
            for n in range(15)
            for i in range(4)
            for j in range(4)
        ]
    )
    found = next(each for each in plan.inputs if "conv2" in each.ranks)
    assert found.tokens == len(rows)
    assert torch.allclose(found.singular, torch.linalg.svdvals(rows - rows.mean(0))[:6], rtol=1e-5)
    before = model(images)
    batches = [{**batch, "labels": torch.arange(5) % 3} for batch in batches]
    layers = plan.layers(2.0)
    weight = model.conv2.weight.detach().clone()
    trained = train_adapter(
        model, batches, validation=list(batches), layers=layers, steps=4, learning_rate=0.01, progress=False
    )
    assert trained.validation < trained.history[0].validation
    assert int(torch.linalg.matrix_rank((model.conv2.weight - weight).flatten(1), rtol=1e-4)) == plan.ranks["conv2"]
    assert model(images).shape == before.shape and type(model.conv2) is torch.nn.Conv2d


def test_a_start_changes_nothing_before_the_first_step() -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=LENGTHS)
    with torch.no_grad():
        before = model(**batches[0]).logits
        with adapters_beside(model, Eva(rank=3).layers(model, batches), 0):
            adapted = model(**batches[0]).logits
        after = model(**batches[0]).logits
    assert torch.equal(before, adapted) and torch.equal(before, after)


def test_explained_variance_is_that_of_a_projection() -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=LENGTHS)
    path = "model.layers.0.mlp.gate_proj"
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found = explained_variance(model, {path: rows}, batches, progress=False).layers[0]
    x = read(model, path, batches).double()
    x = x - x.mean(0)
    projected = x @ torch.linalg.pinv(rows.double()) @ rows.double()
    assert found.explained == pytest.approx(float(projected.square().sum() / x.square().sum()), rel=1e-5)
    values = torch.linalg.svdvals(x).square()
    assert found.most == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-5)
    assert found.rank == 3 and found.explained <= found.most


def test_inputs_that_never_change_get_no_rank() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    plan = Eva(rank=2, rho=1.0).plan(model, tiny_batches("llama", lengths=LENGTHS), progress=False)
    assert plan.ranks["model.layers.0.mlp.down_proj"] == 0
    assert "model.layers.0.mlp.down_proj" not in plan.layers(2.0)
    assert "0.0%" not in str(plan.to_dict()) and plan.table().row_count == len(plan.inputs)


def test_directions_of_a_spectrum() -> None:
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    statistic = Spectrum(centred=True)
    statistic.update(x)
    directions, values = statistic.directions(4)
    oracle = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert torch.allclose(values, oracle.S[:4])
    assert torch.allclose((directions @ oracle.Vh[:4].t()).abs(), torch.eye(4, dtype=torch.float64), atol=1e-9)
    with pytest.raises(ValueError, match="k: 7 was given; give 1 to 6"):
        statistic.directions(7)


def test_bad_data() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    with pytest.raises(DataError, match="batches: 0 were given"):
        Eva(rank=2).plan(model, [], progress=False)
    short = tiny_batches("llama", lengths=((2, 1),))
    with pytest.raises(DataError, match=r"q_proj read 3 rows, which are too few for 8 directions \(rank 4 at rho 2\)"):
        Eva(rank=4).plan(model, short, progress=False)
    with pytest.raises(ValueError, match=r"rank: 9 at rho 2 asks for 18 directions, and .*q_proj has 16 inputs"):
        Eva(rank=9).plan(model, batches, progress=False)
    with pytest.raises(ValueError, match=r"directions: lm_head; give those of linear layers in blocks"):
        explained_variance(model, {"lm_head": torch.ones(1, 16)}, batches, progress=False)
    with pytest.raises(ValueError, match=r"down_proj was given rows of shape \[1, 16\]; give \[rank, 24\]"):
        explained_variance(model, {"model.layers.0.mlp.down_proj": torch.ones(1, 16)}, batches, progress=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        Eva(rank=2).plan(model, batches, progress=False)


def test_blocks_are_read_one_at_a_time() -> None:
    sites = [
        site for site, _, _ in inputs_of(tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS), progress=False)
    ]
    assert len(sites) == 8 and sites == sorted(sites, key=lambda site: site.split(".")[1])
