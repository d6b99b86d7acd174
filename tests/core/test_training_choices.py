"""What a training lets its caller choose, against loops written by hand in plain torch: the optimizer, which parameters
train and at which rate, what rules do with gradients, what the best step is, and streams."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from actkit.core.forward.stream import Stream
from actkit.core.ground.errors import CheckpointError, DataError, NonFiniteError, RecipeError
from actkit.core.recipe.optimizer import OPTIMIZERS, OptimizerSettings, ScoreSettings
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.recipe.stage import Train
from actkit.core.train.choice import parameter_groups, trained_parameters
from actkit.core.train.optimizers import MuonWithAdamW, make_optimizer
from actkit.core.train.rules import RuleCallback, attached
from actkit.core.train.score import Score
from actkit.core.train.training import Trained, train
from actkit.testing import check_rule, tiny_batches, tiny_model

STEPS, RATE = 6, 1e-2


class Net(nn.Module):
    """A classifier of 4 numbers with every kind of parameter that is treated in its own way."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).relu()))


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))
BATCH, HELD_OUT = {"x": X, "labels": Y}, {"x": X + 1, "labels": Y}


def net() -> Net:
    return Net().double()


def ours(model: nn.Module, **settings: Any) -> Trained:
    defaults: dict[str, Any] = {
        "validation": [HELD_OUT],
        "steps": STEPS,
        "learning_rate": RATE,
        "warmup": 0.0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": None,
        "evaluate_every": 2,
        "keep": "last",
        "progress": False,
    }
    return train(model, settings.pop("batches", [BATCH]), **{**defaults, **settings})


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]] = (BATCH,) * STEPS,
    change: Callable[[], Any] = lambda: None,
) -> nn.Module:
    """The steps in plain torch. change: what happens to the gradients."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        change()
        optimizer.step()
    return model


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)


# -- optimizers --------------------------------------------------------------------------------------------------------

TORCH: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "adamw": ("adamw", lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.0)),
    "adam": ({"adam": {"betas": [0.8, 0.9]}}, lambda p: torch.optim.Adam(p, lr=RATE, betas=(0.8, 0.9))),
    "sgd": ("sgd:momentum=0.9,nesterov=true", lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True)),
    "sgd of a text": ("sgd:momentum=9e-1", lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9)),
    "adafactor": ("adafactor", lambda p: torch.optim.Adafactor(p, lr=RATE)),
    "rmsprop": ("rmsprop:alpha=0.9", lambda p: torch.optim.RMSprop(p, lr=RATE, alpha=0.9)),
    "a function": (
        functools.partial(torch.optim.SGD, momentum=0.5),
        lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.5),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_an_optimizer_steps_as_in_a_plain_loop(name: str) -> None:
    model = net()
    optimizer, make = TORCH[name]
    ours(model, optimizer=optimizer)
    expected = net()
    assert_same(model, by_hand(expected, make(expected.parameters())))


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model, expected = net(), net()
    ours(model, optimizer="muon:momentum=0.9", weight_decay=0.1)
    matrices = [expected.first.weight, expected.last.weight]
    others = [parameter for parameter in expected.parameters() if parameter.dim() < 2]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        expected.zero_grad()
        F.cross_entropy(expected(X), Y).backward()
        muon.step()
        adamw.step()
    assert_same(model, expected)


def test_muon_leaves_embeddings_and_the_head_to_adamw() -> None:
    model = tiny_model("llama")
    optimizer = make_optimizer("muon", model, 1e-3)
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizer.param_groups if group["by_muon"] for p in group["params"]}
    assert by_muon == {name for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name}
    F.cross_entropy(model(**tiny_batches("llama")[0]).logits[:, 0], torch.zeros(3, dtype=torch.int64)).backward()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(state)  # the parts follow
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_weight_decay_and_the_schedule_reach_every_optimizer() -> None:
    """SGD with decay of matrices alone, a warm-up and a linear fall, by the formula."""
    model, expected = net(), net()
    ours(model, optimizer="sgd", weight_decay=0.1, warmup=0.34, schedule="linear")
    for step in range(STEPS):
        rate = RATE * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / 4)
        expected.zero_grad()
        F.cross_entropy(expected(X), Y).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                decay = 0.1 if parameter.dim() == 2 else 0.0
                parameter -= rate * (parameter.grad + decay * parameter)
    assert_same(model, expected)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_is_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    decay = 0.0 if name == "rprop" else 0.01
    options: dict[str, Any] = {"optimizer": name, "weight_decay": decay, "loss": _dropped, "schedule": "cosine"}
    whole, cut = Net(dropout=0.3), Net(dropout=0.3)
    ours(whole, out=tmp_path / "whole", batches=LOOSE, validation=LOOSE[:1], **options)
    with pytest.raises(_Killed):
        ours(cut, out=tmp_path / "cut", batches=LOOSE, validation=LOOSE[:1], **{**options, "loss": _killed_at(4)})
    cut = Net(dropout=0.3)
    torch.manual_seed(7)
    ours(cut, out=tmp_path / "cut", batches=LOOSE, validation=LOOSE[:1], resume=True, **options)
    for key, value in whole.state_dict().items():
        assert torch.equal(cut.state_dict()[key], value), key


class _Killed(Exception):
    pass


LOOSE = [{"x": X.float(), "labels": Y}, {"x": X.float() * 2, "labels": Y}]


def _dropped(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"]) * (1 + torch.rand(()))


def _killed_at(step: int) -> Callable[[nn.Module, Any], Tensor]:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += model.training
        if calls[0] == step:
            raise _Killed
        return _dropped(model, batch)

    return loss


def test_numbers_that_an_optimizer_keeps_in_its_groups_are_resumed(tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        """Its rate falls with a count of its own, in the group, as that of schedule-free optimizers."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                group["lr"] = group["lr"] / group["k"]
            return super().step(closure)

    whole, cut = Net(), Net()
    options: dict[str, Any] = {"optimizer": lambda groups: Counting(groups), "batches": LOOSE, "validation": LOOSE[:1]}
    ours(whole, **options, loss=_dropped)
    with pytest.raises(_Killed):
        ours(cut, **options, out=tmp_path / "cut", loss=_killed_at(6))
    cut = Net()
    ours(cut, **options, out=tmp_path / "cut", resume=True, loss=_dropped)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), whole.parameters(), strict=True))


