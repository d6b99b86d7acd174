"""VanillaNet: against the authors' code run on random weights, against float64, and folds against what they replace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from actkit.core.edit import changes
from actkit.core.ground.errors import EditError, RecipeError
from actkit.core.layers.activations import Activation
from actkit.core.layers.batch_norm import batch_norm_factors
from actkit.core.layers.linear import ActLinear
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.stage import Train
from actkit.core.store import checkpoint
from actkit.core.store.deltas import Delta
from actkit.core.train import staged_run
from actkit.core.train.training import train
from actkit.functions.swap import Swap
from actkit.functions.vanillanet.deepen import Collapse, Deepen, deepened
from actkit.functions.vanillanet.faded import FadeActivations, FadedActivation
from actkit.functions.vanillanet.folding import DeepPair
from actkit.functions.vanillanet.model import PRESETS, VanillaNet, renamed
from actkit.functions.vanillanet.series import SeriesActivation2d
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_rule, check_transform, tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN

REFERENCE = safetensors.torch.load_file(Path(__file__).parent / "fixtures" / "vanillanet.safetensors")
SMALL: dict[str, Any] = {"dims": (4, 6, 8), "strides": (2, 1), "in_channels": 2, "classes": 3, "order": 1}


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """With random weights and statistics, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("strength"):
                positive = name.endswith("running_var")
                values = torch.rand(tensor.shape, generator=generator) + 0.5
                tensor.copy_(values if positive else 0.4 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def fade(model: nn.Module, strength: float) -> None:
    for module in model.modules():
        if isinstance(module, FadedActivation):
            module.strength.fill_(strength)


# -- the net -----------------------------------------------------------------------------------------------------------


def test_it_computes_what_the_release_does():
    """In its trained form, half faded and faded, and folded: weights and outputs of the authors' code."""
    state = {name.removeprefix("state."): value for name, value in REFERENCE.items() if name.startswith("state.")}
    net = VanillaNet(**SMALL)
    net.load_state_dict(renamed(state, net))
    net.eval()
    torch.testing.assert_close(net(REFERENCE["input"]), REFERENCE["faded"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.to_deploy()(REFERENCE["input"]), REFERENCE["deployed"], rtol=1e-5, atol=1e-6)
    fade(net, 0.3)
    torch.testing.assert_close(net(REFERENCE["input"]), REFERENCE["at_0.3"], rtol=1e-5, atol=1e-6)


def test_released_checkpoints_are_read_by_name():
    state = {name.removeprefix("state."): value for name, value in REFERENCE.items() if name.startswith("state.")}
    net = VanillaNet.from_release(state, "tiny", **SMALL, stem=(4, 4, 0))
    torch.testing.assert_close(net(REFERENCE["input"]), REFERENCE["faded"], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="Missing key"):
        VanillaNet.from_release({}, "tiny")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("v5", 15.5), ("v6", 32.5), ("v7", 32.8), ("v8", 37.1), ("v9", 41.4), ("v10", 45.7), ("v11", 50.0), ("v13", 58.6)],
)
def test_deployed_presets_have_the_published_number_of_parameters(name: str, millions: float):
    with torch.device("meta"):
        net = VanillaNet.preset(name, fused=True)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("settings", [{}, {"deep": False}, {"order": None}, {"order": 2, "dropout": 0.3}])
def test_deploying_is_exact(settings: dict[str, Any]):
    net = drawn(VanillaNet.preset("digits", **settings))
    fade(net, 1.0)
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(net.to_deploy()(x), net(x), rtol=1e-4, atol=1e-5)
    wide = net.double()
    torch.testing.assert_close(wide.to_deploy()(x.double()), wide(x.double()), rtol=1e-10, atol=1e-10)
    if settings.get("deep", True):
        sizes = [sum(p.numel() for p in each.parameters()) for each in (net, net.to_deploy())]
        assert sizes[1] < 0.75 * sizes[0]


