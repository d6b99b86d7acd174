"""Top-k activations against torch.topk, plain sorting and autograd; the transform against MLPs computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.largest import largest
from actkit.core.layers.activations import Activation, is_activation, mixes_of
from actkit.core.layers.folding import ScaledActivation
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.train.training import train
from actkit.functions.swap import swap
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKActivation, TopKMlp
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.models import INNER


def relu_top_k(k: int | float, by: Any = "value") -> TopKActivation:
    return TopKActivation(nn.ReLU(), k, by)


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_it_equals_torch_topk_bit_for_bit() -> None:
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 32, 63, 64):
        y = x.relu()
        best = y.topk(k, dim=-1)
        assert torch.equal(relu_top_k(k)(x), torch.zeros_like(y).scatter(-1, best.indices, best.values))
        smooth = F.gelu(x)
        best = smooth.abs().topk(k, dim=-1)
        expected = torch.zeros_like(y).scatter(-1, best.indices, smooth.gather(-1, best.indices))
        assert torch.equal(TopKActivation(nn.GELU(), k, "abs")(x), expected)
    assert torch.equal(relu_top_k(64)(x), x.relu())
    assert torch.equal(relu_top_k(1.0)(x), x.relu())


def test_of_equal_values_exactly_k_survive_the_first_ones() -> None:
    """Against a stable sort of Python, on few distinct values."""
    x = torch.randint(-2, 4, (200, 12), generator=torch.Generator().manual_seed(1)).float()
    for k in (1, 5, 11):
        for row, mask in zip(x.tolist(), largest(x, k).tolist(), strict=True):
            kept = sorted(range(12), key=lambda i: -row[i])[:k]  # Python's sort is stable
            assert [i for i in range(12) if mask[i]] == sorted(kept)


def test_a_share_is_rounded_and_keeps_at_least_one() -> None:
    for share, kept in ((0.25, 6), (0.27, 6), (0.28, 7), (0.001, 1), (1.0, 24)):
        assert int(largest_count(share)) == kept


def largest_count(share: float) -> Tensor:
    x = torch.rand(1, 24, generator=torch.Generator().manual_seed(2)) + 0.1
    return (relu_top_k(share)(x) != 0).sum()


def test_fewer_positives_than_k_leave_zeros() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, -1.0, -5.0]])
    assert torch.equal(relu_top_k(4)(x), torch.tensor([[1.0, 0.0, 3.0, 0.0, 0.0]]))


def test_nan_is_not_hidden() -> None:
    y = relu_top_k(2)(torch.tensor([[1.0, math.nan, 3.0, 2.0]]))
    assert y.isnan().any()


def test_the_gradient_goes_through_what_is_kept_only() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0, -4.0]], dtype=torch.float64, requires_grad=True)
    relu_top_k(2)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    inputs = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    for base, by in ((nn.GELU(), "abs"), (nn.SiLU(), "value"), (nn.ReLU(), "value")):
        assert torch.autograd.gradcheck(TopKActivation(base, 4, by), inputs)


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, -0.5, True, "4", None, math.nan])
def test_bad_k(k: Any) -> None:
    with pytest.raises(ValueError, match=r"k: .* was given; give a number of neurons"):
        TopKActivation(nn.ReLU(), k)
    with pytest.raises(ValidationError, match="give a number of neurons"):
        TopKMlp(k=k)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="by: 'size' was given"):
        TopKActivation(nn.ReLU(), 4, "size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k: 9 was given for 8 channels"):
        relu_top_k(9)(torch.zeros(2, 8))
    with pytest.raises(ValidationError, match="activation"):
        TopKMlp(k=4, activation="gelu")  # type: ignore[arg-type]


def test_spec_and_traits() -> None:
    layer = TopKActivation(nn.SiLU(), 0.5, "abs")
    again = TopKActivation.from_spec(layer.spec(), nn.SiLU())
    x = torch.randn(4, 10)
    assert torch.equal(layer(x), again(x)) and again.spec() == {"k": 0.5, "by": "abs"}
    assert is_activation(layer) and mixes_of(layer) == ("channels",)


# -- the transform -----------------------------------------------------------------------------------------------------


def keep(y: Tensor, k: int) -> Tensor:
    """All but the k largest of each row set to 0; no ties."""
    return y * (y >= y.sort(dim=-1, descending=True).values[..., k - 1 : k])


def test_a_gated_mlp_keeps_the_largest_of_the_gate() -> None:
    model = tiny_model("llama")
    apply(model, TopKMlp(k=5), progress=False)
    mlp, x = model.model.layers[1].mlp, torch.randn(7, 16)
    with torch.no_grad():
        expected = mlp.down_proj(keep(F.silu(mlp.gate_proj(x)), 5) * mlp.up_proj(x))
        torch.testing.assert_close(mlp(x), expected)


def test_a_plain_mlp_and_relu_instead_of_gelu() -> None:
    model = tiny_model("vit")
    apply(model, TopKMlp(k=0.25, activation="relu"), min_coverage=0.0, progress=False)
    mlp, x = anatomy(model).blocks[0].mlp, torch.randn(7, 16)
    assert mlp is not None
    with torch.no_grad():
        expected = mlp.down.module(keep(F.relu(mlp.up.module(x)), INNER // 4))
        torch.testing.assert_close(mlp.module(x), expected)


def test_every_activation_of_every_family_is_reached() -> None:
    for kind in ("llama", "gemma", "mixtral", "gpt2", "bert", "vit", "mlp"):
        model = tiny_model(kind)
        batches = tiny_batches(kind)
        apply(model, TopKMlp(k=3), batches, min_coverage=0.0, progress=False)
        found = sum(isinstance(module, TopKActivation) for module in model.modules())
        assert found == {"mixtral": 8, "mlp": 1}.get(kind, 2), kind
        site = "mlp.hidden" if kind in ("gpt2", "bert", "vit", "mlp") else "mlp.gate"
        activity = neuron_activity(model, batches, site=site, progress=False)
        for layer in activity.layers:
            assert layer.high * INNER <= 3 + 1e-9 and layer.count > 0, kind


def test_it_is_what_it_should_be_as_a_transform() -> None:
    check_transform(TopKMlp(k=5), tiny_model("vit"), tiny_batches("vit"), compile_backend="aot_eager", export=True)
    for kind in ("llama", "mixtral", "mlp"):
        check_transform(TopKMlp(k=0.2, activation="relu"), tiny_model(kind), tiny_batches(kind))


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, batch = tiny_model("bert"), tiny_batches("bert")[0]
    apply(model, TopKMlp(k=0.3, activation="relu", by="abs"), min_coverage=0.0, progress=False)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    with evaluating(model), evaluating(again):
        assert torch.equal(first_tensor(forward(model, batch)), first_tensor(forward(again, batch)))
    layer = again.get_submodule(anatomy(again).blocks[1].mlp.activation)  # type: ignore[union-attr]
    assert isinstance(layer, TopKActivation) and isinstance(layer.base, Activation) and layer.k == 0.3


def test_it_is_read_from_a_recipe_and_by_swap() -> None:
    recipe = Recipe.parse({"actkit": 1, "transforms": [{"top_k_mlp": {"k": 4}}, {"top_k_mlp": {"k": 0.5}}]})
    assert [type(transform.k) for transform in recipe] == [int, float]  # type: ignore[attr-defined]
    assert Recipe.parse(recipe.dump()).dump() == recipe.dump()
    swapped, changed = tiny_model("llama"), tiny_model("llama")
    swap(swapped, "silu", lambda: TopKActivation(nn.SiLU(), 4))
    apply(changed, TopKMlp(k=4), progress=False)
    batch = tiny_batches("llama")[0]
    with evaluating(swapped), evaluating(changed):
        assert torch.equal(first_tensor(forward(swapped, batch)), first_tensor(forward(changed, batch)))


def test_more_than_there_are() -> None:
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match=r"k: 25 was given, the MLP at model.layers.0.mlp.act_fn has 24 neurons"):
        apply(model, TopKMlp(k=25), progress=False)
    assert not any(isinstance(module, TopKActivation) for module in model.modules())


def test_traced_models_say_what_is_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.act = nn.Conv1d(1, 4, 3, padding=1), nn.ReLU()
            self.first, self.second, self.third = nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.inner = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.act(self.convolution(x[:, None])).flatten(1))
            return self.third(self.inner(self.second(F.silu(x))))

    model = Mixed()
    applied = apply(model, TopKMlp(k=2), [torch.randn(3, 8)], min_coverage=0.0, progress=False)
    assert isinstance(model.inner, TopKActivation) and isinstance(model.act, nn.ReLU)
    assert [(path, reason.split(":")[0].split(",")[0]) for path, _, reason in applied.report.skipped] == [
        ("act", "it stands at a convolution"),
        ("silu", "before second"),
    ]


# -- with other methods ------------------------------------------------------------------------------------------------


def test_over_a_quantizer() -> None:
    model = tiny_model("llama")
    batches = tiny_batches("llama")
    apply(model, [RoundToNearest(bits=4, group_size=8), TopKMlp(k=6)], batches, progress=False)
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 16)
    gate, up, down = (layer.dequantized() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = (keep(F.silu(x @ gate.T), 6) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_after_an_equalization_the_unscaled_values_are_compared() -> None:
    model, batches = tiny_model("bert"), tiny_batches("bert")
    path = anatomy(model).blocks[0].mlp.activation  # type: ignore[union-attr]
    apply(model, Awq(bits=4, group_size=8, n_grid=4), batches, min_coverage=0.0, progress=False)
    if not isinstance(model.get_submodule(path), ScaledActivation):
        scaled = ScaledActivation(model.get_submodule(path), torch.rand(INNER) + 0.5)
        model.set_submodule(path, scaled)
    apply(model, TopKMlp(k=5), min_coverage=0.0, progress=False)
    outer = model.get_submodule(path)
    assert isinstance(outer, ScaledActivation) and isinstance(outer.activation, TopKActivation)
    x = torch.randn(6, INNER)
    torch.testing.assert_close(outer(x), keep(F.gelu(x), 5) / outer.scale)


def test_order_with_masks_of_inputs() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(RecipeError, match=r"TopKMlp cannot follow Teal: its thresholds or scales were calibrated"):
        apply(model, [Teal(), TopKMlp(k=4)], batches, progress=False)
    with pytest.raises(RecipeError, match="TopKMlp cannot follow TopKMlp"):
        apply(model, [TopKMlp(k=4), TopKMlp(k=3)], batches, progress=False)
    apply(model, TopKMlp(k=12), progress=False)
    apply(model, Teal(), batches, progress=False)


def test_it_trains_from_the_first_step() -> None:
    """The loss falls, and no token has more than k."""
    model = apply(tiny_model("vit", num_labels=3, hidden_act="relu"), TopKMlp(k=4), min_coverage=0.0).model
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(12, 3, 8, 8, generator=generator), "labels": torch.arange(12) % 3}
    with torch.no_grad():
        loss = model(**batch).loss
    trained = train(model, [batch], validation=[dict(batch)], steps=30, learning_rate=3e-3, keep="last", progress=False)
    assert trained.history[-1].loss < 0.5 * float(loss)  # type: ignore[operator]
    assert neuron_activity(model, [batch], progress=False).layers[0].high <= 4 / INNER + 1e-9
