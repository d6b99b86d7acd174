"""Fitted MLPs against the modules they stand for and NumPy's quantiles, and what fitting brings; the promises."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actkit.core.edit.edits import apply_edit, get_module
from actkit.core.forward.batch import BatchContext
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch.calls import Call
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.functions.reconstruct_mlp import FittedMlp, ReconstructMlp, positive_quantile
from actkit.functions.swap import Swap
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

FAST: dict[str, Any] = {"steps": 3, "rows": 2}


def call(x: torch.Tensor) -> Call:
    return Call((x,), {}, BatchContext.of({"inputs_embeds": x}))


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_a_fitted_mlp_computes_what_the_model_will(kind: str) -> None:
    """Conv1D, gates and biases included: after its edits and the swap the module gives the same."""
    model = tiny_model(kind)
    mlp = anatomy(model).block(0).mlp
    assert mlp is not None
    fitted = FittedMlp(mlp, "relu", 1e-3)
    with torch.no_grad():
        for parameter in fitted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        direct, clamped = fitted(x, 0.5)
        for edit in fitted.edits():
            apply_edit(model, edit)
        first, *others = (get_module(model, linear.path)(x) for linear in mlp.inputs)
        for bound, found in ((torch.inf, direct), (0.5, clamped)):
            bent = torch.clamp(first, 0, bound)
            expected = get_module(model, mlp.down.path)(bent * others[0] if others else bent)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_bound_is_a_quantile_of_the_positive_values() -> None:
    model = tiny_model("vit")
    mlp = anatomy(model).block(0).mlp
    assert mlp is not None
    xs = [torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    bound = positive_quantile(mlp, model, [call(x) for x in xs], 0.9)
    with torch.no_grad():
        bent = np.concatenate([get_module(model, mlp.activation)(mlp.up.module(x)).numpy().ravel() for x in xs])
    positive = np.sort(bent[bent > 0])
    assert bound == pytest.approx(np.quantile(positive, 0.9), rel=0.05) and bound in positive.astype(np.float32)


@pytest.mark.parametrize(("kind", "importance"), [("vit", "aph"), ("vit", "ph"), ("gpt2", "mse")])
def test_fitting_gives_back_what_the_swap_takes(kind: str, importance: str) -> None:
    batches = tiny_batches(kind, lengths=((6,) * 8,) * 2)
    model = tiny_model(kind)
    report = apply(model, ReconstructMlp(steps=150, importance=importance), batches, progress=False).report
    found = [values for _, method, values in report.values if method == "ReconstructMlp"]
    assert len(found) == 2 and all(values["left"] < 0.3 for values in found)


def test_the_second_term_shrinks_the_hidden_units() -> None:
    """On what it learned from, the clamped MLP comes closer to the old one than without that term."""
    batches = tiny_batches("vit", lengths=((1,) * 8,) * 2)
    original = tiny_model("vit")
    errors = []
    for clamp in (0.0, 10.0):
        model = copy.deepcopy(original)
        settings: dict[str, Any] = {"steps": 150, "quantile": 0.8, "importance": "mse", "rate": 1e-2}
        report = apply(model, ReconstructMlp(**settings, clamp=clamp), batches, progress=False).report
        bound = next(values["bound"] for _, _, values in report.values)
        mlp, before = (anatomy(each).block(0).mlp for each in (model, original))
        assert mlp is not None and before is not None
        site = Site("mlp.input", 0)
        x = record(original, {site: Sample(512)}, batches, progress=False)[site].rows
        with torch.no_grad():
            target = before.down.module(get_module(original, before.activation)(before.up.module(x)))
            hidden = mlp.up.module(x).clamp(0, bound)
            errors.append(float((mlp.down.module(hidden) - target).square().mean()))
    assert errors[1] < errors[0]


def test_without_steps_it_is_the_swap_alone() -> None:
    one, other = tiny_model("vit"), tiny_model("vit")
    apply(one, ReconstructMlp(steps=0), tiny_batches("vit"), progress=False)
    apply(other, Swap(where="gelu", new="relu"), tiny_batches("vit"), progress=False)
    batch = tiny_batches("vit")[0]
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, other(**batch).logits)
    assert one.config.hidden_act == other.config.hidden_act == "relu"


def test_what_has_the_function_already_is_left() -> None:
    model = tiny_model("vit", hidden_act="relu")
    report = apply(model, ReconstructMlp(**FAST), tiny_batches("vit"), progress=False).report
    assert not report.changed and "its function is relu already" in {reason for *_, reason in report.skipped}


def test_experts_are_left_and_said() -> None:
    report = apply(
        tiny_model("mixtral"), ReconstructMlp(**FAST), tiny_batches("mixtral"), min_coverage=0.0, progress=False
    ).report
    assert {reason for *_, reason in report.skipped} == {"experts are left as they are"}


def test_an_unknown_function_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed are"):
        ReconstructMlp(new="bent")
    with pytest.raises(ValueError, match="mixes"):
        ReconstructMlp(new="softmax")


def test_a_rounded_mlp_is_not_trained() -> None:
    model = tiny_model("vit")
    apply(model, RoundToNearest(group_size=8), progress=False)
    with pytest.raises(ValueError, match="put it first"):
        apply(model, ReconstructMlp(**FAST), tiny_batches("vit"), progress=False)


def test_the_result_is_an_ordinary_model() -> None:
    model = tiny_model("vit")
    apply(model, ReconstructMlp(**FAST), tiny_batches("vit"), progress=False)
    assert all(isinstance(get_module(model, x.path), nn.Linear) for b in anatomy(model).blocks for x in b.linears())


@pytest.mark.parametrize("kind", architectures(["vit", "bert", "llama", "gpt2"]))
def test_it_keeps_its_promises(kind: str) -> None:
    transform = ReconstructMlp(new="relu2", mode="hvp", **FAST)
    check_transform(transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(group_size=8)])
