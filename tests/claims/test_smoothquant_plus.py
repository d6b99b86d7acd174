"""SmoothQuant+'s experiments on tiny sizes: what they judge, and a correlation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from actkit.claims import smoothquant_plus
from actkit.claims.subject import Subject
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.quantization.rtn import RoundToNearest

TINY = smoothquant_plus.Sizes(seeds=(0, 1), calibration=1, held_out=2, search=64, steps=2)


@pytest.fixture(scope="module")
def natural(language):
    return Subject("swiglu", calibration=1, split="train", held_out=2, model=language)


def test_arms_have_a_value_per_seed(natural):
    found = smoothquant_plus.arms(natural, TINY, 4)
    assert [len(values) for values in found.values()] == [1, 2, 2, 2]
    assert len({round(value, 9) for values in found.values() for value in values}) >= 5


@pytest.mark.parametrize(
    ("rounded", "fixed", "searched", "passed"),
    [(32.0, 31.3, 31.0, True), (32.0, 30.9, 31.0, False), (32.0, 31.3, 31.3, False), (29.9, 30.0, 30.0, False)],
)
def test_the_central_claim_is_judged_by_the_gap(natural, monkeypatch, rounded, fixed, searched, passed):
    arms = {"rounded": [rounded], "strength 0.5": [fixed], "SmoothQuant+": [searched], "AWQ's scales": [31.0]}
    monkeypatch.setattr(smoothquant_plus, "arms", lambda *_: arms)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert smoothquant_plus.on_the_twin(natural, natural, TINY).passed is passed


@pytest.mark.parametrize(("searched", "harmless", "lossless"), [(30.2, True, True), (30.7, False, False)])
def test_ratios(natural, monkeypatch, searched, harmless, lossless):
    monkeypatch.setattr(smoothquant_plus, "arms", lambda *_: {"rounded": [30.3], "SmoothQuant+": [searched]})
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert smoothquant_plus.no_harm(natural, TINY).passed is harmless
    assert smoothquant_plus.lossless(natural, TINY).passed is lossless


@torch.no_grad()
def test_the_correlation_is_that_of_numpy(natural):
    model = natural.model
    inputs: dict[str, list[torch.Tensor]] = {}
    paths = [linear.path for block in anatomy(model).blocks for linear in block.linears()]
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.setdefault(path, []).append(args[0].flatten(0, 1).double())
        )
        for path in paths
    ]
    for batch in natural.calibration(0):
        model(**batch)
    for handle in handles:
        handle.remove()
    weights = {path: model.get_submodule(path).weight.double() for path in paths}
    applied = apply(model, RoundToNearest(bits=4, group_size=64), undo="memory", progress=False)
    rounded = {path: model.get_submodule(path).dequantized().double() for path in paths}
    applied.undo()
    ratios, errors = [], []
    for path in paths:
        x = torch.cat(inputs[path])
        largest = x.abs().amax(0)
        ratios.append(float(largest.max() / largest.median()))
        errors.append(float((x @ (rounded[path] - weights[path]).T).norm() / (x @ weights[path].T).norm()))
    ranks = [rankdata(np.round(values, 9)) for values in (ratios, errors)]  # layers that share an input share a ratio
    assert smoothquant_plus.correlation(natural) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-6)
