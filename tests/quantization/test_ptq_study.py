"""The study's rows against recipes applied and measured one by one."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.core.ground.errors import RecipeError
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.quantization.gptq import Gptq
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.quantization.zeroquant_v2.ptq_study import ptq_study, sensitivity_class
from actkit.quantization.zeroquant_v2.zeroquant import ZeroQuant
from actkit.testing import tiny_batches, tiny_model


def perplexity(model, batches) -> float:
    return measure_quality(model, batches, task="language", resamples=1, progress=False).metrics["perplexity"].value


def test_rows_are_recipes_measured_one_by_one() -> None:
    model, given = tiny_model("llama"), tiny_batches("llama")
    text = tiny_batches("llama", lengths=((9, 7), (8,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"weights": ((4, 8), (8, "row"), None), "symmetric": (False,), "ranks": (0, 2)}
    study = ptq_study(model, given, text, **settings, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert study.perplexity == perplexity(model, text)
    assert len(study.combinations) == 2 * 2 * 2 * 2 + 1
    recipes = {
        "4-bit groups of 8, rtn": [RoundToNearest(bits=4, group_size=8)],
        "8-bit rows, rtn + rank 2": [RoundToNearest(bits=8, group_size=-1), Lorc(rank=2)],
        "4-bit groups of 8, gptq + rank 2; inputs of 8 bits per token": [
            Gptq(bits=4, group_size=8),
            Lorc(rank=2),
            RoundInputs(bits=8, symmetric=False),
        ],
        "inputs of 8 bits per token": [RoundInputs(bits=8, symmetric=False)],
    }
    rows = {row.name: row for row in study.combinations}
    assert len(rows) == len(study.combinations)
    for name, recipe in recipes.items():
        changed = tiny_model("llama")
        apply(changed, recipe, given, progress=False)
        row = rows[name]
        assert row.perplexity == pytest.approx(perplexity(changed, text), rel=1e-6)
        assert row.loss == row.perplexity - study.perplexity and row.share == row.loss / study.perplexity
        assert row.sensitivity == sensitivity_class(row.loss)
    # 4-bit codes, and a scale of 16 bits and a zero point in a byte for 8 of them
    assert rows["4-bit groups of 8, rtn"].bits_per_weight == 4 + (16 + 8) / 8
    assert rows["inputs of 8 bits per token"].bits_per_weight == 32
    assert study.to_dict()["combinations"][0]["weights"] == [4, 8]


def test_blocks_may_be_trained_for_each_combination() -> None:
    model, given = tiny_model("llama"), tiny_batches("llama")
    settings = {"weights": ((3, 8),), "symmetric": (False,), "ranks": (0, 2), "methods": ("zq_local", "zq_global")}
    inputs = (None, (8, "token"), (8, "tensor"))
    study = ptq_study(model, given, given, **settings, inputs=inputs, steps=3, progress=False)
    rows = {row.name: row.perplexity for row in study.combinations}
    assert len(rows) == 2 * 2 * 3
    recipes = {
        "3-bit groups of 8, zq_local": [ZeroQuant(bits=3, group_size=8, inputs="local", steps=3)],
        "3-bit groups of 8, zq_global + rank 2; inputs of 8 bits per token": [
            ZeroQuant(bits=3, group_size=8, input_bits=8, steps=3),
            Lorc(rank=2),
        ],
        "3-bit groups of 8, zq_global; inputs of 8 bits per tensor": [
            ZeroQuant(bits=3, group_size=8, steps=3),
            RoundInputs(bits=8, per="tensor", symmetric=False),
        ],
    }
    for name, recipe in recipes.items():
        changed = tiny_model("llama")
        apply(changed, recipe, given, progress=False)
        assert rows[name] == pytest.approx(perplexity(changed, given), rel=1e-6)


def test_classes_and_what_is_refused() -> None:
    assert [sensitivity_class(loss) for loss in (-1, 0.1, 0.11, 0.5, 0.51, math.inf)] == [1, 1, 2, 2, 3, 3]
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(ValueError, match="no combination rounds anything"):
        ptq_study(model, batches, batches, weights=(None,), inputs=(None,), progress=False)
    with pytest.raises(ValueError, match="group_size: 7 does not divide"):
        ptq_study(model, batches, batches, weights=((4, 7),), progress=False)
    apply(model, RoundToNearest(bits=4, group_size=8), progress=False)
    with pytest.raises(RecipeError, match="applied already"):
        ptq_study(model, batches, batches, progress=False)