def test_settings_of_optimizers_have_one_form() -> None:
    for given in ("sgd:momentum=0.9", {"sgd": {"momentum": 0.9}}, OptimizerSettings("sgd", {"momentum": 0.9})):
        assert OptimizerSettings.parse(given).dump() == {"sgd": {"momentum": 0.9}}
    assert OptimizerSettings.parse("adamw").dump() == "adamw" == OptimizerSettings.parse({"adamw": None}).dump()
    stage = Train(steps=1, optimizer="sgd:momentum=0.9", trainable="*norm*", learning_rates={"*bias": 1e-3})
    again = Train.parse(json.loads(json.dumps(stage.dump())), 1)
    assert again == stage and again.options()["optimizer"] == {"sgd": {"momentum": 0.9}}
    assert again.trainable == ("*norm*",) and "score" not in stage.dump()
    assert Train(steps=1, score="accuracy:better=higher").dump()["score"] == {"accuracy": {"better": "higher"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamq"}, "optimizer: 'adamq' is not known; allowed are adadelta"),
        ({"optimizer": "lbfgs"}, "optimizer: 'lbfgs' is not known"),
        ({"optimizer": "sgd:speed=1"}, "optimizer: sgd: 'speed' is no option of it; allowed are dampening"),
        ({"optimizer": "sgd:lr=1"}, "optimizer: sgd: lr is a setting of the training; give learning_rate="),
        ({"optimizer": "sgd:["}, "optimizer: 'sgd:.' was given; write it like"),
        ({"optimizer": 3}, "optimizer: 3 was given; give a name"),
        ({"optimizer": "sgd:momentum=-1"}, "optimizer: sgd does not take"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "weight_decay: 0.1 was given, and rprop has none"),
        ({"optimizer": lambda groups: None}, "optimizer: .*lambda.* returned a NoneType without all"),
        ({"optimizer": lambda groups: torch.optim.SGD(groups[:1])}, "returned a SGD without all of the parameters"),
        ({"trainable": "*nothing*"}, r"trainable: '\*nothing\*' fits no parameter; .* first.weight, first.bias"),
        ({"trainable": []}, "none of its parameters requires a gradient"),
        ({"learning_rates": {"*nothing*": 1.0}}, "learning_rates: .* fits no parameter"),
        ({"learning_rates": {"*": 0.0}}, "learning_rates: .* was given, allowed is numbers above 0"),
        ({"score": "accuracy"}, "score: 'accuracy' was given; write a metric and which is better"),
        ({"score": lambda model, batches: 0.0}, "score: .* was given; write a metric and which is better"),
        ({"score": "speed:better=higher"}, "score: 'speed' is no metric of this model; allowed are accuracy"),
    ],
)
def test_bad_choices_name_the_setting(settings: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        ours(model, **settings)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))


