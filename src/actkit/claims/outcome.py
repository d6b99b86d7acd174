"""The outcome of a paper's claims: for each what the paper found, what was found here, and whether that passes.

A claim is written down in two halves. Its Statement (with the condition to pass) is a constant of the module and stands
before the run; the experiment adds its Measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from actkit.core.ground.machine import machine, versions
from actkit.core.ground.progress import track

if TYPE_CHECKING:
    from rich.table import Table


SYNTHETIC = "synthetic"  # the subject of what is measured on random numbers, with no model
SMALL = "small models"  # the subject of what needs models that are trained for it, or several at once


@dataclass(frozen=True)
class Statement:
    """What is claimed, before it is measured.

    Attributes:
        statement: what is claimed.
        paper: its figure.
        condition: what must be measured here for it to pass.
        subject: the model that it is measured on, by its name in the zoo, or SYNTHETIC or SMALL.
    """

    statement: str
    paper: str
    condition: str
    subject: str

    def on(self, subject: str) -> Statement:
        """The same claim, with the same condition, about another model."""
        return replace(self, subject=subject)


class Measurement(NamedTuple):
    """What an experiment measured.

    Attributes:
        here: a short text with the figures and their spread.
        passed: whether the condition holds.
    """

    here: str
    passed: bool


@dataclass(frozen=True)
class Claim:
    """A statement with its measurement.

    Attributes:
        statement: as in `Statement`.
        subject: as in `Statement`.
        paper: as in `Statement`.
        here: as in `Measurement`.
        condition: as in `Statement`.
        passed: as in `Measurement`.
    """

    statement: str
    subject: str
    paper: str
    here: str
    condition: str
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What a run of a paper's claims found, and on which machine.

    Attributes:
        slug: of the paper.
        claims: in the order of the module.
        seeds: of the run.
        sizes: how much data and how many tries, by name.
        seconds: of the whole run.
        machine: that it ran on.
        versions: of the libraries.
        date: ISO, UTC.
    """

    slug: str
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    sizes: dict[str, Any]
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(claim.passed for claim in self.claims)

    @property
    def subjects(self) -> list[str]:
        """What the claims were measured on."""
        return list(dict.fromkeys(claim.subject for claim in self.claims))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it: an evidence file with one run."""
        found = asdict(self)
        slug, claims = found.pop("slug"), found.pop("claims")
        run = {"subjects": self.subjects, **found, "seeds": list(self.seeds)}
        return {"slug": slug, "claims": list(claims), "runs": [run]}

    def table(self) -> Table:
        """Claim, subject, paper, here and pass, a row per claim, for a terminal."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        held = sum(claim.passed for claim in self.claims)
        title = f"{self.slug}: {held} of {len(self.claims)} claims hold here ({self.seconds:.0f} s, {self.date})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_lines=True)
        for name in ("claim", "subject", "paper", "here", "pass"):
            table.add_column(name, overflow="fold", ratio=None if name in ("subject", "pass") else 1)
        for claim in self.claims:
            asked = f"{escape(claim.statement)}\n[dim]{escape(claim.condition)}[/]"
            verdict = "yes" if claim.passed else "[bold red]no[/]"
            table.add_row(asked, escape(claim.subject), escape(claim.paper), escape(claim.here), verdict)
        return table


def merged(recorded: Mapping[str, Any], new: Mapping[str, Any], order: Sequence[Statement]) -> dict[str, Any]:
    """Merge an evidence file with a new run, whose claims replace those on its subjects; the others stay.

    Args:
        recorded: what the file holds.
        new: the outcome of the run, as `Outcome.to_dict` gives it.
        order: all statements of the paper; a recorded claim that is not among them is dropped.
    """
    renewed = {subject for run in new["runs"] for subject in run["subjects"]}
    claims = [claim for claim in recorded["claims"] if claim["subject"] not in renewed] + new["claims"]
    found = {(claim["subject"], claim["statement"]): claim for claim in claims}
    kept = [found[key] for each in order if (key := (each.subject, each.statement)) in found]
    runs = []
    for run in recorded["runs"]:
        left = [subject for subject in run["subjects"] if subject not in renewed]
        if left:
            runs.append({**run, "subjects": left})
    return {"slug": new["slug"], "claims": kept, "runs": [*runs, *new["runs"]]}


Experiment = tuple[Statement, Callable[[], Measurement]]


def conduct(
    slug: str, experiments: Sequence[Experiment], sizes: Any, subject: str | None = None, progress: bool = True
) -> Outcome:
    """Run experiments one after another and write down what they found.

    Args:
        slug: of the paper.
        experiments: each statement with what measures it.
        sizes: a dataclass with `seeds`, for the record.
        subject: only the experiments on it; None for all.
        progress: show a bar.

    Returns:
        The outcome, with the machine and the time.
    """
    started = time.perf_counter()
    chosen = [(statement, measure) for statement, measure in experiments if subject in (None, statement.subject)]
    claims = []
    for statement, measure in track(chosen, f"Reproducing {slug}", enabled=progress):
        found = measure()
        about = (statement.statement, statement.subject, statement.paper)
        claims.append(Claim(*about, found.here, statement.condition, bool(found.passed)))
    seconds = round(time.perf_counter() - started, 1)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    more = asdict(sizes)
    seeds = tuple(more.pop("seeds"))
    return Outcome(slug, tuple(claims), seeds, _plain(more), seconds, machine(), versions(), date)


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what is recorded equals what is read again."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
