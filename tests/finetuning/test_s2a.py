"""S2A: what trains, gradients beside exact ones, the plain model afterwards, side paths and prompts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.forward.batch import first_tensor
from actkit.core.ground.errors import EditError, UnsupportedModelError
from actkit.core.measure.saved_tensors import saved_tensors
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.train.choice import trained_parameters
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.finetuning.adapters import AdaptedLayer
from actkit.finetuning.low_rank_training import train_adapter
from actkit.finetuning.s2a.prompts import AddPrompts, PromptedBlock
from actkit.finetuning.s2a.s2a import S2A, head_of
from actkit.finetuning.s2a.side_path import AddSidePath, SidePath
from actkit.testing import check_rule, check_transform, tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN

PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labelled(kind: str) -> list[Any]:
    return [{**batch, "labels": torch.arange(len(next(iter(batch.values())))) % 2} for batch in tiny_batches(kind)]


def gradient(model: nn.Module, rule: S2A, batch: Any) -> tuple[Tensor, Tensor, int]:
    """Outputs, the gradient of what trains, and kept bytes."""
    model.zero_grad()
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    with trained_parameters(model, [rule]), attached([rule], model):
        with saved_tensors(model) as saved:
            y = first_tensor(model(**inputs))
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return y.detach(), torch.cat(found), saved.bytes


def moved(model: nn.Module) -> nn.Module:
    """As if side paths had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SidePath):
                module.up.weight.copy_(0.3 * torch.randn(module.up.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "gpt2"])
def test_outputs_are_the_same_bits_and_gradients_near(kind: str) -> None:
    model = apply(tiny_model(kind), AddSidePath(reduction=4), progress=False).model
    batch = tiny_batches(kind)[0]
    expected, exact, plain = gradient(moved(model), S2A(coded=()), batch)
    for bits, alike in ((8, 0.9999), (4, 0.97)):
        found, near, kept = gradient(model, S2A(bits=bits), batch)
        assert torch.equal(found, expected)
        assert float(torch.cosine_similarity(near, exact, 0)) > alike
        assert bits == 4 or float((near - exact).norm() / exact.norm()) < 1e-2
        assert kept < (0.6 if kind in ("llama", "vit") else 0.4) * plain


def test_what_trains() -> None:
    model = tiny_model("bert")
    names = set(S2A().trainable(model) or ())
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert names == biases | {"classifier.weight", "classifier.bias"} and set(head_of(model)) < names
    assert set(S2A(bias=False).trainable(model) or ()) == {"classifier.weight", "classifier.bias"}
    assert S2A(bias=False, head=("*pooler*",)).trainable(model) == ["*pooler*"]
    assert S2A(bias=False, head=False).trainable(model) is None
    apply(model, AddSidePath(reduction=4), progress=False)
    side = {name for name, _ in model.named_parameters() if ".down." in name or ".up." in name}
    assert side and set(S2A(bias=False).trainable(model) or ()) == side | {"classifier.weight", "classifier.bias"}
    assert head_of(DigitsCNN()) == ["fc2.weight", "fc2.bias"] and not head_of(model.bert)


def test_batch_norms_keep_their_statistics_while_their_shift_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3))
    with torch.no_grad():
        model.train()(torch.rand(16, 1, 8, 8))
    mean, shift = model[1].running_mean.clone(), model[1].bias.detach().clone()
    data = [({"input": torch.rand(8, 1, 8, 8), "labels": torch.arange(8) % 3}) for _ in range(3)]
    trained = train(model, data, validation=data[:1], steps=3, learning_rate=1e-2, rules=["s2a"], progress=False)
    assert torch.equal(model[1].running_mean, mean) and not torch.equal(model[1].bias, shift)
    reports = trained.history[-1].reports
    assert reports is not None and reports["0.S2A"]["coded"] == {"norm": 1, "activation": 1}
    assert type(model[1]) is nn.BatchNorm2d and type(model[2]) is nn.ReLU


def test_what_is_not_coded_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.drop = nn.Linear(4, 8), nn.RReLU(), nn.Dropout(0.5)
            self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(self.norm(self.act(self.first(x))).softmax(-1)))  # type: ignore[no-any-return]

    rule = S2A().attach(Odd())
    report = rule.report()
    rule.detach()
    assert report["coded"] == {"dropout": 1}
    assert report["left"] == ["activation: RReLU", "attention: Odd calls no attention function of transformers"]
    with pytest.raises(UnsupportedModelError, match="has no module that would keep codes"):
        S2A().attach(nn.Sequential(nn.Linear(2, 2)))
    S2A(coded=()).attach(nn.Sequential(nn.Linear(2, 2))).detach()


def test_what_cannot_be_trained_or_coded_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no bias, no head that is not tied .* side_path"):
        S2A().trainable(tiny_model("llama"))
    model = tiny_model("bert")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match=r"'eager' is computed by the model's own code"):
        S2A().attach(model)
    assert type(model.bert.encoder.layer[0].output.LayerNorm) is nn.LayerNorm  # nothing is left behind
    S2A(coded=("activation", "norm")).attach(model).detach()
    with pytest.raises(ValueError, match="less than or equal to 8"):
        S2A(bits=9)


