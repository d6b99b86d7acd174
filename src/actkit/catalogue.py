"""The catalogue: one entry per paper, read from `papers.toml`, with the evidence recorded for it.

    >>> from actkit.catalogue import paper, papers
    >>> [entry.slug for entry in papers(family="robustness")]
    ['ft-clipact', 'genbab']
    >>> paper("genbab").year
    2024

`python -m actkit.catalogue` prints docs/papers.md.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import tomllib
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actkit.core.ground.errors import ActkitError

if TYPE_CHECKING:
    from rich.table import Table


FAMILIES = {
    "functions": "Functions",
    "sparsity": "Sparsity",
    "quantization": "Quantization",
    "compression": "Compression",
    "finetuning": "Fine-tuning",
    "interpretation": "Interpretation",
    "steering": "Steering",
    "robustness": "Robustness",
    "dynamics": "Dynamics",
    "models": "Models",
}
KINDS = ("layer", "transform", "rule", "analysis", "runtime", "model")
STATUSES = ("working", "built", "planned")

_HERE = Path(__file__).parent
CATALOGUE = _HERE / "papers.toml"
EVIDENCE = _HERE / "claims" / "evidence"


class CatalogueError(ActkitError, ValueError):
    """A malformed catalogue or evidence file, an unknown paper, or an unknown filter value."""


@dataclass(frozen=True)
class Paper:
    """A paper of the catalogue.

    Attributes:
        slug: its name in actkit.
        title: its own.
        short: its own.
        year: of the first public version.
        family: one of FAMILIES.
        kind: what it adds to actkit, among KINDS.
        summary: what it does, in a sentence.
        arxiv: its number there.
        reference: repository of code by the authors, or marked as a third party's.
        entry: where the method lives (`module:object`), once it is built.
        unsure: what could not be checked against the paper or its code.
    """

    slug: str
    title: str
    short: str
    year: int
    family: str
    kind: tuple[str, ...]
    summary: str
    arxiv: str | None = None
    reference: str | None = None
    entry: str | None = None
    unsure: str | None = None

    @property
    def evidence(self) -> dict[str, Any] | None:
        """The recorded outcome of the paper's claims, or None: slug, claims and runs.

        Each claim holds statement, subject (the model that it was measured on), paper (its figure), here (ours),
        condition and passed; each run its subjects, seeds, sizes, seconds, machine, versions and date.
        """
        path = EVIDENCE / f"{self.slug}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CatalogueError(f"The evidence {path} is not JSON: {error}. Record it again.") from error
        claims = found.get("claims") if isinstance(found, dict) and found.get("slug") == self.slug else None
        if not claims or any(not {"passed", "subject"} <= claim.keys() for claim in claims) or "runs" not in found:
            raise CatalogueError(f"The evidence {path} holds no outcome for {self.slug!r}. Record it again.")
        return found

    @property
    def status(self) -> str:
        """'working' with an entry point and recorded evidence, 'built' with an entry point only, else 'planned'."""
        if self.entry is None:
            return "planned"
        return "built" if self.evidence is None else "working"

    @property
    def passed(self) -> int:
        """How many of its recorded claims hold here; 0 if none is recorded."""
        return self._outcomes().count(True)

    @property
    def failed(self) -> int:
        """How many of its recorded claims do not hold here; 0 if none is recorded."""
        return self._outcomes().count(False)

    @property
    def by_subject(self) -> dict[str, tuple[int, int]]:
        """Per subject how many of its recorded claims hold, and how many there are."""
        evidence = self.evidence
        found: dict[str, tuple[int, int]] = {}
        for claim in evidence["claims"] if evidence else ():
            held, all_ = found.get(claim["subject"], (0, 0))
            found[claim["subject"]] = (held + bool(claim["passed"]), all_ + 1)
        return found

    def _outcomes(self) -> list[bool]:
        evidence = self.evidence
        return [bool(claim["passed"]) for claim in evidence["claims"]] if evidence else []

    @property
    def url(self) -> str | None:
        """Its page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the status and the evidence; plain values, ready for JSON."""
        return {**asdict(self), "kind": list(self.kind), "status": self.status, "evidence": self.evidence}


def papers(
    *,
    family: str | None = None,
    kind: str | None = None,
    status: str | None = None,
    year: int | None = None,
    text: str | None = None,
) -> list[Paper]:
    """Return the papers that meet every filter given, by family and then by slug.

    Args:
        family: one of FAMILIES.
        kind: one of KINDS.
        status: 'working', 'built' or 'planned'.
        year: of the first public version.
        text: words that must all occur in the slug, names or summary, whatever their case.

    Returns:
        The papers.

    Raises:
        CatalogueError: a family, kind, status or year is unknown; it lists the allowed values.
    """
    found = load()
    _check("family", family, FAMILIES)
    _check("kind", kind, KINDS)
    _check("status", status, STATUSES)
    _check("year", year, sorted({entry.year for entry in found}))
    words = text.lower().split() if text else []
    return [
        entry
        for entry in found
        if (family is None or entry.family == family)
        and (kind is None or kind in entry.kind)
        and (year is None or entry.year == year)
        and all(word in f"{entry.slug} {entry.short} {entry.title} {entry.summary}".lower() for word in words)
        and (status is None or entry.status == status)
    ]


def paper(slug: str) -> Paper:
    """Return the paper of that slug. Raises CatalogueError, which suggests near names, if there is none."""
    known = {entry.slug: entry for entry in load()}
    if slug in known:
        return known[slug]
    near = difflib.get_close_matches(slug.lower(), known, n=3)
    hint = f"Did you mean {', '.join(near)}?" if near else "List the papers with: actkit papers."
    raise CatalogueError(f"paper: {slug!r} is not in the catalogue. {hint}")


@cache
def load(path: Path = CATALOGUE) -> tuple[Paper, ...]:
    """Read and check a catalogue. Raises CatalogueError, which names the entry that is wrong."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("paper", [])
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"The catalogue {path} is not TOML: {error}.") from error
    found: dict[str, Paper] = {}
    for number, entry in enumerate(entries, 1):
        read = _read(entry, number)
        if read.slug in found:
            raise CatalogueError(f"papers.toml: the slug {read.slug!r} occurs twice.")
        found[read.slug] = read
    order = list(FAMILIES)
    return tuple(sorted(found.values(), key=lambda entry: (order.index(entry.family), entry.slug)))


