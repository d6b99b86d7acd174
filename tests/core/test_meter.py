"""The meter: what it reads and when, that it changes nothing, and that it goes on where it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import batches, build

from actkit.core.ground.errors import CheckpointError, DataError, RecipeError
from actkit.core.train.meter import Meter, readings
from actkit.core.train.training import train
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.testing import check_rule, tiny_batches, tiny_model
from actkit.testing.rules import CHECKS

ANALYSIS = "neuron_activity:threshold=0.05"


def test_it_keeps_what_rules_promise() -> None:
    rule = Meter(analysis=ANALYSIS, points=3)
    checks = check_rule(rule, tiny_model("llama"), tiny_batches("llama", lengths=((9, 4, 6), (7, 2))))
    assert [check.name for check in checks] == list(CHECKS)
    assert {check.name for check in checks if check.outcome != "holds"} == {"what it ends with is saved"}


def trained(rule: Any, steps: int = 6, **settings: Any) -> Any:
    model = build("llama")
    data = batches("llama")
    return train(
        model, data, validation=data[:1], steps=steps, rules=[rule], learning_rate=1e-2, progress=False, **settings
    )


@pytest.mark.parametrize("keep", ["best", "last"])
def test_readings_are_those_of_the_model_at_each_step(keep: Any, tmp_path: Any) -> None:
    """Against trainings that end at that step: their last weights, analysed by hand."""
    held = batches("llama")[:1]
    rule = Meter(analysis={"neuron_activity": {"threshold": 0.05}}, at=(0, 2, 5, 6), batches=held)
    found = trained(rule, out=tmp_path / "run", evaluate_every=3, keep=keep)
    read = readings(found)
    assert [step for step, _ in read] == [0, 2, 5, 6]
    assert json.loads(json.dumps(readings(tmp_path / "run", "neuron_activity"))) == json.loads(json.dumps(read))
    start = neuron_activity(build("llama"), held, threshold=0.05, progress=False).to_dict()
    assert {key: value for key, value in read[0][1].items() if key != "step"} == start
    if keep == "last":
        end = neuron_activity(found.model, held, threshold=0.05, progress=False).to_dict()
        assert {key: value for key, value in read[-1][1].items() if key != "step"} == end
    assert start != {key: value for key, value in read[-1][1].items() if key != "step"}
    settings = [step.reports["0.Meter"]["settings"] for step in found.history if step.reports]
    assert settings == [{"threshold": 0.05}] * 2  # at the two steps that were validated


def test_the_first_batch_of_the_training_is_read_by_default() -> None:
    data = batches("llama")
    read = readings(trained(Meter(analysis=ANALYSIS, at=(0,))))
    start = neuron_activity(build("llama"), data[:1], threshold=0.05, progress=False).to_dict()
    assert read == [(0, {"step": 0, **start})]


@pytest.mark.parametrize("spacing", ["linear", "log", "both"])
@pytest.mark.parametrize("points", [2, 3, 40])
def test_points_span_the_training(spacing: Any, points: int) -> None:
    steps = sorted(Meter(analysis="profile", points=points, spacing=spacing).steps(2000))
    assert steps[0] == 0 and steps[-1] == 2000 and len(steps) <= points + 1
    gaps = torch.tensor(steps).diff()
    if points == 40:
        assert len(steps) >= 32
        assert spacing != "linear" or int(gaps.max() - gaps.min()) <= 1
        assert spacing == "linear" or (steps[1] == 1 and float((gaps[1:] >= gaps[:-1]).double().mean()) > 0.5)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(RecipeError, match="'nothing' is not known"):
        trained(Meter(analysis="nothing"))
    with pytest.raises(DataError, match="meter: there is no batch to read"):
        Meter(analysis="profile").attach(build("llama"))
    with pytest.raises(ValueError, match="at: step 9 was given, and the training has 6"):
        trained(Meter(analysis=ANALYSIS, at=(1, 9)))
    running = Meter(analysis=ANALYSIS).attach(build("llama"), example=batches("llama")[0])
    other = Meter(analysis=ANALYSIS).attach(build("llama"), example=batches("llama")[1])
    with pytest.raises(CheckpointError, match="meter: its batches are not those"):
        other.load_state_dict(running.state_dict())
    with pytest.raises(DataError, match="no meter of eafo read there"):
        readings(trained(Meter(analysis=ANALYSIS, at=(1,)), steps=1), "eafo")


# -- the end of a training ---------------------------------------------------------------------------------------------

PLAIN = {
    "schedule": "constant",
    "warmup": 0.0,
    "keep": "last",
}  # a rate that does not depend on how many steps there are


def shares(**settings: Any) -> list[tuple[int, float]]:
    rule = Meter(analysis=ANALYSIS, spacing="linear", points=7)
    return [(step, found["share"]) for step, found in readings(trained(rule, **PLAIN, **settings))]


def test_a_training_ends_after_the_first_step_whose_reading_is_so() -> None:
    """Against one of as many steps, bit for bit."""
    after = shares()[1:]
    least = min(value for _, value in after[:4])
    last = next(step for step, value in after if value == least)
    until = f"share < {least + 1e-9}"
    rule = Meter(analysis=ANALYSIS, spacing="linear", points=7, until=until)
    found = trained(rule, **PLAIN, evaluate_every=6)
    assert found.steps == last and found.history[-1].validation is not None
    assert (
        found.ended == f"share was {least:.4g} after step {last} ({until})" and found.to_dict()["ended"] == found.ended
    )
    assert [step for step, _ in readings(found)] == list(range(last + 1))
    short = trained(Meter(analysis=ANALYSIS, at=(0,)), steps=last, **PLAIN)
    assert short.ended is None
    pairs = zip(found.model.state_dict().values(), short.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_one_that_is_never_so_ends_nothing_and_the_first_model_is_not_asked() -> None:
    assert trained(Meter(analysis=ANALYSIS, at=(0, 6), until="share > -1")).ended is None  # its last step anyway
    assert trained(Meter(analysis=ANALYSIS, points=3, until="share < 0")).steps == 6


def test_its_end_is_resumed_and_deeper_numbers_have_names() -> None:
    data = batches("llama")
    rule = Meter(analysis=ANALYSIS, at=(1,), until="layers.1.share > 0")
    running = rule.attach(build("llama"), example=data[0])
    running.before_step(0.0)
    assert running.over() is None
    running.after_step(0.25)
    again = rule.attach(build("llama"), example=data[0])
    again.load_state_dict(running.state_dict())
    assert again.over() == running.over() and running.over() is not None


def test_the_trainer_ends_too(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    from actkit.core.train.rules import RuleCallback

    model, data = build("llama"), batches("llama")[0]
    rows = [{"input_ids": row, "labels": row} for row in data["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rule = Meter(analysis=ANALYSIS, at=(2,), until="share > 0", batches=[data])
    with RuleCallback([rule]) as callback:
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
    assert trainer.state.global_step == 2
