"""The outcome of a paper's claims: for each what the paper found, what was found here, and whether that passes.

A claim is written down in two halves. Its Statement (with the condition to pass) is a constant of the module and stands
before the run; the experiment adds what it measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from actkit.core.ground.machine import machine, versions
from actkit.core.ground.progress import track

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Statement:
    """statement: what is claimed. paper: its figure. condition: what must be measured here for it to pass."""

    statement: str
    paper: str
    condition: str


class Finding(NamedTuple):
    """What an experiment measured: a short text with the figures and their spread, and whether the condition holds."""

    here: str
    passed: bool


@dataclass(frozen=True)
class Claim:
    """A statement with its finding."""

    statement: str
    paper: str
    here: str
    condition: str
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What a run of a paper's claims found, and where. seconds: of the whole run; date: ISO, UTC."""

    slug: str
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return all(claim.passed for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it: the content of the evidence file."""
        found = asdict(self)
        return {**found, "claims": list(found["claims"]), "seeds": list(self.seeds)}

    def table(self) -> Table:
        """Claim, paper, here and pass, one row per claim, for a terminal."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        held = sum(claim.passed for claim in self.claims)
        title = f"{self.slug}: {held} of {len(self.claims)} claims hold here ({self.seconds:.0f} s, {self.date})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_lines=True)
        for name in ("claim", "paper", "here", "pass"):
            table.add_column(name, overflow="fold", ratio=None if name == "pass" else 1)
        for claim in self.claims:
            asked = f"{escape(claim.statement)}\n[dim]{escape(claim.condition)}[/]"
            verdict = "yes" if claim.passed else "[bold red]no[/]"
            table.add_row(asked, escape(claim.paper), escape(claim.here), verdict)
        return table


Experiment = tuple[Statement, Callable[[], Finding]]


def conduct(slug: str, experiments: Sequence[Experiment], seeds: Iterable[int], progress: bool = True) -> Outcome:
    """Run experiments one after another and write down what they found."""
    started = time.perf_counter()
    claims = []
    for statement, experiment in track(experiments, f"Reproducing {slug}", enabled=progress):
        found = experiment()
        claims.append(Claim(statement.statement, statement.paper, found.here, statement.condition, bool(found.passed)))
    seconds = round(time.perf_counter() - started, 1)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Outcome(slug, tuple(claims), tuple(seeds), seconds, machine(), versions(), date)
