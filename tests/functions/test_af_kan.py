"""AF-KAN against the release's outputs, its formulas, and the models it is put into."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import zoo
from actkit.core.ground.errors import EditError, RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.univariate.kan_linear import KanLinear
from actkit.core.univariate.shifted_pairs import COMBINATIONS, ShiftedPairs
from actkit.functions.af_kan.af_kan_layer import AfKanLayer, AfKanNetwork, relu_kan_layer
from actkit.functions.af_kan.reductions import REDUCTIONS
from actkit.functions.af_kan.replace import AfKan, AfKanMlp, layer_of
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

THEIRS = json.loads(Path(__file__).with_name("all_kan.json").read_text())
NAMES = {  # theirs -> ours
    "phase_low": "basis.low",
    "phase_high": "basis.high",
    "base_weight": "coefficients.weight",
    "norm": "normed",
    "temperature": "reduction.temperature",
    "gk_linear": "reduction.linear",
    "conv1d": "reduction.convolution",
    "query_local": "reduction.query",
    "key_local": "reduction.key",
    "value_local": "reduction.value",
    "local_linear": "reduction.linear",
    "mh_attn": "reduction.attention",
}


def renamed(state: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, values in state.items():
        first = name if name in NAMES else name.split(".")[0]
        found[name.replace(first, NAMES[first], 1)] = torch.tensor(values, dtype=torch.float64)
    return found


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", THEIRS["layers"], ids=lambda case: f"{case['method']} {case['func']}")
def test_the_release_gives_the_same_outputs(case: dict[str, Any]) -> None:
    """Of All-KAN at the commit that the file names: all combinations, five reductions, in float64."""
    layer = AfKanLayer(4, 3, act=case["act"], combine=case["func"], reduce=case["method"], scale="batch").double()
    state = renamed(case["state"])
    own = layer.state_dict()
    layer.load_state_dict({name: state[name] for name in own})  # theirs holds a temperature that not all use
    x, expected = (torch.tensor(case[name], dtype=torch.float64) for name in ("x", "output"))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.float()(x.float()), expected.float(), atol=3e-5, rtol=0)  # norms enlarge rounding


def test_self_attention_is_its_formula() -> None:
    layer = AfKanLayer(4, 3, reduce="self_attn").double()
    reduction, values = layer.reduction, layer.features(torch.rand(2, 5, 4, dtype=torch.float64))
    q, k, v = (each(values) for each in (reduction.query, reduction.key, reduction.value))  # type: ignore[operator]
    weights = (torch.einsum("bnim,bnjm->bnij", q, k) / 2).softmax(-1)  # the root of 4 features
    torch.testing.assert_close(reduction(values), torch.einsum("bnij,bnjm->bni", weights, v))


@pytest.mark.parametrize("act", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_pairs_are_their_formula_with_slopes_of_autograd(act: str, combine: str) -> None:
    basis = ShiftedPairs(4, 2, act, combine, scale=1.5).double()
    x = torch.linspace(-0.7, 1.6, 37, dtype=torch.float64).requires_grad_()
    s = getattr(F, act)
    low = (torch.arange(6).double() - 2) / 4
    u, v = s(x[:, None] - low), s(low + 3 / 4 - x[:, None])
    expected = {
        "quad1": (u * v) ** 2,
        "quad2": u * v + u * u + v * v,
        "sum": u + v,
        "prod": u * v,
        "sum_prod": u + v + u * v,
        "cubic1": (u + v) * (u * u + v * v),
        "cubic2": (u * v) ** 3,
    }[combine]
    torch.testing.assert_close(basis(x), 1.5 * expected)
    slopes = [torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in basis(x).unbind(-1)]
    torch.testing.assert_close(basis.derivative(x.detach()), torch.stack(slopes, -1).detach())


def test_relu_kan_is_its_formula_and_has_the_parameters_of_the_paper_s_table() -> None:
    layer = relu_kan_layer(5, 3, 4, 2).double()
    with torch.no_grad():
        layer.basis.low.add_(0.05 * torch.randn(5, 6))  # each input has its own
    x = torch.rand(7, 5, dtype=torch.float64)
    normed = F.layer_norm(x, (5,))[..., None]
    r = 4 * 4**2 / 3**2
    phi = (F.relu(normed - layer.basis.low) * F.relu(layer.basis.high - normed) * r) ** 2
    expected = torch.einsum("bim,oim->bo", phi, layer.coefficients.weight.view(3, 5, 6)) + layer.coefficients.bias
    torch.testing.assert_close(layer(x), expected)

    def count(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def relu_kan(*widths: int) -> nn.Module:
        return nn.Sequential(*(relu_kan_layer(a, b) for a, b in pairwise(widths)))

    assert count(AfKanNetwork((64, 32, 10))) == 2600 and count(AfKanNetwork((784, 64, 10))) == 52_552
    assert count(relu_kan(64, 5, 10)) == 3201 and count(relu_kan(64, 32, 10)) == 15_594


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_row_does_not_depend_on_the_others_but_in_the_released_way(reduce: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 4, dtype=torch.float64)
    for scale in ("sample", "running", "batch"):
        layer = AfKanLayer(4, 3, reduce=reduce, scale=scale).double()  # type: ignore[arg-type]
        layer(x)
        layer.eval()
        alone = torch.cat([layer(each) for each in x.split(1)])
        assert torch.allclose(alone, layer(x), atol=1e-6) == (scale != "batch"), scale


def test_scales() -> None:
    x = torch.rand(6, 4)
    by_row = AfKanLayer(4, 3).features(x)
    assert torch.equal(by_row.amin((1, 2)), torch.zeros(6)) and torch.equal(by_row.amax((1, 2)), torch.ones(6))
    running = AfKanLayer(4, 3, scale="running")
    values = running.basis(x)
    running.features(x)
    assert float(running.high) == pytest.approx(0.9 + 0.1 * float(values.max().detach()))
    assert float(running.low) == pytest.approx(0.1 * float(values.min().detach()))
    before = running.high.clone()
    running.eval().features(3 * x)
    assert torch.equal(running.high, before)
    constant = AfKanLayer(4, 3)
    with torch.no_grad():  # ReLU far away: all values are 0
        constant.basis.low.fill_(100.0)
        constant.basis.high.fill_(-100.0)
    constant.basis.activation = nn.ReLU()  # type: ignore[assignment]
    assert not constant.features(x).any() and bool(torch.isfinite(constant(x)).all())


@pytest.mark.parametrize("join", ["sum", "product", "sum_product", "quadratic"])
def test_several_reductions_are_joined(join: Any) -> None:
    net = AfKanNetwork((4, 5, 3), ("global_attn", "multistep"), join)
    x = torch.rand(2, 7, 4)
    a, b = (stack(x) for stack in net.stacks)
    expected = {"sum": a + b, "product": a * b, "sum_product": a + b + a * b, "quadratic": a + b + a * b + a**2 + b**2}
    torch.testing.assert_close(net(x), expected[join])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"grid": 0}, "grid: 0 was given"),
        ({"order": -1}, "order: -1 was given"),
        ({"grid": 1, "order": 0, "reduce": "local_attn"}, "reduce: local_attn needs at least 2 values"),
        ({"act": "no"}, "activation: 'no' was given"),
        ({"act": "softmax"}, "activation: 'softmax' mixes"),
        ({"combine": "quad3"}, "combine: 'quad3' was given, allowed are quad1, quad2"),
        ({"reduce": "mean"}, "reduce: 'mean' was given, allowed are global_attn"),
        ({"norm": "group"}, "norm: 'group' was given"),
        ({"scale": "all"}, "scale: 'all' was given"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AfKanLayer(4, 3, **settings)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="x: its last dimension is 5; this layer reads 4"):
        AfKanLayer(4, 3)(torch.rand(2, 5))
    with pytest.raises(ValueError, match="in_features, out_features: 0 and 3"):
        AfKanLayer(0, 3)
    with pytest.raises(ValueError, match=r"widths, reductions: \[4\] and"):
        AfKanNetwork((4,))
    with pytest.raises(ValueError, match="join: 'max'"):
        AfKanNetwork((4, 3), join="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: 'kan'"):
        layer_of("kan", 4, 3)  # type: ignore[arg-type]


# -- the transform -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", architectures(("llama", "gpt2", "vit")))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    rtn = RoundToNearest(bits=4, group_size=8)
    check_transform(AfKan(), tiny_model(kind), tiny_batches(kind), conflicting=(), repeatable=True)
    with pytest.raises(RecipeError, match="slot was filled for; put af_kan first"):
        apply(tiny_model(kind), [rtn, AfKan()], tiny_batches(kind), progress=False)


@pytest.mark.parametrize("kan", ["af_kan", "relu_kan"])
def test_an_mlp_gets_no_more_parameters_than_before(kan: Any, tmp_path: Path) -> None:
    for kind in ("llama", "vit"):
        original, model, batches = tiny_model(kind), tiny_model(kind), tiny_batches(kind)
        notes = apply(model, AfKan(kind=kan), progress=False).report.notes
        assert len(notes) == 2
        for path in ("model.layers.0.mlp", "model.layers.1.mlp") if kind == "llama" else ("vit.layers.0.mlp",):
            before = sum(each.numel() for each in original.get_submodule(path).parameters())
            made = model.get_submodule(path)
            assert isinstance(made, AfKanMlp)
            assert sum(each.numel() for each in made.parameters()) <= before
            wider = AfKanMlp(16, made.hidden + 1, kan, **made.settings)
            assert sum(each.numel() for each in wider.parameters()) > before
        first, second = (model.get_submodule(path).up for path in paths(kind))
        assert not torch.equal(first.coefficients.weight, second.coefficients.weight)
        layers = [linear.path for block in anatomy(model).blocks for linear in block.linears()]
        assert any(".mlp.up." in path for path in layers)
        save(model, tmp_path / kind)
        torch.testing.assert_close(output(load(tmp_path / kind), batches), output(model, batches), rtol=0, atol=0)


def paths(kind: str) -> tuple[str, str]:
    prefix = "model.layers" if kind == "llama" else "vit.layers"
    return f"{prefix}.0.mlp", f"{prefix}.1.mlp"


def output(model: nn.Module, batches: list[Any]) -> Tensor:
    with torch.no_grad():
        return model(**batches[0])[0]


def test_a_head_by_its_name_in_eight_bits(tmp_path: Path) -> None:
    model = zoo.load("cnn")
    head = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)][-1]
    images = torch.rand(8, 1, 8, 8)
    for kan in ("af_kan", "relu_kan"):
        changed = apply(model, AfKan(where=(head,), kind=kan), [images], inplace=False, progress=False).model
        layer = changed.get_submodule(head)
        assert isinstance(layer, AfKanLayer | KanLinear)
        report = apply(changed, RoundToNearest(bits=8), [images], min_coverage=0.0, progress=False).report
        assert isinstance(changed.get_submodule(f"{head}.coefficients"), ActLinear), report.skipped
        with torch.no_grad():
            assert changed(images).shape == model(images).shape


def test_layers_outside_of_blocks_and_what_is_left() -> None:
    model, batches = tiny_model("vit"), tiny_batches("vit")
    apply(model, AfKan(where=("classifier", "vit.layers.1.mlp.fc?")), batches, progress=False)
    found = {name for name, each in model.named_modules() if isinstance(each, AfKanLayer)}
    assert found == {"classifier", "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"}
    with pytest.raises(EditError, match="where: 'head' names nothing"):
        apply(tiny_model("vit"), AfKan(where=("head",)), batches, progress=False)
    with pytest.raises(EditError, match=r"where: 'vit.layers.0.mlp' names a ViTMLP"):
        apply(tiny_model("vit"), AfKan(where=("vit.layers.0.mlp",)), batches, progress=False)
    for kind, text in (("bert", "lie in different modules"), ("mixtral", "experts"), ("mlp", "knows no MLP here")):
        skipped = apply(tiny_model(kind), AfKan(), tiny_batches(kind), min_coverage=0.0, progress=False).report.skipped
        assert skipped and all(text in reason for _, _, reason in skipped)
    with pytest.raises(ValueError, match="local_attn needs"):
        apply(tiny_model("vit"), AfKan(grid=1, order=0, reduce="local_attn"), batches, progress=False)
    for settings in ({"combine": "quad3"}, {"reduce": "mean"}, {"grid": 0}, {"scale": "batch"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AfKan(**settings)
