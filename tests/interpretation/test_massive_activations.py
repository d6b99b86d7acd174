"""Massive activations: found by hand, fitted as scipy does, forecast on a known mapping, overwritten entry by entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from scipy.special import lambertw
from transformers import LlamaConfig

from actkit.core.forward.batch import forward
from actkit.core.ground.errors import DataError
from actkit.core.train.meter import Meter
from actkit.core.train.training import train
from actkit.core.watch.extremes import is_massive
from actkit.interpretation.massive_activations import law as laws
from actkit.interpretation.massive_activations.dynamics import dynamics, trajectories
from actkit.interpretation.massive_activations.forecast import TARGETS, Forecast, Shape
from actkit.interpretation.massive_activations.law import (
    FIRST_STEP,
    LAW,
    LOGARITHM,
    SECOND_STEP,
    compare_laws,
    fit,
    identifiable,
    jacobian,
    original,
    original_curve,
)
from actkit.interpretation.massive_activations.massive_activations import massive_activations
from actkit.interpretation.massive_activations.overwriting import massive_values, overwritten
from actkit.testing import tiny_batches, tiny_model

CHANNEL = 5
TRUE = {"A": 300.0, "lambda": 0.3, "gamma": 0.2, "t0": 0.4, "K": 400.0}
TIMES = np.unique(np.concatenate([[0.0], np.geomspace(0.1, 140, 20), np.linspace(7, 140, 20)]))


def planted(kind: str = "llama") -> Any:
    """A model whose first block writes huge values into one channel."""
    model = tiny_model(kind)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[CHANNEL] *= 1e6
    return model


def by_hand(model: Any, batches: Any, block: int) -> list[torch.Tensor]:
    """Of each sequence the real rows behind a block, [tokens, channels]."""
    taken: list[torch.Tensor] = []
    handle = model.model.layers[block].register_forward_hook(
        lambda module, args, output: taken.extend(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    handle.remove()
    masks = [row.bool() for batch in batches for row in batch["attention_mask"]]
    return [x[mask] for x, mask in zip(taken, masks, strict=True)]


# -- finding -----------------------------------------------------------------------------------------------------------


def test_layers_are_those_of_a_hook_by_hand() -> None:
    model, batches = planted(), tiny_batches("llama")
    found = massive_activations(model, batches, top=3, progress=False)
    assert found.sequences == sum(len(batch["input_ids"]) for batch in batches)
    ids = [row[mask.bool()] for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    for block, layer in enumerate(found.layers):
        rows = by_hand(model, batches, block)
        ratios = torch.tensor([float(x.abs().max() / x.abs().median()) for x in rows], dtype=torch.float64)
        assert layer.ratio == pytest.approx(float(ratios.mean()), rel=1e-6)
        assert layer.ratio_std == pytest.approx(float(ratios.std()), rel=1e-6)
        values = torch.cat(rows).abs().flatten()
        assert [abs(each.value) for each in layer.top] == values.topk(3).values.tolist()
        assert layer.median == pytest.approx(float(values.median()), rel=1 / 256)
        for each in layer.top:
            assert float(rows[each.sequence][each.place, each.channel]) == each.value
            assert int(ids[each.sequence][each.place]) == each.token_id
        assert layer.strict and layer.top[0].channel == CHANNEL
    assert len(found.strict) == len(found.layers)
    assert not massive_activations(tiny_model("llama"), batches, progress=False).strict


def test_massive_is_both_large_and_larger() -> None:
    assert is_massive(101, 0.1) and not is_massive(101, 0.102) and not is_massive(99, 0.001)
    assert not is_massive(1e9, 0.0)


def test_a_median_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match=r"blocks.0.mlp.hidden: the median magnitude is 0"):
        massive_activations(tiny_model("llama", hidden_act="relu"), tiny_batches("llama"), site="mlp.hidden")


# -- overwriting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "zero"])
def test_exactly_the_massive_entries_are_overwritten(mode: Any) -> None:
    model, batches = planted(), tiny_batches("llama")
    values = massive_values(model, batches, progress=False)
    rows = torch.cat(by_hand(model, batches, 0))
    massive = rows.abs() > values.threshold
    assert massive.any(0).nonzero().flatten().tolist() == [CHANNEL] == list(values.means)
    assert values.count == int(massive.sum()) and values.site == "blocks.0.block.output"
    held = rows[massive].double()
    assert values.means[CHANNEL] == pytest.approx(float(held.mean()))
    assert values.deviations[CHANNEL] == pytest.approx(float(held.std(correction=0)))
    wanted = torch.where(massive, values.means[CHANNEL] if mode == "mean" else 0.0, rows)
    second = model.model.layers[1]
    read: list[torch.Tensor] = []
    with torch.no_grad(), overwritten(model, values, mode):
        handle = second.register_forward_pre_hook(lambda module, args, kwargs: read.extend(args[0]), with_kwargs=True)
        for batch in batches:
            forward(model, batch)
        handle.remove()
    masks = [row.bool() for batch in batches for row in batch["attention_mask"]]
    found = torch.cat([x[mask] for x, mask in zip(read, masks, strict=True)])
    torch.testing.assert_close(found, wanted.to(found.dtype))


def test_nothing_to_overwrite_is_an_error() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(DataError, match="behind any block exceeds 100 and 1000 times"):
        massive_values(model, batches, progress=False)
    with pytest.raises(DataError, match="behind block 1 exceeds"):
        massive_values(model, batches, block=1, progress=False)
    values = massive_values(planted(), batches, progress=False)
    with pytest.raises(ValueError, match="mode: 'half' was given"), overwritten(model, values, "half"):  # type: ignore[arg-type]
        pass


# -- the law -----------------------------------------------------------------------------------------------------------


def test_the_two_forms_are_one_curve() -> None:
    form = identifiable(TRUE)
    again = original(form)
    assert all(again[name] == pytest.approx(TRUE[name], rel=1e-12) for name in TRUE)
    curve = np.exp(-form["beta"] * TIMES) * (form["A1"] * np.log(TIMES + form["tau0"]) + form["A2"]) + form["K"]
    np.testing.assert_allclose(curve, original_curve(TIMES, TRUE), rtol=1e-8)


def test_the_jacobian_is_that_of_finite_differences() -> None:
    found = jacobian(TIMES, TRUE)
    for index, name in enumerate(TRUE):
        step = 1e-6 * TRUE[name]
        ahead, behind = (original_curve(TIMES, {**TRUE, name: TRUE[name] + sign * step}) for sign in (1, -1))
        scale = float(np.abs(found[:, index]).max())
        np.testing.assert_allclose(found[:, index], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6 * scale)


def test_an_exact_curve_is_recovered_with_its_peak() -> None:
    fitted = fit(TIMES, original_curve(TIMES, TRUE))
    assert fitted.r2 > 1 - 1e-9 and fitted.converged
    for name, value in TRUE.items():
        assert fitted.parameters[name] == pytest.approx(value, rel=1e-2), name
    grid = np.linspace(0.01, 140, 200_001)
    highest = float(grid[original_curve(grid, TRUE).argmax()])
    assert fitted.peak == pytest.approx(highest, rel=1e-3) and fitted.peak_observed
    x = math.exp(float(lambertw(1 / TRUE["lambda"]).real))
    assert fitted.peak == pytest.approx((x - TRUE["t0"]) / TRUE["gamma"], rel=1e-3)
    assert fitted.steady_state == pytest.approx(TRUE["K"], rel=1e-3)
    np.testing.assert_allclose(fitted.predict(TIMES), original_curve(TIMES, fitted.parameters), rtol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_the_trust_region_fit_from_the_start_of_the_paper(seed: int) -> None:
    random = np.random.default_rng(seed)
    r = original_curve(TIMES, TRUE) * (1 + 0.02 * random.standard_normal(len(TIMES)))
    t, y = TIMES / TIMES[-1], r / np.ptp(r)

    def curve(t: Any, a: float, rate: float, gamma: float, t0: float, k: float) -> Any:
        return original_curve(t, {"A": a, "lambda": rate, "gamma": gamma, "t0": t0, "K": k})

    start = [np.ptp(y), 1.0, 1.0, 1.0, y.min() + np.ptp(y) / 2]
    lowest = [-np.inf, 1e-9, 1e-9, 1e-9, -np.inf]
    best = curve_fit(curve, t, y, start, method="trf", bounds=(lowest, np.inf), max_nfev=20_000)[0]
    theirs = float(np.square(curve(t, *best) - y).sum())
    fitted = fit(TIMES, r)
    ours = float(np.square((fitted.predict(TIMES) - r) / np.ptp(r)).sum())
    assert ours <= theirs * (1 + 1e-3)
    n = len(r)
    assert fitted.aic == pytest.approx(n * math.log(ours * np.ptp(r) ** 2 / n) + 10)
    assert fitted.aicc == pytest.approx(fitted.aic + 60 / (n - 6))
    deviations = [fitted.standard_errors[name] for name in TRUE]
    assert all(0 < each < math.inf for each in deviations)


def test_no_law_is_much_better_than_the_one_that_made_the_curve() -> None:
    random = np.random.default_rng(0)
    wave = math.sqrt(1 - 0.3**2)
    at = 0.2 * TIMES
    curves = {
        FIRST_STEP.name: 50 * (1 - np.exp(-TIMES / 20)),
        SECOND_STEP.name: 50 * (1 - np.exp(-0.3 * at) * (np.cos(wave * at) + 0.3 / wave * np.sin(wave * at))),
        LOGARITHM.name: 12 * np.log(TIMES + 3) + 5,
        LAW.name: original_curve(TIMES, TRUE),
    }
    for name, curve in curves.items():
        noisy = np.abs(curve + 0.5 * random.standard_normal(len(TIMES)))
        fits = compare_laws(TIMES.tolist(), noisy.tolist())
        assert fits[name].r2 > 0.98
        assert fits[name].aic < min(each.aic for each in fits.values()) + 6  # the law of five bends to most curves
        apart = {SECOND_STEP.name, LAW.name} if name in (SECOND_STEP.name, LAW.name) else set()
        assert all(fits[other].aic > fits[name].aic + 50 for other in apart - {name})
        assert [each.aic for each in fits.values()] == sorted(each.aic for each in fits.values())
        assert fits[name].law == name


@pytest.mark.parametrize("damping", [0.5, 1.0, 3.0])
def test_the_second_order_step_solves_its_equation(damping: float) -> None:
    """y'' + 2 zeta w y' + w^2 y = w^2, from rest."""
    t = np.linspace(0, 20, 20_001)
    y = laws._second_order(t, damping, 0.7)[:, 0]
    step = t[1] - t[0]
    slope, bend = np.gradient(y, step), np.gradient(np.gradient(y, step), step)
    np.testing.assert_allclose((bend + 2 * damping * 0.7 * slope + 0.49 * y)[5:-5], 0.49, atol=1e-4)
    assert abs(y[0]) < 1e-12