def _read(entry: dict[str, Any], number: int) -> Paper:
    where = f"papers.toml: the entry {entry.get('slug') or f'number {number}'!r}"
    types = {field.name: str(field.type) for field in fields(Paper)}
    optional = {name for name, kind in types.items() if kind.endswith("None")}
    if unknown := entry.keys() - types:
        raise CatalogueError(f"{where} has the unknown key {_listed(unknown)}. Allowed are {_listed(types)}.")
    if missing := types.keys() - optional - entry.keys():
        raise CatalogueError(f"{where} lacks {_listed(missing)}.")
    for key, value in entry.items():
        wanted = {"year": int, "kind": list}.get(key, str)
        if type(value) is not wanted or not value:
            raise CatalogueError(f"{where} has {key} = {value!r}. It must be a {wanted.__name__} and not empty.")
    if entry["family"] not in FAMILIES:
        raise CatalogueError(f"{where} has family = {entry['family']!r}. Allowed are {_listed(FAMILIES)}.")
    if wrong := [kind for kind in entry["kind"] if kind not in KINDS]:
        raise CatalogueError(f"{where} has the unknown kind {_listed(map(repr, wrong))}. Allowed are {_listed(KINDS)}.")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry["slug"]):
        raise CatalogueError(f"{where} has a malformed slug. It must be lower-case words joined by hyphens.")
    if not re.fullmatch(r"actkit(\.\w+)+:\w+", entry.get("entry", "actkit.module:object")):
        raise CatalogueError(f"{where} has entry = {entry['entry']!r}. It must read actkit.module:object.")
    return Paper(**{**entry, "kind": tuple(entry["kind"])})


def _check(name: str, value: object, allowed: Collection[object]) -> None:
    if value is not None and value not in allowed:
        raise CatalogueError(f"{name}: {value!r} is not known. Allowed are {_listed(map(str, allowed))}.")


