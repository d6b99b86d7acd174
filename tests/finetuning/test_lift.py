"""LIFT against NumPy's SVD, torch's AdamW whole and masked, a literal loop with full-size moments, and peft's SHiRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.recipe.runner import apply
from actkit.core.store.deltas import Delta
from actkit.core.train.choice import parameter_groups, trained_parameters
from actkit.core.train.masks import Masks, layer_weights
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.finetuning.lift.lift import Lift, LiftAdamW
from actkit.finetuning.lift.principal import principal_mask
from actkit.finetuning.lift.probe import weight_probe
from actkit.finetuning.lift.shira import lift_shira
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_rule, tiny_batches, tiny_model

LENGTHS = ((9, 4, 6), (7, 2), (5, 5), (8, 3, 3))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- principal weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 7)])
@pytest.mark.parametrize("reduce", ["largest", "smallest", "random", "hybrid"])
def test_entries_are_the_largest_after_numpy_s_reduction(shape: tuple[int, int], reduce: Any) -> None:
    weight = drawn(*shape)
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(3))[:4].numpy()
    kept = {"largest": [0, 1, 2, 3], "smallest": [-1, -2, -3, -4], "random": order, "hybrid": [0, 1, -1, -2]}[reduce]
    reduced = np.abs((u[:, kept] * s[kept]) @ vh[kept])
    mask = principal_mask(weight, 4, k=25, reduce=reduce, seed=3)
    assert int(mask.sum()) == 25 and mask.shape == weight.shape
    assert reduced[mask.numpy()].min() >= reduced[~mask.numpy()].max()


def test_numbers_of_entries_and_convolutions() -> None:
    assert int(principal_mask(drawn(40, 60), 5, lora_rank=3).sum()) == 3 * 100
    conv = drawn(8, 3, 3, 3)
    assert torch.equal(principal_mask(conv, 2, k=20).flatten(1), principal_mask(conv.flatten(1), 2, k=20))
    assert torch.equal(principal_mask(conv, 2, k=20, algorithm="gram"), principal_mask(conv, 2, k=20))
    with pytest.warns(UserWarning, match="lora_rank: 9 takes all 48 entries"):
        assert bool(principal_mask(drawn(6, 8), 2, lora_rank=9).all())
    with pytest.warns(UserWarning, match=r"rank_filter: 99 was given, a weight of \[6, 8\] has 6"):
        found = principal_mask(drawn(6, 8), 99, k=5)
    magnitudes = drawn(6, 8).abs()
    assert float(magnitudes[found].min()) >= float(magnitudes[~found].max())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rank_filter": 2}, "k, lora_rank: None and None were given"),
        ({"rank_filter": 2, "k": 1, "lora_rank": 1}, "k, lora_rank: 1 and 1 were given"),
        ({"rank_filter": 2, "k": 0}, "k: 0 was given"),
        ({"rank_filter": 2, "lora_rank": -1}, "lora_rank: -1 was given"),
        ({"rank_filter": 0, "k": 1}, "rank_filter: 0 was given"),
    ],
)
def test_bad_numbers_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        principal_mask(drawn(6, 8), **given)
    with pytest.raises(ValueError, match=r"weight: torch.float32 of shape"):
        principal_mask(drawn(6), 1, k=1)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()


def steps(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        yield torch.randn(9, 12, generator=generator).double(), torch.randint(5, (9,), generator=generator)


def trained(model: nn.Module, optimizer: Any, number: int = 20, after: Callable[[], None] | None = None) -> nn.Module:
    for x, labels in steps(number):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        if after is not None:
            after()
        optimizer.step()
    return model


SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def test_with_all_entries_it_is_adamw() -> None:
    ours, theirs = net(), net()
    ones = {each: torch.ones_like(each, dtype=torch.bool) for each in ours.parameters()}
    trained(ours, LiftAdamW(ours.parameters(), **SETTINGS, eps=1e-6, eps_mode="torch", fixed=ones))
    trained(theirs, torch.optim.AdamW(theirs.parameters(), **SETTINGS, eps=1e-6))
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float((found - expected).detach().abs().max()) <= 1e-7


def test_a_fixed_mask_is_masked_adamw() -> None:
    ours, theirs, start = net(), net(), net()
    chosen = {name: principal_mask(each, 3, k=31) for name, each in ours.named_parameters() if each.dim() == 2}
    weights = {name: each for name, each in theirs.named_parameters() if name in chosen}

    def mask() -> None:
        for name, each in weights.items():
            assert each.grad is not None
            each.grad *= chosen[name]

    fixed = {each: chosen[name] for name, each in ours.named_parameters() if name in chosen}
    optimizer = LiftAdamW(list(fixed), **SETTINGS, eps=1e-6, eps_mode="torch", fixed=fixed)
    trained(ours, optimizer)
    masked = torch.optim.AdamW(list(weights.values()), **SETTINGS, eps=1e-6)
    for x, labels in steps(20):
        masked.zero_grad()
        F.cross_entropy(theirs(x), labels).backward()
        mask()
        masked.step()
        with torch.no_grad():  # decay reaches all weights there
            for name, each in weights.items():
                each.copy_(torch.where(chosen[name], each, start.get_parameter(name)))
    for name, found in ours.named_parameters():
        assert float((found - theirs.get_parameter(name)).detach().abs().max()) <= 1e-12, name
    assert optimizer.density() == pytest.approx(62 / (12 * 16 + 16 * 5))
    assert optimizer.memory() == 62 * (8 + 8 + 8) + 2 * 4


@pytest.mark.parametrize("eps_mode", ["released", "torch"])
def test_chosen_again_it_is_the_loop_with_whole_moments(eps_mode: Any) -> None:
    """The release's way: moments scattered by the old mask, gathered by the new one; the count goes on."""
    ours, theirs = net(), net()
    optimizer = LiftAdamW([p for p in ours.parameters() if p.dim() == 2], 0.03, 2, 3, 4, eps=1e-3, eps_mode=eps_mode)
    trained(ours, optimizer, 15)
    weights = [each for each in theirs.parameters() if each.dim() == 2]
    moments = {each: [torch.zeros_like(each), torch.zeros_like(each)] for each in weights}
    masks: dict[Tensor, Tensor] = {}
    changed = 0
    for step, (x, labels) in enumerate(steps(15)):
        theirs.zero_grad()
        F.cross_entropy(theirs(x), labels).backward()
        with torch.no_grad():
            for each in weights:
                if step % 4 == 0:
                    mask = principal_mask(each, 3, lora_rank=2)
                    if each in masks:
                        changed += int((mask != masks[each]).sum())
                        for moment in moments[each]:
                            moment *= masks[each] & mask
                    masks[each] = mask
                mean, square = moments[each]
                gradient = each.grad
                assert gradient is not None
                mean.copy_(masks[each] * (0.9 * mean + 0.1 * gradient))
                square.copy_(masks[each] * (0.95 * square + 0.05 * gradient**2))
                corrected = math.sqrt(1 - 0.95 ** (step + 1))
                bottom = square.sqrt() + 1e-3 if eps_mode == "released" else square.sqrt() / corrected + 1e-3
                scale = 0.03 / (1 - 0.9 ** (step + 1)) * (corrected if eps_mode == "released" else 1)
                each -= masks[each] * (scale * mean / bottom)
    assert changed > 0
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(ours_, theirs_) for ours_, theirs_ in zip(optimizer.masks().values(), masks.values()))


