"""Fake quantization from settings to frozen integers: what is put in, trained, stored and exported."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import ExportError, RecipeError
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.layers.learned_inputs import LearnedInputs
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import HalfIntegerWeight, IntegerWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.stage import Train
from actkit.core.store.checkpoint import load, save
from actkit.core.train.staged_run import run
from actkit.core.train.training import train
from actkit.formats.export import export
from actkit.quantization.fake_quantize import FakeQuantize, TrainedInputs, TrainedWeights
from actkit.quantization.freeze import Freeze
from actkit.quantization.gptq import Gptq
from actkit.quantization.noisyquant import NoisyQuant
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rotate import Rotate
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model

LSQ = TrainedInputs(by="lsq", bits=4, unsigned=("down",))
STATSQ = FakeQuantize(weights=TrainedWeights(by="statsq", bits=2), inputs=LSQ)
TOKENS = FakeQuantize(weights=TrainedWeights(bits=4, clip=0.95), inputs=TrainedInputs(bits=4, clip=0.95))
SETTINGS = {
    "weights": FakeQuantize(),
    "tokens": TOKENS,
    "statsq, lsq": STATSQ,
    "lsq": FakeQuantize(weights=TrainedWeights(by="lsq", bits=3), inputs=TrainedInputs(by="lsq", per="channel")),
    "inputs alone": FakeQuantize(weights=None, inputs=TrainedInputs(by="lsq", biases=False)),
    "some roles": FakeQuantize(weights=TrainedWeights(bits=2, symmetric=True, group_size=8), skip=("down", "output")),
}


def layers(model: nn.Module) -> list[ActLinear]:
    return [module for module in model.modules() if isinstance(module, ActLinear)]


def fine_tuned(model: nn.Module, batches: list[Any], **settings: Any) -> nn.Module:
    given = {"steps": 4, "learning_rate": 1e-3, "weight_decay": 0.0, "progress": False, **settings}
    return train(model, batches[:1], validation=batches[1:2], **given).model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bert", "vit", "mixtral", "mlp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_family_is_frozen_to_the_same_function(kind: str, name: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    targets = [linear.path for block in anatomy(model, batches[0]).blocks for linear in SETTINGS[name].targets(block)]
    report = apply(model, SETTINGS[name], batches, undo="off", progress=False).report
    missing = {path for path, _, _ in report.skipped}
    trained = [model.get_submodule(path) for path in targets if path not in missing]
    assert trained and all(isinstance(module, ActLinear) and module.in_training for module in trained)
    model.eval()
    with torch.no_grad():
        expected = _outputs(model, batches[0])
        apply(model, Freeze(), batches, undo="off", progress=False)
        torch.testing.assert_close(_outputs(model, batches[0]), expected, rtol=1e-4, atol=1e-5)
    assert not any(module.in_training for module in layers(model))


def _outputs(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch)[0] if isinstance(batch, dict) else model(batch)


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "weights"), ("llama", "statsq, lsq"), ("vit", "lsq"), ("vit", "tokens")]
)
def test_fake_quantize_keeps_what_transforms_promise(kind: str, name: str) -> None:
    conflicting = [RoundToNearest(bits=4, group_size=-1)] + ([RoundInputs()] if name != "weights" else [])
    check_transform(SETTINGS[name], tiny_model(kind), tiny_batches(kind), conflicting=conflicting)


@pytest.mark.slow(reason="the compiler and the exporter of torch run")
def test_what_is_in_training_compiles_and_is_exported_by_torch() -> None:
    model, batches = tiny_model("llama", num_hidden_layers=1), tiny_batches("llama", lengths=((9, 4),))
    check_transform(STATSQ, model, batches, compile_backend="aot_eager", export=True)


@pytest.mark.parametrize("name", ["statsq, lsq", "tokens"])
def test_freeze_keeps_what_transforms_promise(name: str) -> None:
    batches = tiny_batches("llama")
    model = apply(tiny_model("llama"), SETTINGS[name], batches, undo="off", progress=False).model
    check_transform(Freeze(), model, batches)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_trained(name: str) -> None:
    """Latent weights, steps and vectors move, and the loss falls; the model that was given can still be had by undo."""
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=((9, 9),) * 2)
    original = copy.deepcopy(model.state_dict())
    applied = apply(model, SETTINGS[name], batches, undo="memory", progress=False)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    fine_tuned(model, batches)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    inside = {key for key in before if key.rpartition(".")[2] in ("tensor", "step", "before", "after")}
    assert inside and inside <= moved
    applied.undo()
    restored = model.state_dict()
    for layer in SETTINGS[name].targets(anatomy(model).block(0)) if name != "inputs alone" else ():
        assert torch.equal(restored[f"{layer.path}.weight"], original[f"{layer.path}.weight"])


def test_fake_quantize_train_freeze_in_one_recipe(tmp_path: Any) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=((9, 9),) * 3)
    recipe = Recipe([STATSQ, Train(steps=3, learning_rate=1e-3), Freeze()])
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")).dump() == recipe.dump()
    data = [batches, (batches[:2], batches[2:]), None]
    applied = run(model, recipe, data, undo="memory", progress=False)
    names = [next(iter(entry)) for entry in json.loads(json.dumps(applied.report.recipe))["stages"]]
    assert names == ["apply", "train", "apply"]
    kinds = {type(layer.storage) for layer in layers(model)}
    assert kinds == {HalfIntegerWeight}
    save(model, tmp_path / "frozen")
    again = load(tmp_path / "frozen")
    with torch.no_grad():
        assert torch.equal(again(**batches[0])[0], model.eval()(**batches[0])[0])
    assert sum(m.storage.nbytes for m in layers(again)) < sum(m.storage.tensor.nbytes for m in latent(batches)) / 5


def latent(batches: list[Any]) -> list[ActLinear]:
    return layers(apply(tiny_model("llama"), STATSQ, batches, undo="off", progress=False).model)


def test_a_model_in_training_is_saved_whole_and_goes_on(tmp_path: Any) -> None:
    model, batches = tiny_model("vit"), tiny_batches("vit")
    apply(model, SETTINGS["lsq"], batches, undo="off", progress=False)
    save(model, tmp_path / "latent")
    again = load(tmp_path / "latent")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    assert all(
        isinstance(layer.storage, LatentWeight) and isinstance(layer.inputs, LearnedInputs) for layer in layers(again)
    )


def test_the_means_come_from_calibration() -> None:
    """The step of inputs: 2 mean |x| / sqrt(largest code), what the norm gives in the untouched block."""
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=((9, 9),))
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batches[0])
    handle.remove()
    apply(model, SETTINGS["statsq, lsq"], batches, undo="off", progress=False)
    up, down = (model.get_submodule(f"model.layers.0.mlp.{name}_proj").inputs for name in ("up", "down"))
    assert up.step.item() == pytest.approx(2 * float(seen[0].abs().mean()) / 7**0.5, rel=1e-5)
    assert up.zero is None and int(down.zero) == 0
    model, per = tiny_model("llama"), {"by": "lsq", "per": "channel"}
    apply(model, FakeQuantize(inputs=TrainedInputs(**per)), batches, undo="off", progress=False)
    found = model.get_submodule("model.layers.0.mlp.up_proj").inputs.step
    torch.testing.assert_close(found.detach(), 2 * seen[0].abs().flatten(0, 1).mean(0) / 127**0.5)


def test_a_step_for_each_position() -> None:
    batches = tiny_batches("vit")
    settings = FakeQuantize(inputs=TrainedInputs(by="lsq", bits=4, per="position"))
    model = apply(tiny_model("vit"), settings, batches, undo="off", progress=False).model
    inputs = layers(model)[0].inputs
    assert inputs.step.dim() == 1 and inputs.scale.shape == (len(inputs.step), 1) and len(inputs.step) > 1
    expected = model(**batches[0]).logits
    frozen = apply(model, Freeze(), undo="off", progress=False).model
    torch.testing.assert_close(frozen(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sequences of one length"):
        apply(tiny_model("llama"), settings, tiny_batches("llama", lengths=((9, 9), (5, 5))), progress=False)


def test_what_stacks_and_what_is_refused() -> None:
    batches = tiny_batches("llama")
    for stack in (
        [FakeQuantize(), QuantizeCache(bits=4)],
        [FakeQuantize(), Wina(sparsity=0.5)],
        [Wina(), FakeQuantize()],
    ):
        model = apply(tiny_model("llama"), stack, batches, undo="off", progress=False).model
        assert layers(model)[0].in_training
    for stack, text in (
        ([FakeQuantize(), Gptq(bits=4, group_size=-1)], "both fill the weight slot"),
        ([RoundInputs(), TOKENS], "both fill the inputs slot"),
        ([Wina(), STATSQ], "shifts inputs by what it learns"),
        ([FakeQuantize(), FakeQuantize()], "applied already"),
        ([FakeQuantize(), Freeze(), RoundToNearest()], "both fill the weight slot"),
    ):
        with pytest.raises(RecipeError, match=text):
            Recipe(stack).check()
    with pytest.raises(RecipeError, match="no weights or inputs in training"):
        apply(tiny_model("llama"), Freeze(), progress=False)
    with pytest.raises(ValueError, match="they are shifted, and some are selected"):
        apply(tiny_model("llama"), [STATSQ, Wina(sparsity=0.5)], batches, progress=False)


@pytest.mark.parametrize("name", ["tokens", "statsq, lsq"])
def test_rotated_layers_are_trained_behind_their_rotation(name: str) -> None:
    batches = tiny_batches("llama", lengths=((9, 9),) * 2)
    model = apply(tiny_model("llama"), [Rotate(), SETTINGS[name]], batches, undo="off", progress=False).model
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    assert down.inputs.rotation is not None and down.inputs.grid.bits == 4
    if name == "statsq, lsq":
        seen: list[torch.Tensor] = []
        before = apply(tiny_model("llama"), Rotate(), batches, undo="off", progress=False).model
        before.get_submodule("model.layers.0.mlp.down_proj").inputs.register_forward_hook(
            lambda module, args, output: seen.append(output.detach())
        )
        for batch in batches:
            before(**batch)
        expected = 4 * float(torch.cat(seen).abs().mean()) / 15**0.5
        assert down.inputs.step.item() == pytest.approx(expected, rel=0.2)
    fine_tuned(model, batches)
    model.eval()
    with torch.no_grad():
        expected = model(**batches[0]).logits
        apply(model, Freeze(), batches, undo="off", progress=False)
        torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.get_submodule("model.layers.0.mlp.down_proj").inputs.rotation is not None


def test_noise_is_not_searched_for_learned_inputs() -> None:
    batches = tiny_batches("vit")
    with pytest.raises(RecipeError, match="inputs"):
        apply(tiny_model("vit"), [TOKENS, NoisyQuant()], batches, progress=False)
    report = apply(tiny_model("vit"), [STATSQ, NoisyQuant(clip_grid=2, n_grid=2)], batches, progress=False).report
    assert {reason for _, name, reason in report.skipped if name == "NoisyQuant"} == {
        "its inputs are in training, or have several scales"
    }


def test_training_integers_is_refused() -> None:
    batches = tiny_batches("llama", lengths=((9, 9),) * 2)
    model = apply(tiny_model("llama"), [FakeQuantize(), Freeze()], batches, undo="off", progress=False).model
    with pytest.raises(ValueError, match=r"cannot be trained; train before they are made .*freeze"):
        fine_tuned(model, batches)
    fine_tuned(model, batches, trainable="*norm*")


def test_a_model_in_training_is_not_exported(tmp_path: Any) -> None:
    model = apply(tiny_model("llama"), FakeQuantize(), undo="off", progress=False).model
    with pytest.raises(ExportError, match=r"in training .*Apply freeze, then export"):
        export(model, tmp_path / "out", format="compressed-tensors", proof=False)


@pytest.mark.parametrize("bits", [2, 4])
def test_half_integers_are_exported_as_odd_integers(bits: int, tmp_path: Any) -> None:
    pytest.importorskip("compressed_tensors")
    weights = FakeQuantize(weights=TrainedWeights(by="statsq", bits=bits))
    model = apply(tiny_model("llama"), [weights, Freeze()], undo="off", progress=False).model.eval()
    written = export(model, tmp_path / "out", format="compressed-tensors")
    container = 4 if bits == 2 else 8
    assert all(f"{container} bits" in text for text in written.quantized.values())
    assert any("odd integers of half the step" in note for note in written.notes)
    assert isinstance(layers(model)[0].storage, HalfIntegerWeight)  # the model in memory keeps its bits


def test_rows_of_integers_are_exported_like_those_of_rtn(tmp_path: Any) -> None:
    pytest.importorskip("compressed_tensors")
    weights = FakeQuantize(weights=TrainedWeights(by="lsq", bits=4))
    model = apply(tiny_model("llama"), [weights, Freeze()], undo="off", progress=False).model.eval()
    assert isinstance(layers(model)[0].storage, IntegerWeight)
    written = export(model, tmp_path / "out", format="compressed-tensors")
    assert all(text == "4 bits, one scale per row, symmetric" for text in written.quantized.values())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"weights": None}, "both are null"),
        ({"weights": {"by": "statsq", "bits": 8}}, "allowed are 1 to 7"),
        ({"weights": {"bits": 1}}, "allowed are 2 to 8"),
        ({"weights": {"by": "lsq", "clip": 0.9}}, "they say how a range is taken"),
        ({"inputs": {"by": "token", "per": "channel"}}, "no meaning for inputs by 'token'"),
        ({"inputs": {"by": "lsq", "clip": 0.9}}, "no meaning for inputs by 'lsq'"),
        ({"weights": {"group_size": 0}}, "group_size"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        FakeQuantize(**given)


def test_rounded_inputs_alone_may_be_clipped() -> None:
    with pytest.raises(ValueError, match=r"clip: 0\.5 was given beside a scale"):
        RoundedInputs(IntegerGrid(8, scope="tensor"), torch.ones(1), clip=0.5)
