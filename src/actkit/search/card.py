"""The model card of the best model: what it is, what was measured, on what, and how to make it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actkit.core.ground.memory import format_bytes
from actkit.core.store.card import Card
from actkit.search.measured import Candidate
from actkit.search.verdict import times

if TYPE_CHECKING:
    from actkit.search.results import Optimization


def model_card(result: Optimization, best: Candidate) -> str:
    """Write the text of README.md."""
    original, info = result.original, result.machine
    rows: list[tuple[str, str]] = []
    if best.loss is not None:
        rows.append(("loss", best.loss.text(".2%")))
    for label, mine, other in (
        ("on disk", best.disk_bytes, original.disk_bytes),
        ("weights in memory", best.weight_bytes, original.weight_bytes),
        ("weights read per token", best.bytes_per_token, original.bytes_per_token),
    ):
        if mine is not None and other:
            rows.append((label, f"{format_bytes(mine)} ({mine / other:.1%} of the original's {format_bytes(other)})"))
    if best.density is not None:
        rows.append(("inputs read by layers that choose some", f"{best.density:.1%}"))
    if best.speed is not None and best.speed.ratio is not None:
        rate, ratio = best.speed.rate, best.speed.ratio
        through = f"through {best.speed.engine}"
        rows.append(("speed", f"{rate.value:.4g} {best.speed.unit} {through}, {times(ratio)} the original's"))
    share = best.disk_share(original)
    return Card(
        title=f"{result.name}, {best.name}",
        library="actkit",
        base_model=result.name,
        methods=list(dict.fromkeys(name for entry in best.recipe for name in entry)),
        made=f"Made by `actkit optimize`{'' if share is None else f': {share:.0%} of the original on disk'}. It needs "
        f"`import actkit` to load; without it, loading fails instead of giving wrong weights.",
        use='import actkit\n\nmodel = actkit.load("path/to/this/folder")\n',
        metrics=best.metrics,
        data=result.data["test"]["data"],
        rows=rows,
        recipe=best.recipe,
        machine=f"{info['processor']}, {info['cores']} cores, {info['capability']}, {info['threads']} threads",
        versions=result.versions,
    ).text()