def test_another_optimizer_is_not_resumed(tmp_path: Path) -> None:
    common: dict[str, Any] = {"out": tmp_path / "cut", "batches": LOOSE, "validation": LOOSE[:1]}
    with pytest.raises(_Killed):
        ours(Net(), **common, optimizer="sgd:momentum=0.9", loss=_killed_at(4))
    for settings, message in (
        ({"optimizer": "sgd"}, "optimizer is 'sgd', the training in .* began with {'sgd'"),
        ({"optimizer": "sgd:momentum=0.9", "trainable": "*norm*"}, "trainable is"),
        ({"optimizer": "sgd:momentum=0.9", "learning_rates": {"*norm*": 0.1}}, "learning_rates is"),
        ({"optimizer": "sgd:momentum=0.9", "score": "accuracy:better=higher"}, "score is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ours(Net(), **common, **settings, resume=True)


# -- which parameters train, and at which rate -------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["norm.*", ["norm.weight", "norm.bias"], lambda model: ["norm.*"]])
def test_only_the_chosen_parameters_train(given: Any) -> None:
    model, expected = net(), net()
    model.last.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(False)  # chosen all the same
    result = ours(model, trainable=given)
    assert result.trainable == 16
    assert_same(model, by_hand(expected, torch.optim.AdamW(expected.norm.parameters(), lr=RATE, weight_decay=0.0)))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"last.bias", "norm.weight"}


def test_rates_by_group() -> None:
    model, expected = net(), net()
    ours(model, learning_rates={"norm.weight": 0.1, "norm.*": 0.05, "last.*": 0.02}, weight_decay=0.3)
    groups = [
        {"params": [expected.norm.weight], "lr": 0.1, "weight_decay": 0.0},
        {"params": [expected.norm.bias], "lr": 0.05, "weight_decay": 0.0},
        {"params": [expected.last.weight], "lr": 0.02, "weight_decay": 0.3},
        {"params": [expected.last.bias], "lr": 0.02, "weight_decay": 0.0},
        {"params": [expected.first.weight], "weight_decay": 0.3},
        {"params": [expected.first.bias], "weight_decay": 0.0},
    ]
    assert_same(model, by_hand(expected, torch.optim.AdamW(groups, lr=RATE)))


class NormsOnly(TrainingRule):
    """Trains the norms, and nothing else."""

    def trainable(self, model: nn.Module) -> list[str]:
        return ["*norm.*"]

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedRule()


class LastOnly(NormsOnly):
    def trainable(self, model: nn.Module) -> list[str]:
        return ["last.*"]


def test_a_rule_says_what_trains() -> None:
    model, expected = net(), net()
    ours(model, rules=[NormsOnly()])
    assert_same(model, by_hand(expected, torch.optim.AdamW(expected.norm.parameters(), lr=RATE, weight_decay=0.0)))
    model, expected = net(), net()
    ours(model, rules=[NormsOnly()], trainable="first.bias")  # all that somebody names
    ours(model, rules=[NormsOnly(), LastOnly()])
    first = [expected.first.bias, *expected.norm.parameters()]
    by_hand(expected, torch.optim.AdamW(first, lr=RATE, weight_decay=0.0))
    second = [*expected.norm.parameters(), *expected.last.parameters()]
    assert_same(model, by_hand(expected, torch.optim.AdamW(second, lr=RATE, weight_decay=0.0)))


class OwnOptimizer(TrainingRule):
    """Trains by SGD, one part of the model at half the rate."""

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{**group, "lr": group["lr"] / 2} for group in groups], momentum=0.5)

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.5
        return AttachedRule()


