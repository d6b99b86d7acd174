"""Deltas against plain arithmetic of state dicts, in every storage, on disk and back on the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from actkit.core.ground.errors import CheckpointError
from actkit.core.store.deltas import Delta, Dense, LowRank, Part, Sparse, added, product
from actkit.testing import tiny_model


def pair(seed: int = 0, share: float = 1.0) -> tuple[nn.Module, nn.Module]:
    """A tuned model and its base, tied and with statistics; share: of the entries that differ."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 9), nn.Linear(9, 24))
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter += change * (torch.rand(parameter.shape, generator=generator) < share)
        tuned[1].running_mean += 0.5  # type: ignore[operator]
    return tuned, base


def parts(shape: tuple[int, ...] = (4, 6)) -> list[Part]:
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(shape, generator=generator, dtype=torch.float64)
    thin = dense * (torch.rand(shape, generator=generator) < 0.3)
    left, right = torch.randn(4, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    indices = thin.flatten().nonzero().flatten()
    return [Dense(dense), Sparse(indices, thin.flatten()[indices], shape), LowRank(left, right, shape)]


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("second", range(3))
def test_sums_and_products_of_parts_are_those_of_the_whole(first: int, second: int) -> None:
    one, other = parts()[first], parts()[second].times(-0.5)
    torch.testing.assert_close(added(one, other).dense(), one.dense() + other.dense())
    assert product(one, other) == pytest.approx(float((one.dense() * other.dense()).sum()))
    if first == second:
        assert type(added(one, other)) is type(one)


@pytest.mark.parametrize("kind", ["dense", "sparse", "low rank"])
def test_base_and_delta_are_the_tuned_model(kind: str, tmp_path: Path) -> None:
    tuned, base = pair(share=0.2 if kind == "sparse" else 1.0)
    delta = Delta.between(tuned, base)
    if kind == "sparse":
        delta = delta.sparse()
        assert delta.numbers < 0.3 * sum(each.numel() for each in base.parameters())
    if kind == "low rank":
        with torch.no_grad():
            tuned[3].weight.copy_(base[3].weight + torch.randn(9, 1) @ torch.randn(1, 24))  # type: ignore[operator]
        delta = Delta.between(tuned, base).low_rank(1)
        assert isinstance(delta.parts["3.weight"], LowRank) and isinstance(delta.parts["3.bias"], Dense)
        delta = Delta({"3.weight": delta.parts["3.weight"]}, delta.base)
    delta.save(tmp_path / "delta.safetensors")
    for each in (delta, Delta.load(tmp_path / "delta.safetensors")):
        model = copy.deepcopy(base)
        each.add_to(model)
        for name, value in model.state_dict().items():
            if kind != "low rank" or name == "3.weight":
                torch.testing.assert_close(value, tuned.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_float64_gives_the_same_bits() -> None:
    tuned, base = pair()
    Delta.between(tuned, base, dtype=torch.float64).sparse().add_to(base)
    assert all(torch.equal(value, tuned.state_dict()[name]) for name, value in base.state_dict().items())


def test_arithmetic_is_that_of_state_dicts() -> None:
    (one, base), (other, _) = pair(1), pair(2)
    first, second = Delta.between(one, base), Delta.between(other, base).sparse()
    total = first + 2 * second - first * 0.5
    vectors = [
        torch.cat([(dict(each.named_parameters())[name] - p).flatten() for name, p in base.named_parameters()]).double()
        for each in (one, other)
    ]
    flat = torch.cat([total.parts[name].dense().flatten() for name, _ in base.named_parameters()]).double()
    torch.testing.assert_close(flat, 0.5 * vectors[0] + 2 * vectors[1], rtol=1e-5, atol=1e-6)
    assert first.norm() == pytest.approx(float(vectors[0].norm().detach()), rel=1e-5)
    cosine = float(torch.cosine_similarity(vectors[0], vectors[1], dim=0).detach())
    assert first.cosine(second) == second.cosine(first) == pytest.approx(cosine, abs=1e-6)
    assert (first - first).norm() == 0 and first.cosine(first - first) == 0
    assert float(total.buffers["1.running_mean"].mean()) == pytest.approx(0.25 + 1.0)
    model = copy.deepcopy(base)
    first.add_to(model, scale=0.0)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_tied_parameter_is_one_part() -> None:
    base = tiny_model("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_parameter("model.embed_tokens.weight").mul_(2)
    delta = Delta.between(tuned, base)
    assert list(delta.parts) == ["model.embed_tokens.weight"]
    delta.add_to(base)
    assert torch.equal(base.get_parameter("lm_head.weight"), tuned.get_parameter("model.embed_tokens.weight"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    tuned, base = pair()
    delta = Delta.between(tuned, base)
    with pytest.raises(CheckpointError, match="delta: it belongs to a model with the fingerprint"):
        delta.add_to(tuned)
    delta.add_to(tuned, check=False)
    with pytest.raises(ValueError, match="deltas of one base can be added"):
        delta + Delta.between(pair(5)[0], tuned)
    other = Delta({"0.weight": Dense(torch.zeros(3))})
    with pytest.raises(ValueError, match=r"delta: 0.weight have other shapes"):
        delta.product(other)
    with pytest.raises(ValueError, match=r"delta: 0.weight has shape \[6, 2, 3, 3\] in this model, \[3\] was expected"):
        other.add_to(base)
    with pytest.raises(ValueError, match="tuned, base: weight differ in name or shape"):
        Delta.between(nn.Linear(2, 2), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="rank: 0 was given"):
        delta.low_rank(0)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, text in (("other", "holds none"), ("none", "is not readable")):
        with pytest.raises(CheckpointError, match=text):
            Delta.load(tmp_path / f"{name}.safetensors")
