"""The limit of a proof: other orders of summation stay within it, other functions do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.example import Inputs
from actkit.core.forward.hooks import evaluating
from actkit.core.measure.rounding import limit


def model_of(dtype: torch.dtype, seed: int = 0, layers: int = 4) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def outputs_of(model: Any, batch: Any) -> Tensor:
    with evaluating(model):
        return first_tensor(forward(model, batch)).float()


def permuted(model: Any, seed: int) -> Any:
    """The same function in another order of summation: hidden units of the MLPs, and heads."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            mlp, attention = layer.mlp, layer.self_attn
            units = torch.randperm(mlp.down_proj.in_features, generator=generator)
            size = attention.head_dim
            heads = torch.randperm(attention.o_proj.in_features // size, generator=generator)
            channels = (heads[:, None] * size + torch.arange(size)).flatten()
            for linear, order in ((mlp.gate_proj, units), (mlp.up_proj, units)):
                linear.weight.copy_(linear.weight[order])
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight.copy_(linear.weight[channels])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, units])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, channels])
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_other_orders_are_within_it_and_other_functions_are_not(dtype: torch.dtype, seed: int) -> None:
    model = model_of(dtype, seed)
    batch = Inputs.of(model).batch(2)
    outputs = outputs_of(model, batch)
    found = limit(model, batch, outputs)
    assert not found.reason
    eager = permuted(model, 2)
    eager.set_attn_implementation("eager")
    moved = [float((outputs_of(other, batch) - outputs).abs().max()) for other in (permuted(model, 1), eager)]
    assert 0 < max(moved) <= found.value
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    assert float((outputs_of(wrong, batch) - outputs).abs().max()) > found.value


def test_it_is_measured_on_the_model() -> None:
    """Sixteen layers round more than one, and the model is left as it was."""
    shares = []
    for layers in (1, 16):
        model = model_of(torch.bfloat16, layers=layers).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batch = Inputs.of(model).batch(2)
        outputs = outputs_of(model, batch)
        shares.append(limit(model, batch, outputs).value / float(outputs.abs().max()))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.training and model.dtype == torch.bfloat16
    assert shares[1] > 2 * shares[0]


class Fixed(nn.Module):
    """Computes in float32 whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.linear.weight)


def test_where_nothing_can_be_measured_it_is_a_share_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, outputs = torch.ones(2, 4), torch.tensor([1.0, -3.0])
    found = limit(Fixed(), batch, outputs)
    assert found.value == pytest.approx(3e-5)
    assert found.describe() == "3e-05 (not measured: it does not run in float64 (RuntimeError))"
    found = limit(nn.Linear(4, 3).double(), batch.double(), outputs)
    assert found.value == pytest.approx(3e-5) and "nothing wider than torch.float64" in found.reason
    found = limit(nn.Linear(4, 3, device="meta"), batch, outputs)
    assert found.value == pytest.approx(3e-5) and found.reason == "its weights are offloaded"
    monkeypatch.setattr(
        "actkit.core.measure.rounding.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10})
    )
    found = limit(nn.Linear(4, 3).bfloat16(), batch.bfloat16(), outputs)
    assert found.value == pytest.approx(3e-2) and found.reason == "a copy in float32 does not fit into memory"
