"""AP against torch.nn.utils.prune, a NumPy transcription of the paper's step, and what must hold of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from actkit.compression.ap.ap import ActivatingPruner, Ap, ap_select, at_random, by_torch, layer_magnitude
from actkit.compression.ap.dead_neurons import Silence, dead_neuron_rate
from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.train.masks import KeepMasks, Masks
from actkit.core.train.training import train
from actkit.core.watch.statistics import Rows
from actkit.testing import check_rule, tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN


def transcribed(now: Any, reference: Any, alive: Any, number: int) -> Any:
    """Step 4 of the paper's loop, with the threshold that the release takes."""
    negative = np.logical_and(alive, now < 0)
    moved = np.abs(now - reference)
    ordered = np.sort(moved[negative])
    threshold = ordered[number]
    dropped = np.logical_and(negative, moved <= threshold)
    return np.logical_and(alive, np.logical_not(dropped))


@pytest.mark.parametrize("case", range(20))
def test_the_released_step_is_the_transcription_s(case: int) -> None:
    generator = torch.Generator().manual_seed(case)
    now, reference = torch.randn(2, 500, generator=generator)
    if case % 2:  # with ties
        now, reference = (now * 4).round(), (reference * 4).round()
    alive = torch.rand(500, generator=generator) < 0.7
    number = 1 + case * 3
    found = ap_select(now, reference, alive, number, released=True)
    assert np.array_equal(found.numpy(), transcribed(now.numpy(), reference.numpy(), alive.numpy(), number))
    ours = ap_select(now, reference, alive, number)
    assert int((alive & ~ours).sum()) == number and not bool((found & ~ours & alive).any())
    assert bool((now[alive & ~ours] < 0).all())


def test_controls_and_signs() -> None:
    now = torch.tensor([-1.0, 2.0, -3.0, 4.0, -5.0])
    reference = torch.tensor([0.0, 2.0, -2.5, 4.0, -5.0])
    alive = torch.tensor([True, True, True, False, True])
    assert ap_select(now, reference, alive, 2).tolist() == [True, True, False, False, False]
    assert ap_select(now, reference, alive, 1, sign="any").tolist() == [True, False, True, False, True]
    turned = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    assert ap_select(now, reference, alive, 2, scale=turned).tolist() == [True, False, True, False, False]
    drawn = [ap_select(now, reference, alive, 1, order="random", seed=seed) for seed in range(20)]
    assert {int((alive & ~each).nonzero()) for each in drawn} == {0, 2, 4}
    with pytest.raises(ValueError, match="number: 4 was given, and 3 negative weights are alive"):
        ap_select(now, reference, alive, 4)


def network(seed: int = 0) -> DigitsCNN:
    torch.manual_seed(seed)
    return DigitsCNN(channels=(4, 6), hidden=8)


