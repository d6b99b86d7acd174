"""GPTQ against least squares solved anew for every column, its successors' formula in float64, and brute force."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import NonFiniteError, RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq, Order, SecondOrder, round_in_order
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import equal, outputs

LONG = ((12, 9, 12), (10, 12), (12, 9, 12))


# -- the method in NumPy, written from its formulas --------------------------------------------------------------------


def nearest(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero) * scale


def parameters(groups: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of groups [..., size]."""
    if symmetric:
        scale = np.abs(groups).max(-1) / (2 ** (bits - 1) - 1)
        return scale, np.full_like(scale, 2 ** (bits - 1))
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = (high - low) / (2**bits - 1)
    return scale, -np.round(low / scale)


def column_parameters(w: np.ndarray, j: int, column: np.ndarray, grid: IntegerGrid) -> tuple[np.ndarray, np.ndarray]:
    """Of column j, of the weight as it was (groups of inputs) or of the column as it is now (groups of outputs)."""
    if grid.group_axis == "input":
        first = j // grid.size(w.shape[1]) * grid.size(w.shape[1])
        return parameters(w[:, first : first + grid.size(w.shape[1])], grid.bits, grid.symmetric)
    size = grid.size(len(w))
    found = parameters(column.reshape(-1, size), grid.bits, grid.symmetric)
    return np.repeat(found[0], size), np.repeat(found[1], size)


def by_least_squares(w: np.ndarray, h: np.ndarray, order: np.ndarray, grid: IntegerGrid) -> np.ndarray:
    """Round a column, then choose all columns behind it for the smallest error of the output, and so on."""
    current, rounded = w.copy(), np.zeros_like(w)
    for step, j in enumerate(order):
        rounded[:, j] = nearest(current[:, j], *column_parameters(w, j, current[:, j], grid), grid.bits)
        done, rest = order[: step + 1], order[step + 1 :]
        # least squares of |(w - w') X|: w'_rest = w_rest + (w_done - q_done) H_done,rest H_rest,rest^-1
        moved = (w[:, done] - rounded[:, done]) @ h[np.ix_(done, rest)]
        current[:, rest] = w[:, rest] + np.linalg.solve(h[np.ix_(rest, rest)], moved.T).T
    return rounded


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """Per token and output, in float64."""
    change = (weight - rounded).double()
    return float(torch.einsum("oi,ij,oj->", change, moment.double(), change)) / len(change)


def by_inverse(w: np.ndarray, h: np.ndarray, order: np.ndarray, grid: IntegerGrid) -> np.ndarray:
    """The formula of the release: the upper Cholesky factor of the inverse, errors passed on column by column."""
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    left, rounded = w[:, order].copy(), np.zeros_like(w)
    for i, j in enumerate(order):
        q = nearest(left[:, i], *column_parameters(w, j, left[:, i], grid), grid.bits)
        left[:, i:] -= np.outer((left[:, i] - q) / upper[i, i], upper[i, i:])
        rounded[:, j] = q
    return rounded


def layer(rows: int = 24, columns: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that are correlated, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ (torch.eye(columns) + mix)
    x[:, 3] *= 8
    return torch.randn(rows, columns, generator=generator), x.t() @ x / len(x)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "grid",
    [
        IntegerGrid(4, 32),
        IntegerGrid(3, 16),
        IntegerGrid(4, -1, symmetric=True),
        IntegerGrid(3, 8, "output"),
        IntegerGrid(4, -1, "output", symmetric=True),
    ],
    ids=repr,
)
def test_codes_are_those_of_least_squares_and_of_the_inverse(grid: IntegerGrid, act_order: bool) -> None:
    weight, moment = layer()
    order = Order.of(moment, 0.01, act_order)
    assert order is not None and order.damp == 0.01
    stored = round_in_order(weight, order, grid)
    damped = moment.double().numpy() + 0.01 * float(moment.diagonal().mean()) * np.eye(len(moment))
    columns = order.columns.numpy()
    activity = moment.diagonal().numpy()[columns]
    assert (np.diff(activity) <= 0).all() if act_order else (columns == np.arange(len(moment))).all()
    mine = output_error(weight, stored.dequantize(), moment)
    assert mine < 0.8 * output_error(weight, grid.fake(weight), moment)
    assert SecondOrder(moment, order).error(weight, stored.dequantize()) == pytest.approx(mine, rel=1e-4)
    for reference in (by_least_squares, by_inverse):
        rounded = reference(weight.double().numpy(), damped, columns, grid)
        near = np.isclose(stored.dequantize().numpy(), rounded, rtol=1e-3, atol=1e-3)
        assert near.mean() > 0.999
        theirs = output_error(weight, torch.from_numpy(rounded).float(), moment)
        assert mine == pytest.approx(theirs, rel=1e-4 if near.all() else 1e-2)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, moment = layer()
    order = Order.of(moment)
    assert order is not None
    h = moment.double()[order.columns][:, order.columns]
    h.diagonal().add_(0.01 * float(moment.diagonal().mean()))
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    torch.testing.assert_close(order.upper.double(), expected, rtol=1e-4, atol=1e-6)


