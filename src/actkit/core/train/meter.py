"""The meter: an analysis of a model, read again and again while it is trained.

    trained = train(model, batches, validation=held_out, rules=[Meter(analysis="massive_activations", points=40)])
    for step, found in readings(trained):
        ...

It adds no penalty and changes nothing: gradients and weights are the same bits with it and without. What it reads
stands in the history, and so in `training.json`, at the next step that is validated. With `until='share < 0.2'` the
training ends after the first step whose reading is so.

When to use it: to see how something grows while a model learns, without saved checkpoints.
Cost: one run of the analysis at each reading.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.ground.fingerprint import fingerprint
from actkit.core.recipe.analysis import Analysis, parse_analysis
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.train.training_setup import RECORD

if TYPE_CHECKING:
    from actkit.core.train.training import Trained


class Meter(TrainingRule):
    """Read an analysis at steps of a training.

    Attributes:
        analysis: its name, 'name:setting=value', or {name: settings}.
        points: how many steps are read, the model before the first one and the last among them; fewer if several fall
            on one step.
        spacing: how they lie: 'linear', 'log' (dense at the beginning), or 'both', half of each.
        at: these steps instead; 0 is the model before training.
        until: 'name < number' or 'name > number' of a reading after a step, at which the training ends; what stands
            deeper in the dictionary of the result is 'layers.0.name'. None: it goes on to its last step.
        batches: what is read, the same each time; None is the first batch of the training. Not written to files.

    Raises:
        ValueError: a value is out of bounds, or the analysis is unknown.
    """

    only_reads: ClassVar[bool] = True
    analysis: str | dict[str, dict[str, Any] | None]
    points: int = Field(40, ge=2)
    spacing: Literal["linear", "log", "both"] = "both"
    at: tuple[int, ...] | None = None
    until: str | None = None
    batches: Any = Field(None, exclude=True, repr=False)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedMeter:
        measure = parse_analysis(self.analysis)
        if self.until is not None:
            _condition(self.until)
        if self.batches is None and example is None:
            raise DataError("meter: there is no batch to read; give it batches=, or the training an example.")
        batches = [example] if self.batches is None else sequence_of(self.batches, "meter: batches")
        return AttachedMeter(self, measure, model, batches)

    def steps(self, total: int) -> set[int]:
        """The steps that are read in a training of so many.

        Args:
            total: of the training.

        Raises:
            ValueError: `at` names a step that it does not have.
        """
        if self.at is not None:
            beyond = [step for step in self.at if not 0 <= step <= total]
            if beyond:
                raise ValueError(f"at: step {beyond[0]} was given, and the training has {total}; give 0 to {total}.")
            return set(self.at)
        halves = {"linear": (self.points, 0), "log": (0, self.points)}
        linear, log = halves.get(self.spacing, (self.points - self.points // 2, self.points // 2))
        found = {0, total}
        if linear > 1:
            found |= {round(total * index / (linear - 1)) for index in range(linear)}
        if log > 1:
            found |= {round(math.exp(math.log(total) * index / max(1, log - 2))) for index in range(log - 1)}
        return found


class AttachedMeter(AttachedRule):
    """The meter at work.

    Args:
        rule: its settings.
        measure: what is read.
        model: in place.
        batches: what it is read on.
    """

    def __init__(self, rule: Meter, measure: Analysis, model: nn.Module, batches: Sequence[Any]) -> None:
        self.rule, self.measure, self.model, self.batches = rule, measure, model, batches
        self.step = 0
        self.readings: list[dict[str, Any]] = []  # that were not reported yet
        self._over: str | None = None
        self._begun = False

    def before_step(self, progress: float) -> None:
        if self.step == 0 and not self._begun and (self.rule.at is None or 0 in self.rule.at):
            self._read()
        self._begun = True

    def after_step(self, progress: float) -> None:
        self.step += 1
        if self.step in self.rule.steps(round(self.step / progress)):
            self._read()

    def _read(self) -> None:
        found = self.measure(self.model, self.batches, progress=False).to_dict()
        self.readings.append({"step": self.step, **found})
        if self.rule.until is not None and self.step:
            name, less, limit = _condition(self.rule.until)
            number = _number(found, name)
            if number < limit if less else number > limit:
                self._over = f"{name} was {number:.4g} after step {self.step} ({self.rule.until})"

    def over(self) -> str | None:
        return self._over

    def report(self) -> dict[str, Any]:
        if not self.readings:
            return {}
        found, self.readings = self.readings, []
        return {"analysis": self.measure.name, "settings": dict(self.measure.settings), "readings": found}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "begun": self._begun,
            "readings": json.dumps(self.readings),
            "over": self._over or "",
            "data": fingerprint(self.batches),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("data") != fingerprint(self.batches):
            raise CheckpointError("meter: its batches are not those of the readings so far; go on with the same ones.")
        self.step, self._begun = state["step"], state["begun"]
        self.readings = json.loads(state["readings"])
        self._over = state["over"] or None


def _condition(text: str) -> tuple[str, bool, float]:
    """The name, whether it is to be less, and the number of 'name < number'."""
    parts = re.fullmatch(r"\s*([\w.]+)\s*([<>])\s*(\S+)\s*", text)
    try:
        if parts is not None:
            return parts[1], parts[2] == "<", float(parts[3])
    except ValueError:
        pass
    raise ValueError(f"until: {text!r} was given; give 'name < number' or 'name > number'.")


def _number(found: Any, name: str) -> float:
    """What stands in the dictionary of a result at 'layers.0.name'."""
    value = found
    for part in name.split("."):
        known = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
        value = next((each for key, each in known.items() if str(key) == part), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f"until: {name} is no number of the analysis, whose result has {', '.join(map(str, found))}; name one of "
            f"these, or as in 'layers.0.name' what stands in it."
        )
    return value


def readings(trained: Trained | str | Path, analysis: str | None = None) -> list[tuple[int, dict[str, Any]]]:
    """What meters read in a training, in the order of its steps.

    Args:
        trained: the result of a training, or the folder that it was saved to.
        analysis: only what was read by this one; None if there was one meter.

    Returns:
        (step, the dictionary of the result) for each reading.

    Raises:
        DataError: no meter read that, or several meters read and it is not said which is meant.
    """
    if isinstance(trained, str | Path):
        path = Path(trained) / RECORD
        if not path.is_file():
            raise DataError(f"readings: there is no {path}; give the folder that a training was saved to.")
        history = [step["reports"] for step in json.loads(path.read_text(encoding="utf-8"))["history"]]
    else:
        history = [step.reports for step in trained.history]
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for reports in history:
        for name, report in (reports or {}).items():
            if name.endswith(".Meter") and analysis in (None, report["analysis"]):
                each = found.setdefault(f"{name} ({report['analysis']})", [])
                each += [(reading["step"], reading) for reading in report["readings"]]
    if len(found) != 1:
        wanted = "" if analysis is None else f" of {analysis}"
        many = f"{', '.join(found)} read there; name the analysis" if found else f"no meter{wanted} read there"
        raise DataError(f"readings: {many}; train under the rule meter, with one meter for an analysis.")
    return next(iter(found.values()))