def _listed(names: Any) -> str:
    return ", ".join(names if isinstance(names, dict | tuple | map) else sorted(names))


def table(entries: Collection[Paper]) -> Table:
    """The papers for a terminal, and how many have which status."""
    from actkit.core.ground.tables import PlainTable

    counts = ", ".join(f"{sum(entry.status == status for entry in entries)} {status}" for status in STATUSES)
    found = PlainTable(title=f"{len(entries)} papers: {counts}", title_justify="left")
    for heading in ("slug", "paper", "family", "kind", "status"):
        found.add_column(heading, no_wrap=heading in ("slug", "family"))
    for entry in entries:
        name = f"{entry.short} ({entry.year})"
        found.add_row(entry.slug, name, entry.family, ", ".join(entry.kind), _status(entry))
    return found


def details(entry: Paper) -> Table:
    """One paper in full, with the recorded outcome of its claims."""
    from actkit.core.ground.tables import PlainTable

    found = PlainTable(show_header=False, title=entry.title, title_justify="left", box=None, padding=(0, 2))
    rows = {
        "slug": entry.slug,
        "year": str(entry.year),
        "family": entry.family,
        "kind": ", ".join(entry.kind),
        "paper": entry.url,
        "reference code": entry.reference,
        "what it does": entry.summary,
        "entry point": entry.entry,
        "unsure": entry.unsure,
        "status": _status_by_subject(entry),
    }
    for name, text in rows.items():
        if text:
            found.add_row(name, text)
    evidence = entry.evidence
    for claim in evidence["claims"] if evidence else ():
        verdict = "holds" if claim["passed"] else "does not hold"
        found.add_row(verdict, f"{claim['statement']} ({claim['subject']})\n{claim['here']}")
    return found


def _status(entry: Paper) -> str:
    if entry.status != "working":
        return entry.status
    return f"working: {entry.passed} of {entry.passed + entry.failed} claims hold"


def _status_by_subject(entry: Paper) -> str:
    """'... claims hold (on smollm2 2 of 5, on swiglu 1 of 5)'."""
    listed = ", ".join(f"on {subject} {held} of {all_}" for subject, (held, all_) in entry.by_subject.items())
    return _status(entry) + (f" ({listed})" if listed else "")


def readme_table() -> str:
    """A Markdown table per family: slug, title and year, kind, status with the outcome of the claims."""
    parts = []
    for family, heading in FAMILIES.items():
        rows = [_row(entry) for entry in papers(family=family)]
        head = "| slug | paper | kind | status |\n|---|---|---|---|"
        parts.append(f"### {heading} ({len(rows)})\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(entry: Paper) -> str:
    title = f"[{entry.title}]({entry.url})" if entry.url else entry.title
    return f"| `{entry.slug}` | {title} ({entry.year}) | {', '.join(entry.kind)} | {_status_by_subject(entry)} |"


def document() -> str:
    """The text of docs/papers.md: the table, then what each paper does and what is unsure about it."""
    count = {status: len(papers(status=status)) for status in STATUSES}
    parts = [
        "# The papers\n",
        "<!-- Generated by `python -m actkit.catalogue > docs/papers.md`. Edit src/actkit/papers.toml instead. -->\n",
        f"{len(load())} papers: {', '.join(f'{number} {status}' for status, number in count.items())}.",
        "*Working*: built, and the outcome of the paper's claims is recorded, whether they hold here or not.",
        "*Built*: can be used; nothing is recorded yet. *Planned*: not built yet.",
        "The year is that of the first public version.\n",
        readme_table(),
        "## What each one does",
    ]
    for family, heading in FAMILIES.items():
        parts += [f"\n### {heading}\n", *map(_item, papers(family=family))]
    return "\n".join(parts) + "\n"


def _item(entry: Paper) -> str:
    code = f" Reference code: {entry.reference}." if entry.reference else ""
    unsure = f" *{entry.unsure}*" if entry.unsure else ""
    return f"- `{entry.slug}`, {entry.short}. {entry.summary}{code}{unsure}"


if __name__ == "__main__":
    sys.stdout.write(document())
