"""Fingerprints: any edit of any value is seen, however it was made; what holds the same values has the same."""

from __future__ import annotations

import copy
import itertools
import random

import torch
from accelerate import cpu_offload
from tiny_models import build
from torch import nn

from actkit.core.ground.fingerprint import fingerprint, model_fingerprint


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3).bfloat16())


def test_every_single_bit_counts() -> None:
    """Also behind the first values of a tensor, in buffers, and written past torch's version counters."""
    model = small()
    first = model_fingerprint(model)
    seen = {first}
    tensors = [tensor.detach().view(-1).view(torch.uint8).numpy() for tensor in model.state_dict().values()]
    for values in tensors:
        for place in range(len(values)):
            values[place] ^= 1
            seen.add(model_fingerprint(model))
            values[place] ^= 1
    assert len(seen) == 1 + sum(map(len, tensors)) and model_fingerprint(model) == first
    model[0].weight.data[8, 6] += 1e-3
    assert model_fingerprint(model) not in seen


def test_the_order_of_values_counts_and_names_types_shapes_and_classes_do() -> None:
    model = small()
    found = {model_fingerprint(model)}
    with torch.no_grad():
        for change in (
            lambda: model[0].weight.copy_(model[0].weight.flip(0).clone()),
            lambda: model[0].weight.copy_(model[0].weight.roll(1, 1).clone()),
            lambda: model.double(),
            lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.reshape(7, 9))),
            lambda: model.append(model.pop(1)),
            lambda: setattr(model, "__class__", type("Other", (nn.Sequential,), {})),
        ):
            change()
            found.add(model_fingerprint(model))
    assert len(found) == 7


def test_equal_values_have_one_fingerprint_wherever_they_are() -> None:
    model = build("llama")
    first = model_fingerprint(model)
    assert first == model_fingerprint(copy.deepcopy(model)) == model_fingerprint(build("llama"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().T.contiguous().T)  # the same, otherwise in memory
    assert model_fingerprint(model) == first
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in offloaded.parameters()) and model_fingerprint(offloaded) == first
    tied = build("llama", tie_word_embeddings=True)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert model_fingerprint(tied) == model_fingerprint(untied)  # each name has its values


def test_batches_by_brute_force() -> None:
    """Of all pairs of some thousand small nested values, exactly the equal ones share a fingerprint."""
    draw = random.Random(0)
    parts = [torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), "ab", None]
    values = [{name: draw.choice(parts) for name in draw.sample("xyz", draw.randint(1, 3))} for _ in range(60)]
    for one, other in itertools.combinations(values, 2):
        same = one.keys() == other.keys() and all(one[key] is other[key] for key in one)
        assert (fingerprint(one) == fingerprint(other)) == same