def test_between_the_best_of_all_codes_and_rounding_to_nearest() -> None:
    """One row of four weights in 2 bits: all 256 sets of codes are tried."""
    grid, every = IntegerGrid(2, -1), torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
    sums = torch.zeros(3)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
        weight, moment = torch.randn(1, 4, generator=generator), x.t() @ x / len(x)
        order = Order.of(moment, 1e-6)
        assert order is not None
        stored = round_in_order(weight, order, grid)
        tried = grid.dequantize(every, stored.scale.expand(256, 1), stored.zero.expand(256, 1))  # type: ignore[union-attr]
        errors = ((tried - weight) @ moment * (tried - weight)).sum(1)
        mine = output_error(weight, stored.dequantize(), moment)
        # the last code is the best one there is for the others
        fixed = (tried == stored.dequantize())[:, order.columns[:3]].all(1)
        assert mine == pytest.approx(float(errors[fixed].min()), rel=1e-3, abs=1e-6)
        sums += torch.tensor([float(errors.min()), mine, output_error(weight, grid.fake(weight), moment)])
    assert sums[0] <= sums[1] < 0.75 * sums[2]


# -- in a model --------------------------------------------------------------------------------------------------------


def recorded_inputs(model: Any, path: str, batches: list[Any]) -> Tensor:
    """What enters a layer in plain passes, padding left out."""
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with evaluating(model):
        for batch in batches:
            forward(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)]).float()