def test_a_rule_brings_the_optimizer() -> None:
    model, expected = net(), net()
    ours(model, rules=[OwnOptimizer()])
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=RATE / 2, momentum=0.5))
    assert_same(model, expected)
    with pytest.raises(ValueError, match="rules: OwnOptimizer, OwnOptimizer bring an optimizer each"):
        ours(net(), rules=[OwnOptimizer(), OwnOptimizer()])
    with pytest.raises(ValueError, match=r"optimizer: .* was given, and OwnOptimizer brings its own"):
        ours(net(), rules=[OwnOptimizer()], optimizer="sgd")


class AddsAllThatTrains(TrainingRule):
    """Freezes the model and trains a scale that it puts behind the last layer."""

    def trainable(self, model: nn.Module) -> list[str]:
        return []

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedScale(model)


class AttachedScale(AttachedRule):
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        model.last.register_parameter("scale", nn.Parameter(torch.ones(())))
        self.handle = model.last.register_forward_hook(lambda module, args, output: output * module.scale)

    def detach(self) -> None:
        self.handle.remove()
        self.model.last.found = float(self.model.last.scale.detach())
        del self.model.last.scale


def test_a_rule_may_add_all_that_trains() -> None:
    model, before = net(), net()
    ours(model, rules=[AddsAllThatTrains()])
    assert model.last.found != 1.0
    assert_same(model, before)


class Unfreezes(TrainingRule):
    """Lets one parameter train once it is at work, and puts another layer behind the model's."""

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        model.last.bias.requires_grad_(True)
        return AttachedUnfreezes(model)


class AttachedUnfreezes(AttachedRule):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def detach(self) -> None:
        self.model.last.bias.requires_grad_(False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw at another rate"])
def test_what_a_rule_unfreezes_in_attach_is_trained(optimizer: str) -> None:
    """The same as if it had been trainable from the start, and in anyone's loop too."""
    rates = {"last.*": 0.1} if "rate" in optimizer else {}
    optimizer = optimizer.split()[0]
    model, expected = net(), net()
    model.last.bias.requires_grad_(False)
    result = ours(model, rules=[Unfreezes()], optimizer=optimizer, learning_rates=rates, weight_decay=0.2)
    ours(expected, optimizer=optimizer, learning_rates=rates, weight_decay=0.2)
    assert_same(model, expected)
    assert result.trainable == sum(parameter.numel() for parameter in expected.parameters())
    assert not model.last.bias.requires_grad

    model, expected = net(), net()
    model.last.bias.requires_grad_(False)
    made = torch.optim.AdamW(parameter_groups(model, 0.0), lr=RATE)
    with attached([Unfreezes()], model, made):
        by_hand(model, made)
    assert_same(model, by_hand(expected, torch.optim.AdamW(expected.parameters(), lr=RATE, weight_decay=0.0)))


def test_an_unfrozen_parameter_of_16_bits_is_refused() -> None:
    model = net()
    model.last.bias = nn.Parameter(model.last.bias.detach().bfloat16(), requires_grad=False)
    with pytest.raises(ValueError, match=r"last\.bias is torch\.bfloat16"):
        ours(model, rules=[Unfreezes()])


def test_a_frozen_batch_norm_stays_as_it_is() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.frozen, self.trained = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.bare = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bare(self.trained(self.frozen(x))))

    model = Normed().double()
    model.frozen.requires_grad_(False)
    model.bare.requires_grad_(False)
    modes: list[tuple[bool, ...]] = []
    model.register_forward_pre_hook(
        lambda m, _: modes.append((m.training, m.frozen.training, m.trained.training, m.bare[1].training))
    )
    ours(model, steps=2, evaluate_every=2)
    assert (True, False, True, False) in modes and (True, True, True, True) not in modes
    assert torch.equal(model.frozen.running_mean, torch.zeros(4, dtype=torch.float64))
    assert int(model.frozen.num_batches_tracked) == int(model.bare[1].num_batches_tracked) == 0
    assert int(model.trained.num_batches_tracked) == 2
    assert all(module.training for module in model.modules())  # as before
    expected = Normed().double()
    expected.requires_grad_(False)
    for module in (expected.trained, expected.head):
        module.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for _ in range(2):
        expected.train()
        expected.frozen.eval()
        expected.bare[1].eval()
        optimizer.zero_grad()
        F.cross_entropy(expected(X), Y).backward()
        optimizer.step()
    assert_same(model, expected)


