"""Neural codes: bits against plain hooks, distances against scipy, regions against the geometry of lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actkit
from actkit.core.train.meter import Meter, readings
from actkit.core.train.training import train
from actkit.data import digits
from actkit.interpretation.neural_code.categories import code_kmeans, code_knn, code_logistic
from actkit.interpretation.neural_code.codes import (
    Codes,
    distinct,
    duplicates,
    hamming,
    nearest,
    neural_codes,
    redundancy,
    varying,
)
from actkit.interpretation.neural_code.neural_code import neural_code
from actkit.interpretation.neural_code.phase_chart import CodeNet, PhaseChart, Reading, phase_chart
from actkit.interpretation.neural_code.regions import code_diffusion, region_diameter
from actkit.testing import tiny_batches, tiny_model


def made(bits, labels=None) -> Codes:
    """Codes of one layer from 0 and 1."""
    from actkit.interpretation.neural_code.codes import CodeLayer

    bits = np.asarray(bits, dtype=np.uint8)
    layers = (CodeLayer("act", 0, bits.shape[1], False, 0),)
    given = None if labels is None else np.asarray(labels)
    return Codes(np.packbits(bits, axis=1), layers, given, np.arange(len(bits)))


def drawn(samples, width, seed=0, classes=3):
    draw = np.random.default_rng(seed)
    means = draw.random((classes, width))
    labels = draw.integers(0, classes, samples)
    return made(draw.random((samples, width)) < means[labels], labels)


# -- what is read ------------------------------------------------------------------------------------------------------


def hooked_signs(model, modules, batches):
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: kept[name].append(args[0] > 0))
        for name in modules
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(kept[name]) for name in modules]


def test_bits_of_images_are_those_of_plain_hooks():
    model = actkit.load("cnn", dtype=torch.float32)
    pixels, labels = digits("search")
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(50), labels.split(50), strict=True)]
    codes = neural_codes(model, batches, progress=False)
    plain = [{"pixel_values": x} for x in pixels.split(50)]
    signs = hooked_signs(model, ["act1", "act2", "act3"], plain)
    # positions first and channels inside, as actkit lays out rows
    wanted = torch.cat([x.flatten(2).transpose(1, 2).flatten(1) if x.dim() == 4 else x for x in signs], 1)
    assert np.array_equal(codes.bits(), wanted.numpy())
    assert [(layer.path, layer.stop - layer.start) for layer in codes.layers] == [
        ("act1", 1024),
        ("act2", 512),
        ("act3", 64),
    ]
    assert codes.labels.tolist() == labels.tolist() and not any(layer.soft for layer in codes.layers)
    pooled = neural_codes(model, batches, pool="any", progress=False)
    any_on = torch.cat([x.flatten(2).any(2) if x.dim() == 4 else x for x in signs], 1)
    assert np.array_equal(pooled.bits(), any_on.numpy())
    assert np.array_equal(codes.of_layer("act3").bits(), signs[2].numpy())


def test_tokens_are_samples_without_the_padding():
    model, batches = tiny_model("llama", hidden_act="relu"), tiny_batches("llama")
    codes = neural_codes(model, batches, progress=False)
    modules = [f"model.layers.{i}.mlp.act_fn" for i in range(2)]
    masks = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches])
    signs = []
    for name in modules:
        kept: list[torch.Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: kept.append(a[0].flatten(0, 1) > 0))  # noqa: B023
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        signs.append(torch.cat(kept)[masks])
    assert np.array_equal(codes.bits(), torch.cat(signs, 1).numpy())
    assert len(codes) == int(masks.sum())
    soft = neural_codes(tiny_model("llama"), batches, progress=False)
    assert all(layer.soft for layer in soft.layers)


def test_labels_of_tokens_go_with_their_tokens():
    model, batches = tiny_model("llama"), tiny_batches("llama")
    given = [{**batch, "labels": batch["input_ids"] * 2} for batch in batches]
    codes = neural_codes(model, given, progress=False)
    wanted = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    assert codes.labels.tolist() == (2 * wanted).tolist()


def test_the_mode_of_the_model_does_not_matter_and_is_kept():
    torch.manual_seed(0)
    model = CodeNet((1, 8, 8), 10, 12, 2)
    images = digits("search")[0]
    model(images)  # statistics of the batch norms
    once = neural_codes(model.eval(), [images], progress=False)
    again = neural_codes(model.train(), [images], progress=False)
    assert np.array_equal(once.packed, again.packed) and model.training


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, 2), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


def test_a_relu_that_is_called_as_a_function_is_read_behind_it():
    torch.manual_seed(0)
    model, x = Functional(nn.functional.relu), torch.randn(9, 4)
    codes = neural_codes(model, [x], progress=False)
    assert np.array_equal(codes.bits(), (model.first(x) > 0).numpy())


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 65, 200])
def test_counts_and_distances_are_those_of_numpy_and_scipy(width):
    from scipy.spatial.distance import cdist

    one, other = drawn(40, width, 1), drawn(30, width, 2)
    assert distinct(one) == len(np.unique(one.bits(), axis=0))
    assert redundancy(one) == (40 - len(np.unique(one.bits(), axis=0))) / 40
    wanted = cdist(one.bits(), other.bits(), "hamming") * width
    assert np.array_equal(hamming(one, other), np.rint(wanted).astype(int))
    index, distance = nearest(one, other, 5)
    assert np.array_equal(distance, np.sort(wanted, axis=1)[:, :5].round())
    assert np.array_equal(np.take_along_axis(wanted, index, 1).round(), distance)
    assert np.array_equal(one.counts(), one.bits().sum(0))


def test_duplicates_are_groups_of_equal_codes():
    codes = made([[0, 1], [1, 1], [0, 1], [1, 0], [1, 1], [0, 1]])
    assert duplicates(codes) == [[0, 2, 5], [1, 4]] and distinct(codes) == 3 and redundancy(codes) == 0.5


def test_constant_bits_are_found_on_training_samples_alone():
    train_codes, test_codes = made([[0, 1, 1], [0, 0, 1]]), made([[1, 1, 0]])
    assert varying(train_codes).tolist() == [False, True, False]
    assert varying(train_codes, test_codes).tolist() == [True, True, True]
    kept = train_codes.units(np.array([False, True, True]))
    assert kept.bits().tolist() == [[1, 1], [0, 1]] and kept.width == 2


def test_simple_algorithms_find_what_scikit_learn_finds():
    from sklearn.neighbors import KNeighborsClassifier

    known, asked = drawn(120, 40, 3), drawn(60, 40, 3)
    theirs = KNeighborsClassifier(5, metric="hamming").fit(known.bits(), known.labels)
    assert code_knn(known, asked, k=5) == pytest.approx(theirs.score(asked.bits(), asked.labels))
    assert code_logistic(known, asked) > 0.9 and code_kmeans(known, asked) > 0.9


def test_greedy_clusters_read_higher_than_matched_ones():
    """Two clusters of one class: the majority takes both, a matching may not."""
    bits = [[0, 0, 0, 0]] * 10 + [[1, 1, 1, 1]] * 10
    codes = made(bits, [0] * 6 + [1] * 4 + [0] * 7 + [1] * 3)
    assert code_kmeans(codes, codes, matching="greedy") == pytest.approx(13 / 20)
    assert code_kmeans(codes, codes) == pytest.approx(max(6 + 3, 4 + 7) / 20)


# -- regions -----------------------------------------------------------------------------------------------------------


def test_the_diameter_is_that_of_a_region_that_is_known():
    """|x| < 1 is a region of two units that are off behind 1."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.fill_(-1.0)
    x, unit = torch.zeros(1), torch.ones(1)
    assert region_diameter(model, x, unit) == pytest.approx(2.0, abs=0.06)
    assert region_diameter(model, x + 3, unit) == pytest.approx(7.0, abs=0.06)  # from 1 to the end of the line, at 8


