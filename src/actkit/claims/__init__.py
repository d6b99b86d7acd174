"""Claims: what a paper states, as an experiment that can fail here; evidence: the recorded outcome.

One module per paper, named as its slug with underscores, with a function `run(*, progress) -> Outcome`. Its conditions
stand in the code before the run and are those of the record. A claim that does not hold is recorded as failed.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

from actkit import catalogue
from actkit.catalogue import CatalogueError
from actkit.claims.outcome import Claim, Outcome, Statement
from actkit.core.ground.whole_file import write_whole

__all__ = ["Claim", "Outcome", "Statement", "reproduce", "slugs"]

_HERE = Path(__file__).parent


def slugs() -> list[str]:
    """The papers whose claims can be run, in the order of the catalogue."""
    return [entry.slug for entry in catalogue.papers() if _module(entry.slug).is_file()]


def reproduce(slug: str, *, record: bool = False, progress: bool = True) -> Outcome:
    """Run the claims of a paper, which takes minutes: the head of its module says how many.

    record: also write the outcome to `claims/evidence/SLUG.json` in the package; otherwise the record stays as it is.
    progress: show bars.
    Raises CatalogueError for a slug that the catalogue does not know and for a paper without claims, before any work,
    and OSError where the evidence cannot be written.
    """
    paper = catalogue.paper(slug)
    if not _module(slug).is_file():
        raise CatalogueError(
            f"slug: {slug!r} ({paper.short}) is in the catalogue, but its claims are not built yet. "
            f"Papers with claims are {', '.join(slugs())}; see: actkit papers."
        )
    if record and not os.access(catalogue.EVIDENCE.parent, os.W_OK):
        raise PermissionError(
            f"record: {catalogue.EVIDENCE} cannot be written, and the run would take minutes. Run without record, or "
            f"from a checkout of actkit installed with pip install -e."
        )
    outcome: Outcome = importlib.import_module(f"actkit.claims.{_name(slug)}").run(progress=progress)
    if record:
        write(outcome, catalogue.EVIDENCE / f"{slug}.json")
    return outcome


def write(outcome: Outcome, path: Path) -> None:
    """Write the evidence, so that a killed run leaves the old record whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(outcome.to_dict(), indent=1, ensure_ascii=False) + "\n")


def _name(slug: str) -> str:
    return slug.replace("-", "_")


def _module(slug: str) -> Path:
    return _HERE / f"{_name(slug)}.py"
