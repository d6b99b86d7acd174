"""index.html: a comparison on one page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from typing import Any

from actkit.comparison.results import Comparison, Row, cells
from actkit.core.ground.estimate import Estimate
from actkit.core.page.templating import about_machine, template
from actkit.search.drawing import Kind, Mark, points


def render(result: Comparison) -> str:
    """Write the page.

    Args:
        result: of a comparison.

    Returns:
        HTML.

    Raises:
        ImportError: jinja2 (the extra `report`) is missing.
    """
    page = template("comparison.html", "actkit.comparison")
    from markupsafe import Markup

    return page.render(
        r=result,
        headline=headline(result),
        rows=[{"row": row, "cells": [cell.partition("\n") for cell in cells(row)]} for row in result.rows],
        picture=Markup(_picture(result)),
        conditions=_conditions(result),
        parts=[part for part in result.baseline.widths if part],
        command=command(result),
    )


def headline(result: Comparison) -> str:
    """Say in one sentence who was better and who was worse.

    Args:
        result: of a comparison.
    """
    named = {
        word: [row.name for row in result.rows if row.word == word]
        for word in ("better", "worse", "no difference seen", "failed")
    }
    parts = [
        f"better than {result.baseline.name}: {', '.join(named['better']) or 'none'}",
        f"worse: {', '.join(named['worse']) or 'none'}",
        f"no difference seen: {', '.join(named['no difference seen']) or 'none'}",
        *([f"failed: {', '.join(named['failed'])}"] if named["failed"] else []),
    ]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def command(result: Comparison) -> str:
    """The command line that makes this comparison.

    Args:
        result: of a comparison.
    """
    given = result.settings
    widths = result.baseline.widths
    more = " --equal time" if given["equal"] == "time" else ""
    return (
        f"actkit compare-functions {','.join(given['names'])} --on {given['task']} --out compared{more} "
        f"--seeds {len(given['seeds'])} --steps {given['steps']} --width {next(iter(widths.values()))} "
        f"--threads {given['threads']} --seed {given['seeds'][0]}"
    )


def _picture(result: Comparison) -> str:
    marks = []
    for number, row in enumerate(result.rows):
        if row.mean is None:
            continue
        text = f"{row.name}: {row.mean:.4g}, {row.seconds:.3g} s; {row.word}"
        seconds = Estimate(row.seconds, row.seconds, row.seconds)
        marks.append(
            Mark(
                seconds, Estimate(row.mean, min(row.scores), max(row.scores)), _kind(row), str(number or row.name), text
            )
        )
    unit = f" ({result.unit})" if result.unit else ""
    return points(marks, "seconds of a training", f"{result.score}{unit}")


def _kind(row: Row) -> Kind:
    kinds: dict[str, Kind] = {"baseline": "original", "better": "best", "no difference seen": "front"}
    return kinds.get(row.word, "other")


def _conditions(result: Comparison) -> list[tuple[str, str]]:
    given: Any = result.settings
    return [
        *about_machine(result.machine),
        ("threads", str(given["threads"])),
        (
            "trainings",
            f"AdamW or Adam, {given['steps']} steps of {given['rows']} rows, rates that fall along a cosine",
        ),
        (
            "rates",
            f"{', '.join(f'{rate:g}' for rate in given['rates'])}: the least mean validation loss over the seeds",
        ),
        ("seeds", f"{', '.join(map(str, given['seeds']))}, of weights, data and order, the same for all arms"),
        ("equal", "parameters and steps" if given["equal"] == "steps" else "parameters and seconds"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ("time", f"{result.training_seconds:.0f} s of training, {result.seconds:.0f} s in this run"),
    ]
