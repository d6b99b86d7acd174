"""SmoothQuant's scales against numpy, its exactness in float64, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actkit.core.ground.errors import RecipeError
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth, smoothing_scale
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.zoo.outliers import outlier_twin
from representative import architectures

EVERY = ("norm", "value", "up")


def by_hand(largest: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """The release's formula."""
    column = np.maximum(np.max([np.abs(weight).max(0) for weight in weights], 0), 1e-5)
    return np.maximum(np.power(largest, alpha) / np.power(column, 1 - alpha), 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 1.0])
def test_scales_are_those_of_the_formula(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(12, 8, generator=generator), torch.randn(5, 8, generator=generator)]
    largest = torch.rand(8, generator=generator) * 10 + 0.01
    expected = by_hand(largest.double().numpy(), [w.double().numpy() for w in weights], alpha)
    np.testing.assert_allclose(smoothing_scale(largest, weights, alpha).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "vit", "mixtral", "bert"])
def test_smoothing_keeps_the_function_and_evens_out_the_inputs(kind: str) -> None:
    model = tiny_model(kind).double()
    given = tiny_batches(kind, lengths=((9, 9),))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in given[0].items()}
    if kind == "mixtral":
        model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(**batch).logits
        sets = ("value", "up") if kind == "bert" else EVERY
        report = apply(model, Smooth(alpha=0.7, sets=sets), [batch], progress=False).report
        bound = {"gemma3_text": 1e-4, "llama": 1e-9, "mixtral": 1e-9}.get(kind, 1e-6)  # norms, or scales, of float32
        torch.testing.assert_close(model(**batch).logits, expected, rtol=bound, atol=bound)
    assert not report.skipped


def test_alpha_one_makes_every_channel_as_large() -> None:
    """max |x_j| is 1 for every channel behind it: x_j / max |x_j|."""
    model = tiny_model("gpt2")
    batches = tiny_batches("gpt2", lengths=((9, 9),))
    apply(model, Smooth(alpha=1.0), batches, progress=False)
    found: list[torch.Tensor] = []
    handle = model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    torch.testing.assert_close(found[0].flatten(0, 1).abs().amax(0), torch.ones(found[0].shape[-1]))


def test_a_channel_that_is_always_zero_is_named() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[3], model.transformer.h[0].ln_1.bias[3] = 0.0, 0.0
    notes = apply(model, Smooth(), tiny_batches("gpt2"), progress=False).report.notes
    assert any("1 channels are 0 on all calibration tokens" in note for note in notes)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_sets_without_a_scale_are_skipped_and_a_model_without_any_is_refused() -> None:
    report = apply(tiny_model("bert"), Smooth(sets=EVERY), tiny_batches("bert"), progress=False).report
    assert {reason.partition(":")[0] for _, _, reason in report.skipped} == {"post-norm"}


def test_it_stands_before_what_fills_a_slot() -> None:
    with pytest.raises(RecipeError, match=r"Smooth cannot follow RoundToNearest: .* put it first"):
        apply(tiny_model("llama"), [RoundToNearest(group_size=8), Smooth()], tiny_batches("llama"), progress=False)


def test_rounding_behind_it_loses_less_where_channels_are_large() -> None:
    twin = outlier_twin(tiny_model("llama"), channels=2, factor=30.0)
    batches = tiny_batches("llama", lengths=((9, 9), (9, 9)))
    with torch.no_grad():
        expected = [twin(**batch).logits for batch in batches]
    errors: list[float] = []
    recipes: list[Any] = [RoundToNearest(group_size=8), [Smooth(), RoundToNearest(group_size=8)]]
    for recipe in recipes:
        applied = apply(twin, recipe, batches, undo="memory", progress=False)
        with torch.no_grad():
            pairs = zip(batches, expected, strict=True)
            errors.append(sum(float((twin(**batch).logits - before).square().mean()) for batch, before in pairs))
        applied.undo()
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kind", architectures(["llama", "mixtral", "vit", "gemma3_text", "gpt2"]))
def test_it_keeps_its_promises(kind: str) -> None:
    transform = Smooth(alpha=0.6, sets=EVERY)
    check_transform(transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(group_size=8)])


def test_what_it_touches_is_what_it_says() -> None:
    block = anatomy(tiny_model("llama")).block(0)
    found = [each if isinstance(each, str) else each.role for each in Smooth().targets(block)]
    attention = ["query", "key", "value", "model.layers.0.input_layernorm.weight"]
    assert found == [*attention, "gate", "up", "model.layers.0.post_attention_layernorm.weight"]
