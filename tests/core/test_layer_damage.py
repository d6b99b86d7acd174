"""The damage of layers against the divergence itself, in float64, and against the full Fisher matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actkit.core.ground.errors import NonFiniteError
from actkit.core.watch.damage import layer_damage
from actkit.testing import tiny_batches, tiny_model


class Tiny(nn.Module):
    """Two layers with a nonlinearity between them; three classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def moved(layer: nn.Linear, size: float, seed: int) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features).to(torch.float64)
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other.weight.data = layer.weight.data + size * noise
    other.bias.data = layer.bias.data.clone()
    return other


def divergence(model: nn.Module, changed: nn.Module, x: Tensor) -> float:
    before, after = (each(x).log_softmax(-1) for each in (model, changed))
    return float((before.exp() * (before - after)).sum(-1).mean().detach())


def exchanged(model: Tiny, path: str, layer: nn.Module) -> Tiny:
    other = Tiny()
    other.load_state_dict(model.state_dict())
    setattr(other, path, layer)
    return other


@pytest.mark.parametrize("path", ["first", "second"])
def test_it_is_the_divergence_of_a_small_change(path: str) -> None:
    model, x = Tiny(), torch.randn(400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layers = {size: moved(getattr(model, path), size, 2) for size in (0.01, 0.03)}
    found = layer_damage(model, {str(s): {path: layer} for s, layer in layers.items()}, [x], draws=64, progress=False)
    for size, layer in layers.items():
        true = divergence(model, exchanged(model, path, layer), x)
        assert found[str(size)][path] == pytest.approx(true, rel=0.08)
    assert found["0.03"][path] == pytest.approx(9 * found["0.01"][path], rel=1e-6)  # the first term is a square


def test_it_is_the_fisher_matrix_around_the_change() -> None:
    """At the last layer, d^T (diag p - p p^T) d / 2 exactly, but for the draws."""
    model, x = Tiny(), torch.randn(300, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = moved(model.second, 0.2, 4)
    hidden = torch.tanh(model.first(x))
    change, p = layer(hidden) - model.second(hidden), model(x).softmax(-1)
    exact = ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean() / 2
    found = layer_damage(model, {"a": {"second": layer}}, [x], draws=200, progress=False)
    assert found["a"]["second"] == pytest.approx(float(exact.detach()), rel=0.05)


def test_no_change_does_no_damage_and_padding_counts_nothing() -> None:
    model = tiny_model("llama")
    batch = {key: value.clone() for key, value in tiny_batches(model)[0].items()}
    path = "model.layers.0.mlp.up_proj"
    own = model.get_submodule(path)
    assert layer_damage(model, {"same": {path: own}}, [batch], progress=False)["same"][path] == 0.0
    other = nn.Linear(own.in_features, own.out_features, bias=False)
    torch.manual_seed(0)
    other.weight.data = own.weight.data + 0.01 * torch.randn_like(own.weight)
    ids = batch["input_ids"][:1]
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wide = {
        "input_ids": torch.cat([ids, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    }
    first, second = (
        layer_damage(model, {"a": {path: other}}, [each], draws=200, progress=False)["a"][path]
        for each in (plain, wide)
    )
    assert second == pytest.approx(first, rel=0.2)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    path = "model.layers.1.mlp.down_proj"
    layer_damage(model, {"a": {path: model.get_submodule(path)}}, tiny_batches(model), progress=False)
    assert not frozen.requires_grad and all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_is_named() -> None:
    model: Any = Tiny()
    broken = moved(model.first, 0.0, 0)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="first: exchanged for bad"):
        layer_damage(model, {"bad": {"first": broken}}, [torch.ones(2, 6, dtype=torch.float64)], progress=False)
