"""Claims: what a paper states, as an experiment that can fail here; evidence: the recorded outcome.

One module per paper, named as its slug with underscores, with a function `run(*, subject, progress) -> Outcome`. Its
conditions stand in the code before the run and are those of the record. A claim that does not hold is recorded as
failed. A claim is about one subject: a small model, or a real one from a package of its own (`smollm2`), for which the
same condition is tested again.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from actkit import catalogue
from actkit.catalogue import CatalogueError
from actkit.claims.outcome import Claim, Outcome, Statement, merged
from actkit.core.ground.whole_file import write_whole
from actkit.zoo import packaged

__all__ = ["Claim", "Outcome", "Statement", "reproduce", "slugs"]

_HERE = Path(__file__).parent


def slugs() -> list[str]:
    """Return the papers whose claims can be run, in the order of the catalogue."""
    return [entry.slug for entry in catalogue.papers() if _module(entry.slug).is_file()]


def reproduce(slug: str, *, subject: str | None = None, record: bool = False, progress: bool = True) -> Outcome:
    """Run the claims of a paper, which takes minutes: the head of its module says how many.

    Args:
        slug: of the paper, as the catalogue has it.
        subject: only the claims about this model (or `synthetic`, `small models`); None for those about all that comes
            with actkit, so not those about `smollm2`.
        record: also write the outcome to `claims/evidence/SLUG.json` in the package, where it replaces what is recorded
            for the same subjects; otherwise the record stays as it is.
        progress: show bars.

    Returns:
        What each claim found, and on which machine.

    Raises:
        CatalogueError: before any work, if the catalogue does not know the slug, the paper has no claims, or none of
            them is about the subject.
        ImportError: the package that holds the subject is missing; the error says which line installs it.
        OSError: the evidence cannot be written.
    """
    paper = catalogue.paper(slug)
    if not _module(slug).is_file():
        raise CatalogueError(
            f"slug: {slug!r} ({paper.short}) is in the catalogue, but its claims are not built yet. "
            f"Papers with claims are {', '.join(slugs())}; see: actkit papers."
        )
    module = importlib.import_module(f"actkit.claims.{_name(slug)}")
    known = list(dict.fromkeys(each.subject for each in module.STATEMENTS))
    if subject is not None and subject not in known:
        raise CatalogueError(
            f"subject: {subject!r} was given, but no claim of {slug!r} is about it; choose one of {', '.join(known)}."
        )
    if subject in packaged.PACKAGED:
        packaged.pieces(subject)  # raises if they are missing
    if record and not os.access(catalogue.EVIDENCE.parent, os.W_OK):
        raise PermissionError(
            f"record: {catalogue.EVIDENCE} cannot be written, and the run would take minutes. Run without record, or "
            f"from a checkout of actkit installed with pip install -e."
        )
    outcome: Outcome = module.run(subject=subject, progress=progress)
    if record:
        _record(outcome, module.STATEMENTS)
    return outcome


def _record(outcome: Outcome, order: tuple[Statement, ...]) -> None:
    """Keep the outcome as evidence, beside what is recorded about other subjects."""
    recorded, found = catalogue.paper(outcome.slug).evidence, outcome.to_dict()
    write(found if recorded is None else merged(recorded, found, order), catalogue.EVIDENCE / f"{outcome.slug}.json")


def write(evidence: dict[str, Any], path: Path) -> None:
    """Write the evidence, so that a killed run leaves the old record whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(evidence, indent=1, ensure_ascii=False) + "\n")


def _name(slug: str) -> str:
    return slug.replace("-", "_")


def _module(slug: str) -> Path:
    return _HERE / f"{_name(slug)}.py"
