"""The records of activation functions: held to what they say, and against closed forms that are written here."""

from __future__ import annotations

import copy
import math
import pickle
import runpy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from actkit.core.ground.errors import RecipeError
from actkit.core.layers import known_functions as known
from actkit.core.layers.activation_function import ActivationFunction, Break, Piece, piecewise_polynomial, thresholded
from actkit.core.layers.activations import (
    Activation,
    Thresholded,
    activation_function,
    function_names,
    gives_zeros,
    is_activation,
    mixes_of,
    name_of,
    record_of,
)
from actkit.core.measure.summary import summarise
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKActivation
from actkit.sparsity.prosparse.fatrelu import ShiftedRelu
from actkit.testing import check_function, tiny_model

ROOT = Path(__file__).parents[2]
INF = math.inf
OTHERS = {
    "celu": known.celu(0.5),
    "elu": known.elu(2.0),
    "hardtanh": known.hardtanh(-0.5, 2.0),
    "leaky_relu": known.leaky_relu(-0.3),
    "shifted_relu": known.shifted_relu(0.4),
    "softplus": known.softplus(2.0),
    "threshold": known.threshold(0.5, -1.0),
    "fatrelu": thresholded(known.RELU, 0.2),
    "cats over silu": thresholded(known.SILU, 0.2),
    "cats over gelu": thresholded(known.GELU, 0.1),
    "twice": thresholded(thresholded(known.TANH, 0.2), 0.5),
    "of hardtanh": thresholded(known.HARDTANH, 0.5),
    "nothing left": thresholded(known.SIGMOID, 2.0),
}


@pytest.mark.parametrize("name", function_names())
def test_what_is_registered_is_true(name: str) -> None:
    found = {check.name: check.outcome for check in check_function(activation_function(name))}
    assert len(set(found.values())) == 1 or not activation_function(name).mixes or found["it mixes what it says"]
    assert found["shape and dtype are kept"] == found["it mixes what it says"] == "holds"


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_and_thresholds_are_true(name: str) -> None:
    check_function(OTHERS[name])


CLOSED = {  # mean, second moment, mean slope, mean squared slope of a standard normal input
    "relu": (1 / math.sqrt(2 * math.pi), 1 / 2, 1 / 2, 1 / 2),
    "relu2": (1 / 2, 3 / 2, 2 / math.sqrt(2 * math.pi), 2),
    "gelu": (1 / math.sqrt(4 * math.pi), 0.425221482570299, 1 / 2, 0.455850865649287),  # by mpmath
    "identity": (0, 1, 1, 1),
    "selu": (0, 1, 0.985231116185797, 1.07157499245580),  # its fixed point, arXiv:1706.02515
    "hardtanh": (0, 0.516058550961713, 0.682689492137086, 0.682689492137086),
}


@pytest.mark.parametrize("name", CLOSED)
def test_moments_in_closed_form(name: str) -> None:
    found: Any = activation_function(name).moments()
    values = (found.mean, found.second, found.slope, found.squared_slope)
    assert values == pytest.approx(CLOSED[name], rel=1e-12, abs=1e-12)
    assert found.variance == pytest.approx(found.second - found.mean**2)


def test_moments_of_a_step_that_is_narrow_beside_the_density() -> None:
    """ReLU scales with its input; the tanh of a very wide input is a sign."""
    wide: Any = known.RELU.moments(0.0, 1000.0)
    assert wide.mean == pytest.approx(1000 / math.sqrt(2 * math.pi), rel=1e-12)
    sign: Any = known.TANH.moments(300.0, 1000.0)
    assert sign.mean == pytest.approx(math.erf(0.3 / math.sqrt(2)), abs=1e-6)
    assert known.SOFTMAX.moments() is None
    with pytest.raises(ValueError, match="deviation: 0 was given"):
        known.RELU.moments(0.0, 0)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "tanh", "softplus", "leaky_relu"])