def moved(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("base", ["global_magnitude", by_torch(prune.L1Unstructured)], ids=["ours", "torch's"])
def test_magnitudes_are_pruned_as_by_torch(base: Any) -> None:
    """Bit for bit, over three cycles."""
    model, theirs = network(), network()
    pruner = ActivatingPruner(model, base, share=0.3, activating=0.0, rewind="none")
    layers = [(each, "weight") for each in theirs.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    for _ in range(3):
        report = pruner.prune()
        prune.global_unstructured(layers, prune.L1Unstructured, amount=report.by_base)
        expected = Masks.of_torch(theirs).kept
        assert all(torch.equal(pruner.masks.kept[name], kept) for name, kept in expected.items())
        assert report.by_ap == 0 and report.alive == pruner.masks.alive


def test_each_layer_loses_its_share_and_chance_is_repeatable() -> None:
    model = network()
    weights = {name: each.detach() for name, each in ActivatingPruner(model).weights.items()}
    alive = Masks.all_of(weights).kept
    kept = layer_magnitude(weights, alive, 500)
    total = sum(each.numel() for each in alive.values())
    for name, each in kept.items():
        assert abs(int((~each).sum()) - 500 * each.numel() / total) <= 1
        assert float(weights[name][~each].abs().max()) <= float(weights[name][each].abs().min())
    assert sum(int((~each).sum()) for each in kept.values()) == 500
    drawn = [at_random(weights, alive, 77) for _ in range(2)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in alive)
    assert sum(int((~each).sum()) for each in drawn[0].values()) == 77


def test_a_cycle_prunes_what_was_asked_and_rewinds_all() -> None:
    model = network()
    start = copy.deepcopy(model.state_dict())
    pruner = ActivatingPruner(model, share=0.2, activating=0.02, spare=["conv1.*"])
    total = pruner.masks.total
    for _ in range(3):
        before = dict(pruner.masks.kept)
        alive = pruner.masks.alive
        moved(model)
        report = pruner.prune()
        assert report.by_base + report.by_ap == round(0.2 * alive) and report.by_ap == int(0.02 * alive)
        assert pruner.masks.alive == alive - round(0.2 * alive) == report.alive and report.total == total
        assert all(not bool((pruner.masks.kept[name] & ~kept).any()) for name, kept in before.items())
        pruner.rewind()
        for name, value in model.state_dict().items():
            kept = pruner.masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, start[name] * kept), name


def test_pre_activations_never_fall_where_inputs_are_not_negative() -> None:
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(9, 14, generator=generator, dtype=torch.float64)
        x = torch.rand(30, 14, generator=generator, dtype=torch.float64)
        alive = torch.rand(9, 14, generator=generator) < 0.8
        now, reference = weight * alive, weight + torch.randn(9, 14, generator=generator, dtype=torch.float64)
        after = now * ap_select(now, reference, alive, 12)
        z, risen = x @ now.t(), x @ after.t()
        assert bool((risen >= z - 1e-12).all()) and float((risen <= 0).double().mean()) <= float(
            (z <= 0).double().mean()
        )


def test_a_norm_with_a_negative_scale_turns_the_sign() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))
            return found

    torch.manual_seed(0)
    model = Normed().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1]))
    pruner = ActivatingPruner(model, share=0.2, activating=0.1, parameters=["conv*"], norms={"conv": "norm"})
    x = torch.rand(5, 3, 6, 6)
    kept = pruner._activated({"conv.weight": model.conv.weight.detach()}, dict(pruner.masks.kept), 20)["conv.weight"]
    signs = model.conv.weight[~kept] * model.norm.weight.view(4, 1, 1, 1).expand_as(kept)[~kept]
    assert int((~kept).sum()) == 20 and bool((signs < 0).all())
    before = model.norm(model.conv(x))
    with torch.no_grad():
        model.conv.weight.mul_(kept)
    assert bool((model.norm(model.conv(x)) >= before - 1e-6).all())
    assert pruner.prune().negative_scales == 2
    with pytest.raises(ValueError, match="norms: 'conv': 'act' was given"):
        ActivatingPruner(model, norms={"conv": "act"})
    turned = nn.Sequential(Conv1D(4, 3), nn.BatchNorm1d(4))
    scale = ActivatingPruner(turned, norms={"0": "1"})._scale("0.weight", turned.get_parameter("0.weight"))
    assert scale.shape == (3, 4)


# -- dead neurons ------------------------------------------------------------------------------------------------------


def brute_force(model: DigitsCNN, x: Tensor) -> tuple[float, float]:
    """The rates of elements and of channels, from the activations."""
    first = model.act1(model.conv1(x))
    second = model.act2(model.conv2(first))
    third = model.act3(model.fc1(model.flatten(second)))
    elements = torch.cat([each.flatten(1) == 0 for each in (first, second, third)], 1)
    channels = torch.cat([(first == 0).flatten(2).all(-1), (second == 0).flatten(2).all(-1), third == 0], 1)
    return float(elements.double().mean()), float(channels.double().mean())


def test_rates_are_those_of_counting() -> None:
    model, x = network(), torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        model.conv2.bias.sub_(0.4)  # some channels are silent at all positions
    batches = [{"pixel_values": x[:16]}, {"pixel_values": x[16:]}]
    elements, channels = brute_force(model, x)
    found = dead_neuron_rate(model, batches, progress=False)
    assert found.total == found.dynamic == pytest.approx(elements, abs=1e-12) and found.static == 0
    of_channels = dead_neuron_rate(model, batches, granularity="channel", progress=False)
    assert of_channels.total == pytest.approx(channels, abs=1e-12) and 0 < of_channels.total < found.total
    one = dead_neuron_rate(model, batches, layers=["act3"], progress=False)
    assert [layer.path for layer in one.layers] == ["act3"]
    assert "silenced" in str(found.table().columns[3].header) and found.to_dict()["layers"][0]["channels"] == 4


