"""Draw docs/functions/gallery.svg and write the table beside it, from the records of all registered functions.

python scripts/function_gallery.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import svg  # noqa: E402
from actkit.core.ground import registry  # noqa: E402
from actkit.core.layers.activation_function import ActivationFunction  # noqa: E402
from actkit.core.layers.activations import (  # noqa: E402
    activation_function,
    flops_of,
    function_names,
    says_what_it_mixes,
)
from actkit.core.layers.hidden_act import default_spec  # noqa: E402

PICTURE, PAGE = (ROOT / "docs" / "functions" / name for name in ("gallery.svg", "gallery.md"))
COLUMNS, CELL, INNER = 6, 132, 112
LOW, HIGH, BOTTOM, TOP = -4.0, 4.0, -2.0, 4.0
MARK, NAMES = "<!-- learned -->", "<!-- names -->"


def learned() -> dict[str, ActivationFunction | None]:
    """The registered modules that are activation functions and need no settings, with what is known of them."""
    found: dict[str, ActivationFunction | None] = {}
    for name in registry.module_names():
        cls = registry.module_class(name)
        if default_spec(cls) is None:
            continue
        module = cls()
        assert says_what_it_mixes(module)
        known = module.record() if hasattr(module, "record") else None
        if known is None or known.name not in function_names():  # one that is a function of the table is drawn once
            found[name] = known
    return found


def drawn() -> dict[str, ActivationFunction]:
    """What has a panel, by name: registered functions, then learned ones at their first coefficients."""
    records = {name: activation_function(name) for name in function_names()}
    known = {name: record for name, record in records.items() if record.elementwise}
    return known | {name: record for name, record in learned().items() if record is not None and record.elementwise}


def picture() -> str:
    """A panel for each, with the function and its derivative."""
    parts = []
    for index, (name, record) in enumerate(drawn().items()):
        parts += _panel(name, record, CELL * (index % COLUMNS) + 10, CELL * (index // COLUMNS) + 20)
    rows = -(-len(drawn()) // COLUMNS)
    return svg.picture(CELL * COLUMNS, CELL * rows + 8, parts)


def _panel(name: str, record: ActivationFunction, left: float, top: float) -> list[str]:
    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - LOW) / (HIGH - LOW) * INNER, top + (TOP - y) / (TOP - BOTTOM) * (INNER - 10)

    parts = [
        svg.line([at(LOW, 0), at(HIGH, 0)], "#cccccc", width=0.8),
        svg.line([at(0, BOTTOM), at(0, TOP)], "#cccccc", width=0.8),
        svg.text(left + INNER / 2, top - 6, name),
    ]
    assert record.derivative is not None
    x = torch.linspace(LOW, HIGH, 161, dtype=torch.float64) + 1e-9  # not at a kink
    for function, colour, dashes in ((record.derivative, svg.COLOURS[1], "3 2"), (record.function, svg.COLOURS[0], "")):
        for run in _runs(x, function(x)):
            parts.append(svg.line([at(*point) for point in run], colour, dashes, 1.4))
    return parts


def _runs(x: torch.Tensor, y: torch.Tensor) -> list[list[tuple[float, float]]]:
    """The stretches that lie in the panel and do not jump."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in zip(x.tolist(), y.tolist(), strict=True):
        if not BOTTOM <= point[1] <= TOP or (runs[-1] and abs(point[1] - runs[-1][-1][1]) > 0.3):
            runs.append([])
        if BOTTOM <= point[1] <= TOP:
            runs[-1].append(point)
    return [run for run in runs if len(run) > 1]


def written(page: str) -> str:
    """The page with a new list of what is learned."""
    before, _, rest = page.partition(MARK)
    after = rest.partition(MARK)[2]
    rows = "\n".join(f"| `{name}` | {_of(registry.module_class(name))} |" for name in learned())
    return f"{before}{MARK}\n| name | what it is | FLOPs |\n|---|---|---|\n{rows}\n{MARK}{_elsewhere(after)}"


def _elsewhere(page: str) -> str:
    """The page with a new table of the names that others have for a function."""
    before, _, rest = page.partition(NAMES)
    after = rest.partition(NAMES)[2]
    rows = []
    for name in function_names():
        record = activation_function(name)
        theirs = (f"nn.{record.torch_name}" if record.torch_name else None, record.config_name)
        rows.append(f"| `{name}` | {' | '.join(f'`{each}`' if each else '' for each in theirs)} | {record.flops} |")
    head = "| name | torch | transformers | FLOPs |\n|---|---|---|---|"
    return f"{before}{NAMES}\n{head}\n{chr(10).join(rows)}\n{NAMES}{after}"


def _of(cls: type) -> str:
    module = cls()
    count = sum(parameter.numel() for parameter in module.parameters())
    mixes = ", ".join(module.mixes) if getattr(module, "mixes", ()) else ""  # type: ignore[attr-defined]
    about = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    learns = f"{count} learned {'number' if count == 1 else 'numbers'}" if count else "nothing learned"
    return f"{about}; {learns}{f'; mixes {mixes}' if mixes else ''} | {flops_of(module)}"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