def test_readings_that_cannot_be_fitted_are_refused() -> None:
    good = list(range(1, 9))
    for t, r, words in (
        (good[:5], good[:5], "block 1: 5 readings were given for five parameters"),
        ([1, 2, 2, 4, 5, 6, 7, 8], good, "the times do not rise"),
        (good, [1.0, 2.0, math.nan, 4, 5, 6, 7, 8], "the ratio at time 3 is nan"),
        (good, [1.0, -2.0, 3, 4, 5, 6, 7, 8], "the ratio at time 2 is -2.0"),
        (good, good[:-1], "8 times and 7 ratios"),
    ):
        with pytest.raises(DataError, match=words):
            fit(t, r, layer="block 1")


# -- over a training ---------------------------------------------------------------------------------------------------


def test_a_meter_gives_the_trajectory_of_each_block() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    start = massive_activations(model, batches, progress=False)
    meter = Meter(analysis="massive_activations:top=1", points=8, spacing="linear", batches=batches)
    trained = train(
        model, batches, validation=batches[:1], steps=8, rules=[meter], learning_rate=1e-2, keep="last", progress=False
    )
    found = trajectories(trained)
    assert list(found) == [layer.site for layer in start.layers]
    end = massive_activations(model, batches, progress=False)
    for first, last in zip(start.layers, end.layers, strict=True):
        times, ratios = found[first.site]
        assert times[0] == 0 and times[-1] == 8 and len(times) == 8
        assert (ratios[0], ratios[-1]) == (first.ratio, last.ratio)
    result = dynamics(found)
    assert [layer.layer for layer in result.layers] == list(found)
    with pytest.raises(DataError, match="no layer was given"):
        dynamics({})


