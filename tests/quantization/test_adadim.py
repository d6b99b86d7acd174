"""AdaDim against its greedy search written out with whole passes, and the map of squared gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.quantization.adadim.adadim import AdaDim
from actkit.quantization.adadim.sensitivity import weight_sensitivity
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import equal, outputs
from actkit.zoo.outliers import outlier_twin

LONG = ((12, 9, 12), (10, 12))
PARTS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def part_output(model: nn.Module, path: str, batches: list[Any]) -> Tensor:
    """What a module gives in whole passes, padding left out."""
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *given: rows.append(first_tensor(given[-1])))
    with evaluating(model):
        for batch in batches:
            forward(model, batch)
    handle.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(rows, batches, strict=True)])


def rounded(model: nn.Module, path: str, grid: IntegerGrid) -> nn.Module:
    copied = copy.deepcopy(model)
    linear = copied.get_submodule(path)
    copied.set_submodule(path, ActLinear.of(linear, weight=IntegerWeight.quantize(linear.weight, grid)))
    return copied


def greedy(model: nn.Module, block: str, batches: list[Any], objective: str) -> dict[str, dict[str, float]]:
    """The losses of each layer of a block by axis; blocks in front are the original's."""
    found = {}
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    for layer in [*layers, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]:
        path, (part, _, name) = f"{block}.{layer}", layer.partition(".")
        inspected = f"{block}.{part}" if objective == "inspect" and name in PARTS[part] else path
        before = part_output(model, inspected, batches)
        tried = {
            axis: rounded(model, path, IntegerGrid(3, 8, axis, scale_dtype="float16")) for axis in ("input", "output")
        }  # type: ignore[arg-type]
        losses = {
            axis: float((part_output(other, inspected, batches) - before).square().mean())
            for axis, other in tried.items()
        }
        found[path] = losses
        model = tried[min(losses, key=losses.__getitem__)]
    return found


@pytest.mark.parametrize("objective", ["inspect", "layer"])
def test_axes_are_those_of_the_greedy_search(objective: str) -> None:
    model, batches = outlier_twin(tiny_model("llama"), channels=2, factor=10.0), tiny_batches("llama", lengths=LONG)
    expected = {
        path: losses
        for block in ("model.layers.0", "model.layers.1")
        for path, losses in greedy(copy.deepcopy(model), block, batches, objective).items()
    }
    report = apply(model, AdaDim(group_size=8, objective=objective), batches, progress=False).report
    found = {path: each for _, _, values in report.values for path, each in values.items()}
    assert found.keys() == expected.keys()
    for path, losses in expected.items():
        assert {axis: found[path][axis] for axis in losses} == pytest.approx(losses, rel=1e-4)
        assert found[path]["axis"] == min(losses, key=losses.__getitem__)
        assert model.get_submodule(path).storage.grid.group_axis == found[path]["axis"]
    assert {each["axis"] for each in found.values()} == {"input", "output"}
    said = next(note for note in report.notes if note.startswith("model.layers.0: groups along the output"))
    for path in (path for path in found if path.startswith("model.layers.0")):
        assert (path.removeprefix("model.layers.0.") in said) == (found[path]["axis"] == "output")


def test_groups_of_outputs_are_those_of_inputs_of_the_transposed_weight() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(IntegerGrid(3, 8, "output").fake(weight), IntegerGrid(3, 8).fake(weight.t()).t())


def test_groups_of_outputs_absorb_the_scale_of_an_input_channel() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    scale = 2.0 ** torch.arange(-20, 20)  # exact factors
    grid = IntegerGrid(3, 8, "output")
    assert torch.equal(grid.fake(weight * scale) / scale, grid.fake(weight))
    for earlier in (Smooth(), Awq(round=False), Awq()):
        assert AdaDim().conflicts(earlier) is not None
    assert AdaDim(axes=("input",)).conflicts(Smooth()) is None
    with pytest.raises(RecipeError, match="AdaDim cannot follow Smooth: groups of outputs lie within an input channel"):
        apply(tiny_model("llama"), [Smooth(), AdaDim(group_size=8)], tiny_batches("llama"), progress=False)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_one_axis_is_the_plain_quantizer(axis: Any) -> None:
    batches = tiny_batches("llama", lengths=LONG)
    settings: dict[str, Any] = {"bits": 3, "group_size": 8}
    for method, plain in (
        ("rtn", RoundToNearest(**settings, group_axis=axis)),
        ("gptq", Gptq(**settings, group_axis=axis)),
    ):
        one, other = tiny_model("llama"), tiny_model("llama")
        apply(one, AdaDim(**settings, method=method, axes=(axis,)), batches, progress=False)
        apply(other, plain, batches, progress=False)
        equal(outputs(one, batches), outputs(other, batches), method)