@pytest.mark.parametrize("sequential", [True, False])
def test_each_layer_is_rounded_for_what_it_reads_by_then(sequential: bool) -> None:
    batches = tiny_batches("llama", lengths=LONG)
    model, by_hand = tiny_model("llama"), tiny_model("llama")
    settings: dict[str, Any] = {"bits": 3, "group_size": 8, "true_sequential": sequential}
    report = apply(model, Gptq(scale_dtype="float32", **settings), batches, progress=False).report
    for block in anatomy(tiny_model("llama")).blocks:
        names = [("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))]
        paths = [[f"{block.path}.{part}.{name}_proj" for name in stage] for part, stage in names]
        before = copy.deepcopy(by_hand)  # with the blocks in front rounded
        for stage in paths:
            x = recorded_inputs(by_hand if sequential else before, stage[0], batches)
            order = Order.of(x.t() @ x / len(x))
            assert order is not None
            for path in stage:
                linear = by_hand.get_submodule(path)
                stored = round_in_order(linear.weight.detach(), order, IntegerGrid(3, 8))
                by_hand.set_submodule(path, ActLinear.of(linear, weight=stored))
    equal(outputs(model, batches), outputs(by_hand, batches), "outputs")
    (found,) = [values for path, _, values in report.values if path == "model.layers.1"]
    assert len(found) == 7 and all(each["gptq"] < each["nearest"] for each in found.values())
    assert any("x that of rounding to nearest" in note for note in report.notes)


def test_it_loses_less_than_rounding_to_nearest() -> None:
    batches = tiny_batches("gpt2", lengths=LONG)
    reference, errors = outputs(tiny_model("gpt2"), batches), {}
    recipes = {"rtn": RoundToNearest(bits=3, group_size=8)} | {
        axis: Gptq(bits=3, group_size=8, group_axis=axis) for axis in ("input", "output")
    }
    for name, recipe in recipes.items():
        model = tiny_model("gpt2")
        apply(model, recipe, batches, progress=False)
        found = zip(outputs(model, batches), reference, strict=True)
        errors[name] = sum(float((a - b).square().sum()) for a, b in found)
    assert errors["input"] < 0.5 * errors["rtn"] and errors["output"] < 0.5 * errors["rtn"]


def test_a_dead_channel_is_rounded_to_nearest_and_moves_nothing() -> None:
    weight, moment = layer()
    moment[5], moment[:, 5] = 0, 0
    for axis in ("input", "output"):
        grid = IntegerGrid(4, 8, axis)  # type: ignore[arg-type]
        order = Order.of(moment)
        assert order is not None and order.columns[-1] == 5
        stored = round_in_order(weight, order, grid).dequantize()
        torch.testing.assert_close(stored[:, 5], grid.fake(weight)[:, 5])
        other = weight.clone()
        other[:, 5] = weight[:, 5] * 0.9  # in the same range, so that the others keep their scales
        if axis == "output":
            kept = [j for j in range(160) if j != 5]
            assert torch.equal(round_in_order(other, order, grid).dequantize()[:, kept], stored[:, kept])
    nothing = Order.of(torch.zeros(160, 160))
    assert nothing is not None
    assert torch.equal(round_in_order(weight, nothing, IntegerGrid(4, 8)).dequantize(), IntegerGrid(4, 8).fake(weight))


def test_a_moment_without_a_factor_is_damped_more_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = torch.eye(16)
    moment[0, 1] = moment[1, 0] = 1.05  # no moment of any inputs: an eigenvalue of -0.05
    order = Order.of(moment)
    assert order is not None and order.damp == pytest.approx(0.1)
    damped = moment.double() + 0.1 * torch.eye(16)
    inverse = torch.linalg.inv(damped[order.columns][:, order.columns])
    torch.testing.assert_close(order.upper.double().t() @ order.upper.double(), inverse, rtol=1e-4, atol=1e-6)
    moment[0, 1] = moment[1, 0] = 12
    assert Order.of(moment) is None
    monkeypatch.setattr(Order, "of", lambda *_: None)
    model, plain = tiny_model("llama"), tiny_model("llama")
    report = apply(model, Gptq(group_size=8), tiny_batches("llama"), progress=False).report
    apply(plain, RoundToNearest(group_size=8), progress=False)
    reason = "rounded to nearest: its second moment has no Cholesky factor"
    assert f"model.layers.0.self_attn.q_proj: {reason}" in report.notes and len(report.notes) == 14
    equal(outputs(model, tiny_batches("llama")), outputs(plain, tiny_batches("llama")), "outputs")


def test_experts_that_no_token_reached_are_rounded_to_nearest() -> None:
    model, plain = tiny_model("mixtral"), tiny_model("mixtral")
    batch = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    report = apply(model, Gptq(group_size=8), [batch], progress=False).report
    apply(plain, RoundToNearest(group_size=8), progress=False)
    unreached = [note.partition(":")[0] for note in report.notes if "no calibration token reached it" in note]
    assert len(unreached) == 2 * 2 * 3  # in each of two blocks, two of four experts, with three layers
    for path in unreached:
        assert torch.equal(model.get_submodule(path).dequantized(), plain.get_submodule(path).dequantized())


def test_what_is_observed_together() -> None:
    with_experts, dense = (anatomy(tiny_model(kind)).block(0) for kind in ("mixtral", "llama"))
    sites = [[str(inputs.site) for inputs in stage] for stage in Gptq().stages(dense)]
    assert sites == [[f"blocks.0.{name}"] for name in ("attention.input", "attention.mixed", "mlp.input", "mlp.hidden")]
    assert [len(stage) for stage in Gptq(true_sequential=False).stages(dense)] == [4]
    assert Gptq().memory(dense, 1) == 28 * 24**2
    assert Gptq(true_sequential=False).memory(dense, 1) == 4 * (3 * 16**2 + 24**2) + 24 * 24**2
    assert [len(stage) for stage in Gptq().stages(with_experts)] == [1, 1]  # its experts are closed


def test_values_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(1e25)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.mlp\.input: products of its values overflow"):
        apply(model, Gptq(group_size=8), tiny_batches("llama"), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


STACKS: dict[str, list[Any]] = {
    "gptq, wina": [Gptq(bits=4, group_size=8), Wina(sparsity=0.4)],
    "smooth, gptq": [Smooth(), Gptq(bits=4, group_size=8)],
    "awq's scales, gptq, round_inputs": [Awq(group_size=8, n_grid=4, round=False), Gptq(group_size=8), RoundInputs()],
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_saved_loaded_and_undone(name: str, tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LONG)
    before = outputs(model, batches)
    applied = apply(model, STACKS[name], batches, progress=False)
    after = outputs(model, batches)
    loaded = load(save(model, tmp_path / "stack"))
    equal(outputs(loaded, batches), after, "outputs")
    layers = [module for module in loaded.modules() if isinstance(module, ActLinear)]
    assert len(layers) == 14 and all(isinstance(layer.storage, IntegerWeight) for layer in layers)
    filled = {"gptq, wina": "select", "awq's scales, gptq, round_inputs": "inputs"}.get(name)
    assert all(set(layer.other_slots) == ({filled} if filled else set()) for layer in layers)
    applied.undo()
    equal(outputs(model, batches), before, "outputs after undo")


def test_settings_order_and_groups_are_checked() -> None:
    for settings, text in (({"bits": 9}, "bits"), ({"damp": 0}, "damp"), ({"group_size": 0}, "group_size: 0 was")):
        with pytest.raises(ValidationError, match=text):
            Gptq(**settings)
    batches = tiny_batches("llama")
    with pytest.raises(ValueError, match=r"q_proj: group_size: 7 does not divide the 16 inputs; choose a divisor"):
        apply(tiny_model("llama"), Gptq(group_size=7), batches, progress=False)
    with pytest.raises(RecipeError, match="weight slot"):
        apply(tiny_model("llama"), [RoundToNearest(group_size=8), Gptq(group_size=8)], batches, progress=False)