def test_weights_drawn_by_the_moments_keep_the_size_of_activations_and_gradients(name: str) -> None:
    """Ten random layers, 512 wide: as the page says; the moments are those of a sample, to its error."""
    record, width = activation_function(name), 512
    found: Any = record.moments()
    generator = torch.Generator().manual_seed(0)
    x = start = torch.randn(512, width, generator=generator, dtype=torch.float64).requires_grad_()
    sizes = []
    for _ in range(10):
        weight = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width * found.second)
        x = record.function(x) @ weight.T
        sizes.append(float(x.detach().square().mean()))
    # a layer's mean square is at most as uncertain as a chi-squared of 512 degrees, and layers add up: three deviations
    assert max(abs(math.log(size)) for size in sizes) < 3 * math.sqrt(10 * 2 / width)
    first = record.function(start)
    assert float(first.detach().square().mean()) == pytest.approx(found.second, rel=0.02)
    slopes = torch.autograd.grad(first.sum(), start)[0]
    assert float(slopes.square().mean()) == pytest.approx(found.squared_slope, rel=0.02)


def test_zeros() -> None:
    assert known.RELU.zeros == ((-INF, 0.0),) and known.RELU.share_of_zeros() == 0.5
    assert known.HARDSHRINK.zeros == ((-0.5, 0.5),) and known.SILU.zeros == () == known.HARDTANH.zeros
    assert known.RELU.share_of_zeros(1.0, 2.0) == pytest.approx(0.30853753872598694)  # Phi(-1/2)
    assert known.threshold(0.5, -1.0).zeros == ()
    fat = thresholded(known.RELU, 0.2)
    assert fat.zeros == ((-INF, 0.2),) and fat.jumps == (0.2,) and fat.kinks == ()
    assert fat.share_of_zeros() == pytest.approx(0.579259709439103)  # Phi(0.2)
    assert thresholded(known.SIGMOID, 2.0).zeros == ((-INF, INF),)
    assert thresholded(known.RELU, 0.0).kinks == (0.0,)


def test_solutions() -> None:
    assert known.SILU.solve(-0.1) == pytest.approx((-3.53725962678964172, -0.225265528810478872))  # mpmath
    assert known.SILU.solve(-0.3) == () == known.TANH.solve(1.5)
    assert known.HARDSWISH.solve(5.0) == (5.0,) and known.RELU.solve(0.0) == (0.0,)
    assert known.GELU.solve(0.0) == pytest.approx((0.0,), abs=1e-12) and known.SIGMOID.solve(1.0) == ()
    assert known.SOFTPLUS.solve(0.0) == () == known.RELU.solve(-1.0)
    assert known.HARDSHRINK.solve(0.2) == () and known.HARDSHRINK.solve(-0.7) == (-0.7,)
    assert known.TANH.solve(0.5) == pytest.approx((math.atanh(0.5),))


# -- which module computes what ----------------------------------------------------------------------------------------