def test_gptq_rounds_with_the_axes_that_rounding_to_nearest_chose() -> None:
    batches = tiny_batches("llama", lengths=LONG)
    axes = []
    for method in ("rtn", "gptq"):
        model = outlier_twin(tiny_model("llama", num_hidden_layers=1), channels=2, factor=10.0)
        report = apply(model, AdaDim(group_size=8, method=method, objective="layer"), batches, progress=False).report
        axes.append({path: each["axis"] for _, _, values in report.values for path, each in values.items()})
        first = next(iter(axes[-1]))
        assert axes[0][first] == axes[-1][first]  # later ones see other layers before them
    assert set(axes[1].values()) == {"input", "output"}
    assert AdaDim(method="gptq").memory(anatomy(model).block(0), 1) == Gptq().memory(anatomy(model).block(0), 1) > 0
    assert AdaDim().memory(anatomy(model).block(0), 1) == 0


def test_an_axis_that_does_not_fit_is_left_out_or_refused() -> None:
    batches = tiny_batches("llama")
    model = tiny_model("llama", num_key_value_heads=1)  # of 4 outputs
    report = apply(model, AdaDim(group_size=8), batches, progress=False).report
    reason = "groups along the output were not tried: group_size: 8 does not divide the 4 outputs"
    assert sum(reason in note for note in report.notes) == 2 * 2
    assert model.model.layers[0].self_attn.k_proj.storage.grid.group_axis == "input"
    for axes, text in ((("output",), "does not divide the 4 outputs"), (("input",), "does not divide the 16 inputs")):
        with pytest.raises(ValueError, match=text):
            settings = {"group_size": 8 if axes == ("output",) else 7, "axes": axes}
            apply(tiny_model("llama", num_key_value_heads=1), AdaDim(**settings), batches, progress=False)


def test_experts_that_no_token_reached_keep_groups_of_inputs() -> None:
    batch = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    report = apply(tiny_model("mixtral"), AdaDim(group_size=8), [batch], progress=False).report
    found = {path: each for _, _, values in report.values for path, each in values.items()}
    unreached = [each for path, each in found.items() if "experts" in path and len(each) == 1]
    assert len(unreached) == 2 * 2 * 3 and all(each["axis"] == "input" for each in unreached)


def test_a_stack_with_wina_is_saved_loaded_and_undone(tmp_path: Path) -> None:
    model, batches = outlier_twin(tiny_model("llama"), channels=2, factor=10.0), tiny_batches("llama", lengths=LONG)
    before = outputs(model, batches)
    applied = apply(model, [AdaDim(bits=4, group_size=8), Wina(sparsity=0.4)], batches, progress=False)
    loaded = load(save(model, tmp_path / "stack"))
    equal(outputs(loaded, batches), outputs(model, batches), "outputs")
    layers = [module for module in loaded.modules() if isinstance(module, ActLinear)]
    assert {layer.storage.grid.group_axis for layer in layers} == {"input", "output"}
    assert all(layer.select is not None and layer.pack() for layer in layers)
    applied.undo()
    equal(outputs(model, batches), before, "outputs after undo")


def test_settings_are_checked() -> None:
    for settings, text in (({"axes": ()}, "axes"), ({"method": "awq"}, "method"), ({"group_size": 0}, "group_size: 0")):
        with pytest.raises(ValidationError, match=text):
            AdaDim(**settings)
    assert AdaDim(search_tokens=1000).passes(10_000, 40) == pytest.approx(0.6)
    assert AdaDim(method="gptq").passes(100, 1) == 10


# -- the map of squared gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_map_is_that_of_finite_differences(kind: str) -> None:
    model = tiny_model(kind).double()
    batches = tiny_batches(kind, lengths=((9,), (7,)))
    path = "model.layers.1.mlp.up_proj" if kind == "llama" else "transformer.h.0.mlp.c_fc"

    def loss(model: Any, batch: Any) -> Tensor:  # transformers' own is computed in float32
        return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    found = weight_sensitivity(model, batches, layers=f"*{path[-12:]}", loss=loss, progress=False)
    linear = next(x for block in anatomy(model).blocks for x in block.linears() if x.path == path)
    assert found.maps[path].shape == linear.weight.shape and found.batches == 2
    for row, column in ((0, 3), (5, 1)):
        squares = []
        for batch in batches:
            losses = []
            for step in (1e-3, -2e-3):
                with torch.no_grad():
                    linear.weight[row, column] += step
                    losses.append(float(loss(model, batch)))
            with torch.no_grad():
                linear.weight[row, column] += 1e-3
            squares.append(((losses[0] - losses[1]) / 2e-3) ** 2)
        assert float(found.maps[path][row, column]) == pytest.approx(
            sum(squares) / 2, rel=0.02
        )  # a norm computes in float32
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_large_input_channel_shows_as_a_sensitive_column() -> None:
    batches = tiny_batches("llama", lengths=LONG)
    found = weight_sensitivity(outlier_twin(tiny_model("llama"), channels=1, factor=100.0), batches, progress=False)
    (layer,) = [each for each in found.layers if each.path == "model.layers.1.mlp.up_proj"]
    assert layer.columns > 0.9 > layer.rows
    with pytest.raises(ValueError, match="layers: 'nothing' matches no linear layer with dense weights"):
        weight_sensitivity(tiny_model("llama"), batches, layers="nothing", progress=False)
    with pytest.raises(DataError, match="0 batches"):
        weight_sensitivity(tiny_model("llama"), [], progress=False)
