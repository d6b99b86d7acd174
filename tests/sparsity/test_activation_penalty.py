"""Activation penalties against closed forms and autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.sparsity.prosparse.activation_penalty import ActivationPenalty


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
        hidden_act="relu",
        **settings,
    )
    return LlamaForCausalLM(config)


def test_l1_gradient_in_closed_form() -> None:
    """d/dW mean|relu(Wx + b)| = mean over rows and channels of [Wx + b > 0] x."""
    model = Mlp().double()
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with attached([ActivationPenalty(weight=2.0, sites=("layer.input:down",))], model, example=x) as rules:
        model(x)
        penalty = rules.penalty()
        assert penalty is not None
        penalty.backward()
    active = (x @ model.up.weight.T + model.up.bias > 0).double()
    assert torch.allclose(model.up.weight.grad, 2.0 * active.T @ x / active.numel(), rtol=1e-6, atol=1e-9)
    assert model.down.weight.grad is None


def test_hoyer_in_closed_form() -> None:
    """Between 1 / channels (one active) and 1 (all alike), without regard to scale; 0 where nothing is active."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    nn.init.eye_(model[1].weight)
    rule = ActivationPenalty(weight=1.0, measure="hoyer", sites=("layer.input:2",))
    with attached([rule], model, example=torch.ones(1, 4)) as rules:
        rows = ([3.0, 0, 0, 0], 1 / 4), ([2.0, 2, -2, 2], 1.0), ([1.0, 2, 3, 4], 100 / 120), ([0.0] * 4, 0.0)
        for row, expected in rows:
            for scale in (1.0, 100.0):
                model(scale * torch.tensor([row]))
                assert rules.penalty().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("measure", "reduction"), [("l1", "mean"), ("l1", "sum"), ("hoyer", "mean")])
@pytest.mark.parametrize("site", ["mlp.hidden", "mlp.gate", "block.output", "attention.query", "attention.weights"])
def test_padding_does_not_count(measure: str, reduction: str, site: str) -> None:
    """Rows padded on the right give the weighted mean of what each gives alone."""
    model = llama()
    rule = ActivationPenalty(weight=1.0, measure=measure, reduction=reduction, sites=(site,))
    rows = [torch.randint(0, 40, (1, length), generator=torch.Generator().manual_seed(length)) for length in (4, 7)]
    ids = torch.zeros(2, 7, dtype=torch.int64)
    ids[0, :4], ids[1] = rows[0], rows[1]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with attached([rule], model) as rules:
        alone = []
        for row in rows:
            model(input_ids=row)
            alone.append(rules.penalty().item())
        model(input_ids=ids, attention_mask=mask)
        together = rules.penalty(mask).item()
    if site == "attention.weights" and (measure, reduction) != ("l1", "sum"):
        return  # a mean over keys depends on how many keys there are
    assert together == pytest.approx((4 * alone[0] + 7 * alone[1]) / 11, rel=1e-5)


def test_schedule() -> None:
    """The stages of a progressive penalty: exact at the points, half a period between, flat outside."""
    rule = ActivationPenalty(weight=2.0, schedule=((0.2, 0.0), (0.4, 1.0), (0.8, 3.0)), interpolation="cosine")
    for progress, factor in ((0.0, 0), (0.2, 0), (0.4, 1), (0.8, 3), (1.0, 3), (0.3, 0.5), (0.6, 2)):
        assert rule.factor(progress) == pytest.approx(2 * factor, abs=1e-12)
    done = (0.5 - 0.4) / 0.4
    assert rule.factor(0.5) == pytest.approx(2 * (1 + 2 * 0.5 * (math.sin(-math.pi / 2 + math.pi * done) + 1)))
    slope = (rule.factor(0.4 + 1e-6) - rule.factor(0.4)) / 1e-6
    middle = (rule.factor(0.6 + 1e-6) - rule.factor(0.6)) / 1e-6
    assert slope < 1e-3 * middle
    linear, step = (rule.model_copy(update={"interpolation": kind}) for kind in ("linear", "step"))
    assert linear.factor(0.5) == pytest.approx(2 * 1.5) and step.factor(0.5) == pytest.approx(2 * 1.0)
    assert ActivationPenalty(weight=0.5).factor(0.0) == ActivationPenalty(weight=0.5).factor(1.0) == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": -1.0},
        {"weight": math.nan},
        {"measure": "l2"},
        {"sites": ()},
        {"schedule": ()},
        {"schedule": ((0.5, 1.0), (0.5, 2.0))},
        {"schedule": ((0.0, -1.0),)},
        {"schedule": ((0.0, 1.0), (1.5, 1.0))},
        {"unknown": 1},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ActivationPenalty(**settings)


def test_no_graph_is_an_error_not_a_silent_zero() -> None:
    model = llama()
    with attached([ActivationPenalty()], model) as rules:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match="none has a graph"):
            rules.penalty()
        with pytest.raises(ValueError, match="once after each forward pass"):
            rules.penalty()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with attached([ActivationPenalty()], model) as rules:
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match="trainable"):
            rules.penalty()


def test_weight_zero_adds_nothing_and_keeps_nothing() -> None:
    model = llama()
    with attached([ActivationPenalty(schedule=((0.5, 0.0), (1.0, 1.0)))], model) as rules:
        loss = model(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss
        assert rules.add(loss) is loss
        rules.before_step(0.75)
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        assert rules.penalty() is not None


def test_training_under_it_makes_activations_smaller() -> None:
    batches = [
        {"input_ids": torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
    ]

    def mean_after(rules: Any) -> float:
        model = llama(initializer_range=0.2)
        train(model, batches, validation=batches[:1], steps=20, learning_rate=3e-3, rules=rules, keep="last")
        with attached([ActivationPenalty(weight=1.0)], model) as reading:
            model(**batches[0])
            return reading.penalty().item()

    assert mean_after([ActivationPenalty(weight=30.0)]) < 0.7 * mean_after([])