@pytest.mark.parametrize("choose", ["magnitude", "gradient", "random"])
def test_other_selectors(choose: Any) -> None:
    model = net()
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    optimizer = LiftAdamW([weight], 0.1, 1, update_interval=None, choose=choose)
    x, labels = next(steps(1))
    F.cross_entropy(model(x), labels).backward()
    assert weight.grad is not None
    scores = {"magnitude": before.abs(), "gradient": weight.grad.abs()}
    optimizer.step()
    moved = weight.detach() != before
    assert int(moved.sum()) == 28 and torch.equal(optimizer.masks()[weight], moved)
    if choose in scores:
        assert float(scores[choose][moved].min()) >= float(scores[choose][~moved].max())


def test_bad_use_of_the_optimizer_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    for given, text in (
        ({"lora_rank": 0}, "lora_rank: 0 was given"),
        ({"update_interval": 0}, "update_interval: 0 was given, allowed is 1 or more, or None"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1.0}, "eps"),
    ):
        with pytest.raises(ValueError, match=text):
            LiftAdamW([weight], **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than one parameter group"):
        LiftAdamW([{"params": [weight]}, {"params": [weight]}])
    with pytest.raises(ValueError, match=r"params: a parameter is torch.bfloat16, too coarse"):
        LiftAdamW([nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="step: no parameter has a gradient"):
        LiftAdamW([weight]).step()


def test_a_transposed_parameter_and_a_closure() -> None:
    torch.manual_seed(0)
    turned = nn.Parameter(torch.randn(6, 5).t())
    plain = nn.Parameter(turned.detach().contiguous().clone())
    target = drawn(5, 6, seed=4)
    for each in (turned, plain):
        optimizer = LiftAdamW([each], 0.1, 1, 2, 2)

        def closure(each: Tensor = each, optimizer: LiftAdamW = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (each - target).square().sum()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure) or 0.0) for _ in range(5)]
        assert losses[-1] < losses[0]
    assert torch.equal(turned.contiguous(), plain) and not turned.is_contiguous()


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_a_training_changes_chosen_entries_alone_and_is_resumed(tmp_path: Path) -> None:
    batches = tiny_batches("llama", lengths=LENGTHS)
    rule = Lift(lora_rank=1, rank_filter=3, update_interval=3)
    found = []
    for stop in (False, True):
        model = tiny_model("llama")
        given: dict[str, Any] = {"validation": batches[:1], "steps": 8, "learning_rate": 1e-2, "evaluate_every": 2}
        given |= {"progress": False, "out": tmp_path / f"{stop}", "keep": "last", "weight_decay": 0.0}
        if stop:
            passes = 0

            def count(*_: Any) -> None:
                nonlocal passes
                passes += 1
                if passes == 9:
                    raise KeyError("planned")

            handle = model.register_forward_pre_hook(count)
            with pytest.raises(KeyError, match="planned"):
                train(model, batches[1:], rules=[rule], **given)
            handle.remove()
            model, given["resume"] = tiny_model("llama"), True
        result = train(model, batches[1:], rules=[rule], **given)
        found.append(model)
        report = (result.history[-1].reports or {})["0.Lift"]
        assert 0 < report["density"] < 0.2 and report["state_bytes"] > 0
    start = tiny_model("llama")
    for name, value in found[0].state_dict().items():
        assert torch.equal(value, found[1].state_dict()[name]), name
    delta = Delta.between(found[0], start).sparse()
    weights = layer_weights(start)
    assert set(delta.parts) == set(weights)  # embedding, head and norms are as they were
    each_choice = sum(sum(weight.shape) for weight in weights.values())
    assert each_choice * 0.9 < delta.numbers <= 3 * each_choice
    delta.save(tmp_path / "delta.safetensors")
    Delta.load(tmp_path / "delta.safetensors").add_to(start)
    for name, value in start.state_dict().items():
        torch.testing.assert_close(value, found[0].state_dict()[name], rtol=1e-6, atol=1e-7)


