"""Write the table of docs/activation-functions.md, from the records.

python scripts/function_table.py
"""

from __future__ import annotations

from pathlib import Path

from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.activations import activation_function, function_names

PAGE = Path(__file__).parents[1] / "docs" / "activation-functions.md"
HEAD = (
    "| name | FLOPs | kinks, *jumps* | inflections | pieces | inverse | antiderivative | limits | mean | second moment "
    "| mean slope | mean squared slope |"
)


def table() -> str:
    """A row per registered element-wise function."""
    records = [activation_function(name) for name in function_names()]
    return "\n".join(
        [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *(_row(each) for each in records if each.elementwise)]
    )


def _row(record: ActivationFunction) -> str:
    moments = record.moments()
    assert moments is not None and record.limits is not None
    signs = {1: "up", -1: "down", 0: "flat"}
    moving = [piece for piece in record.pieces if piece.direction]
    cells = (
        f"`{record.name}`",
        "None" if record.flops is None else str(record.flops),
        ", ".join([*map(_number, record.kinks), *(f"*{_number(x)}*" for x in record.jumps)]),
        ", ".join(map(_number, record.inflections)),
        ", ".join(signs[piece.direction] for piece in record.pieces),
        "yes" if all(piece.inverse for piece in moving) else "None",
        "yes" if record.antiderivative is not None else "None",
        ", ".join(map(_number, record.limits)),
        *(f"{value + 0.0:.4f}" for value in map(_rounded, _values(record))),
    )
    return f"| {' | '.join(cells)} |"


def _values(record: ActivationFunction) -> tuple[float, ...]:
    moments = record.moments()
    assert moments is not None
    return moments.mean, moments.second, moments.slope, moments.squared_slope


def _rounded(value: float) -> float:
    return round(value, 6)


def _number(value: float) -> str:
    return f"{value:.4g}"


def written(page: str) -> str:
    """The page with a new table."""
    before, _, rest = page.partition(HEAD.split(" FLOPs")[0])
    lines = rest.splitlines()
    end = next((index for index, line in enumerate(lines) if index and not line.startswith("|")), len(lines))
    return before + table() + "\n" + "\n".join(lines[end:]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