# -- what rules see and do ---------------------------------------------------------------------------------------------


class Centred(TrainingRule):
    """Gradient centralization (2020, arXiv:2004.01461): the mean of each row of a matrix's gradient is taken off."""

    @property
    def name(self) -> str:
        return "centred"

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedCentred(model)


class AttachedCentred(AttachedRule):
    def __init__(self, model: nn.Module) -> None:
        self.model, self.progress = model, []

    def after_backward(self, progress: float) -> None:
        self.progress.append(progress)
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.dim() == 2:
                parameter.grad -= parameter.grad.mean(1, keepdim=True)

    def report(self) -> dict[str, Any]:
        return {"calls": len(self.progress), "progress": self.progress[-1]}

    def state_dict(self) -> dict[str, Any]:
        return {"progress": torch.tensor(self.progress, dtype=torch.float64)}

    def load_state_dict(self, state: Any) -> None:
        self.progress = state["progress"].tolist()


def test_after_backward_comes_before_the_clipping() -> None:
    model, expected = net(), net()
    result = ours(model, rules=[Centred()], max_grad_norm=0.05, optimizer="sgd")

    def change() -> None:
        for parameter in (expected.first.weight, expected.last.weight):
            parameter.grad -= parameter.grad.mean(1, keepdim=True)
        norms.append(float(nn.utils.clip_grad_norm_(expected.parameters(), 0.05)))

    norms: list[float] = []
    assert_same(model, by_hand(expected, torch.optim.SGD(expected.parameters(), lr=RATE), change=change))
    assert [step.gradient_norm for step in result.history[1:]] == pytest.approx(norms) and min(norms) > 0.05
    reports = {step.step: step.reports for step in result.history}
    assert reports[0] is None is reports[1] and reports[4] == {"0.Centred": {"calls": 4, "progress": 3 / 6}}


class ConfidencePenalty(TrainingRule):
    """Penalises sure predictions of the labels that count, from the output and the batch alone (2017, 1701.06548)."""

    @property
    def name(self) -> str:
        return "confidence"

    def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
        return AttachedConfidence()


class AttachedConfidence(AttachedRule):
    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        logits = output if isinstance(output, Tensor) else output.logits
        chances = logits.softmax(-1)
        entropy = -(chances * chances.clamp(min=1e-12).log()).sum(-1)
        return -2.0 * entropy[batch["labels"] != -100].mean()


def test_a_penalty_sees_batch_and_output() -> None:
    model, expected = net(), net()
    result = ours(model, rules=[ConfidencePenalty()], optimizer="sgd")
    for _ in range(STEPS):
        expected.zero_grad()
        logits = expected(X)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        (F.cross_entropy(logits, Y) - 2 * entropy).backward()
        torch.optim.SGD(expected.parameters(), lr=RATE).step()
    assert_same(model, expected)
    assert result.history[1].penalty < 0

    seen: list[Any] = []

    class Watch(AttachedRule):
        def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> None:
            seen.append((batch, output))

    class Watches(TrainingRule):
        def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
            return Watch()

    ours(net(), rules=[Watches()], steps=1, loss=lambda model, batch: model(batch["x"]).square().mean())
    assert seen[0][0] is BATCH and seen[0][1].shape == (16, 3)  # also under a loss of one's own