def test_deploying_too_early_is_refused():
    net = drawn(VanillaNet.preset("digits"))
    fade(net, 0.9999)
    with pytest.raises(ValueError, match=r"stem_conv: strength: the activation is at 0.9999, and two layers"):
        net.to_deploy()
    fade(net, 1.0)
    with pytest.raises(ValueError, match=r"stem_conv: norm: a batch norm in training mode"):
        net.train().to_deploy()


def test_the_last_pool_of_the_wide_preset_and_images_that_do_not_fit():
    net = drawn(VanillaNet((4, 4, 4), (2, 1), pools=(5, 0), stem=(4, 3, 1), classes=2))
    assert net(torch.randn(1, 3, 20, 20)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"images of 30 x 30 were given, .* give sides of 4 plus a multiple of 4"):
        VanillaNet(**SMALL)(torch.randn(1, 2, 30, 30))
    with pytest.raises(ValueError, match="dims, strides: 3 and 1 were given"):
        VanillaNet((4, 4, 4), (2,))
    with pytest.raises(ValueError, match="name: 'v4' was given, allowed are v5"):
        VanillaNet.preset("v4")
    assert set(PRESETS) >= {f"v{n}" for n in range(5, 14)}


def test_it_is_saved_and_loaded(tmp_path: Path):
    net = drawn(VanillaNet(**SMALL))
    fade(net, 0.4)
    checkpoint.save(net, tmp_path / "deep")
    loaded = checkpoint.load(tmp_path / "deep")
    x = torch.randn(2, 2, 16, 16)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)
    fade(net, 1.0)
    checkpoint.save(net.to_deploy(), tmp_path / "deployed")
    torch.testing.assert_close(checkpoint.load(tmp_path / "deployed")(x), net.to_deploy()(x), rtol=0, atol=0)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_the_series_is_the_sum_over_neighbours():
    series = drawn(SeriesActivation2d(3, order=1)).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    factor, shift = batch_norm_factors(series.norm)
    for h, w, c in ((0, 0, 0), (2, 3, 1), (4, 1, 2)):
        expected = 0.0
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if 0 <= h + i < 5 and 0 <= w + j < 4:
                    expected += float(series.weight[c, 0, i + 1, j + 1]) * max(float(x[1, c, h + i, w + j]), 0.0)
        assert float(series(x)[1, c, h, w].detach()) == pytest.approx(expected * float(factor[c]) + float(shift[c]))
    torch.testing.assert_close(series.fuse()(x), series(x), rtol=1e-12, atol=1e-12)
    again = series.fuse().fuse()
    torch.testing.assert_close(again(x), series(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_fading_goes_from_the_function_to_nothing(name: str):
    x = torch.randn(50)
    torch.testing.assert_close(FadedActivation(name, 0.0)(x), Activation(name)(x), rtol=0, atol=0)
    torch.testing.assert_close(FadedActivation(name, 1.0)(x), x, rtol=0, atol=0)
    torch.testing.assert_close(FadedActivation(name, 0.3)(x), 0.7 * Activation(name)(x) + 0.3 * x)
    leaky = nn.functional.leaky_relu(x, 0.3)
    torch.testing.assert_close(FadedActivation("relu", 0.3)(x), leaky)


def test_batch_norm_factors_are_the_batch_norm():
    norm = drawn(nn.BatchNorm2d(4, eps=1e-6))
    factor, shift = batch_norm_factors(norm)
    x = torch.randn(3, 4, 2, 2)
    expected = norm.double()(x.double())
    torch.testing.assert_close(x.double() * factor[:, None, None] + shift[:, None, None], expected)
    plain = nn.BatchNorm1d(3, affine=False).eval()
    assert batch_norm_factors(plain)[0].tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (nn.Linear(3, 4), nn.Conv2d(4, 2, 1), "Linear and Conv2d were given"),
        (nn.Linear(3, 4), nn.Linear(5, 2), "the first gives 4 channels, the second reads 5"),
        (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3), "a convolution of kernel 1, stride 1, no padding"),
        (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, stride=2), "a convolution of kernel 1, stride 1, no padding"),
        (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1), "of one group folds as the first one, not of 2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 2, 1), "not padding_mode='reflect'"),
    ],
)
def test_layers_that_are_not_foldable(first: Any, second: Any, text: str):
    with pytest.raises(ValueError, match=text):
        DeepPair(first, second)