SETTINGS: list[tuple[nn.Module, str]] = [
    (nn.CELU(0.5), "celu(0.5)"),
    (nn.ELU(2.0), "elu(2)"),
    (nn.Hardshrink(1.0), "hardshrink(1)"),
    (nn.Hardtanh(-2.0, 3.0), "hardtanh(-2, 3)"),
    (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    (nn.PReLU(init=0.3), "prelu(0.3)"),
    (nn.Softplus(2.0), "softplus(2)"),
    (nn.Softshrink(1.0), "softshrink(1)"),
    (nn.Threshold(0.1, 5.0), "threshold(0.1, 5)"),
    (ShiftedRelu(0.25), "shifted_relu(0.25)"),
    (Thresholded(nn.ReLU(), 0.5), "relu with threshold 0.5"),
    (Thresholded(Thresholded(nn.SiLU(), 0.1), 0.2), "silu with threshold 0.1 with threshold 0.2"),
]


@pytest.mark.parametrize(("module", "name"), SETTINGS, ids=[name for _, name in SETTINGS])
def test_modules_at_other_settings(module: nn.Module, name: str) -> None:
    record = record_of(module)
    assert record is not None and record.name == name and name_of(module) is None and is_activation(module)
    x = torch.linspace(-5, 5, 400, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(record.function(x), module.double()(x), rtol=1e-6, atol=1e-7)
    assert mixes_of(module) == ()


ODD = [
    nn.Softplus(1.0, 5.0),
    nn.ELU(-1.0),
    nn.RReLU(),
    nn.GLU(1),
    ACT2FN["laplace"],
    Thresholded(nn.RReLU(), 0.1),
    TopKActivation(nn.ReLU(), 2),
    nn.PReLU(device="meta"),
    Thresholded(nn.ReLU(), 0.1).to("meta"),
]


@pytest.mark.parametrize("module", ODD, ids=[type(module).__name__ for module in ODD])
def test_modules_of_which_nothing_is_known(module: nn.Module) -> None:
    assert is_activation(module) and record_of(module) is None and name_of(module) is None


@pytest.mark.parametrize("key", sorted(key for key in ACT2FN if key != "xielu"))
def test_what_transformers_calls_them(key: str) -> None:
    """Where its module has a record, that computes the same; where the record has a name there, so does that name."""
    module = ACT2FN[key]
    record = record_of(module)
    if record is None:
        assert key in ("gelu_10", "laplace", "sqrtsoftplus")
        return
    x = torch.linspace(-5, 5, 101)
    with torch.no_grad():
        assert torch.allclose(record.function(x), module(x), rtol=1e-5, atol=2e-4 if "gelu" in key else 1e-6)
        if record.config_name is not None:
            assert torch.allclose(ACT2FN[record.config_name](x), module(x), rtol=1e-5, atol=2e-4)


def test_who_gives_zeros() -> None:
    """A quarter of the outputs and more."""
    many = {name for name in function_names() if activation_function(name).share_of_zeros() >= 0.25}
    assert many == {"relu", "relu2", "relu6", "hardshrink", "softshrink"}
    assert gives_zeros(nn.ReLU6()) and gives_zeros(Thresholded(nn.SiLU(), 0.1)) and gives_zeros(ShiftedRelu(2.0))
    assert not gives_zeros(nn.Hardswish()) and not gives_zeros(nn.Linear(1, 1)) and not gives_zeros(nn.LeakyReLU())


def test_what_mixes() -> None:
    class Old(nn.Module):
        elementwise: ClassVar[bool] = False

    assert mixes_of(Old()) == ("channels", "positions") and is_activation(Old())
    assert mixes_of(TopKActivation(nn.ReLU(), 2)) == ("channels",) == mixes_of(nn.GLU()) == mixes_of(nn.Softmax(-1))
    assert mixes_of(nn.Linear(1, 1)) is None and mixes_of(nn.Softmax(1)) is None
    assert not is_activation(nn.Softmax(-1)) and not is_activation(nn.Identity())
    with pytest.raises(ValueError, match="'softmax' mixes channels; give an element-wise function"):
        Activation("softmax")


def test_a_summary_lists_the_functions_of_a_model() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.act_fn = Thresholded(nn.ReLU(), 0.2)
    model.model.layers[1].mlp.act_fn = TopKActivation(nn.ReLU(), 2)
    silus = len(model.model.layers) - 2
    found = summarise(model).activations
    assert found["TopKActivation"] == {"count": 1} and found.get("silu", {"count": 0})["count"] == silus
    fat = found["relu with threshold 0.2"]
    assert fat["count"] == 1 and fat["zeros"] == pytest.approx(0.579259709439103)
    lines = dict(summarise(model)._rows())["activations"]
    assert "1 x relu with threshold 0.2: of a standard normal input mean" in lines and "58% zeros" in lines


def test_modules_are_copied_and_pickled() -> None:
    module, x = Activation("quick_gelu"), torch.randn(5)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x), module(x)) and again.name == "quick_gelu"


# -- records of one's own ----------------------------------------------------------------------------------------------


