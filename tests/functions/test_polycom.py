"""PolyReLU, PolyNorm and MLPs for them: against closed forms, parameter counts and what was written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actkit.core.ground.errors import DataError
from actkit.core.layers import hidden_act
from actkit.core.layers.activations import gives_zeros, record_of
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Density
from actkit.functions.polycom.degrees import PowerSquares, polynomial_degrees
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU, polynomial_of_relu
from actkit.functions.polycom.ungate import Ungate, UngatedMlp
from actkit.functions.swap import swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal
from actkit.testing import check_function, check_transform, tiny_batches, tiny_model

LIGER = json.loads(Path(__file__).with_name("liger_kernel.json").read_text())
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))


# -- the functions -----------------------------------------------------------------------------------------------------


def test_poly_relu_begins_as_relu_or_its_square_if_asked():
    torch.testing.assert_close(PolyReLU(init="relu")(X), X.relu(), rtol=0, atol=0)
    torch.testing.assert_close(PolyReLU(init="relu2")(X), X.relu().square(), rtol=0, atol=0)


def test_moments_at_the_start_for_normal_inputs():
    """From E relu(x)^k of a standard normal x; of N(x^i), x^i over its root mean square."""
    half = {k: 2 ** (k / 2 - 1) * math.gamma((k + 1) / 2) / math.sqrt(math.pi) for k in range(7)}
    second = sum(half[i + j] for i in (1, 2, 3) for j in (1, 2, 3)) / 9
    found = PolyReLU().record().moments()
    assert (found.mean, found.second) == (pytest.approx(sum(half[i] for i in (1, 2, 3)) / 3), pytest.approx(second))
    points = torch.arange(400_000, dtype=torch.float64) + 0.5
    y = PolyNorm().double()(torch.special.ndtri(points / len(points))[None]).detach()
    assert float(y.mean()) == pytest.approx(1 / 3 / math.sqrt(3), abs=1e-4)  # of x^2 alone
    assert float(y.std()) == pytest.approx(math.sqrt((3 + 6 / math.sqrt(15)) / 9 - 1 / 27), abs=1e-4)


def test_poly_norm_is_liger_kernel_s():
    """Outputs and gradients of its kernels with copied weights, run once at the version that the file names."""
    names = ("x", "weight", "bias", "upstream", "output", "to_x", "to_weight", "to_bias")
    theirs = {name: torch.tensor(LIGER[name]) for name in names}
    layer = PolyNorm()
    layer.load_state_dict({name: theirs[name] for name in ("weight", "bias")})
    output = layer(theirs["x"].requires_grad_())
    found = (output, *torch.autograd.grad(output, (theirs["x"], layer.weight, layer.bias), theirs["upstream"]))
    for ours, name in zip(found, names[4:], strict=True):
        torch.testing.assert_close(ours, theirs[name], atol=1e-5, rtol=1e-5)


def test_poly_norm_keeps_its_output_if_the_input_is_scaled():
    layer = PolyNorm()
    torch.testing.assert_close(layer(1000 * X), layer(100 * X), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.bias.fill_(0.7)
    torch.testing.assert_close(layer(0 * X), torch.full_like(X, 0.7))


def test_the_weight_holds_the_highest_power_first():
    layer = PolyReLU()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 10.0, 100.0]))
    assert float(layer(torch.tensor(2.0)).detach()) == 8 + 40 + 200
    assert layer.coefficients() == (0.0, 100.0, 10.0, 1.0)
    assert layer.extra_repr() == "b=0, a1=100, a2=10, a3=1"


def test_a_polynomial_per_channel_is_one_in_each():
    many, x = PolyReLU(per_channel=True, channels=3), torch.randn(4, 3)
    with torch.no_grad():
        many.weight.copy_(torch.randn(3, 3))
        many.bias.copy_(torch.randn(3))
    for channel in range(3):
        one = PolyReLU()
        with torch.no_grad():
            one.weight.copy_(many.weight[:, channel])
            one.bias.copy_(many.bias[channel : channel + 1])
        torch.testing.assert_close(many(x)[:, channel], one(x[:, channel]))
    assert many.record() is None and many.record(2) is not None and many.extra_repr() == "order=3, channels=3"


@pytest.mark.parametrize(
    "coefficients",
    [
        (0.0, 1 / 3, 1 / 3, 1 / 3),
        (0.5, -1.0, 0.25, 0.5),  # falls, then rises; two kinds of curvature
        (0.0, 1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0),
        (-0.2, 1.0, -1.0, 0.2),  # up, down, up
        (1.5, 0.0, 0.0),
    ],
)
def test_records(coefficients: tuple[float, ...]):
    record = polynomial_of_relu(coefficients)
    check_function(record)
    x = np.linspace(-2, 2, 41)
    expected = sum(a * np.maximum(x, 0) ** i for i, a in enumerate(coefficients))
    np.testing.assert_allclose(record.function(torch.from_numpy(x)).numpy(), expected, atol=1e-14)


def test_records_of_modules_follow_their_coefficients():
    layer = PolyReLU()
    assert gives_zeros(layer)
    with torch.no_grad():
        layer.bias.fill_(0.1)
    assert not gives_zeros(layer) and layer.record().limits == (pytest.approx(0.1), math.inf)
    norm = PolyNorm(order=2)
    record = record_of(norm)
    assert record.mixes == ("channels",) and record.name == "poly_norm(0, 0.5, 0.5)"
    torch.testing.assert_close(record.function(X.double()), norm.double()(X.double()).detach())
    check_function(record)


def test_coefficients_keep_float32():
    model = nn.Sequential(nn.Linear(4, 8), PolyNorm(), nn.Linear(8, 2)).to(torch.bfloat16)
    assert model[1].weight.dtype == model[1].bias.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16
    y = model(torch.randn(3, 4).to(torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and model[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PolyReLU(order=0), "order: 0 was given"),
        (lambda: PolyReLU(init="gelu"), "init: 'gelu' was given"),
        (lambda: PolyReLU(1, "relu2"), "relu2 from order 2 on"),
        (lambda: PolyReLU(per_channel=True, channels=0), "channels: 0 was given"),
        (lambda: PolyReLU(per_channel=True), "channels: None was given with per_channel=True"),
        (lambda: PolyNorm(eps=0), "eps: 0 was given"),
        (lambda: PolyNorm()(torch.arange(4)), r"x: torch.int64 was given"),
        (lambda: PolyNorm()(torch.ones(3, 0)), r"x: shape \(3, 0\) was given"),
    ],
)
def test_errors(make: Any, text: str):
    with pytest.raises(ValueError, match=text):
        make()


# -- in models ---------------------------------------------------------------------------------------------------------


def test_swap_tells_the_channels_to_a_polynomial_for_each():
    model = tiny_model("llama")
    swap(model, "silu", lambda channels: PolyReLU(per_channel=True, channels=channels))
    assert model.model.layers[0].mlp.act_fn.weight.shape == (3, 24)
    swap(model, "poly_relu", "poly_relu")
    assert model.model.layers[0].mlp.act_fn.weight.shape == (3,)


def test_a_config_names_them():
    hidden_act.enter("poly_norm")
    model = tiny_model("llama", hidden_act="poly_norm")
    assert isinstance(model.model.layers[0].mlp.act_fn, PolyNorm)


def test_swapped_in_saved_and_loaded(tmp_path: Path):
    model = tiny_model("llama")
    swap(model, "silu", "poly_norm")
    before = model(**tiny_batches("llama")[0]).logits
    checkpoint.save(model, tmp_path / "folder")
    loaded = checkpoint.load(tmp_path / "folder")
    assert isinstance(loaded.model.layers[0].mlp.act_fn, PolyNorm)
    torch.testing.assert_close(loaded(**tiny_batches("llama")[0]).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3"])
def test_ungate_keeps_the_number_of_parameters(kind: str):
    model = tiny_model(kind)
    mlp = anatomy(model).block(0).mlp
    weights = sum(linear.weight.numel() for linear in (*mlp.inputs, mlp.down))
    applied = apply(model, Ungate(activation="poly_relu", multiple_of=1), progress=False)
    new = model.get_submodule(mlp.path)
    assert isinstance(new, UngatedMlp) and new.up_proj.out_features == 36  # 1.5 times 24
    assert sum(p.numel() for p in new.parameters()) == weights + 4
    path, _, values = applied.report.values[0]
    assert (path, values) == (mlp.path, {"width": 36, "before": weights, "after": weights + 4})
    assert any("random weights: train the model" in note for note in applied.report.notes)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_an_ungated_mlp_is_read_as_one(kind: str):
    model = tiny_model(kind)
    apply(model, Ungate(activation="relu", multiple_of=1), progress=False)
    block = anatomy(model).block(1)
    mlp = block.mlp
    assert mlp is not None and not mlp.gated and mlp.width == 36 and mlp.norm is not None
    assert [linear.path for linear in mlp.inputs] == [f"{mlp.path}.up_proj"]
    seen = record(model, {"mlp.hidden": Density(), "mlp.preactivation": Density()}, tiny_batches(kind), progress=False)
    assert len(seen) == 4 and 0 < seen["blocks.1.mlp.hidden"].density < 1


@pytest.mark.parametrize("activation", ["poly_norm", "poly_relu", "relu"])
def test_the_decoder_takes_an_ungated_mlp(activation: str):
    model, ids = tiny_model("llama"), tiny_batches("llama")[0]["input_ids"][:1]
    apply(model, Ungate(activation=activation), progress=False)
    engine = choose_engine(model, capacity=16)
    assert engine.decoder is not None, engine.describe()
    found = torch.stack([engine.decoder([token]) for token in ids[0].tolist()])
    engine.decoder.close()
    torch.testing.assert_close(found, model.eval()(ids).logits[0].detach(), rtol=1e-4, atol=1e-5)


def test_ungate_draws_as_the_model_does():
    model = tiny_model("llama", hidden_size=64, intermediate_size=256, initializer_range=0.5)
    apply(model, Ungate(), progress=False)
    first, second = (layer.mlp for layer in model.model.layers)
    assert float(first.up_proj.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(first.up_proj.weight, second.up_proj.weight)


def test_ungate_counts_biases():
    model = tiny_model("llama", mlp_bias=True)
    before = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    apply(model, Ungate(multiple_of=1), progress=False)
    after = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert model.model.layers[0].mlp.up_proj.bias is not None and abs(after - before - 4) <= 17


def test_ungate_exchanges_the_activation_of_mlps_without_a_gate():
    model = tiny_model("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight
    apply(model, Ungate(), progress=False)
    assert isinstance(model.transformer.h[0].mlp.act, PolyNorm) and model.transformer.h[0].mlp.c_fc.weight is weight


def test_ungate_leaves_experts():
    applied = apply(tiny_model("mixtral"), Ungate(), min_coverage=0, progress=False)
    assert "experts are not rebuilt" in {reason for _, _, reason in applied.report.skipped}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_ungate_passes(kind: str):
    checks = check_transform(
        Ungate(multiple_of=1), tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(bits=4, group_size=8)]
    )
    found = {check.name: check.outcome for check in checks}
    held = {name for name, outcome in found.items() if outcome == "holds"}
    assert {"the same result twice", "save and load", "undo is exact", "settings are strict"} <= held


def test_other_methods_work_on_top(tmp_path: Path):
    model = tiny_model("llama")
    apply(model, Ungate(multiple_of=8), progress=False)
    apply(model, [RoundToNearest(bits=8, group_size=8)], progress=False)
    apply(model, Teal(sparsity=0.3), tiny_batches("llama"), progress=False)
    checkpoint.save(model, tmp_path / "folder")
    batch = tiny_batches("llama")[0]
    torch.testing.assert_close(
        checkpoint.load(tmp_path / "folder")(**batch).logits, model(**batch).logits, rtol=0, atol=0
    )


def test_settings_of_ungate():
    with pytest.raises(ValueError, match="'rotation' is a Rotation, which is no activation function; give one of poly"):
        Ungate(activation="rotation")
    with pytest.raises(ValueError, match="'thresholded' is a Thresholded, which needs settings"):
        Ungate(activation="thresholded")
    with pytest.raises(ValueError, match=r"'poly_nrm' is not known\. Did you mean poly_norm"):
        Ungate(activation="poly_nrm")


# -- learned degrees ---------------------------------------------------------------------------------------------------


def test_degrees_are_those_written_out_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), PolyReLU(), nn.Linear(5, 7), PolyNorm(order=2), nn.Linear(7, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, -2.0, 1.0]))
    batches = [torch.randn(8, 6), torch.randn(3, 6)]
    found = polynomial_degrees(model, batches, progress=False)
    x = torch.cat([model[0](batch) for batch in batches]).relu().detach().double()
    expected = [float(abs(a) * (x ** (2 * i)).mean().sqrt()) for i, a in ((1, 1.0), (2, -2.0), (3, 0.0))]
    first, second = found.layers
    assert (first.path, first.kind, first.coefficients) == ("1", "PolyReLU", (1.0, -2.0, 0.0))
    assert first.contributions == pytest.approx(expected, rel=1e-6)
    assert first.degree == pytest.approx((expected[0] + 2 * expected[1]) / sum(expected))
    assert second.contributions == pytest.approx((0.5, 0.5), abs=1e-3) and second.degree == pytest.approx(1.5, abs=1e-3)


def test_squares_merge():
    x = torch.randn(20, 6)
    whole, one, other = (PowerSquares(3, 1e-6) for _ in range(3))
    whole.update(x)
    one.update(x[:7])
    other.update(x[7:])
    assert one.merge(other).rms == pytest.approx(whole.rms)


def test_degrees_need_a_polynomial():
    with pytest.raises(DataError, match=r"this LlamaForCausalLM has no PolyReLU or PolyNorm"):
        polynomial_degrees(tiny_model("llama"), tiny_batches("llama"), progress=False)
    with pytest.raises(DataError, match="0 were given"):
        polynomial_degrees(tiny_model("llama"), [], progress=False)