def test_what_is_pruned_away_is_static() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(F.relu(self.first(x)))
            return found

    torch.manual_seed(0)
    model, x = Functional(), torch.randn(30, 4)
    with torch.no_grad():
        model.first.weight[:3] = 0
        model.first.bias[:3] = torch.tensor([-1.0, 0.0, 1.0])  # the third is pruned and never silent
    found = dead_neuron_rate(model, [x], progress=False)
    assert found.static == pytest.approx(2 / 8)
    assert found.total == pytest.approx(float((model.first(x) <= 0).double().mean()))
    assert [layer.path for layer in found.layers] == ["relu before last"]


@pytest.mark.parametrize(("kind", "changes"), [("llama", {"hidden_act": "relu"}), ("phi3", {"hidden_act": "relu"})])
def test_behind_a_gate_the_gate_s_units_count(kind: str, changes: dict[str, Any]) -> None:
    model, batches = tiny_model(kind, **changes), tiny_batches(kind)
    with torch.no_grad():
        mlp = model.get_submodule("model.layers.0.mlp")
        (mlp.gate_proj if kind == "llama" else mlp.gate_up_proj).weight[:2] = 0
    first, second = dead_neuron_rate(model, batches, progress=False).layers
    assert first.pruned.tolist() == [True, True] + [False] * (len(first.dead) - 2) and first.dead[:2].tolist() == [1, 1]
    assert first.static == pytest.approx(2 / len(first.dead)) and second.static == 0 and 0 < second.dynamic < 1


def test_smooth_functions_need_an_eps() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(ValueError, match=r"eps: 0 was given, and model.layers.0.mlp.act_fn.* gives no exact zeros"):
        dead_neuron_rate(model, batches, progress=False)
    rates = [dead_neuron_rate(model, batches, eps=eps, progress=False).total for eps in (1e-4, 1e-1)]
    assert 0 <= rates[0] < rates[1] <= 1


def test_shards_of_a_measure_are_merged() -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).relu()
    rows = Rows(torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4))
    whole, parts = Silence(), [Silence(), Silence()]
    whole.update(x, rows)
    for part, chosen in zip(parts, (slice(0, 6), slice(6, 12)), strict=True):
        part.update(x[chosen], rows[chosen])
    parts[0].merge(parts[1])
    for granularity in ("element", "channel"):
        (number, expected), (same, found) = whole.rates(granularity), parts[0].rates(granularity)  # type: ignore[arg-type]
        assert number == same and torch.equal(expected, found)
    assert torch.equal(whole.rates("channel")[1], (x.view(4, 3, 5) == 0).all(1).double().mean(0))


def test_bad_data_is_refused() -> None:
    with pytest.raises(DataError, match="batches: 0 were given"):
        dead_neuron_rate(network(), [])
    batches = [{"pixel_values": torch.rand(2, 1, 8, 8)}]
    with pytest.raises(ValueError, match=r"layers: \['x'\] fit no activation; the model has act1, act2, act3"):
        dead_neuron_rate(network(), batches, layers=["x"], progress=False)
    with pytest.raises(DataError, match="layers: this model has no activation"):
        dead_neuron_rate(nn.Sequential(nn.Linear(3, 2)), [torch.rand(2, 3)], progress=False)
    for settings, text in (
        ({"eps": -1}, "eps: -1 was given"),
        ({"granularity": "row"}, "granularity: 'row' was given"),
    ):
        with pytest.raises(ValueError, match=text):
            dead_neuron_rate(network(), batches, **settings)  # type: ignore[arg-type]


# -- as a rule ---------------------------------------------------------------------------------------------------------


