"""MobileTL: blocks of several libraries' shapes, gradients beside autograd's, and MobileNetV2 as it was afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.mobiletl import DigitsMobileNet
from actkit.core.forward.batch import first_tensor
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.coded import CodedActivation, FrozenNorm
from actkit.core.train.choice import trained_parameters
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.finetuning.mobiletl import MobileTL, find_inverted_residuals
from actkit.testing import check_rule


def mobilenet() -> Any:
    """MobileNetV2 with random weights, small."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=2, classifier_dropout_prob=0.0)
    config.problem_type = "single_label_classification"
    model = MobileNetV2ForImageClassification(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_blocks_are_found() -> None:
    found = find_inverted_residuals(mobilenet())
    assert [block.path for block in found] == [f"mobilenet_v2.layer.{index}" for index in range(16)]
    assert all(len(block.convolutions) == 3 and len(block.activations) == 2 and not block.excitation for block in found)
    ours = find_inverted_residuals(DigitsMobileNet())
    assert len(ours) == 5 and all(len(block.excitation) == 2 and len(block.activations) == 4 for block in ours)
    assert not find_inverted_residuals(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


def test_a_block_that_does_not_expand_and_one_of_torchvision_s_shape() -> None:
    class Residual(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.conv = nn.Sequential(*layers)

    def part(into: int, out: int, size: int, groups: int = 1) -> nn.Module:
        convolution = nn.Conv2d(into, out, size, padding=size // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))

    narrow = Residual(part(4, 4, 3, 4), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
    wide = Residual(part(6, 36, 1), part(36, 36, 3, 36), nn.Conv2d(36, 6, 1, bias=False), nn.BatchNorm2d(6))
    found = find_inverted_residuals(nn.Sequential(part(3, 4, 3), narrow, wide))
    assert [block.path for block in found] == ["1", "2"]
    assert found[0].convolutions == ("1.conv.0.0", "1.conv.1") and found[1].norms[-1] == "2.conv.3"


def test_what_trains() -> None:
    model = mobilenet()
    names = set(MobileTL(blocks=1).trainable(model))
    block = "mobilenet_v2.layer.15"
    parts = ("expand_1x1", "conv_3x3", "reduce_1x1")
    expected = {f"{block}.{part}.convolution.weight" for part in parts}
    expected |= {f"{block}.{part}.normalization.bias" for part in parts}
    expected |= {f"{block}.reduce_1x1.normalization.weight", "classifier.weight", "classifier.bias"}
    assert names == expected
    rule = MobileTL(blocks=1, norm_internal="frozen", norm_last="shift", head=False)
    fewer = {f"{block}.{part}.convolution.weight" for part in parts} | {f"{block}.reduce_1x1.normalization.bias"}
    assert set(rule.trainable(model)) == fewer


@pytest.mark.parametrize("backward", ["exact", "codes", "sign"])
def test_gradients_are_those_of_frozen_norms(backward: Any) -> None:
    """Beside autograd on a model in evaluation mode, whose last norms see the same batch in training mode."""
    model, x = mobilenet(), images()
    rule = MobileTL(blocks=2, backward=backward)
    plain = copy.deepcopy(model)
    with trained_parameters(plain, [rule]):
        for block in rule.chosen(plain):
            plain.get_submodule(block.norms[-1]).train()
        expected = first_tensor(plain(x))
        expected.square().sum().backward()
    with trained_parameters(model, [rule]), attached([rule], model):
        model.train()
        assert not isinstance(model.mobilenet_v2.conv_stem.first_conv.normalization, nn.BatchNorm2d)
        found = first_tensor(model(x))
        found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    exact = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    ours = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert exact.keys() == ours.keys()
    for name, value in ours.items():
        assert value is not None
        if backward == "sign" and not name.startswith("classifier"):  # ReLU6 lets pass what is above 6
            continue
        torch.testing.assert_close(value, exact[name], rtol=1e-5, atol=1e-6)


def test_a_step_for_hard_swish() -> None:
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(10000, generator=torch.Generator().manual_seed(1))
    (exact,) = torch.autograd.grad(F.hardswish(x), x, upstream)
    module = nn.Sequential(nn.Hardswish())
    rule = MobileTL()
    from actkit.finetuning.mobiletl import _code

    code = _code(rule, module[0])
    assert code is not None and code.bits == 1
    (found,) = torch.autograd.grad(CodedActivation(module[0], code)(x), x, upstream)
    assert torch.equal(found, upstream * (x > 0))
    assert float(torch.cosine_similarity(found, exact, 0)) > 0.85
    gate = _code(rule, nn.Hardsigmoid())
    assert gate is not None and gate.levels == (0.0, pytest.approx(1 / 6))
    assert _code(rule, nn.Sigmoid()) is None and _code(MobileTL(backward="exact"), nn.Hardswish()) is None
    assert _code(MobileTL(backward="codes"), nn.Hardswish()).bits == 4  # type: ignore[union-attr]


def test_the_plain_model_is_back_and_what_is_frozen_has_not_moved() -> None:
    model = mobilenet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    data = [{"pixel_values": images(seed=seed), "labels": torch.tensor([0, 1, 1, 0])} for seed in range(3)]
    trained = train(
        model, data, validation=data[:1], steps=3, learning_rate=1e-2, rules=["mobiletl:blocks=2"], progress=False
    )
    reports = trained.history[-1].reports
    assert reports is not None and reports["0.MobileTL"] == {"norms": 50, "activations": 5}
    after = model.state_dict()
    assert list(after) == list(before) and [type(module) for module in model.modules()] == kinds
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved and all(
        name.startswith(("mobilenet_v2.layer.14", "mobilenet_v2.layer.15", "classif")) for name in moved
    )
    statistics = {name for name in moved if "running" in name}
    assert statistics == {
        f"mobilenet_v2.layer.{index}.reduce_1x1.normalization.running_{what}"
        for index in (14, 15)
        for what in ("mean", "var")
    }
    plain = mobilenet()
    plain.load_state_dict(after)
    assert torch.equal(plain(images()).logits, model.eval()(images()).logits)


def test_what_is_frozen_drops_nothing_and_is_in_evaluation_mode() -> None:
    model = DigitsMobileNet(dropout=0.5)
    rule = MobileTL(blocks=1)
    with trained_parameters(model, [rule]), attached([rule], model):
        model.train()
        x = torch.rand(3, 1, 8, 8)
        one, other = (model.stem(x) for _ in range(2))
        assert torch.equal(one, other) and isinstance(model.stem[1], FrozenNorm)
    assert type(model.stem[1]) is nn.BatchNorm2d and model.stem[1].training


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks: 6 were given, and this DigitsMobileNet has 5 .* give at"):
        MobileTL(blocks=6).trainable(DigitsMobileNet())
    with pytest.raises(UnsupportedModelError, match=r"has 0 inverted residual blocks: a pointwise"):
        MobileTL().attach(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MobileTL(blocks=0)


def test_the_rule_passes() -> None:
    data = [{"pixel_values": images(2, seed), "labels": torch.tensor([0, 1])} for seed in range(2)]
    check_rule(MobileTL(blocks=1), mobilenet(), data)
