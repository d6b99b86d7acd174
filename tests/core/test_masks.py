"""Masks against torch.nn.utils.prune, in both directions, on disk and in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from actkit.core.ground.errors import CheckpointError
from actkit.core.train.masks import KeepMasks, Masks, layer_weights
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.testing import check_rule, tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN


def pruned_by_torch(model: nn.Module, share: float = 0.6) -> nn.Module:
    """All layers, by magnitude."""
    layers = [(each, "weight") for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=share)
    return model


def networks() -> tuple[nn.Module, nn.Module]:
    """The same, pruned by torch and plain."""
    torch.manual_seed(0)
    plain = DigitsCNN(channels=(4, 6), hidden=8)
    return pruned_by_torch(copy.deepcopy(plain)), plain


def data(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.rand(8, 1, 8, 8, generator=generator) for _ in range(steps)]
    return [(x, torch.randint(10, (8,), generator=generator)) for x in draw]


def test_torch_s_masks_go_both_ways() -> None:
    theirs, plain = networks()
    masks = Masks.of_torch(theirs)
    assert list(masks.kept) == list(layer_weights(plain)) and masks.alive == round(0.4 * masks.total)
    ours = copy.deepcopy(plain)
    masks.to_torch(ours)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for layer in ours.modules():
        if prune.is_pruned(layer) and isinstance(layer, nn.Linear | nn.Conv2d):
            prune.remove(layer, "weight")
    masks.apply(plain)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert Masks.of_zeros(plain).alive == masks.alive


@pytest.mark.parametrize("made", [torch.optim.AdamW, lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9)])
def test_training_is_that_of_torch_s_pruning(made: Any) -> None:
    theirs, plain = networks()
    masks = Masks.of_torch(theirs)
    optimizers = [made(theirs.parameters()), made(plain.parameters())]
    with attached([KeepMasks.of(masks)], plain, optimizers[1]) as rules:
        for x, labels in data(12):
            for model, optimizer in zip((theirs, plain), optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            rules.after_step(0.5)
            for name, kept in masks.kept.items():
                assert not bool(plain.get_parameter(name)[~kept].any())
    for layer in theirs.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            prune.remove(layer, "weight")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert not plain.get_parameter("fc1.weight")._backward_hooks


def test_a_file_holds_bits(tmp_path: Path) -> None:
    masks = Masks.of_torch(networks()[0])
    masks.save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size < masks.total / 8 + 1000
    again = Masks.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(again.kept[name], kept) for name, kept in masks.kept.items())
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, text in (("other", "holds no masks"), ("none", "is not readable")):
        with pytest.raises(CheckpointError, match=text):
            Masks.load(tmp_path / f"{name}.safetensors")


def test_a_resumed_training_keeps_them(tmp_path: Path) -> None:
    masks = Masks.of_torch(networks()[0])
    masks.save(tmp_path / "masks.safetensors")
    rule = f"keep_masks:masks={tmp_path / 'masks.safetensors'}"
    model = networks()[1]
    batches = [{"pixel_values": x, "labels": labels} for x, labels in data(4)]
    trained = train(model, batches, validation=batches[:1], steps=4, rules=[rule], learning_rate=0.1, progress=False)
    assert Masks.of_zeros(model).alive == masks.alive
    reports = trained.history[-1].reports
    assert reports is not None and reports["0.KeepMasks"]["alive"] == masks.alive / masks.total
    other = KeepMasks.of(Masks({name: ~kept for name, kept in masks.kept.items()})).attach(networks()[1])
    with pytest.raises(CheckpointError, match="began with other masks"):
        other.load_state_dict({"masks": dict(masks.kept)})


def test_an_embedding_is_no_layer_and_patterns_choose() -> None:
    model = tiny_model("llama")  # its head is its embedding
    assert not any("embed" in name or "lm_head" in name for name in layer_weights(model))
    assert list(layer_weights(model, ["*.0.mlp.up_proj.*"])) == ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"parameters: '\*norm\*' fits no weight"):
        layer_weights(model, ["*norm*"])
    with pytest.raises(ValueError, match="this ReLU has no linear layer or convolution"):
        layer_weights(nn.ReLU())


def test_what_does_not_fit_is_refused() -> None:
    masks = Masks.all_of({"conv1.weight": torch.zeros(2, 2), "fc9.weight": torch.zeros(3)})
    with pytest.raises(
        ValueError, match=r"masks: conv1.weight has a mask of shape \[2, 2\], the model has \[4, 1, 3, 3\]"
    ):
        masks.apply(networks()[1])
    with pytest.raises(ValueError, match=r"fc9.weight .* no such parameter"):
        Masks({"fc9.weight": masks.kept["fc9.weight"]}).to_torch(networks()[1])
    with pytest.raises(ValueError, match="there is nothing to hold"):
        KeepMasks().attach(networks()[1])


def test_the_rule_passes() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for weight in layer_weights(model).values():
            weight[:, ::2] = 0
    check_rule(KeepMasks(), model, tiny_batches("llama", lengths=((9, 4, 6), (7, 2), (5, 5), (8, 3, 3))))