def test_in_a_loop_of_one_s_own() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    rule = Lift(lora_rank=1, rank_filter=2, include=("*mlp*",), exclude=("*.0.*",))
    with trained_parameters(model, [rule]):
        optimizer = rule.optimizer(parameter_groups(model, 0.0, learning_rate=1e-3))
        with attached([rule], model, optimizer) as running:
            loss = model(**batches[0], labels=batches[0]["input_ids"]).loss
            loss.backward()
            optimizer.step()
            running.after_step(1.0)
            masks = rule.attach(model, optimizer).masks
    assert sorted(masks.kept) == sorted(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
    assert all(int(mask.sum()) == sum(mask.shape) for mask in masks.kept.values())


def test_what_cannot_be_trained_so_is_refused() -> None:
    model = tiny_model("llama")
    rounded = apply(model, RoundToNearest(bits=4, group_size=8), progress=False, inplace=False).model
    with pytest.raises(UnsupportedModelError, match="is a ActLinear, whose weight is not a plain matrix"):
        Lift().trainable(rounded)
    with pytest.raises(ValueError, match=r"exclude: \['\*'\] leaves no weight to train"):
        Lift(exclude=("*",)).trainable(model)
    with pytest.raises(ValueError, match="optimizer: AdamW was given, and lift trains by its own"):
        Lift().attach(model, torch.optim.AdamW(model.parameters()))
    batches = tiny_batches("llama", lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"optimizer: .* was given, and Lift brings its own"):
        train(model, batches[1:], validation=batches[:1], steps=1, rules=[Lift()], optimizer="sgd", progress=False)
    with pytest.raises(ValueError, match="rules: Lift, Lift bring an optimizer each"):
        train(model, batches[1:], validation=batches[:1], steps=1, rules=[Lift(), Lift()], progress=False)


def test_the_rule_passes() -> None:
    rule = Lift(lora_rank=1, rank_filter=2, update_interval=2, choose="magnitude", exclude=())
    check_rule(rule, tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS))