@pytest.mark.parametrize("settings", [{}, {"coded": ("activation", "norm"), "bits": 3}])
def test_the_rule_passes(settings: dict[str, Any]) -> None:
    model = tiny_model("vit")  # the Trainer does not divide the loss of a BERT by accumulated batches
    model.config.problem_type = "single_label_classification"
    check_rule(S2A(**settings), apply(model, AddSidePath(reduction=4), progress=False).model, labelled("vit"))


def test_codes_under_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, data = tiny_model("llama"), tiny_batches("llama")
    layers = {linear.path: AdaptedLayer(2, 4.0) for block in anatomy(model).blocks for linear in block.linears()}
    found = {}
    for name, rules in (("plain", []), ("coded", ["s2a:bias=false,head=false"])):
        tuned = copy.deepcopy(model)
        train_adapter(
            tuned, data, validation=data[:1], layers=layers, steps=6, learning_rate=1e-2, rules=rules, progress=False
        )
        found[name] = torch.cat([each.detach().flatten() for each in tuned.parameters()])
    start = torch.cat([each.detach().flatten() for each in model.parameters()])
    change, coded = found["plain"] - start, found["coded"] - start
    assert float(torch.cosine_similarity(change, coded, 0)) > 0.9 and not torch.equal(change, coded)
    with pytest.raises(ValueError, match=r"rules: S2A trains parameters .* beside the adapter"):
        train_adapter(
            tiny_model("bert"), labelled("bert"), validation=labelled("bert")[:1], merge=False, steps=1,
            layers={"bert.encoder.layer.0.output.dense": AdaptedLayer(2, 4.0)}, rules=["s2a"], out=tmp_path / "adapter",
        )  # fmt: skip


# -- side paths and prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_side_path_passes(kind: str) -> None:
    checks = check_transform(AddSidePath(reduction=4), tiny_model(kind), tiny_batches(kind))
    held = {check.name for check in checks if check.outcome == "holds"}
    assert {"the same result twice", "exact means exact", "save and load", "undo is exact"} <= held


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_prompts_pass(kind: str) -> None:
    checks = check_transform(AddPrompts(tokens=3, rank=2), tiny_model(kind), tiny_batches(kind))
    held = {check.name for check in checks if check.outcome == "holds"}
    assert {"the same result twice", "save and load", "undo is exact"} <= held


def test_prompts_are_keys_and_values_that_every_token_reads() -> None:
    model = tiny_model("bert", **PLAIN)
    layer = copy.deepcopy(model.bert.encoder.layer[0])
    prompted = PromptedBlock(layer, 16, 3)
    width = layer.attention.self.query.in_features
    prompted = PromptedBlock(layer, width, 3)
    x = torch.randn(2, 5, width)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    found = prompted(x, attention_mask=mask)
    for row, real in ((0, 5), (1, 3)):
        longer = torch.cat([prompted.prompts(), x[row, :real]])[None]
        torch.testing.assert_close(found[row, :real], layer(longer)[0, 3:], rtol=1e-5, atol=1e-5)


def test_prompts_and_side_paths_train_and_come_back(tmp_path: Path) -> None:
    model = tiny_model("vit", **PLAIN)
    apply(model, [AddPrompts(tokens=2), AddSidePath(reduction=4)], progress=False)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    data = labelled("vit")
    train(
        model,
        data,
        validation=data[:1],
        steps=4,
        learning_rate=1e-2,
        rules=["s2a"],
        out=tmp_path / "run",
        progress=False,
    )
    now = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(now[name], value)}
    assert all(
        name.endswith("bias") or any(part in name for part in ("classifier", "prompt", ".up.", ".down."))
        for name in changed
    )
    assert any("prompt" in name for name in changed) and any(".up." in name for name in changed)
    loaded = checkpoint.load(tmp_path / "run")
    inputs = {"pixel_values": data[0]["pixel_values"]}
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert isinstance(get_module(loaded, anatomy(loaded).blocks[0].path), SidePath)


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(EditError, match=r"prompts: this .* writes token by token"):
        apply(tiny_model("llama"), AddPrompts(), progress=False)
    with pytest.raises(EditError, match=r"reduction: 1000 was given, and the hidden states have"):
        apply(tiny_model("bert"), AddSidePath(reduction=1000), progress=False)


def test_a_network_without_attention_keeps_codes_of_the_rest() -> None:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=2, classifier_dropout_prob=0.0)
    model = MobileNetV2ForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(pixel_values=pixels).logits
    with trained_parameters(model, [S2A()]), attached([S2A()], model) as running:
        assert torch.equal(model(pixel_values=pixels).logits, before)
        report = running.report()["0.S2A"]
    assert any("attention" in each for each in report["left"]) and torch.equal(
        model(pixel_values=pixels).logits, before
    )
