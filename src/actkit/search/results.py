"""What the search finds and hands on: the profile of a model, what is proposed, and the outcome of it all.

These classes say what they hold; `figures`, `report` and `card` say how they look in a terminal, in a browser and in a
card.
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

    from actkit.search.mixing.mixing import Mixing


# -- the profile -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteProfile:
    """The activations x at one site: [rows, channels], padding left out.

    Attributes:
        site: with its block.
        name: without it.
        block: its index; None if the site names no block.
        rows: how many.
        channels: how many.
        density: share of |x| > 0.
        above_one_percent: share of |x| above 1 % of `scale`.
        scale: the 99.9th percentile of |x|.
        dead: channels that were 0 on every row.
        largest: the largest |x|.
        largest_channel: the channel that it is in.
        median: of |x|.
        ratio: largest / median |x|; None if the median is 0.
        massive: largest > 100 and ratio > 1000.
        outliers: channels whose largest |x| exceeds 6 times that of the median channel.
        kurtosis_median: over channels (3 is a bell curve); None if all are constant.
        kurtosis_max: the same.
        effective_rank: exp of the entropy of the singular values; None if it was not measured.
        int8_snr: dB left by rounding to nearest, symmetric, one scale for the tensor (from `largest`), on a sample of
            rows; None if rounding is exact.
        int4_snr: the same at 4 bits.
        thresholds: for 25, 50 and 70 % of the values, the |x| that they do not exceed.
        read_by: paths of the linear layers that read x.
        scalable: whether a scale per channel can move out of x (awq).
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
    """One linear layer, and how well its weight can be rounded to nearest, asymmetric, in groups of inputs.

    Attributes:
        path: of the layer.
        role: what it does in its block.
        block: its index.
        group_size: inputs per group; -1 for whole rows, if 64 does not divide them.
        int8_snr: dB left at 8 bits; None if rounding is exact.
        int4_snr: dB left at 4 bits; None if rounding is exact.
    """

    path: str
    role: str
    block: int
    group_size: int
    int8_snr: float | None
    int4_snr: float | None


@dataclass(frozen=True)
class Finding:
    """What stands out at a site.

    Attributes:
        site: of it, with its blocks.
        what: stands out.
        value: the number in `what`, the smallest if it is a range.
        suggestion: what it suggests.
    """

    site: str
    what: str
    value: float
    suggestion: str


@dataclass(frozen=True)
class Profile:
    """What `profile` saw.

    Attributes:
        model: name of its class.
        architecture: of its row, or 'traced'.
        rows: tokens, or images (a site may have several rows of each: patches, pixels).
        sites: what the activations are like.
        weights: how well they can be rounded.
        findings: what stands out.
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
        """Show sites, weights and findings, for a terminal."""
        from actkit.search.figures import profile_table

        return profile_table(self)

    def figure(self) -> Figure:
        """Draw six panels over the blocks.

        Returns:
            A figure of plotly.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        from actkit.search.figures import profile_figure

        return profile_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self)


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """One recipe to try.

    Attributes:
        name: short, unique.
        recipe: what to apply.
        why: what suggests it.
    """

    name: str
    recipe: Recipe
    why: str


@dataclass(frozen=True)
class Answers:
    """How often models answer questions rightly.

    Attributes:
        scores: by name, the original first; each `acc` and `acc_norm`.
        notes: who was not asked, and why.
        questions: how many were asked.
        chance: the share that guessing gets right.
    """

    scores: dict[str, tuple[TaskScore, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    questions: int = 0
    chance: float = 0.0

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, metric, value with its interval, and the difference to the original ('' for the original)."""
        return [
            (name, f"{each.metric} {level(each.value)}", "" if each.difference is None else words(each.difference))
            for name, scores in self.scores.items()
            for each in scores
        ]

    def lines(self) -> list[str]:
        """Return a line per model, by `acc_norm`, and one if no candidate was asked."""
        found = []
        for name, scores in self.scores.items():
            value, difference = scores[-1].value, scores[-1].difference
            margin = f"±{100 * (value.high - value.value):.0f}"
            apart = "" if difference is None else f"; difference {words(difference)}"
            found.append(f"questions: {name} answers {value.value:.0%} ({margin}) of {self.questions} rightly{apart}")
        return [*found, *(f"questions: {note}" for note in self.notes)] if found else []

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        scores = {name: [each.to_dict() for each in found] for name, found in self.scores.items()}
        return {"questions": self.questions, "chance": self.chance, "scores": scores, "notes": list(self.notes)}


@dataclass(frozen=True)
class Optimization:
    """What a search found.

    Attributes:
        name: of the model.
        profile: of the model.
        original: measured like the candidates.
        candidates: in the order they were tried.
        left_out: what was not tried, and why.
        front: names of those that nothing beats; 'original' may be among them.
        verdict: which candidates pay, and which is best.
        best: the folder with the best model, or None.
        proof: of the reload of the best.
        speed_row: speed at a fixed larger shape, or None.
        speed_row_note: why there is none.
        prompt: what the generation check goes on from.
        coverage: lines of the coverage report.
        settings: of the search.
        data: what each split is.
        machine: that it was measured on.
        versions: of the packages, by name.
        notes: what else is worth knowing of how it was measured.
        seconds: of this run.
        answers: to questions.
        mixing: what mixes rest on, and which were tried; None if there are none.
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
    mixing: Mixing | None = None

    def candidate(self, name: str) -> Candidate:
        """Return a candidate, or the original, by name."""
        return next(each for each in (self.original, *self.candidates) if each.name == name)

    def table(self) -> Table:
        """Show the verdict and all candidates, for a terminal of 100 columns."""
        from actkit.search.figures import optimization_table

        return optimization_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
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
            "mixing": None if self.mixing is None else self.mixing.to_dict(),
        }
