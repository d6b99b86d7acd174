"""ProSparse's schedule against the paper's formula, its penalty in our loop, by hand and in transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from actkit.cli.main import app
from actkit.core.ground.errors import RecipeError, UnsupportedModelError
from actkit.core.recipe.rule import dump_rules, parse_rules
from actkit.core.train.rules import RuleCallback, attached
from actkit.core.train.training import train
from actkit.functions.swap import swap
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.prosparse.fatrelu import ShiftedRelu
from actkit.sparsity.prosparse.prosparse import PRESETS, ProSparse
from actkit.testing import tiny_batches, tiny_model

PEAKS, ENDS, START = (0.5, 2.0, 2.0, 8.0), (30, 50, 60, 100), 20


def by_the_paper(t: float, peaks: tuple[float, ...], ends: tuple[float, ...], start: float) -> float:
    """Equation of the paper at step t, written out: 0, then the warm-up, then half-sines between the ends."""
    if t < start:
        return 0.0
    if t <= ends[0]:
        return peaks[0]
    for i in range(1, len(ends)):
        if t <= ends[i]:
            eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * (t - ends[i - 1]) / (ends[i] - ends[i - 1])) + 1)
            return peaks[i - 1] + eta * (peaks[i] - peaks[i - 1])
    return peaks[-1]


def relu_llama(**changes: Any) -> nn.Module:
    return tiny_model("llama", hidden_act="relu", **changes)


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_schedule_is_that_of_the_paper_at_every_step() -> None:
    rule = ProSparse(peaks=PEAKS, ends=ENDS, start=START)
    for t in range(100):
        assert rule.factor(t / 100) == pytest.approx(by_the_paper(t, PEAKS, ENDS, START), abs=1e-12), t
    shares = ProSparse(peaks=PEAKS, ends=tuple(end / 100 for end in ENDS), start=0.2)
    assert [shares.factor(t / 100) for t in range(100)] == [rule.factor(t / 100) for t in range(100)]
    twice = ProSparse(peaks=PEAKS, ends=ENDS, start=START, total=200)  # flat after the last end
    assert twice.factor(0.25) == pytest.approx(rule.factor(0.5)) and twice.factor(0.9) == PEAKS[-1]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_meet_their_peaks_and_are_flat_at_both_ends_of_a_stage(preset: Any) -> None:
    rule, stages = ProSparse(preset=preset), PRESETS[preset]
    total = stages.ends[-1]
    assert rule.factor((stages.start - 1) / total) == 0
    assert rule.factor(stages.start / total) == stages.peaks[0]
    before = rule.factor(0.0)
    for step in range(0, int(total), 50):
        assert rule.factor(step / total) >= before - 1e-15
        before = rule.factor(step / total)
    for i, (peak, end) in enumerate(zip(stages.peaks, stages.ends, strict=True)):
        assert rule.factor(end / total) == pytest.approx(peak, abs=1e-12)
        if i == 0 or peak == stages.peaks[i - 1]:
            continue
        length = (end - stages.ends[i - 1]) / total
        tiny = 1e-5 * length
        middle = rule.factor(end / total - length / 2 + tiny) - rule.factor(end / total - length / 2)
        first = rule.factor(end / total - length + tiny) - rule.factor(end / total - length)
        last = rule.factor(end / total) - rule.factor(end / total - tiny)
        assert first < 1e-3 * middle and last < 1e-3 * middle


def test_seven_b_is_the_schedule_where_none_is_given() -> None:
    assert ProSparse().stages == ProSparse(preset="7b").stages
    assert ProSparse().stages.start == 5000 / 16500 and ProSparse().stages.ends[-1] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peaks": (1.0, 2.0), "ends": (0.5,), "start": 0.1}, "ends: 1 were given for 2 peaks"),
        ({"peaks": (1.0, 2.0), "ends": (0.5, 0.5), "start": 0.1}, "ends: .* must rise"),
        ({"peaks": (1.0,), "ends": (0.5,), "start": 0.5}, "ends: .* with start 0.5"),
        ({"peaks": (2.0, 1.0), "ends": (0.5, 0.6), "start": 0.1}, "must not fall"),
        ({"peaks": (0.0, 1.0), "ends": (0.5, 0.6), "start": 0.1}, "above 0"),
        ({"peaks": (1.0, math.inf), "ends": (0.5, 0.6), "start": 0.1}, "above 0 and finite"),
        ({"peaks": (1.0,), "ends": (0.5,)}, "start: missing"),
        ({"start": 0.1}, "peaks, ends: missing"),
        ({"peaks": (1.0,), "ends": (0.5,), "start": -0.1}, "start"),
        ({"peaks": (1.0,), "ends": (50,), "start": 10, "total": 40}, "total: 40 was given and the last end is 50"),
        ({"peaks": (1.0,), "ends": (0.5,), "start": 0.1, "total": 40}, "total goes with step numbers"),
        ({"preset": "7b", "start": 0.1}, "preset: '7b' was given beside start"),
        ({"preset": "70b"}, "preset"),
        ({"sites": ()}, "sites"),
        ({"reduction": "max"}, "reduction"),
        ({"lambda": 1}, "lambda"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProSparse(**settings)


def test_by_name_and_back() -> None:
    (rule,) = parse_rules("prosparse:peaks=[0.5, 2],ends=[0.3, 1],start=0.2")
    assert rule == ProSparse(peaks=(0.5, 2), ends=(0.3, 1), start=0.2)
    for each in (rule, ProSparse(), ProSparse(preset="13b", reduction="sum")):
        assert parse_rules(dump_rules([each])) == (each,)
    with pytest.raises(RecipeError, match=r"prosparse: .*ends: 1 were given for 2 peaks"):
        parse_rules("prosparse:peaks=[0.5, 2],ends=[0.3],start=0.2")


# -- the penalty -------------------------------------------------------------------------------------------------------

ALWAYS = ProSparse(peaks=(3.0,), ends=(1.0,), start=0.0)


def hidden_values(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """h of each block's MLP at the real tokens, with its graph, by plain hooks."""
    seen: list[Tensor] = []
    real = batch["attention_mask"].bool()
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][real]))
        for layer in model.model.layers
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_penalty_gradients_and_zeros_are_those_written_out(reduction: Any) -> None:
    """3 * the sum over blocks of the mean over real tokens of |h| (float64); the gradient reaches gate and up."""
    model, batch = relu_llama(), tiny_batches("llama")[0]
    rule = ALWAYS.model_copy(update={"reduction": reduction})
    running = rule.attach(model)
    model(**batch)
    penalty = running.penalty(batch["attention_mask"])
    assert penalty is not None
    penalty.backward()
    found = running.sparsity
    running.detach()
    double = relu_llama().double()
    hidden = hidden_values(double, batch)
    expected = 3 * sum(h.abs().mean() if reduction == "mean" else h.abs().sum(-1).mean() for h in hidden)
    expected.backward()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(double.named_parameters())
    for name in ("gate_proj", "up_proj"):
        path = f"model.layers.0.mlp.{name}.weight"
        gradient = model.get_parameter(path).grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient.double(), theirs[path].grad, rtol=1e-3, atol=1e-5)
    assert list(found) == ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]
    assert list(found.values()) == pytest.approx([float((h == 0).double().mean()) for h in hidden])


