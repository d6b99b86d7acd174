"""Weights and inputs in training: values, gradients against autograd and torch.ao, and what they freeze to."""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from actkit.core.grids.half_integers import HalfIntegerGrid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.learned import first_step
from actkit.core.ground import registry
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.layers.learned_inputs import LearnedInputs
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import CodedWeight, DenseWeight
from actkit.core.train.choice import parameter_groups

IN, OUT = 24, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "range": lambda: LatentWeight.of(drawn(OUT, IN), IntegerGrid(4, -1)),
    "clipped": lambda: LatentWeight.of(drawn(OUT, IN), IntegerGrid(3, -1), clip=0.9),
    "groups": lambda: LatentWeight.of(drawn(OUT, IN), IntegerGrid(4, 8, symmetric=True)),
    "statsq": lambda: LatentWeight.of(drawn(OUT, IN), HalfIntegerGrid(2)),
    "lsq": lambda: LatentWeight.of(drawn(OUT, IN), IntegerGrid(3, -1, symmetric=True), learned=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_it_is_seen_through_its_grid_and_freezes_to_the_same(name: str) -> None:
    weight = KINDS[name]()
    frozen = weight.frozen()
    assert isinstance(frozen, CodedWeight) and not frozen.in_training and weight.in_training
    with torch.no_grad():
        assert torch.equal(frozen.dequantize(), weight.dequantize())
        assert torch.equal(frozen.integers(), weight.integers())
    torch.testing.assert_close(weight.dequantize(), frozen.dequantize())  # with a graph, to rounding
    assert frozen.nbytes < weight.nbytes / 2


@pytest.mark.parametrize("name", ["range", "clipped", "groups", "statsq"])
def test_a_range_that_is_found_anew_gives_all_weights_their_gradient(name: str) -> None:
    weight, upstream = KINDS[name](), drawn(OUT, IN, seed=1)
    weight.dequantize().backward(upstream)
    assert torch.equal(weight.tensor.grad, upstream)
    before = weight.dequantize().detach().clone()
    with torch.no_grad():
        weight.tensor.mul_(2)
    torch.testing.assert_close(weight.dequantize(), 2 * before)  # and the range follows


def test_a_clipped_range_is_that_of_the_formula() -> None:
    tensor, bits, clip = drawn(OUT, IN), 3, 0.9
    low, high = (clip * tensor.amin(1, keepdim=True)).clamp(max=0), (clip * tensor.amax(1, keepdim=True)).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    expected = ((torch.round(tensor / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale
    torch.testing.assert_close(KINDS["clipped"]().dequantize(), expected)


def oracle(x: Tensor, step: Tensor, low: int, high: int, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """torch's learnable fake quantizer, with one step: values, gradients of x and the step for the gradient x."""
    x, step, zero = x.clone().requires_grad_(), step.clone().view(1).requires_grad_(), torch.zeros(1)
    found = torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, low, high, factor)
    found.backward(x.detach())
    return found.detach(), x.grad, step.grad


def test_lsq_is_that_of_torch() -> None:
    x, grid = drawn(5, IN), IntegerGrid(4, -1, symmetric=True, scope="tensor")
    step = torch.tensor([0.2])
    inputs = LearnedInputs(grid, step, biases=False, channels=IN)
    given = x.clone().requires_grad_()
    found = inputs(given)
    found.backward(x)
    expected, of_x, of_step = oracle(x, step, -8, 7, 1 / sqrt(7 * x.numel()))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given.grad, of_x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs.step.grad, of_step, rtol=1e-5, atol=1e-6)


def test_lsq_of_weights_is_that_of_torch_row_by_row() -> None:
    weight = KINDS["lsq"]()
    upstream = weight.tensor.detach().clone()
    weight.dequantize().backward(upstream)
    for row in range(OUT):
        x = weight.tensor.detach()[row]
        assert weight.step[row].item() == pytest.approx(2 * float(x.abs().mean()) / sqrt(3), rel=1e-6)
        expected, of_x, of_step = oracle(x, weight.step.detach()[row], -4, 3, 1 / sqrt(3 * IN))
        torch.testing.assert_close(weight.dequantize().detach()[row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.tensor.grad[row], of_x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weight.step.grad[row : row + 1], of_step, rtol=1e-5, atol=1e-6)


def test_a_step_that_passes_zero_is_still_one() -> None:
    weight = KINDS["lsq"]()
    with torch.no_grad():
        expected = weight.dequantize()
        weight.step.neg_()
        assert torch.equal(weight.dequantize(), expected) and torch.equal(weight.frozen().dequantize(), expected)
        weight.step.zero_()
        assert bool(torch.isfinite(weight.dequantize()).all())
    weight.dequantize().sum().backward()
    assert bool(torch.isfinite(weight.step.grad).all())


def test_where_a_step_begins() -> None:
    mean = torch.tensor([0.5])
    assert float(first_step(mean, IntegerGrid(4, symmetric=True))) == pytest.approx(1 / sqrt(7))
    assert float(first_step(mean, IntegerGrid(4))) == pytest.approx(2 / sqrt(15))


def layer(inputs: RoundedInputs, weight: str = "statsq") -> ActLinear:
    return ActLinear.of(nn.Linear(IN, OUT), weight=KINDS[weight](), inputs=inputs)


def learned(shape: tuple[int, ...] = (1,), unsigned: bool = False, **settings: object) -> LearnedInputs:
    grid = IntegerGrid(4, -1, symmetric=not unsigned, scope="tensor")
    zero = torch.zeros(1, dtype=torch.uint8) if unsigned else None
    given = {"biases": True, "channels": IN, **settings}
    made = LearnedInputs(grid, torch.rand(shape) * 0.1 + 0.2, zero, **given)
    with torch.no_grad():
        for name in ("before", "after"):
            if given["biases"]:
                getattr(made, name).copy_(drawn(IN, seed=3) * 0.2)
    return made


INPUTS = {
    "one step": lambda: learned(),
    "without a sign": lambda: learned(unsigned=True),
    "by channel": lambda: learned((IN,)),
    "by position": lambda: learned((5, 1)),
    "no biases": lambda: learned(biases=False),
    "shifted before": lambda: learned(shift=drawn(IN, seed=4), divisor=torch.rand(IN) + 0.5),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_freeze_to_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    trained, x = layer(INPUTS[name]()), drawn(3, 5, IN, seed=5)
    assert trained.in_training
    frozen = trained.frozen()
    assert not frozen.in_training and type(frozen.inputs) is RoundedInputs
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), trained(x), rtol=1e-5, atol=1e-5)
    again = RoundedInputs.from_spec(frozen.inputs.spec(), IN)
    again.load_state_dict(frozen.inputs.state_dict())
    assert torch.equal(again(x), frozen.inputs(x)) and again.describe() == frozen.inputs.describe()


@pytest.mark.parametrize("name", INPUTS)
def test_gradients_of_learned_inputs(name: str) -> None:
    """By autograd through the formula of the header, with the step's gradient scaled."""
    torch.manual_seed(0)
    inputs, x = INPUTS[name]().double(), drawn(3, 5, IN, seed=5).double()
    given = x.clone().requires_grad_()
    inputs(given).backward(x)
    step = inputs.step.detach().clone().requires_grad_()
    low, high = (-8, 7) if inputs.zero is None else (0, 15)
    moved = inputs.moved(x)
    before, after = (None, None) if inputs.before is None else (inputs.before.detach(), inputs.after.detach())
    moved = moved if before is None else moved + before
    shaped = step.view(inputs.scale.shape)
    u = moved / shaped
    code = u + (torch.round(u) - u).detach()
    out = code.clamp(low, high) * shaped + (0 if after is None else after)
    out.backward(x)
    factor = 1 / sqrt(high * x.numel() / step.numel())
    torch.testing.assert_close(inputs(x).detach(), out.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.step.grad, step.grad * factor)
    if inputs.after is not None:
        torch.testing.assert_close(inputs.after.grad, x.flatten(0, -2).sum(0))
        inside = ((torch.round(u) >= low) & (torch.round(u) <= high)).detach()
        torch.testing.assert_close(inputs.before.grad, torch.where(inside, x, 0).flatten(0, -2).sum(0))


def test_tokens_pass_their_gradient_also_where_they_are_clipped() -> None:
    inputs, x = RoundedInputs(IntegerGrid(4, -1), clip=0.5), drawn(3, IN).requires_grad_()
    upstream = drawn(3, IN, seed=1)
    inputs(x).backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert float((inputs(x) - x).abs().max()) > 0.3  # clipped


def test_other_positions_are_refused_by_name() -> None:
    for inputs in (learned((5, 1)), layer(learned((5, 1))).frozen().inputs):
        with pytest.raises(ValueError, match="a scale for each of 5 positions, and 4 were given"):
            inputs(drawn(3, 4, IN))


def test_steps_and_vectors_do_not_decay() -> None:
    trained = layer(INPUTS["by position"](), "lsq")
    decaying = {id(p) for p in parameter_groups(trained, 0.1)[0]["params"]}
    assert decaying == {id(trained.storage.tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_structure_comes_back_from_its_settings(dtype: torch.dtype) -> None:
    for weight in KINDS:
        for inputs in INPUTS:
            made = layer(INPUTS[inputs](), weight).to(dtype)
            again = ActLinear.from_spec(copy.deepcopy(made.spec()))
            again.load_state_dict(made.state_dict())
            assert again.spec() == made.spec()
            x = drawn(3, 5, IN).to(dtype)
            assert torch.equal(again(x), made(x)) and made(x).dtype == dtype


def test_the_original_weight_is_not_trained() -> None:
    linear = nn.Linear(IN, OUT)
    before = linear.weight.detach().clone()
    made = ActLinear.of(linear, weight=LatentWeight.of(linear.weight, IntegerGrid(4, -1)))
    with torch.no_grad():
        made.storage.tensor.add_(1)
    assert torch.equal(linear.weight, before)
    assert made.filled_slots == ("weight",) and "trained, seen as 4-bit" in made.storage.describe()


def test_names_are_registered() -> None:
    assert registry.weight_class("latent") is LatentWeight
    assert registry.inputs_class("learned") is LearnedInputs
    assert DenseWeight(drawn(2, 2)).frozen().kind == "dense"
