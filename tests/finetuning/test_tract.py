"""TrAct against the released package's gradients, the normal equations, and itself in other forms."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.layer_rows import rows_of
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.finetuning.tract import Tract, first_layer, tract_gradient
from actkit.testing import check_rule, tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN

PACKAGE = Path(__file__).with_name("torch_tract.json")
CASES = json.loads(PACKAGE.read_text(encoding="utf-8"))["cases"]
CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 8)),
    (nn.Conv2d(4, 6, (3, 2), groups=2, padding=(1, 0), padding_mode="reflect"), (2, 4, 7, 8)),
    (nn.Conv2d(3, 5, 4, stride=4, padding="valid", bias=False), (3, 8, 8)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 9)),
    (nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 9)),
    (nn.Conv1d(4, 4, 2, groups=4, dilation=3), (4, 9)),
]


def exact(gradient: Tensor, x: Tensor, ridge: float) -> Tensor:
    """The formula with an inverse written out, for [rows, m] and [rows, n]."""
    square = x.t() @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return gradient.t() @ x @ torch.linalg.inv(square)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor, **settings: Any) -> dict[str, Tensor]:
    """Of the parameters, under the rule."""
    layer.zero_grad()
    with attached([Tract(layer="", **settings)], layer) as rules:
        layer(x).backward(upstream)
        rules.after_backward(0.0)
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=[f"{case['kind']} {case['shape']}" for case in CASES])
def test_gradients_are_the_package_s(case: dict[str, Any]) -> None:
    if case["kind"] == "linear":
        layer: nn.Module = nn.Linear(*case["arguments"])
    else:
        into, out, size, stride, padding = case["arguments"]
        layer = nn.Conv2d(into, out, size, stride=stride, padding=padding)
    layer = layer.double()
    for name in ("weight", "bias"):
        with torch.no_grad():
            parameter = layer.get_parameter(name)
            parameter.copy_(torch.tensor(case[name], dtype=torch.float64).view_as(parameter))
    x = torch.tensor(case["x"], dtype=torch.float64).view(case["shape"])
    upstream = torch.tensor(case["upstream"], dtype=torch.float64).view_as(layer(x))
    found = gradients(layer, x, upstream, ridge=case["ridge"], solve_in="float64")
    expected = torch.tensor(case["gradient"], dtype=torch.float64).view_as(found["weight"])
    torch.testing.assert_close(found["weight"], expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found["bias"], upstream.flatten(2).sum((0, 2)) if x.dim() == 4 else upstream.sum(0))


@pytest.mark.parametrize(("rows", "inputs"), [(50, 7), (5, 9), (6, 6), (1, 3)])
def test_both_forms_are_the_formula_and_solve_the_normal_equations(rows: int, inputs: int) -> None:
    x, gradient = drawn(rows, inputs), drawn(rows, 4, seed=1)
    found = tract_gradient(gradient, x, 0.2)
    torch.testing.assert_close(found, exact(gradient, x, 0.2), rtol=1e-9, atol=1e-9)
    square = x.t() @ x / rows + 0.2 * torch.eye(inputs, dtype=torch.float64)
    torch.testing.assert_close(found @ square, gradient.t() @ x, rtol=1e-9, atol=1e-9)
    narrow = tract_gradient(gradient.float(), x.float(), 0.2)
    torch.testing.assert_close(narrow.double(), found, rtol=1e-4, atol=1e-5)


def test_the_step_is_the_one_that_realises_the_wanted_one_best() -> None:
    x, gradient = drawn(30, 5), drawn(30, 3, seed=1)
    step = tract_gradient(gradient, x, 0.1).requires_grad_()
    wanted = 30 * gradient  # of a loss that is a mean
    loss = (wanted - x @ step.t()).square().sum() + 0.1 * 30 * step.square().sum()
    assert float(torch.autograd.grad(loss, step)[0].abs().max()) < 1e-9


def test_another_input_for_the_gradient_is_the_same() -> None:
    """x' = x G^-1 in the backward pass, and W x as the output."""
    x, upstream, layer = drawn(20, 5), drawn(20, 3, seed=1), nn.Linear(5, 3).double()
    inverse = torch.linalg.inv(x.t() @ x / 20 + 0.1 * torch.eye(5, dtype=torch.float64))
    y = layer(x @ inverse)
    y.data = F.linear(x, layer.weight.detach(), layer.bias.detach())
    (expected,) = torch.autograd.grad(y, layer.weight, upstream)
    found = gradients(layer, x, upstream, solve_in="float64")["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda value: str(value)[:40])
def test_a_convolution_is_a_linear_layer_on_what_it_sees(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).double()
    x, groups = drawn(*shape), layer.groups
    y = layer(x)
    rows = rows_of(layer, x)  # [groups, rows, n]
    matrix = layer.weight.flatten(1).unflatten(0, (groups, -1))
    batch = 1 if x.dim() == y.dim() and y.shape[0] == layer.out_channels else len(x)
    as_rows = y.reshape(batch, groups, -1, y[0].numel() * len(y) // batch // layer.out_channels)
    as_rows = as_rows.permute(1, 0, 3, 2).flatten(1, 2)  # [groups, rows, outputs]
    bias = 0 if layer.bias is None else layer.bias.view(groups, 1, -1)
    torch.testing.assert_close(rows @ matrix.mT + bias, as_rows, rtol=1e-10, atol=1e-10)
    upstream = drawn(*y.shape, seed=1)
    wanted = upstream.reshape(batch, groups, -1, as_rows.shape[1] // batch).permute(1, 0, 3, 2).flatten(1, 2)
    expected = torch.cat([exact(wanted[group], rows[group].detach(), 0.1) for group in range(groups)])
    found = gradients(layer, x, upstream, solve_in="float64")["weight"]
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-8, atol=1e-8)


def test_several_calls_rows_of_any_shape_and_conv1d_of_transformers() -> None:
    layer, x, upstream = nn.Linear(4, 3).double(), drawn(2, 5, 4), drawn(2, 5, 3, seed=1)
    expected = exact(upstream.flatten(0, 1), x.flatten(0, 1), 0.1)
    found = gradients(layer, x, upstream, solve_in="float64")["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    turned = Conv1D(3, 4).double()
    found = gradients(turned, x, upstream, solve_in="float64")["weight"]
    torch.testing.assert_close(found.t(), expected, rtol=1e-9, atol=1e-9)
    layer.zero_grad()
    with attached([Tract(layer="", solve_in="float64")], layer):  # two calls, one backward pass
        ((layer(x[0]) * upstream[0]).sum() + (layer(x[1]) * upstream[1]).sum()).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("accumulate", ["batch", "exact"])
def test_accumulated_gradients(accumulate: Any) -> None:
    layer, x, upstream = nn.Linear(4, 3).double(), drawn(20, 4), drawn(20, 3, seed=1)
    with attached([Tract(layer="", accumulate=accumulate, solve_in="float64")], layer) as rules:
        for part in (slice(0, 8), slice(8, 20)):
            layer(x[part]).backward(upstream[part])
        rules.after_backward(0.0)
    whole = exact(upstream, x, 0.1)
    parts = exact(upstream[:8], x[:8], 0.1) + exact(upstream[8:], x[8:], 0.1)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, whole if accumulate == "exact" else parts, rtol=1e-9, atol=1e-9)


def test_what_was_realised_is_reported() -> None:
    layer, x, upstream = nn.Linear(3, 2).double(), drawn(3, 3), drawn(3, 2, seed=1)
    rule = Tract(layer="", ridge=1e-9, solve_in="float64").attach(layer)
    assert rule.report() == {}
    layer(x).backward(upstream)
    assert rule.report()["realised"] == pytest.approx(1.0, abs=1e-4)  # three inputs reach whatever three rows want
    rule.detach()
    x = drawn(200, 3)
    gradient = drawn(200, 2, seed=1)
    rule = Tract(layer="", solve_in="float64").attach(layer)
    layer(x).backward(gradient)
    realised = (x @ exact(gradient, x, 0.1).t()).norm() / (200 * gradient).norm()
    assert rule.report()["realised"] == pytest.approx(float(realised))
    rule.detach()


def test_the_scale_of_images_hardly_counts() -> None:
    layer, x, upstream = nn.Linear(6, 3).double(), drawn(40, 6), drawn(40, 3, seed=1)
    plain = [
        gradients(layer, scale * x, upstream, ridge=1e-6, solve_in="float64")["weight"] * scale for scale in (1, 9)
    ]
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-4, atol=1e-6)  # W x moves alike


def test_the_first_layer_is_found_as_it_is_called() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(8, 2), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.stem(x))
            return found

    assert first_layer(Turned()) == "head"
    assert first_layer(Turned(), torch.zeros(2, 4)) == "stem"
    assert first_layer(tiny_model("vit"), tiny_batches("vit")[0]).endswith("patch_embeddings.projection")