def test_a_training_has_its_cycles(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"pixel_values": torch.rand(16, 1, 8, 8, generator=generator), "labels": torch.arange(16) % 10}
        for _ in range(4)
    ]
    models = []
    for stop in (False, True):
        model = network()
        rule = Ap(share=0.3, activating=0.05, cycles=3)
        given: dict[str, Any] = {"validation": batches[:1], "steps": 12, "learning_rate": 0.01, "schedule": "constant"}
        given |= {"evaluate_every": 3, "progress": False, "out": tmp_path / f"{stop}", "optimizer": "sgd:momentum=0.9"}
        if stop:
            interrupted(model, batches, [rule], given)
            model = network()
            given["resume"] = True
        trained = train(model, batches, rules=[rule], **given)
        models.append(model)
        reports = [step.reports["0.Ap"] for step in trained.history if step.reports]
        assert [report["cycle"] for report in reports] == [0, 1, 2, 3] and trained.kept == "last"
    total = sum(each.numel() for each in ActivatingPruner(network()).weights.values())
    alive = total
    for _ in range(3):
        alive -= round(0.3 * alive)
    assert Masks.of_zeros(models[0]).alive + total - Masks.of_zeros(models[0]).total == alive
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def interrupted(model: nn.Module, batches: Any, rules: Any, given: Any) -> None:
    """A training that is cut off after 8 steps, in its third part."""

    class Stop(Exception):
        pass

    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 8 * 1 + 4:  # 8 steps, and validations before
            raise Stop

    handle = model.register_forward_pre_hook(count)
    with pytest.raises(Stop):
        train(model, batches, rules=rules, **given)
    handle.remove()


def test_a_cycle_by_hand_is_that_of_the_rule() -> None:
    """With trainings of their own between, under `keep_masks`."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"pixel_values": torch.rand(16, 1, 8, 8, generator=generator), "labels": torch.arange(16) % 10}]
    settings: dict[str, Any] = {
        "validation": [{**batches[0], "pixel_values": batches[0]["pixel_values"].flip(0)}],
        "learning_rate": 0.05,
        "schedule": "constant",
        "warmup": 0.0,
        "optimizer": "sgd:momentum=0.9",
        "keep": "last",
        "progress": False,
    }
    by_rule = network()
    train(by_rule, batches, steps=9, rules=[Ap(share=0.3, activating=0.05, cycles=2)], **settings)
    by_hand = network()
    pruner = ActivatingPruner(by_hand, share=0.3, activating=0.05)
    train(by_hand, batches, steps=3, **settings)
    for _ in range(2):
        pruner.prune()
        pruner.rewind()
        train(by_hand, batches, steps=3, rules=[KeepMasks.of(pruner.masks)], **settings)
    for name, value in by_rule.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name]), name


def test_bad_values_are_refused() -> None:
    for given, text in (
        ({"share": 1.0}, "share, activating: 1.0 and 0.02"),
        ({"share": 0.2, "activating": 0.2}, "share, activating: 0.2 and 0.2"),
        ({"base": "x"}, "base: 'x' was given; allowed are global_magnitude"),
        ({"base": lambda weights, alive, number: alive}, "base: it pruned 0 weights, "),
        ({"base": lambda weights, alive, number: {}}, "base: it gave masks of other weights"),
    ):
        with pytest.raises(ValueError, match=text):
            ActivatingPruner(network(), **given).prune()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activating: 0.3 was given; give less than share=0.2"):
        Ap(activating=0.3)
    with pytest.raises(CheckpointError, match="ap: the state is of another rule"):
        Ap().attach(network()).load_state_dict({"cycle": 1})


def test_the_dead_are_counted_before_and_after() -> None:
    model = network()
    batches = [{"pixel_values": torch.rand(8, 1, 8, 8)}]
    report = ActivatingPruner(model, share=0.5, activating=0.3).prune(batches)
    assert report.dead_before is not None and report.dead_after is not None
    assert report.dead_after.total == dead_neuron_rate(model, batches, progress=False).total
    assert report.dead_before.total == dead_neuron_rate(network(), batches, progress=False).total


def test_the_rule_passes() -> None:
    batches = tiny_batches("llama", lengths=((9, 4, 6), (7, 2), (5, 5), (8, 3, 3)))
    check_rule(Ap(share=0.4, activating=0.1, cycles=2), tiny_model("llama", hidden_act="relu"), batches)