def test_diffusion_by_loops():
    codes = drawn(25, 30, 4)
    found = {"every": [], "within": [], "between": []}
    bits, equal = codes.bits(), 0
    for i in range(25):
        for j in range(i + 1, 25):
            distance = int((bits[i] != bits[j]).sum())
            if not distance:
                equal += 1
                continue
            found["every"].append(distance**-2.0)
            found["within" if codes.labels[i] == codes.labels[j] else "between"].append(distance**-2.0)
    measured = code_diffusion(codes)
    for name, values in found.items():
        assert getattr(measured, name) == pytest.approx(np.mean(values))
    assert measured.equal == equal


# -- the analysis and the chart ----------------------------------------------------------------------------------------


def test_the_analysis_adds_up_and_finds_the_models_own_accuracy():
    model = actkit.load("cnn", dtype=torch.float32)
    pixels, labels = (torch.cat(each) for each in zip(digits("search"), digits("test"), strict=True))
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(64), labels.split(64), strict=True)]
    first = len(digits("search")[0])
    found = neural_code(model, batches, fitted=first, progress=False)
    with torch.no_grad():
        own = (model(digits("test")[0]).argmax(-1) == digits("test")[1]).float().mean()
    assert found.accuracy == pytest.approx(float(own))
    assert found.samples == ("example", first, len(labels) - first) and found.bits == 1600
    assert found.redundancy == 0 and found.knn > 0.9 and found.layers[2].bits == 64


def test_a_chart_of_sizes_and_times_names_its_regimes():
    images, labels = digits("search")
    data, held_out = ({"pixel_values": images[part], "labels": labels[part]} for part in (slice(120), slice(120, None)))
    chart = phase_chart(
        lambda size, seed: CodeNet((1, 8, 8), 10, size),
        data,
        held_out,
        sizes=(2, 30),
        steps=20,
        samples=(40, 120),
        repeats=1,
        learning_rate=1e-2,
        progress=False,
    )
    assert len(chart.readings) == 2 * 2 * 2 and chart.axis("step") == [0, 20]
    assert chart.regime(2, 20, 120) == "under-expressive" and chart.mean("redundancy", 30, 20, 120) < 0.05
    assert chart.mean("knn", 30, 20, 120) > chart.mean("knn", 30, 0, 40)


def test_regimes_by_their_borders():
    def reading(size, redundant, knn):
        return Reading(size, 1, 10, 0, redundant, 0.0, knn, 0.0, 0.0, 0.0)

    chart = PhaseChart((reading(1, 0.02, 0.5), reading(2, 0.0, 0.9), reading(3, 0.01, 0.97), reading(4, 0.0, 0.975)))
    assert [chart.regime(size, 1, 10) for size in (1, 2, 3, 4)] == [
        "under-expressive",
        "critical",
        "sufficient",
        "sufficient",
    ]


def test_along_a_training_by_the_meter():
    images, labels = digits("search")
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(images.split(60), labels.split(60), strict=True)]
    meter = Meter(analysis={"neural_code": {"fitted": 100}}, at=(0, 3), batches=batches)
    net = CodeNet((1, 8, 8), 10, 16)
    trained = train(net, batches, validation=batches[:1], steps=3, rules=[meter], keep="last", progress=False)
    assert [step for step, _ in readings(trained)] == [0, 3]
