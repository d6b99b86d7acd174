"""The experiments of the lazy neuron phenomenon on tiny sizes, their data and their conditions."""

from __future__ import annotations

import math
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import ttest_rel
from torch.nn import functional as F

from actkit.claims import lazy_neuron
from actkit.claims.lazy_neuron import Arm, Sizes, Workshop
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKActivation
from actkit.testing import tiny_batches, tiny_model

TINY = Sizes(seeds=(0, 1), few=2, epochs=1, memorised=64, images=64, widths=(16, 32), draws=500)


@pytest.fixture(scope="module")
def workshop():
    made = Workshop(TINY, progress=False)
    images, labels = made.test
    made.test = images[:40], labels[:40]
    return made


def test_data_of_the_arms(workshop):
    def joined(arm, key):
        return torch.cat([batch[key] for batch in workshop.batches(arm)])

    true, noisy = Arm(3, 256), Arm(3, 256, noise=0.4)
    labels, images = Arm(3, 256, data="random labels"), Arm(3, 256, data="random images")
    pixels = joined(true, "pixel_values")
    for other in (noisy, labels, Arm(3, 256, k=16)):
        assert torch.equal(joined(other, "pixel_values"), pixels)
    assert not torch.equal(joined(images, "pixel_values"), pixels)
    assert torch.equal(joined(images, "labels"), joined(true, "labels"))
    assert torch.equal(joined(labels, "labels").sort().values, joined(true, "labels").sort().values)
    assert 0.1 < float((joined(noisy, "labels") != joined(true, "labels")).float().mean()) < 0.4
    assert torch.equal(joined(noisy, "labels"), joined(noisy, "labels"))
    seen = {tuple(image.flatten().tolist()) for image in pixels}
    assert not seen & {tuple(image.flatten().tolist()) for image in workshop.test[0]}


def test_arms_of_a_seed_start_alike_and_each_is_trained_once(workshop):
    dense, top_k = workshop.untrained(Arm(0, 256)), workshop.untrained(Arm(0, 256, k=16))
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), top_k.parameters(), strict=True))
    assert sum(isinstance(module, TopKActivation) for module in top_k.modules()) == 4
    first, again = (workshop.trained([Arm(0, 256)], "")[0] for _ in range(2))
    assert first is again and not torch.equal(next(first.parameters()), next(dense.parameters()))


def test_emergence_is_the_fall_of_the_share(workshop, monkeypatch):
    found = lazy_neuron.emergence(workshop)
    assert not found.passed and all(f"{data}: " in found.here for data in lazy_neuron.DATA)  # one epoch is too few
    shares = {"start": 0.5, "end": 0.34}

    def activity(model, batches):
        before = model not in workshop._trained.values()
        return SimpleNamespace(share=shares["start" if before else "end"])

    monkeypatch.setattr(lazy_neuron, "_activity", activity)
    assert lazy_neuron.emergence(workshop).passed
    assert not lazy_neuron.emergence(workshop, judge_end=True).passed
    shares["end"] = 0.36
    assert not lazy_neuron.emergence(workshop).passed
    shares["end"] = 0.24
    assert lazy_neuron.emergence(workshop, judge_end=True).passed


def test_width_is_judged_by_rank_correlation(workshop, monkeypatch):
    found = lazy_neuron.width(workshop)
    assert "16: " in found.here and "32: " in found.here

    def activity(model, batches):
        size = model.config.intermediate_size
        return SimpleNamespace(share=sign * size, layers=[SimpleNamespace(count=size**0.5)])

    monkeypatch.setattr(lazy_neuron, "_activity", activity)
    sign = -1
    assert lazy_neuron.width(workshop).passed
    sign = 1
    assert not lazy_neuron.width(workshop).passed


def test_pairs_and_their_t(workshop):
    gains = [0.5, 1.5, 2.0, 0.9]
    expected = ttest_rel([10 + gain for gain in gains], [10.0] * 4).statistic
    assert lazy_neuron._paired_t(gains) == pytest.approx(expected)
    assert lazy_neuron._paired_t([1.0, 1.0]) == math.inf
    for experiment in (lazy_neuron.label_noise, lazy_neuron.natural, lazy_neuron.corrupted, lazy_neuron.calibrated):
        here = experiment(workshop).here
        assert "difference" in here and "2 seeds" in here


@pytest.mark.parametrize(("dense", "top_k", "passed"), [(50, (51.2, 51.3), True), (50, (50.8, 50.9), False)])
def test_label_noise_needs_a_point(workshop, monkeypatch, dense, top_k, passed):
    values = iter([dense, dense, *top_k])
    monkeypatch.setattr(Workshop, "accuracy", lambda *_: next(values))
    assert lazy_neuron.label_noise(workshop).passed is passed


def test_layers_of_a_language_model():
    model, batches = tiny_model("llama", hidden_act="relu", num_hidden_layers=4), tiny_batches("llama")
    found = lazy_neuron.layers_of_a_language_model(SimpleNamespace(model=model, held_out=batches))
    shares = [layer.share for layer in neuron_activity(model, batches, progress=False).layers]
    assert f"{shares[0]:.1%}, {shares[1]:.1%}, {shares[2]:.1%}, {shares[3]:.1%} on 28 tokens" in found.here
    assert found.passed == (mean(shares[1:3]) < min(shares[0], shares[3]))


def test_gradients_are_those_of_autograd_and_the_sign_is_judged(monkeypatch):
    hidden = torch.randn(8).relu()
    found = lazy_neuron.last_layer_gradients(hidden, 3, 5, torch.Generator().manual_seed(1))
    last = torch.randn(5, 10, 8, generator=torch.Generator().manual_seed(1)) / math.sqrt(8)
    for gradient, matrix in zip(found, last, strict=True):
        leaf = hidden.clone().requires_grad_()
        F.cross_entropy(matrix @ leaf, torch.tensor(3)).backward()
        torch.testing.assert_close(gradient, leaf.grad)
    sizes = Sizes(seeds=(0,), few=1, draws=4000)
    assert lazy_neuron.first_gradient(sizes).passed
    original = lazy_neuron.last_layer_gradients
    monkeypatch.setattr(lazy_neuron, "last_layer_gradients", lambda *a, **k: -original(*a, **k))
    assert not lazy_neuron.first_gradient(sizes).passed