@pytest.mark.parametrize(
    "first",
    [nn.Linear(5, 4), nn.Conv1d(5, 4, 3, padding=1), nn.Conv2d(5, 4, (3, 2), stride=2, padding=1, dilation=(1, 2))],
    ids=["linear", "signal", "image"],
)
@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)])
def test_pairs_are_merged_exactly(first: Any, biases: tuple[bool, bool]):
    first = copy.deepcopy(first)
    if not biases[0]:
        first.bias = None
    kind = type(first)
    second = kind(4, 6, bias=biases[1]) if kind is nn.Linear else kind(4, 6, 1, bias=biases[1])
    pair = drawn(DeepPair(first, second, norms=(biases[0], biases[1]))).double()
    fade(pair, 1.0)
    shape = {nn.Linear: (7, 5), nn.Conv1d: (2, 5, 9), nn.Conv2d: (2, 5, 9, 8)}[kind]
    x = torch.randn(shape, dtype=torch.float64)
    merged = pair.merged()
    assert type(merged) is kind and (merged.bias is None) == (not any(biases))
    torch.testing.assert_close(merged(x), pair(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FadedActivation("relu", 1.1), "strength: 1.1 was given"),
        (lambda: FadedActivation(nn.Softmax(-1)), "a Softmax mixes channels; it cannot fade"),
        (lambda: SeriesActivation2d(0), "channels, order: 0 and 3 were given"),
        (lambda: SeriesActivation2d(2, -1), "channels, order: 2 and -1 were given"),
        (lambda: Deepen(act="softmax"), "mixes channels"),
        (lambda: FadeActivations(share=0), "share"),
    ],
)
def test_errors(make: Any, text: str):
    with pytest.raises(ValueError, match=text):
        make()


# -- deepen, fade, collapse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["identity", "svd"])
@pytest.mark.parametrize("layer", [nn.Linear(5, 8), nn.Linear(8, 3, bias=False), nn.Conv2d(3, 4, 3, 2, 1)])
def test_a_deepened_layer_computes_what_it_did(split: Any, layer: Any):
    x = torch.randn(3, 5) if layer.weight.shape[1] == 5 else torch.randn(3, 8)
    x = torch.randn(2, 3, 7, 7) if layer.weight.dim() == 4 else x
    pair = deepened(layer, split=split)
    close = {"rtol": 0, "atol": 0} if split == "identity" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(pair(x), layer(x), **close)
    assert float(pair.act.strength) == 1


def images(seed: int, rows: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.rand(rows, 1, 8, 8, generator=generator), "labels": torch.arange(rows) % 10}


def test_deepen_train_collapse(tmp_path: Path):
    torch.manual_seed(0)
    model = DigitsCNN().eval()
    before = sum(p.numel() for p in model.parameters())
    x = images(1)["pixel_values"]
    expected = model(x)
    applied = apply(model, Deepen(where=("conv*", "fc1")), [images(0)], progress=False)
    assert len(applied.edits) == 3 and isinstance(model.conv2, DeepPair) and type(model.fc2) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    trained = train(
        model,
        [images(seed) for seed in range(6)],
        validation=[images(9)],
        steps=6,
        learning_rate=1e-3,
        rules=[FadeActivations(share=0.5)],
        evaluate_every=1,
        progress=False,
    )
    strengths = [next(iter(step.reports.values()))["strength"] for step in trained.history if step.reports]
    assert strengths == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0])
    deep = model.eval()(x)
    assert not torch.allclose(deep, expected, atol=1e-3)
    apply(model, Collapse(), progress=False)
    torch.testing.assert_close(model(x), deep, rtol=1e-4, atol=1e-5)
    assert type(model.conv2) is nn.Conv2d and type(model.fc1) is nn.Linear and recorded(model) == []
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == before
    apply(model, RoundToNearest(bits=8, group_size=16), [images(0)], progress=False)
    checkpoint.save(model, tmp_path / "folder")
    torch.testing.assert_close(checkpoint.load(tmp_path / "folder")(x), model(x), rtol=0, atol=0)


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    known = changes.of(model)
    return known.edits if known else []