def test_zeros_are_counted_before_start_over_all_passes_of_a_step_and_never_trained_on() -> None:
    model, batches = relu_llama(), tiny_batches("llama")
    running = ProSparse(peaks=(1.0,), ends=(1.0,), start=0.5).attach(model)
    assert running.sparsity == {}
    for batch in batches:
        model(**batch)
        assert running.penalty(batch["attention_mask"]) is None
    activity = neuron_activity(model, batches, progress=False)
    running.before_step(0.0)  # clears what neuron_activity's passes left too
    assert running.sparsity == {}
    for batch in batches:
        model(**batch)
        running.penalty(batch["attention_mask"])
    expected = {layer.site: 1 - layer.share for layer in activity.layers}
    assert running.sparsity == pytest.approx(expected)
    running.before_step(0.5)
    model(**batches[0])
    assert running.penalty(batches[0]["attention_mask"]).requires_grad
    running.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradient_checkpointing_counts_once_and_gives_the_same_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model, batch = relu_llama().train(), tiny_batches("llama")[0]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        running = ALWAYS.attach(model)
        for _ in range(2):
            model.zero_grad()
            (model(**batch, labels=batch["input_ids"]).loss + running.penalty(batch["attention_mask"])).backward()
        found.append((running.sparsity, model.model.layers[0].mlp.gate_proj.weight.grad))
        running.detach()
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match="re-entrant"):
        ALWAYS.attach(model)