# -- a fixed mask through peft, and the probe --------------------------------------------------------------------------


def test_shira_trains_the_same_entries() -> None:
    pytest.importorskip("peft")
    batches = tiny_batches("llama", lengths=LENGTHS)
    plain, start = tiny_model("llama"), tiny_model("llama")
    rule = Lift(lora_rank=1, rank_filter=2, update_interval=None, eps_mode="torch", include=("*mlp*", "*q_proj*"))
    adapted = lift_shira(copy.deepcopy(start), 1, 2, include=("*mlp*", "*q_proj*"))
    values = [each for each in adapted.parameters() if each.requires_grad]
    with trained_parameters(plain, [rule]):
        optimizers = [
            rule.optimizer(parameter_groups(plain, 0.0, learning_rate=1e-2)),
            torch.optim.AdamW(values, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0),
        ]
        for batch in batches:
            for model, optimizer in zip((plain, adapted), optimizers, strict=True):
                optimizer.zero_grad()
                model(**batch, labels=batch["input_ids"]).loss.backward()
                optimizer.step()
    assert sum(each.numel() for each in values) == sum(sum(plain.get_parameter(n).shape) for n in rule.trainable(start))
    merged = adapted.merge_and_unload()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, start.state_dict()[name]) for name, value in plain.state_dict().items())
    with pytest.raises(ValueError, match=r"include: .* is no torch.nn.Linear"):
        lift_shira(tiny_model("gpt2"), 1, 2)


def test_the_probe_disturbs_what_is_chosen_and_puts_it_back() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    mask = principal_mask(model.get_parameter("0.weight"), 3, k=10)
    seen: list[Tensor] = []

    def changed(model: nn.Module) -> float:
        seen.append(model.get_parameter("0.weight").detach().clone())
        return float((seen[-1] - before["0.weight"]).abs().sum())

    probe = weight_probe(model, {"chosen": Masks({"0.weight": mask})}, changed, sigma=0.5, seeds=(0, 1), progress=False)
    assert probe.before == 0 and len(set(probe.choices[0].values)) == 2 and probe.choices[0].entries == 10
    difference = seen[1] - before["0.weight"]
    assert torch.equal(difference != 0, mask)
    scale = 0.5 * float(before["0.weight"].square().mean().sqrt())
    expected = torch.randn(10, generator=torch.Generator().manual_seed(0)).double() * scale
    torch.testing.assert_close(difference[mask], expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert probe.to_dict()["choices"][0]["mean"] == pytest.approx(probe.choices[0].mean)
    with pytest.raises(ValueError, match="masks, seeds, sigma"):
        weight_probe(model, {}, changed)
