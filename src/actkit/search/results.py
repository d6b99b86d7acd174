"""What the search finds and hands on: the profile of a model, what is proposed, and the outcome of it all.

These classes know what they hold. How they look in a terminal, in a browser and in a card is said in `figures`,
`report` and `card`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actkit.core.measure.proof import Proof
from actkit.core.measure.task_scores import TaskScore, level, words
from actkit.core.recipe.proposals import LeftOut
from actkit.core.recipe.recipe import Recipe
from actkit.search.measured import Candidate
from actkit.search.speed_row import SpeedRow
from actkit.search.verdict import Verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


# -- the profile -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteProfile:
    """The activations x at one site: [rows, channels], padding left out.

    density: share of |x| > 0. above_one_percent: share of |x| above 1 % of `scale`, the 99.9th percentile of |x|.
    dead: channels that were 0 on every row. largest, at channel `largest_channel`; ratio: largest / median |x|, None
    where the median is 0. massive: largest > 100 and ratio > 1000. outliers: channels whose largest |x| exceeds 6
    times that of the median channel. kurtosis_median, kurtosis_max: over channels (3 is a bell curve; None where all
    are constant). effective_rank: exp of the entropy of the singular values, None where not measured. int8_snr,
    int4_snr: dB left by rounding to nearest, symmetric, one scale for the tensor (from `largest`), on a sample of rows;
    None where rounding is exact. thresholds: for 25, 50 and 70 % of the values, the |x| that they do not exceed.
    read_by: paths of the linear layers that read x. scalable: whether a scale per channel can move out of x (awq).
    """

    site: str
    name: str
    block: int | None
    rows: int
    channels: int
    density: float
    above_one_percent: float
    scale: float
    dead: tuple[int, ...]
    largest: float
    largest_channel: int
    median: float
    ratio: float | None
    massive: bool
    outliers: tuple[int, ...]
    kurtosis_median: float | None
    kurtosis_max: float | None
    effective_rank: float | None
    int8_snr: float | None
    int4_snr: float | None
    thresholds: dict[str, float]
    read_by: tuple[str, ...]
    scalable: bool

    @property
    def rank_share(self) -> float | None:
        """Effective rank over channels."""
        return None if self.effective_rank is None else self.effective_rank / self.channels


@dataclass(frozen=True)
class WeightProfile:
    """One linear layer: dB left by rounding its weight to nearest, asymmetric, in groups of group_size inputs (-1:
    whole rows, where 64 does not divide them)."""

    path: str
    role: str
    block: int
    group_size: int
    int8_snr: float | None
    int4_snr: float | None


@dataclass(frozen=True)
class Finding:
    """What stands out, where, and what it suggests. value: the number in `what`, the smallest where it is a range."""

    site: str
    what: str
    value: float
    suggestion: str


@dataclass(frozen=True)
class Profile:
    """What `profile` saw. rows: tokens, or images (a site may have several rows of each: patches, pixels).
    notes: what was not measured, and why.
    """

    model: str
    architecture: str
    rows: int
    sites: tuple[SiteProfile, ...]
    weights: tuple[WeightProfile, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """Sites, weights and findings for a terminal."""
        from actkit.search.figures import profile_table

        return profile_table(self)

    def figure(self) -> Figure:
        """Six panels over the blocks. Raises ImportError where plotly (the extra `report`) is missing."""
        from actkit.search.figures import profile_figure

        return profile_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """One recipe to try. name: short, unique. why: what suggests it."""

    name: str
    recipe: Recipe
    why: str


@dataclass(frozen=True)
class Answers:
    """scores: by name, the original first; each `acc` and `acc_norm`. notes: who was not asked, and why."""

    scores: dict[str, tuple[TaskScore, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    questions: int = 0
    chance: float = 0.0

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, metric and value with its interval, and from the second name on the difference to the original."""
        return [
            (name, f"{each.metric} {level(each.value)}", "" if each.difference is None else words(each.difference))
            for name, scores in self.scores.items()
            for each in scores
        ]

    def lines(self) -> list[str]:
        """A line per model, by `acc_norm`, and one if nobody but the original was asked."""
        found = []
        for name, scores in self.scores.items():
            value, difference = scores[-1].value, scores[-1].difference
            margin = f"±{100 * (value.high - value.value):.0f}"
            apart = "" if difference is None else f"; difference {words(difference)}"
            found.append(f"questions: {name} answers {value.value:.0%} ({margin}) of {self.questions} rightly{apart}")
        return [*found, *(f"questions: {note}" for note in self.notes)] if found else []

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        scores = {name: [each.to_dict() for each in found] for name, found in self.scores.items()}
        return {"questions": self.questions, "chance": self.chance, "scores": scores, "notes": list(self.notes)}


@dataclass(frozen=True)
class Optimization:
    """What a search found.

    name: of the model. original: measured like the candidates. candidates: in the order they were tried. left_out:
    what was not tried, and why. front: names of those that nothing beats, 'original' among them where so. verdict: who
    pays. best: the folder with the best model, or None; proof: of its reload. speed_row: at a fixed larger shape, or
    None; speed_row_note: why not. prompt: what the generation check goes on from. coverage: lines of the coverage
    report. settings, data, machine, versions, notes: how it was measured. seconds: of this run. answers: to questions.
    """

    name: str
    profile: Profile
    original: Candidate
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...]
    front: tuple[str, ...]
    verdict: Verdict
    best: Path | None
    proof: Proof | None
    speed_row: SpeedRow | None
    speed_row_note: str
    prompt: str | None
    coverage: tuple[str, ...]
    settings: dict[str, Any]
    data: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]
    seconds: float
    answers: Answers = field(default_factory=Answers)

    def candidate(self, name: str) -> Candidate:
        """A candidate, or the original, by name."""
        return next(each for each in (self.original, *self.candidates) if each.name == name)

    def table(self) -> Table:
        """The verdict and all candidates, for a terminal of 100 columns."""
        from actkit.search.figures import optimization_table

        return optimization_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "name": self.name,
            "verdict": self.verdict.to_dict(),
            "best": None if self.best is None else str(self.best),
            "front": list(self.front),
            "original": self.original.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "left_out": [asdict(each) for each in self.left_out],
            "proof": None if self.proof is None else self.proof.to_dict(),
            "speed_row": None if self.speed_row is None else self.speed_row.to_dict(),
            "speed_row_note": self.speed_row_note,
            "prompt": self.prompt,
            "coverage": list(self.coverage),
            "settings": self.settings,
            "data": self.data,
            "machine": self.machine,
            "versions": self.versions,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "answers": self.answers.to_dict(),
            "profile": self.profile.to_dict(),
        }
