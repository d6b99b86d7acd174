"""KAT against the released formula's outputs, closed forms and the models it is put into."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig

from actkit.core.ground.errors import CoverageError, DataError, RecipeError
from actkit.core.layers.activations import activation_function
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.univariate.fit_rational import fit_rational, rational_like
from actkit.core.watch.statistics import Histogram
from actkit.functions.kat.gr_kan import GrKan, points_of
from actkit.functions.kat.group_rational import GroupRational, RationalFirst
from actkit.functions.kat.kat import GrKanLinear, begin_mimetic, kat, keep_variance, variance_gain
from actkit.kernels.rationals import rational
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

KINDS = ("llama", "gemma", "mixtral", "gpt2", "bert", "vit")
KERNELS = Path(__file__).with_name("rational_kat_cu.json")
CONFIG = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    num_labels=3,
)


def is_rows(value: Any) -> bool:
    return isinstance(value, list)


def rationals(model: nn.Module) -> dict[str, GroupRational]:
    return {name: each for name, each in model.named_modules() if isinstance(each, GroupRational)}


def logits(model: nn.Module, batches: list[Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**each)[0].flatten() for each in batches])


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_the_released_kernels_give_the_same_outputs_and_gradients() -> None:
    """Those of rational_kat_cu (kind A), run once at the commit that the file names."""
    theirs = {name: torch.tensor(each) for name, each in json.loads(KERNELS.read_text()).items() if is_rows(each)}
    tensors = [theirs[name].requires_grad_() for name in ("x", "numerator", "denominator")]
    output = rational(*tensors, "A")
    found = (output, *torch.autograd.grad(output, tensors, theirs["upstream"]))
    for ours, name in zip(found, ("output", "to_x", "to_numerator", "to_denominator"), strict=True):
        torch.testing.assert_close(ours, theirs[name], atol=1e-5, rtol=1e-5)


def test_channels_go_by_contiguous_groups_along_any_dimension() -> None:
    layer = GroupRational(6, 3, start="gelu")
    with torch.no_grad():
        layer.denominator.mul_(torch.tensor([[1.0], [2.0], [4.0]]))
    x = torch.randn(2, 6, 4, 5)
    images = GroupRational(6, 3, start="gelu", dim=1)
    images.load_state_dict(layer.state_dict())
    torch.testing.assert_close(images(x), layer(x.movedim(1, -1)).movedim(-1, 1))
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        own = rational(x[:, part].movedim(1, -1), layer.numerator, layer.denominator[group : group + 1])
        torch.testing.assert_close(images(x)[:, part], own.movedim(-1, 1))
    assert not torch.allclose(layer(x[:, :6, 0, 0])[:, 0], layer(x[:, [2, 3, 0, 1, 4, 5], 0, 0])[:, 2])


@pytest.mark.parametrize(("share", "tops", "bottoms"), [("numerator", 1, 4), ("denominator", 4, 1), ("none", 4, 4)])
def test_what_groups_share(share: Any, tops: int, bottoms: int) -> None:
    layer = GroupRational(8, 4, start="silu", share=share)
    assert layer.numerator.shape == (tops, 6) and layer.denominator.shape == (bottoms, 4)
    x = torch.linspace(-3, 3, 64).view(-1, 8)
    torch.testing.assert_close(layer(x), F.silu(x), atol=2e-6, rtol=0)
    assert sum(each.numel() for each in layer.parameters()) == 6 * tops + 4 * bottoms


def test_coefficients_stay_in_float32() -> None:
    layer = GroupRational(8, 4).to(torch.bfloat16)
    assert {each.dtype for each in layer.parameters()} == {torch.float32}
    x = torch.linspace(-3, 3, 64).view(-1, 8)
    exact = F.silu(x.bfloat16().float())
    assert float((layer(x.bfloat16()).detach().float() - exact).abs().max()) <= 2**-8 * 3  # the output's own rounding


def test_a_group_is_learned_from_its_own_channels() -> None:
    """Two groups that are to become ReLU and tanh; the identity has b = 0, and all of it moves."""
    torch.manual_seed(0)
    layer = GroupRational(4, 2, start="identity", share="none")
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    x = torch.randn(512, 4)
    target = torch.cat((x[:, :2].relu(), x[:, 2:].tanh()), 1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    assert loss < 5e-3 and bool((layer.denominator.abs() > 1e-3).all())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"groups": 5}, "groups: 5 were given for 12 channels; give a number that divides them: 1, 2, 3, 4, 6, 12"),
        ({"groups": 4, "share": "all"}, "share: 'all' was given"),
        ({"groups": 4, "degrees": (5, 0)}, "degrees: "),
        ({"groups": 4, "degrees": (3, 2), "start": rational_like("silu")}, r"start: a fit of degrees \(5, 4\)"),
        ({"groups": 4, "start": "softmax"}, "function: 'softmax' mixes"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GroupRational(12, **settings)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="x: it has 8 channels along dim -1; give 4"):
        GroupRational(4, 2)(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"x: torch\.int64 was given"):
        GroupRational(4, 2)(torch.ones(2, 4, dtype=torch.long))


# -- the transform -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(KINDS))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    check_transform(GrKan(), tiny_model(kind), tiny_batches(kind), conflicting=(RoundToNearest(bits=4, group_size=8),))


@pytest.mark.parametrize("kind", architectures(KINDS))
def test_the_outputs_of_every_family_move_little(kind: str) -> None:
    original, model, batches = tiny_model(kind), tiny_model(kind), tiny_batches(kind)
    report = apply(model, GrKan(), batches, progress=False).report
    before, after = logits(original, batches), logits(model, batches)
    assert float((after - before).norm() / before.norm()) < 0.02
    gated = kind in ("llama", "gemma", "mixtral")
    firsts = [each for each in model.modules() if isinstance(each, RationalFirst)]
    assert len(firsts) == (0 if gated else 2) and len(report.notes) == (8 if kind == "mixtral" else 2)
    for each in firsts:  # the identity, to the bit
        x = torch.randn(3, 16)
        assert torch.equal(each.rational(x), x)
    if not gated:
        view = anatomy(model)
        assert all(block.mlp is not None and block.mlp.norm is None for block in view.blocks)


def test_a_fit_goes_by_what_the_mlp_reads() -> None:
    """It is as good as a fit to all inputs at once, and better than one on the interval of the paper."""
    original, batches = tiny_model("vit"), tiny_batches("vit", lengths=((4,) * 4, (4,) * 3))
    for block in original.vit.layers:  # inputs far outside of [-3, 3]
        block.mlp.fc1.weight.data.mul_(4.0)
    path = "vit.layers.1.mlp.activation_fn"
    seen: list[Tensor] = []
    hook = original.get_submodule(path).register_forward_hook(lambda m, args, output: seen.append(args[0]))
    logits(original, batches)
    hook.remove()
    values = torch.cat([each.flatten() for each in seen]).double()
    errors = {}
    for between in (None, (-3.0, 3.0)):
        model = tiny_model("vit")
        model.load_state_dict(original.state_dict())
        notes = apply(model, GrKan(between=between, first=False), batches, progress=False).report.notes
        found = rationals(model)[path]
        fitted = rational(values.unsqueeze(-1), found.numerator.double(), found.denominator[:1].double()).squeeze(-1)
        errors[between] = float((fitted - F.gelu(values)).detach().square().mean().sqrt())
        if between is None:
            assert notes[1].startswith(f"{path}: fitted on -")
    best = fit_rational(F.gelu, points=values).error
    assert errors[None] <= 1.5 * best and errors[None] < 0.2 * errors[(-3.0, 3.0)]


def test_points_are_those_measured_and_the_range() -> None:
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 30.0
    inputs = Histogram()
    inputs.update(x)
    points, weights = points_of(inputs, 0.25)
    assert float(weights.sum()) == pytest.approx(1.0) and float(weights[-1] * 301) == pytest.approx(0.25)
    low, high = float(x.min()), 30.0
    assert float(points[-1]) == pytest.approx(high + (high - low) / 20, rel=0.05)
    measured, shares = points[:-301], weights[:-301] / 0.75
    assert float((shares * measured).sum()) == pytest.approx(float(x.double().mean()), abs=5e-3)
    assert float((shares * measured**2).sum()) == pytest.approx(float(x.double().square().mean()), rel=0.03)


def test_it_needs_no_data_on_an_interval_and_says_what_it_needs_else() -> None:
    model = tiny_model("llama")
    assert apply(model, GrKan(between=(-4.0, 4.0)), progress=False).report.notes[0].endswith("in the mean square")
    with pytest.raises(DataError, match="GrKan calibrates on data"):
        apply(tiny_model("llama"), GrKan(), progress=False)
    with pytest.raises(RecipeError, match=r"groups: 5 were given, and model.layers.0.mlp.act_fn has 24 channels"):
        apply(tiny_model("llama"), GrKan(groups=5), tiny_batches("llama"), progress=False)
    with pytest.raises(RecipeError, match=r"groups: 12 were given, and vit.layers.0.mlp has 16 .*, or first=False"):
        apply(tiny_model("vit"), GrKan(groups=12), tiny_batches("vit"), progress=False)
    apply(tiny_model("vit"), GrKan(groups=12, first=False), tiny_batches("vit"), progress=False)
    with pytest.raises(CoverageError, match="knows no MLP with an activation in this TinyMlp"):
        apply(tiny_model("mlp"), GrKan(), tiny_batches("mlp"), progress=False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"between": (2.0, 1.0)}, "lower end"), ({"degrees": (0, 4)}, "degrees"), ({"groups": 0}, "groups")],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GrKan(**settings)


def test_what_it_leaves_and_refuses() -> None:
    batches = tiny_batches("llama")
    skipped = apply(tiny_model("llama"), [Cats(sparsity=0.5), GrKan()], batches, progress=False).report.skipped
    assert len(skipped) == 2 and "a threshold stands there" in skipped[0][2]
    for first in (RoundToNearest(bits=4, group_size=8), Wina()):
        with pytest.raises(RecipeError, match="slot was calibrated on; put gr_kan first"):
            apply(tiny_model("llama"), [first, GrKan()], batches, progress=False)
    model = tiny_model("mixtral")
    with torch.no_grad():  # experts 0 and 1 have the largest logits whatever comes
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    skipped = apply(model, GrKan(), tiny_batches("mixtral"), progress=False).report.skipped
    assert len(skipped) == 4 and all(reason == "no calibration token reached it" for _, _, reason in skipped)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_awq_and_wina_on_top(kind: str, tmp_path: Path) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    recipe = Recipe.parse(
        {"actkit": 1, "transforms": ["gr_kan", {"awq": {"bits": 4, "group_size": 8, "n_grid": 3}}, "wina"]}
    )
    assert isinstance(recipe.transforms[1], Awq)
    apply(model, recipe, batches, progress=False)
    layers = [each for each in model.modules() if isinstance(each, ActLinear)]
    assert len(layers) == (14 if kind == "llama" else 12)
    save(model, tmp_path / "stacked")
    again = load(tmp_path / "stacked")
    assert torch.equal(logits(again, batches), logits(model, batches))
    assert {each.dtype for name, each in again.named_parameters() if "numerator" in name} == {torch.float32}


# -- the start ---------------------------------------------------------------------------------------------------------


def test_gains_are_those_of_closed_forms_and_of_the_paper() -> None:
    assert variance_gain("identity") == pytest.approx(1.0, rel=1e-12)
    x = torch.randn(2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, paper in (("gelu", 2.3568), ("silu", 2.8178)):
        gain = variance_gain(name)
        assert gain == pytest.approx(paper, rel=5e-3)
        assert gain == pytest.approx(1 / float(rational_like(name)(x).square().mean()), rel=5e-3)
        moments = activation_function(name).moments()
        assert moments is not None and gain == pytest.approx(1 / moments.second, rel=2e-3)


def test_a_stack_keeps_the_variance() -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(*(GrKanLinear(256, 256, start="silu") for _ in range(10)))
    with torch.no_grad():
        kept = float(stack(torch.randn(512, 256)).var())
    assert 0.5 <= kept <= 2
    linear = nn.Linear(64, 32)
    keep_variance(linear, "gelu")
    assert not linear.bias.any()
    assert float(linear.weight.detach().std()) == pytest.approx(math.sqrt(variance_gain("gelu") / 64), rel=0.1)


def test_mimetic_attention() -> None:
    config = CONFIG.__class__(**{**CONFIG.to_dict(), "hidden_size": 64})
    model = kat(config)
    attention = anatomy(model).blocks[0].attention
    assert attention is not None and attention.query is not None and attention.key is not None
    assert attention.value is not None
    for head in range(2):
        rows = slice(32 * head, 32 * (head + 1))
        product = attention.query.weight[rows].T @ attention.key.weight[rows]
        assert torch.linalg.matrix_rank(product, atol=1e-4) == 32
        assert float(product.detach().diagonal().mean()) > 0.3  # like attends to like
    whole = (attention.output.weight @ attention.value.weight).detach().T
    assert float(whole.diagonal().mean()) == pytest.approx(-0.4, abs=0.05)
    left = whole + 0.4 * torch.eye(64)
    assert float(left.std()) == pytest.approx(0.4 / 8, rel=0.1)
    with pytest.raises(ValueError, match="attention: it needs a query, key and value layer each"):
        begin_mimetic(anatomy(tiny_model("llama")).blocks[0].attention)  # type: ignore[arg-type]


def test_a_new_model_is_saved_loaded_and_trained(tmp_path: Path) -> None:
    model = kat(CONFIG, seed=3)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(kat(CONFIG, seed=3)(x).logits, model(x).logits)
    assert not torch.equal(kat(CONFIG, seed=4)(x).logits, model(x).logits)
    assert len(rationals(model)) == 4
    plain = sum(each.numel() for each in tiny_vit().parameters())
    assert sum(each.numel() for each in model.parameters()) == plain + 2 * 2 * (6 + 8 * 4)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        F.cross_entropy(model(x).logits, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert {name for name in before if "rational" in name or "activation_fn" in name} <= moved
    save(model.eval(), tmp_path / "kat")
    assert torch.equal(load(tmp_path / "kat")(x).logits, model(x).logits)


def tiny_vit() -> nn.Module:
    from transformers import ViTForImageClassification

    return ViTForImageClassification(CONFIG)
