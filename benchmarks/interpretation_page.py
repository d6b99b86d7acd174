"""The tables of docs/interpretation/peers.md, from what interpretation_parity.py and interpretation.py recorded.

python benchmarks/interpretation_page.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from interpretation import PARTS

PAGE = Path(__file__).parents[1] / "docs" / "interpretation" / "peers.md"
MARKS = "<!-- {}: {} -->"
TITLES = {
    "swiglu": "`swiglu` (5 M parameters): activations to disk",
    "smollm2": "SmolLM2-135M: activations to disk",
    "reading": "A shuffled batch beside the step that it feeds",
    "steps": "A step of a TopK autoencoder, k 32",
    "kinds": "A step of the other kinds",
    "relp": "Effects of all (block, position) of three sites, `swiglu`",
    "relp-smollm2": "The same, SmolLM2-135M",
}


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines as Markdown, the first as the head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest)) + "\n"


def where(result: Mapping[str, Any]) -> str:
    """Machine, threads, versions and date."""
    versions = result["versions"]
    return (
        f"{result['date'][:10]}, {result['machine']['processor']}, threads: {result['threads']}, load "
        f"{result['load']:.1f}, torch {versions['torch']}, transformers {versions['transformers']}."
    )


def parity(result: Mapping[str, Any]) -> str:
    """A line for each peer and what is alike; the largest difference of all."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((f"{row['peer']} {row['version']}", row["what"].split(": ")[0]), []).append(row)
    lines = [["peer", "compared", "tensors", "largest difference", "bound", ""]]
    for (peer, group), rows in groups.items():
        first = rows[0]
        if first["difference"] is None:
            lines.append([peer, first["what"] or "nothing", "", first["note"].replace("|", "/"), "", "**no**"])
            continue
        what = first["what"] if len(rows) == 1 else group
        note = f" ({first['note']})" if len(rows) == 1 and first["note"] else ""
        largest, met = max(row["difference"] for row in rows), all(row["met"] for row in rows)
        bound = f"{first['bound']:g}"
        lines.append([peer, what + note, str(len(rows)), f"{largest:.1g}", bound, "met" if met else "**missed**"])
    return table(lines) + "\n" + where(result) + "\n"


def speed(result: Mapping[str, Any]) -> str:
    """A table for each part, and the targets."""
    found = []
    for part in PARTS:
        rows = [row for row in result["rows"] if row["part"] == part]
        if not rows:
            continue
        fields = list(dict.fromkeys(key for row in rows for key in row if key != "part"))
        fields = [field for field in fields if any(row.get(field) not in (None, "") for row in rows)]
        lines = [[("" if field == "row" else field) for field in fields]]
        lines += [[_text(row.get(field)) for field in fields] for row in rows]
        targets = [["target", "bound", "measured", ""]]
        for each in result["targets"]:
            if each["part"] == part:
                met = "met" if each["met"] else "**missed**"
                targets.append([each["name"], f"{each['sense']} {each['target']:g}", f"{each['value']:.3g}", met])
        found += [f"### {TITLES[part]}\n", table(lines), table(targets)]
    return "\n".join([*found, where(result)]) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def main() -> None:
    """Write what the records say between the marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, write in (("interpretation_parity", parity), ("interpretation", speed)):
        result = common.committed(name)
        if result is None:
            print(f"{name}.json is not there; run benchmarks/{name}.py first. That part of the page stays as it is.")
            continue
        begin, end = (MARKS.format(name, each) for each in ("begin", "end"))
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{write(result)}{end}{rest.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