# -- the forecast ------------------------------------------------------------------------------------------------------


def layers(models: int = 12) -> tuple[list[tuple[Shape, int]], list[dict[str, float]]]:
    """Layers whose laws are simple functions of their shapes."""
    rows = [(Shape(depth, 64 * heads, heads, 256 * heads), layer)
            for depth, heads in zip(range(4, 4 + models), [2, 4, 8] * models, strict=False)
            for layer in range(depth)]  # fmt: skip
    found = [
        dict.fromkeys(TARGETS, 1.0 + layer / shape.layers) | {"K": 100.0 * (layer + 1) / shape.layers + shape.heads}
        for shape, layer in rows
    ]
    return rows, found


@pytest.mark.parametrize("learner", ["ridge", "boosting"])
def test_a_known_mapping_is_learnt_for_models_that_were_held_out(learner: Any) -> None:
    rows, found = layers()
    scores = Forecast(learner).score(rows, found, folds=3)
    assert set(scores) == set(TARGETS) and scores["K"] > 0.9
    forecast = Forecast(learner).fit(rows, found)
    guessed = forecast.predict(rows[:5])
    assert [each["K"] for each in guessed] == pytest.approx([each["K"] for each in found[:5]], rel=0.2)


def test_features_are_those_of_the_paper() -> None:
    shape = Shape.of(LlamaConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=8, intermediate_size=256))
    assert shape == Shape(4, 64, 8, 256)
    assert shape.features(1) == pytest.approx(
        [0.5, 0.25, 0.125, math.sqrt(0.5), 8 / 64, 4.0, 16.0, 2.0, math.log(64), 8.0]
    )


def test_a_forecast_says_what_it_lacks() -> None:
    rows, found = layers(3)
    with pytest.raises(DataError, match="it was not fitted"):
        Forecast().predict(rows)
    with pytest.raises(DataError, match="9 rows and 2 laws"):
        Forecast().fit(rows[:9], found[:2])
    with pytest.raises(DataError, match="folds: 5 were given for 3 shapes"):
        Forecast("ridge").score(rows, found)
    with pytest.raises(ValueError, match="learner: 'oracle' was given"):
        Forecast("oracle")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="it has no num_hidden_layers"):
        Shape.of(object())