@pytest.mark.parametrize(("kind", "old"), [("llama", "silu"), ("gpt2", "gelu_tanh"), ("bert", "gelu"), ("vit", "gelu")])
def test_smooth_activations_are_refused_until_they_are_swapped(kind: str, old: str) -> None:
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    with pytest.raises(UnsupportedModelError, match=f"is {old}, which has no exact zeros.*swap"):
        ALWAYS.attach(model)
    swap(model, old, "relu")
    running = ALWAYS.attach(model)
    model(**batch)
    mask = batch.get("attention_mask")
    assert running.penalty(mask).item() > 0
    assert all(0.2 < share < 0.8 for share in running.sparsity.values()) and len(running.sparsity) == 2
    running.detach()
    swap(model, "relu", lambda: ShiftedRelu(0.5))
    with attached([ALWAYS], model) as rules:
        model(**batch)
        assert rules.penalty(mask).item() > 0


def test_a_traced_model_by_the_path_of_a_layer() -> None:
    model, x = tiny_model("mlp"), tiny_batches("mlp")[0]
    running = ALWAYS.model_copy(update={"sites": ("layer.input:second",)}).attach(model, example=x)
    model(x)
    hidden = model.act(model.first(x))
    assert running.penalty().item() == pytest.approx(3 * hidden.mean().item(), rel=1e-5)
    assert list(running.sparsity.values()) == pytest.approx([float((hidden == 0).double().mean())])
    running.detach()


# -- three ways to train -----------------------------------------------------------------------------------------------


def test_our_loop_adds_the_factor_of_each_step_and_zeros_become_more() -> None:
    rule = ProSparse(peaks=(1.0, 30.0, 30.0), ends=(0.3, 0.7, 1.0), start=0.2)
    batches = tiny_batches("llama", lengths=((12, 12, 12), (12, 12, 12), (9, 12, 12)))
    shares = []
    for rules in ((), (rule,)):
        model = relu_llama()
        trained = train(
            model, batches, validation=batches[:1], steps=60, learning_rate=1e-2, rules=rules, keep="last",
            progress=False,
        )  # fmt: skip
        shares.append(neuron_activity(model, batches, progress=False).share)
    assert shares[1] < shares[0] - 0.1
    penalties = [step.penalty for step in trained.history[1:]]
    assert penalties[:12] == [None] * 12 and all(penalty > 0 for penalty in penalties[12:])
    jump, later = penalties[12], penalties[15]  # factor 1, before anything has been penalised; still 1
    assert 0.5 * jump < later < 1.5 * jump


def test_transformers_trainer_gets_the_gradient_of_the_scheduled_factor(tmp_path: Path) -> None:
    """The third of four steps, under SGD at rate 0: loss + factor(2 / 4) * penalty, against float64."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(1, 40, (8,), generator=generator)), "labels": ids} for _ in range(8)]
    rule = ProSparse(peaks=(1.0, 5.0), ends=(0.25, 0.75), start=0.2)
    factor = by_the_paper(0.5, (1.0, 5.0), (0.25, 0.75), 0.2)
    model, found = relu_llama(), {}
    losses: list[float] = []
    with RuleCallback([rule]) as callback:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=1, max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_post_hook(
            lambda *_: found.setdefault(len(found), model.model.layers[0].mlp.up_proj.weight.grad.clone())
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback], optimizers=(optimizer, None))
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    double = relu_llama().double()
    ids = torch.stack([row["input_ids"] for row in rows[4:6]])
    hidden = hidden_values(double, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    logits = double(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = loss + factor * sum(h.abs().mean() for h in hidden)
    loss.backward()
    assert losses[2] == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(found[2].double(), double.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-3, atol=1e-5)


def test_command_line_trains_under_it(tmp_path: Path) -> None:
    """The embedded ReLU model for two steps on a small file; the SwiGLU one is refused, with what to do."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i} says a few words about the number {i * i}." for i in range(60)))
    settings = ["--steps", "2", "--sequences", "4", "--length", "16", "--out", str(tmp_path / "out"), "--overwrite"]
    settings += ["--rule", "prosparse:peaks=[1, 4],ends=[0.5, 1],start=0"]
    result = CliRunner().invoke(app, ["train", "relu", "--data", str(text), *settings])
    assert result.exit_code == 0, result.output
    refused = CliRunner().invoke(app, ["train", "swiglu", "--data", str(text), *settings])
    assert refused.exit_code != 0 and "swap(model, 'silu', 'relu')" in str(refused.exception)
