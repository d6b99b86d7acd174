"""Write docs/families/: a page per family of methods, from the catalogue, the headers of the modules and what was run.

    python scripts/family_pages.py

papers.toml says what a paper is and what could not be checked; the header of each module that cites the paper gives the
formula and the paragraphs that start with one of LABELS; the numbers are those of claims/evidence and of
benchmarks/results. So a page holds nothing that is written here, and is as true as they are.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from actkit.catalogue import FAMILIES, Paper, papers  # noqa: E402
from actkit.zoo.packaged import PACKAGED  # noqa: E402

FOLDER = ROOT / "docs" / "families"
SOURCE = ROOT / "src" / "actkit"
COMMAND = "python scripts/family_pages.py"
WHEN = "When to use it"
COST = r"Cost[^:.]{0,20}"
OPEN = "Left open by the paper|Left open|Settled here|Our own reading|Our reading|As in the release"
LABELS = re.compile(rf"(?:^|(?<=[.)] ))({WHEN}|{COST}|{OPEN}): ")
ELSEWHERE = {"actkit.functions.swap": "functions"}  # methods that lie outside their family's folder
ABOUT = {
    "functions": "Activation functions, and layers that learn theirs.",
    "sparsity": "Few activations matter for a token: read only the weights that meet those.",
    "quantization": "Weights and activations in fewer bits.",
    "compression": "Fewer channels, lower rank, fewer layers.",
    "finetuning": "Training less of a model, or with less memory.",
    "interpretation": "What activations mean, and which of them cause an output.",
    "steering": "Changing what a model does by changing its activations.",
    "robustness": "What faults and perturbations do to a model, and what can be proved.",
    "dynamics": "How representations come about during training.",
    "models": "Whole models whose activations are the point.",
}


@dataclass(frozen=True)
class Header:
    """The docstring of a module. title: its first sentence. about: the prose without a label."""

    module: str
    title: str
    formulas: tuple[str, ...]
    about: tuple[str, ...]
    labelled: tuple[tuple[str, str], ...]

    @property
    def link(self) -> str:
        path = Path("../../src", *self.module.split(".")).with_suffix(".py")
        return f"[`{self.module}`]({path.as_posix()})"

    def says(self, label: str) -> Iterator[tuple[str, str]]:
        """The labelled paragraphs whose label matches."""
        return ((name, text) for name, text in self.labelled if re.fullmatch(label, name))


@cache
def header(module: str) -> Header:
    """Read the header of a module, without importing it."""
    file = (ROOT / "src" / Path(*module.split("."))).with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    title, *paragraphs = re.split(r"\n\s*\n", text)
    formulas, about, labelled = [], [], []
    for paragraph in paragraphs:
        if all(line.startswith("    ") for line in paragraph.splitlines()):
            formulas.append(paragraph)
            continue
        first, *pieces = LABELS.split(flat(paragraph))
        if first.strip():
            about.append(first.strip())
        labelled += zip(pieces[::2], map(str.strip, pieces[1::2]), strict=True)
    return Header(module, flat(title), tuple(formulas), tuple(about), tuple(labelled))


def flat(text: str) -> str:
    """A paragraph on one line."""
    return " ".join(text.split())


def modules_of(entry: Paper) -> list[str]:
    """The modules of a paper: its entry point's, then those of the family whose header cites it in the title."""
    assert entry.entry is not None
    found = [entry.entry.split(":")[0]]
    for file in sorted((SOURCE / entry.family).rglob("*.py"), key=lambda file: file.stem):
        module = ".".join(("actkit", *file.relative_to(SOURCE).with_suffix("").parts))
        if module not in found and file.stem != "__init__" and entry.arxiv and entry.arxiv in header(module).title:
            found.append(module)
    return found


