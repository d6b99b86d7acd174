"""Write the tables of docs/functions/comparison.md from the recorded comparisons.

python benchmarks/comparison_page.py            # from benchmarks/results/comparison
python benchmarks/comparison_page.py FOLDER     # takes over FOLDER/TASK/results.json of `compare-functions` first
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "functions" / "comparison.md"
RECORDS = ROOT / "benchmarks" / "results" / "comparison"
TASKS = ("digits-mlp", "digits-mlp-time", "digits-cnn", "digits-vit", "text", "formulas", "tabular")


def main() -> None:
    if len(sys.argv) > 1:
        RECORDS.mkdir(exist_ok=True)
        for task in TASKS:
            found = Path(sys.argv[1]) / task / "results.json"
            if found.exists():
                shutil.copy(found, RECORDS / f"{task}.json")
    page = PAGE.read_text(encoding="utf-8")
    for task in TASKS:
        record = RECORDS / f"{task}.json"
        if record.exists():
            page = replaced(page, task, section(json.loads(record.read_text(encoding="utf-8"))))
    PAGE.write_text(page, encoding="utf-8")


def replaced(page: str, task: str, text: str) -> str:
    """The page with another text between the marks of a task."""
    begin, end = f"<!-- {task} -->\n", f"<!-- end of {task} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    assert after, f"{PAGE}: no marks for {task}"
    return f"{before}{begin}{text}{end}{after}"


def section(result: dict[str, Any]) -> str:
    """A line on the sizes, and the table."""
    given, machine = result["settings"], result["machine"]
    unit = f", {result['unit']}" if result["unit"] else ""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    took = result["training_seconds"]
    minutes = f"{took / 60:.0f} minutes" if took >= 100 else f"{took:.0f} seconds"
    score = f"{result['score'][0].upper()}{result['score'][1:]}"
    more = "" if given["equal"] == "steps" else " for the baseline, as many as fit into its seconds for the others"
    lines = [
        f"{score}{unit}, {result['better']} is better. {given['steps']} steps of {given['rows']} rows{more}, "
        f"{len(given['seeds'])} seeds, rates {', '.join(f'{rate:g}' for rate in given['rates'])}; {threads} of an "
        f"{machine['processor']} that others used too; {minutes} of training.",
        "",
        "| arm | parameters | width | rate | steps | score, range | difference, interval | ms/step | MFLOP | "
        "of functions | saved | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(f"| {' | '.join(cells(row))} |")
    for note in result["notes"][1:]:  # the first is about FLOPs, and stands on the page once
        lines.append(f"\n{note[0].upper()}{note[1:]}.")
    for row in result["rows"]:
        if row["kept"]:
            lines.append(f"\n`{row['name']}` has {span(row['kept'])} parameters behind the training.")
        if row["failed"]:
            lines.append(f"\n`{row['name']}` failed {row['failed']}")
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    scores, change = row["scores"], row["difference"]
    score = "" if not scores else f"{row['mean']:.4g} ({min(scores):.4g} to {max(scores):.4g})"
    differs = (
        "" if not change else f"{signed(change['value'], 3)} ({signed(change['low'])} to {signed(change['high'])})"
    )
    word = f"**{row['word']}**" if row["word"] in ("better", "worse") else row["word"]
    return [
        f"`{row['name']}`",
        span(row["parameters"].values()),
        span(row["widths"].values()),
        "" if row["rate"] is None else f"{row['rate']:g}",
        f"{row['steps']:,}",
        score,
        differs,
        f"{row['milliseconds']:.3g}",
        f"{row['flops'] / 1e6:.3g}",
        "" if row["function_flops"] is None else f"{row['function_flops'] / 1e6:.2g}",
        f"{row['saved_bytes'] / 1e6:.3g} MB",
        word,
    ]


def signed(value: float, figures: int = 2) -> str:
    """What rounding left of 0 is 0."""
    return f"{round(value, 9) + 0.0:+.{figures}g}"


def span(values: Any) -> str:
    """'9,610', or from the least to the most."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


if __name__ == "__main__":
    main()