@pytest.mark.parametrize("rule", [Centred(), ConfidencePenalty(), NormsOnly()], ids=lambda rule: type(rule).__name__)
def test_these_rules_keep_what_every_rule_promises(rule: TrainingRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """In our loop, in one by hand and in the Trainer; the rules are not registered, so settings are left out."""
    monkeypatch.delitem(check_rule.__globals__["CHECKS"], "settings are strict")
    checks = check_rule(rule, tiny_model("llama"), tiny_batches("llama", lengths=((9, 4, 6), (7, 2))))
    left = {check.name for check in checks if check.outcome != "holds"}
    quiet = set() if isinstance(rule, Centred) else {"what it reports is kept"}
    assert left == {"what it ends with is saved"} | quiet


def in_trainer(rules: list[TrainingRule], folder: Path, **settings: Any) -> Any:
    rows = [{key: value[0] for key, value in batch.items()} for batch in tiny_batches("llama", lengths=((5,), (5,)))]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    optimizers = settings.pop("optimizers", None)
    model = settings.pop("model", None) or tiny_model("llama")
    defaults: dict[str, Any] = {"max_steps": 2, "max_grad_norm": 0.0, "use_cpu": True, "report_to": []}
    defaults |= {"disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    with RuleCallback(rules) as callback:
        trainer = Trainer(
            model=optimizers(model) if optimizers else model,
            args=arguments,
            train_dataset=rows,  # type: ignore[arg-type]
            callbacks=[callback],
            **({} if optimizers is None else {"optimizers": (optimizers.made, None)}),
        )
        trainer.train()
        return model, callback


def test_in_the_trainer(tmp_path: Path) -> None:
    """The Trainer's own optimizer knows what trains; what cannot be right is refused."""
    plain = tiny_model("llama")
    model, callback = in_trainer([NormsOnly(), Centred()], tmp_path)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {name for name, _ in plain.named_parameters() if "norm." in name}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert callback.reports == {"1.Centred": {"calls": 2, "progress": 0.5}}
    with pytest.raises(ValueError, match=r"max_grad_norm: 1.0 was given, and a rule changes gradients before"):
        in_trainer([Centred()], tmp_path, max_grad_norm=1.0)

    frozen = tiny_model("llama")
    frozen.model.norm.requires_grad_(False)

    class Late(TrainingRule):
        def attach(self, model: nn.Module, optimizer: Any = None, example: Any = None) -> AttachedRule:
            model.model.norm.requires_grad_(True)
            return AttachedRule()

    with pytest.raises(ValueError, match=r"made before a rule let model\.norm\.weight train"):
        in_trainer([Late()], tmp_path, model=frozen)


# -- the best step -----------------------------------------------------------------------------------------------------


def test_the_best_step_by_another_score() -> None:
    """The score is the number of calls, so that the last or the first step is the best, whatever its loss."""
    calls: list[int] = []

    def count(model: nn.Module, batches: Any) -> float:
        assert not model.training and not torch.is_grad_enabled() and len(batches) == 1
        calls.append(float(torch.rand(())))  # its random numbers change nothing
        return float(len(calls))

    plain = net()
    ours(plain)
    for better, best in (("higher", 6), ("lower", 2)):
        calls.clear()
        model = net()
        result = ours(model, keep="best", score=Score(count, better))  # type: ignore[arg-type]
        assert result.best_step == best and result.kept == "best"
        assert [step.score for step in result.history if step.score is not None] == [1, 2, 3, 4]
        assert "score" in [column.header for column in result.table().columns]
        assert len(set(calls)) == 1
    assert_same(_trained_to(6), plain)
    assert_same(model, _trained_to(2))
    assert result.validation == next(step.validation for step in result.history if step.step == 2)
    with pytest.raises(ValueError, match="score: better='best' was given"):
        Score(count, "best")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="the validation score after step 0 is nan"):
        ours(net(), score=Score(lambda model, batches: math.nan, "lower"))


def _trained_to(steps: int) -> nn.Module:
    expected = net()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=RATE, weight_decay=0.0)
    return by_hand(expected, optimizer, [BATCH] * steps)


def test_a_metric_is_a_score() -> None:
    model = net()
    result = ours(model, score="accuracy:better=higher", keep="best", learning_rate=0.1)
    with torch.no_grad():
        hits = float((model(HELD_OUT["x"]).argmax(-1) == Y).double().mean())
    scores = {step.step: step.score for step in result.history if step.step and step.score is not None}
    assert scores[result.best_step] == pytest.approx(hits) == max(scores.values())
    assert ScoreSettings.parse({"accuracy": {"better": "higher"}}) == ScoreSettings("accuracy", "higher")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd:momentum=0.9"])
def test_how_often_is_validated_changes_nothing(optimizer: str) -> None:
    """After 6 steps with dropout, a random loss, a score and a rule that report: the weights are the same bits."""
    models = []
    for every in (1, 2, 6):
        models.append(Net(dropout=0.3))
        train(
            models[-1],
            LOOSE,
            validation=LOOSE[:1],
            steps=6,
            learning_rate=RATE,
            optimizer=optimizer,
            evaluate_every=every,
            keep="last",
            score=Score(lambda model, batches: float(torch.rand(())), "lower"),
            rules=[Centred()],
            loss=_dropped,
            progress=False,
        )
    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), other.parameters(), strict=True))