def methods() -> dict[str, str]:
    """The registered methods: name -> module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: value.split(":")[0] for name, value in project["entry-points"]["actkit.methods"].items()}


def pages() -> dict[str, str]:
    """The text of every page, by its file name."""
    return {"index.md": overview(), **{f"{family}.md": page(family) for family in FAMILIES}}


def overview() -> str:
    """The first page: the families, and how many of their papers are built."""
    lines = ["# The families of methods\n", note(), "| family | what it is about | papers built |", "|---|---|---|"]
    for family, title in FAMILIES.items():
        entries = papers(family=family)
        built = [entry for entry in entries if entry.status != "planned"]
        extra = others(family)
        names = [f"[{entry.short}]({family}.md#{anchor(entry.short)})" for entry in built]
        names += [f"[`{name}`]({family}.md#{anchor(name)})" for name in extra]
        count = f"{len(built)} of {len(entries)}" + (f": {', '.join(names)}" if names else "")
        lines.append(f"| [{title}]({family}.md) | {ABOUT[family]} | {count} |")
    lines.append(
        "\nEach page gives, for every method that is built, the formula, what it costs, when to use it, what came out "
        "when the paper's claims were run here (those that failed too), and what is our own reading because the paper "
        "leaves it open. What is planned is listed with what could not be checked so far. "
        "[The papers](../papers.md) has all of them in one table."
    )
    return "\n".join(lines) + "\n"


def page(family: str) -> str:
    """The page of a family."""
    entries = papers(family=family)
    built = [entry for entry in entries if entry.status != "planned"]
    planned = [entry for entry in entries if entry.status == "planned"]
    extra = others(family)
    parts = [f"# {FAMILIES[family]}\n", note(), ABOUT[family] + "\n"]
    if not built and not extra:
        parts.append("**No method of this family is built yet.** These papers are planned:\n")
    else:
        parts.append(f"{len(built)} of {len(entries)} papers of this family are built.\n")
    parts += [method(entry) for entry in built]
    parts += [other(name, module) for name, module in extra.items()]
    if planned:
        if built or extra:
            parts.append("## Planned\n\nNot built yet:\n")
        parts += [item(entry) for entry in planned]
    return "\n".join(parts).rstrip("\n") + "\n"


def anchor(title: str) -> str:
    """The anchor that a heading gets, on the site and elsewhere."""
    return re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-")


def note() -> str:
    """Where to change the page."""
    return f"<!-- Generated by `{COMMAND}`; edit papers.toml, the headers of the modules, or run again. -->\n"


def item(entry: Paper) -> str:
    """A planned paper."""
    unsure = f" *Not checked: {entry.unsure}*" if entry.unsure else ""
    return f"- **{entry.short}** (`{entry.slug}`): {cited(entry)}. {entry.summary}{unsure}"


def cited(entry: Paper) -> str:
    """Title, year and number of a paper, with a link if it has one."""
    title = f"[{entry.title}]({entry.url})" if entry.url else entry.title
    return f"{title}, {entry.year}" + (f", arXiv:{entry.arxiv}" if entry.arxiv else "")


def method(entry: Paper) -> str:
    """A built method."""
    headers = [header(module) for module in modules_of(entry)]
    code = f" Code: {entry.reference}." if entry.reference else ""
    parts = [f"## {entry.short}\n", f"{cited(entry)}.{code}\n", f"{entry.summary}\n"]
    parts += [told(headers)]
    parts += [runs(entry), *measured(entry.short)]
    reading = [line for each in headers for line in our_reading(each, several=len(headers) > 1)]
    if entry.unsure:
        reading.append(f"- *Not checked.* {entry.unsure}")
    if reading:
        parts.append("### Our own reading\n\n" + "\n".join(reading) + "\n")
    in_full = ROOT / "docs" / entry.family / f"{entry.slug}.md"
    if in_full.exists():
        parts.append(f"How to use it, with code: [{entry.short} in full](../{entry.family}/{entry.slug}.md).\n")
    return "\n".join(parts)


def others(family: str) -> dict[str, str]:
    """Registered methods of the family that are no paper's of the catalogue: name -> module."""
    taken = {module for entry in papers(family=family) if entry.entry for module in modules_of(entry)}
    return {
        name: module
        for name, module in methods().items()
        if module not in taken and (module.split(".")[1] == family or ELSEWHERE.get(module) == family)
    }


def other(name: str, module: str) -> str:
    """A method without a paper of its own in the catalogue."""
    about = header(module)
    parts = [f"## `{name}`\n", told([about]), *measured(about.title.split(":")[0])]
    reading = list(our_reading(about, several=False))
    if reading:
        parts.append("### Our own reading\n\n" + "\n".join(reading) + "\n")
    return "\n".join(parts)


def told(headers: list[Header]) -> str:
    """When to use a method, its formulas and what it costs."""
    parts = [f"**When to use it:** {text}\n" for each in headers for _, text in each.says(WHEN)]
    registered = {module: name for name, module in methods().items()}
    for each in headers:
        name = f", in recipes `{registered[each.module]}`" if each.module in registered else ""
        parts.append(f"{each.link}{name}: {each.title}\n")
        parts += [f"```text\n{formula_text(formula)}\n```\n" for formula in each.formulas]
        parts += [f"{text}\n" for text in each.about]
        parts += [f"*{label}:* {text}\n" for label, text in each.says(COST)]
    return "\n".join(parts)


def formula_text(formula: str) -> str:
    """A formula without the indentation that all its lines share."""
    return "\n".join(line.removeprefix("    ") for line in formula.splitlines())


def our_reading(about: Header, *, several: bool) -> Iterator[str]:
    """What the paper leaves open and how it was settled: a list item for each paragraph that says so."""
    where = f" ({about.link})" if several else ""
    for label, text in about.says(OPEN):
        yield f"- *{label}{where}.* {text[0].upper()}{text[1:]}"