def record(**changes: Any) -> ActivationFunction:
    return ActivationFunction(
        **{
            "name": "mine",
            "function": torch.tanh,
            "derivative": lambda x: 1 - torch.tanh(x) ** 2,
            "second_derivative": lambda x: -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2),
            "antiderivative": lambda x: torch.log(torch.cosh(x)),
            "inflections": (0.0,),
            "pieces": (Piece(-INF, INF, 1, torch.atanh),),
            "limits": (-1.0, 1.0),
        }
        | changes
    )


def jumping(x: Tensor) -> Tensor:
    return torch.where(x > 1, x + 1, x)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"function": lambda x: torch.tanh(x).float()}, "shape and dtype are kept: torch.float32"),
    ({"mixes": ("channels",), "function": lambda x: x - x.mean(tuple(range(x.dim() - 1)))}, "one position alone"),
    ({"mixes": ("channels", "positions"), "function": lambda x: x - x.mean(0)}, "one row of the batch"),
    ({"derivative": torch.tanh}, "the derivative is right: the derivative differs"),
    ({"second_derivative": torch.tanh}, "the second derivative is right"),
    ({"breaks": (Break(0.5, 1),)}, "what breaks is right: its derivative goes from"),
    (
        {"function": jumping, "derivative": torch.ones_like, "second_derivative": torch.zeros_like},
        "no break is missing: the function jumps",
    ),
    ({"pieces": (Piece(-INF, INF, -1),)}, "goes the other way"),
    ({"pieces": (Piece(-INF, 0, 1), Piece(0, INF, 1))}, "the pieces that meet at 0 are one"),
    ({"pieces": (Piece(-INF, INF, 1, torch.tanh),)}, "the function of its inverse"),
    ({"inflections": ()}, "inflections are right"),
    ({"inflections": (0.1,)}, "inflections are right"),
    ({"antiderivative": torch.cosh}, "the antiderivative is right"),
    ({"limits": (-1.0, 2.0)}, "limits are right"),
    ({"limits": (-1.0, INF)}, "limits are right"),
]


def test_the_record_that_the_wrong_ones_are_made_of_is_right() -> None:
    check_function(record())


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_the_tester_finds_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_function(record(**changes))


def test_moments_and_solutions_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationFunction, "solve", lambda self, output: ())
    with pytest.raises(AssertionError, match="outputs are solved for"):
        check_function(record())
    moments = known.RELU.moments()
    monkeypatch.setattr(ActivationFunction, "moments", lambda self, mean=0, deviation=1: moments)
    with pytest.raises(AssertionError, match="moments are right: mean for"):
        check_function(record())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixes": ("heads",)}, "mixes: .*heads.* was given for 'mine', allowed are channels"),
        ({"limits": None}, "derivative, limits: 'mine' is element-wise"),
        ({"derivative": None}, "derivative, limits: 'mine' is element-wise"),
        ({"pieces": ()}, "pieces: those of 'mine' leave gaps"),
        ({"pieces": (Piece(-INF, 0, 1), Piece(1, INF, 1))}, "pieces: those of 'mine' leave gaps"),
    ],
)
def test_bad_records(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**changes)


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match=r"functions: 'gelo' is not known\. Did you mean gelu"):
        activation_function("gelo")


def test_a_polynomial_with_an_inflection_and_a_jump() -> None:
    """x^2 below 0, -x^2 to 1, then 3: falls, and jumps up."""
    pieces = ((0.0, 0.0, 1.0), (0.0, 0.0, -1.0), (3.0,))

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 1, torch.full_like(x, 3), -x * x.abs())

    made = piecewise_polynomial("odd", function, (0.0, 1.0), pieces)
    assert made.inflections == (0.0,) and made.breaks == (Break(0.0, 2), Break(1.0, 0)) and made.limits == (INF, 3.0)
    assert [(piece.start, piece.end, piece.direction) for piece in made.pieces] == [(-INF, 1, -1), (1, INF, 0)]
    check_function(made)


def test_the_page_lists_what_is_known() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "function_table.py"))
    page = (ROOT / "docs" / "activation-functions.md").read_text(encoding="utf-8")
    assert script["written"](page) == page, "run python scripts/function_table.py"