@pytest.mark.parametrize(
    ("model", "settings", "text"),
    [
        (lambda: tiny_model("llama"), {}, r"layer: 'model.embed_tokens' is a Embedding; tract trains a Linear"),
        (lambda: DigitsCNN(), {"layer": "conv9"}, r"layer: 'conv9' is not there"),
        (lambda: nn.Conv3d(1, 2, 3), {}, r"layer: '' is a Conv3d"),
        (lambda: nn.ReLU(), {}, r"model: this ReLU has no layer that tract could train"),
        (lambda: DigitsCNN().requires_grad_(False), {}, r"layer: 'conv1' is frozen"),
    ],
)
def test_what_it_cannot_train_is_refused(model: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        Tract(**settings).attach(model())


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Tract(ridge=0)
    with pytest.raises(ValueError, match=r"ridge: -1 was given"):
        tract_gradient(torch.zeros(2, 3), torch.zeros(2, 4), -1)
    with pytest.raises(ValueError, match=r"gradient, x: shapes \(2, 3\) and \(4, 2\)"):
        tract_gradient(torch.zeros(2, 3), torch.zeros(4, 2))


def test_warnings() -> None:
    model = DigitsCNN()
    rule = Tract(layer="fc1").attach(model)
    with pytest.warns(UserWarning, match="it is not the first layer"):
        model(torch.zeros(2, 1, 8, 8)).sum().backward()
    rule.detach()
    with pytest.warns(UserWarning, match="reads 5000 inputs"):
        Tract().attach(nn.Linear(5000, 1)).detach()


def test_nothing_is_changed_outside_of_training() -> None:
    model, x = DigitsCNN(), torch.rand(3, 1, 8, 8)
    expected = model(x).detach()
    rule = Tract().attach(model)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        model(x)
    assert not rule.inputs
    rule.detach()
    assert not model.conv1._forward_hooks and not model.conv1.weight._backward_hooks


@pytest.mark.parametrize("settings", [{}, {"accumulate": "exact"}])
def test_the_rule_passes(settings: dict[str, Any]) -> None:
    batches = [{**batch, "labels": torch.arange(len(batch["pixel_values"])) % 2} for batch in tiny_batches("vit")]
    model = tiny_model("vit")
    model.config.problem_type = "single_label_classification"  # which transformers would note at the first loss
    check_rule(Tract(**settings), model, batches)


def test_a_training_under_it_saves_a_plain_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DigitsCNN()
    data = [{"pixel_values": torch.rand(8, 1, 8, 8), "labels": torch.arange(8)} for _ in range(3)]
    trained = train(
        model, data, validation=data[:1], steps=4, rules=["tract:ridge=0.05"], evaluate_every=2, progress=False
    )
    share = trained.history[-1].reports
    assert share is not None and 0 < share["0.Tract"]["realised"] <= 1 and math.isfinite(trained.validation)