def runs(entry: Paper) -> str:
    """The recorded outcome of the paper's claims."""
    evidence = entry.evidence
    title = "### In our own runs\n"
    if evidence is None:
        return f"{title}\nThe paper's claims were not run yet.\n"
    lines = [title]
    for run in evidence["runs"]:
        held, all_ = (sum(counts) for counts in zip(*(entry.by_subject[subject] for subject in run["subjects"])))
        option = f" --subject {run['subjects'][0]}" if run["subjects"][0] in PACKAGED else ""
        lines.append(
            f"**{held} of {all_} claims hold here on {' and '.join(run['subjects'])}** ({circumstances(run)}). "
            f"`actkit reproduce {entry.slug}{option}` runs them again.\n"
        )
    for claim in evidence["claims"]:
        mark, kind = ("✓ Holds", "success") if claim["passed"] else ("✗ Does not hold", "failure")
        lines += [
            f'<details class="{kind}">'
            f"<summary><strong>{mark} on {claim['subject']}:</strong> {escape(claim['statement'], quote=False)}"
            f"</summary>",
            f"<p>The paper: {escape(claim['paper'], quote=False)}</p>",
            f"<p>Here: {escape(claim['here'], quote=False)}</p>",
            f"<p>Holds if: {escape(claim['condition'], quote=False)}</p>",
            "</details>",
        ]
    return "\n".join(lines) + "\n"


def circumstances(run: Mapping[str, Any]) -> str:
    """When and on what machine a run of claims was, with how many seeds."""
    machine, seeds = run["machine"], len(run["seeds"])
    return (
        f"{run['date'][:10]}, {machine['processor']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ''}, torch {run['versions']['torch']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, {run['seconds'] / 60:.0f} minutes"
    )


def measured(short: str) -> list[str]:
    """What the benchmarks say about the method of this name: quality at equal bytes, speed of decoding."""
    return [table for table in (quality(short), speed(short)) if table]


def quality(short: str) -> str:
    """Mean loss at each share of bytes saved, from the benchmark of quality."""
    result = results("sparsity_quality.json")
    rows = [row for row in result.get("rows", ()) if named(row["method"], short) and row["outcome"] != "out of reach"]
    if not rows:
        return ""
    levels = sorted({row["level"] for row in result["rows"]})
    lines = [
        "Quality if a step reads fewer bytes (the mean over calibration seeds, perplexity, for minilm 1 - cosine; "
        "[the whole table, and when it was measured](../sparsity/quality.md)):\n",
        "| model, setting | unchanged | " + " | ".join(f"{level:.0%} saved" for level in levels) + " |",
        "|---|---|" + "---|" * len(levels),
    ]
    for model, name in dict.fromkeys((row["model"], row["method"]) for row in rows):
        cells = []
        for level in levels:
            losses = [
                row["loss"]
                for row in rows
                if (row["model"], row["method"], row["level"]) == (model, name, level) and row.get("loss") is not None
            ]
            missing = "not reached" if level in result["measured"][model]["levels"] else "not measured"
            cells.append(f"{sum(losses) / len(losses):.4g}" if losses else missing)
        setting = name.removeprefix(short).lstrip(", ")
        lines.append(
            f"| {model}{', ' + setting if setting else ''} | {result['dense'][model]:.4g} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def speed(short: str) -> str:
    """Tokens per second, from the benchmark of decoding with sparsity."""
    result = results("sparsity.json")
    rows = [row for row in result.get("rows", ()) if named(row["row"], short)]
    if not rows:
        return ""
    lines = [
        f"Decoding at a 1.1B shape with random weights in bf16 ({when(result)}, {result['threads']} threads; "
        "`python benchmarks/sparsity.py`):\n",
        "| setting | tokens/s | over dense | MB read per token |",
        "|---|---|---|---|",
    ]
    for row in rows:
        setting = row["row"].removeprefix(short).lstrip(", ")
        lines.append(f"| {setting} | {row['tokens/s']:.1f} | {row['x dense']:.2f}x | {row['MB/token']:.0f} |")
    return "\n".join(lines) + "\n"


def named(text: str, short: str) -> bool:
    """Whether a row of a benchmark is about the method: 'Spark, 8%' is about 'Spark Transformer'."""
    name = text.split(",")[0]
    return name == short or name == short.split()[0]


@cache
def results(name: str) -> Mapping[str, Any]:
    """A recorded benchmark; empty if none is recorded."""
    path = ROOT / "benchmarks" / "results" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def when(result: Mapping[str, Any]) -> str:
    """Day and processor of a benchmark."""
    return f"{result['date'][:10]}, {result['machine']['processor']}"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