# -- streams -----------------------------------------------------------------------------------------------------------


def drawn(generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(8, 4, generator=generator)
    return {"x": x, "labels": (x.sum(1) > 0).long()}


def test_a_stream_is_endless_and_follows_from_its_seed() -> None:
    stream = Stream(drawn, seed=3)
    first = stream.take(40)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(first, stream))  # iterating again begins anew
    assert torch.equal(next(stream.start(17))["x"], first[17]["x"]) and torch.equal(stream[17]["x"], first[17]["x"])
    others = [batch["x"] for seed in (2, 3, 4) for batch in Stream(drawn, seed=seed).take(40)]
    assert len({tuple(x.flatten().tolist()) for x in others}) == 120
    with pytest.raises(IndexError, match="no end"):
        stream[-1]


def test_training_on_a_stream_is_resumed_at_its_position(tmp_path: Path) -> None:
    stream, held_out = Stream(drawn, seed=1), Stream(drawn, seed=2).take(2)
    settings: dict[str, Any] = {"batches": stream, "validation": held_out, "gradient_accumulation": 2, "steps": 5}
    whole = Net()
    ours(whole, **settings, loss=_dropped)
    with pytest.raises(_Killed):
        ours(Net(), **settings, out=tmp_path / "cut", loss=_killed_at(8))
    cut = Net()
    ours(cut, **settings, out=tmp_path / "cut", resume=True, loss=_dropped)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), whole.parameters(), strict=True))

    model, expected = Net(), Net()
    ours(model, batches=stream, validation=held_out, optimizer="sgd")
    by_hand(expected, torch.optim.SGD(expected.parameters(), lr=RATE), stream.take(STEPS))
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_streams_are_refused_where_an_end_is_needed(tmp_path: Path) -> None:
    stream = Stream(drawn, seed=1)
    held_out = stream.take(2)
    with pytest.raises(ValueError, match="epochs: 2 was given for a stream, which has no end; give steps"):
        ours(Net(), batches=stream, validation=held_out, steps=None, epochs=2)
    with pytest.raises(DataError, match=r"validation: Stream\(a stream, seed=1\) has no end; give some"):
        ours(Net(), validation=stream)
    with pytest.raises(_Killed):
        ours(Net(), batches=stream, validation=held_out, out=tmp_path / "cut", loss=_killed_at(4))
    with pytest.raises(CheckpointError, match="data is"):
        ours(Net(), batches=Stream(drawn, seed=4), validation=held_out, out=tmp_path / "cut", resume=True)
    with pytest.raises(ValueError, match="batches: 0 was given"):
        stream.take(0)
    with pytest.raises(ValueError, match="seed: -1 was given"):
        Stream(drawn, seed=-1)


def test_bad_names_are_recipe_errors() -> None:
    for parse, given in ((OptimizerSettings.parse, "adamq"), (ScoreSettings.parse, "loss")):
        with pytest.raises(RecipeError):
            parse(given)


def test_without_a_choice_nothing_changes() -> None:
    model = net()
    model.first.requires_grad_(False)
    with trained_parameters(model):
        assert not model.first.weight.requires_grad and model.last.weight.requires_grad
    with trained_parameters(model, trainable="first.*"):
        assert model.first.weight.requires_grad and not model.last.weight.requires_grad
    assert not model.first.weight.requires_grad and model.last.weight.requires_grad


# -- several processes -------------------------------------------------------------------------------------------------

SHARED = """
import sys, torch
from test_training_choices import shared

model = shared(2)
torch.save(model.state_dict(), f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
"""


def shared(processes: int) -> nn.Module:
    """A model that so many processes have trained on the same steps of four batches."""
    model = Net()
    ours(
        model,
        batches=Stream(drawn, 1),
        validation=Stream(drawn, 2).take(2),
        optimizer="sgd:momentum=0.9",
        trainable=["first.*", "last.weight"],
        rules=[Centred()],
        gradient_accumulation=4 // processes,
        max_grad_norm=0.05,
        score="accuracy:better=higher",
        learning_rate=0.1,
    )
    return model


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Under torchrun without an accelerator, on a stream, with clipping behind a rule: the weights of one process."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = shared(1).state_dict()
    for found in (torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(alone["first.weight"], Net().first.weight)