def test_collapsed_the_model_is_a_plain_checkpoint(tmp_path: Path):
    """Of the base's class, read by transformers alone; the record keeps what was done, and what others put in."""
    model, (batch, *_) = tiny_model("llama"), tiny_batches("llama")
    shapes = {name: each.shape for name, each in model.state_dict().items()}
    first = apply(model, Deepen(where="*.up_proj"), progress=False)
    train(model, [batch], validation=[batch], steps=2, rules=[FadeActivations(share=0.5)], keep="last", progress=False)
    checkpoint.save(model, tmp_path / "deep")
    model = checkpoint.load(tmp_path / "deep").eval()
    deep, edits = model(**batch).logits, recorded(model)
    assert type(model) is not LlamaForCausalLM and len(edits) == 2
    second = apply(model, Collapse(), progress=False)
    assert type(model) is LlamaForCausalLM and recorded(model) == []
    assert [next(iter(entry)) for entry in changes.of(model).recipe] == ["deepen", "collapse"]
    checkpoint.save(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / checkpoint.MANIFEST).exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert {name: each.shape for name, each in again.state_dict().items()} == shapes
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    torch.testing.assert_close(again(**batch).logits, deep, rtol=1e-4, atol=1e-5)
    tuned = tiny_model("llama")
    Delta.between(again, tuned).add_to(tuned)
    torch.testing.assert_close(tuned.eval()(**batch).logits, again(**batch).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(EditError, match="undo: the model was changed again since"):
        copied = apply(first.model, Collapse(), progress=False)
        first.undo()
    copied.undo()
    second.undo()
    assert recorded(model) == edits and type(model) is not LlamaForCausalLM
    torch.testing.assert_close(model(**batch).logits, deep, rtol=0, atol=0)


def test_edits_of_others_stay_behind_a_collapse(tmp_path: Path):
    model, (batch, *_) = tiny_model("llama"), tiny_batches("llama")
    apply(model, [Swap(where="silu", new="gelu"), Deepen(where="*.up_proj"), Collapse()], progress=False)
    assert {entry.get("replace", "config") for entry in recorded(model)} <= {
        "config",
        "model.layers.0.mlp.act_fn",
        "model.layers.1.mlp.act_fn",
    }
    apply(model, RoundToNearest(bits=8, group_size=8), tiny_batches("llama"), progress=False)
    checkpoint.save(model, tmp_path / "folder")
    loaded = checkpoint.load(tmp_path / "folder")
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_a_pair_that_no_edit_put_in_is_kept_by_name(tmp_path: Path):
    model = DigitsCNN().eval()
    model.fc1 = deepened(model.fc1)
    apply(model, Collapse(), progress=False)
    assert isinstance(model.fc1, ActLinear) and len(recorded(model)) == 1
    checkpoint.save(model, tmp_path / "folder")
    x = images(1)["pixel_values"]
    torch.testing.assert_close(checkpoint.load(tmp_path / "folder")(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("deep", [False, True])
def test_a_recipe_goes_on_behind_a_collapse(deep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped in the stage after it: the folder is a plain one, also if the run began with a deepened model."""
    rows, deepen = tiny_batches("llama"), Deepen(where="*.up_proj")
    fading = Train(rules=(FadeActivations(share=0.5),), steps=2, learning_rate=1e-3)
    recipe = Recipe([*([] if deep else [deepen]), fading, Collapse(), Train(steps=1)])

    def begun() -> nn.Module:
        model = tiny_model("llama")
        return apply(model, deepen, progress=False).model if deep else model

    def run(name: str, **options: Any) -> Any:
        given = [(rows, rows[:1]) if isinstance(each, Train) else None for each in recipe.stages]
        return staged_run.run(begun(), recipe, given, out=tmp_path / name, progress=False, **options)

    whole, real = run("whole"), staged_run.train

    def failing(*args: Any, **options: Any) -> Any:
        return 1 / 0 if options["steps"] == 1 else real(*args, **options)

    monkeypatch.setattr(staged_run, "train", failing)
    with pytest.raises(ZeroDivisionError):
        run("out")
    monkeypatch.setattr(staged_run, "train", real)
    done = run("out", resume=True)
    assert type(done.model) is LlamaForCausalLM
    assert changes.of(done.model).recipe == changes.of(whole.model).recipe
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(done.model.state_dict()[name], tensor)
    assert done.edits == whole.edits == []
    assert recorded(done.undo()) == recorded(begun())


def test_collapse_refuses_what_is_not_ready():
    model = DigitsCNN().eval()
    with pytest.raises(EditError, match="has no deepened layer"):
        apply(model, Collapse(), [images(0)], progress=False)
    apply(model, Deepen(), [images(0)], progress=False)
    fade(model, 0.5)
    with pytest.raises(EditError, match=r"collapse: conv1: strength: the activation is at 0.5"):
        apply(model, Collapse(), progress=False)
    with pytest.raises(RecipeError, match="Deepen was applied already"):
        apply(model, Deepen(), [images(0)], progress=False)


def test_collapse_in_training_mode_is_refused():
    net, x = drawn(VanillaNet(**SMALL)), torch.randn(2, 2, 16, 16)
    fade(net, 1.0)
    with pytest.raises(EditError, match=r"Collapse: the model is in training mode.*call model\.eval\(\) first"):
        apply(net.train(), Collapse(), [x], progress=False)


def test_a_net_collapses_by_the_transform_too():
    net = drawn(VanillaNet(**SMALL))
    fade(net, 1.0)
    x = torch.randn(2, 2, 16, 16)
    expected, deployed = net(x), net.to_deploy()(x)
    applied = apply(net, Collapse(), [x], progress=False)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x), deployed, rtol=1e-4, atol=1e-5)
    applied.undo()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_what_cannot_be_deepened_is_said():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 4, 5, 5)
    applied = apply(model, Deepen(), [x], progress=False)
    assert [path for path, _, _ in applied.report.skipped if path == "0"] and isinstance(model[2], DeepPair)
    with pytest.raises(EditError, match="where: nothing matches no linear layer or convolution"):
        apply(nn.Sequential(nn.Linear(2, 2)), Deepen(where="nothing"), [torch.randn(1, 2)], progress=False)


@pytest.mark.parametrize("kind", ["llama", "mlp"])
def test_deepen_passes(kind: str):
    where = "*.up_proj" if kind == "llama" else "*"
    checks = check_transform(
        Deepen(where=where), tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(bits=4, group_size=8)]
    )
    held = {check.name for check in checks if check.outcome == "holds"}
    assert {"the same result twice", "exact means exact", "save and load", "undo is exact"} <= held


def test_collapse_passes():
    model = tiny_model("llama")
    apply(model, Deepen(where="*.up_proj"), progress=False)
    checks = check_transform(Collapse(), model, tiny_batches("llama"))
    held = {check.name for check in checks if check.outcome == "holds"}
    assert {"the same result twice", "exact means exact", "undo is exact"} <= held


@pytest.mark.parametrize("mode", ["linear", "cosine"])
def test_fading_passes(mode: Any):
    model = tiny_model("llama")
    apply(model, Swap(where="silu", new={"module": "faded_activation", "spec": {}}), progress=False)
    check_rule(FadeActivations(mode=mode), model, tiny_batches("llama"))


def test_the_course_of_fading():
    linear, cosine = FadeActivations(share=0.5), FadeActivations(share=0.5, mode="cosine")
    assert [linear.strength(p) for p in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1]
    assert cosine.strength(0.125) == pytest.approx(0.1464466) and cosine.strength(0.5) == 1
    with pytest.raises(EditError, match="matches no faded activation"):
        FadeActivations().attach(DigitsCNN())
    with pytest.raises(EditError, match="matches no faded activation"):
        FadeActivations(where="x*").attach(VanillaNet(**SMALL))
