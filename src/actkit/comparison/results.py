"""What a comparison found: a row per arm, as a table, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from actkit.comparison.judging import Difference
from actkit.core.ground.memory import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

Word = Literal["baseline", "better", "worse", "no difference seen", "failed", "not compared"]


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        name: as it was given.
        kind: of the part that it is.
        widths: by part of the task; '' if it has one.
        parameters: by part of the task, of the model that is trained.
        kept: parameters behind the training, if layers were pruned then: the fewest and the most of all trainings.
        rate: of the three, that with the least mean validation loss; None if each failed with some seed.
        scores: on test data, one for each seed.
        mean: of them; None if a training failed.
        difference: to the baseline, paired by seed; of the baseline None.
        word: the verdict; 'not compared' if the baseline failed.
        milliseconds: of a training step, in turns with the other arms.
        slowest: of the steps that were timed.
        flops: of a step's forward and backward pass, for each row or token; matrix products and convolutions alone.
        saved_bytes: of a step, kept for the backward pass, parameters left out.
        steps: of a training.
        failed: why a training failed, or None.
        function_flops: of the activations in a forward pass, for each row or token, as their records count them; None
            if nobody counted those of one, or for a record from before they were counted.
    """

    name: str
    kind: str
    widths: Mapping[str, int]
    parameters: Mapping[str, int]
    kept: tuple[int, int] | None
    rate: float | None
    scores: tuple[float, ...]
    mean: float | None
    difference: Difference | None
    word: Word
    milliseconds: float
    slowest: float
    flops: float
    saved_bytes: float
    steps: int
    failed: str | None = None
    function_flops: float | None = None

    @property
    def seconds(self) -> float:
        """Of a training: its steps at the measured time of one, in one part of the task."""
        return self.steps * self.milliseconds / 1000


@dataclass(frozen=True)
class Comparison:
    """The arms of one comparison.

    Attributes:
        task: its name.
        score: what is compared.
        unit: of the score.
        better: whether a higher or a lower score is.
        rows: the baseline first, in the order that was given.
        settings: of the comparison.
        machine: that it ran on.
        versions: of Python and packages.
        notes: what a reader must know.
        training_seconds: of all trainings, also those of earlier runs that the journal had.
        seconds: of this run.
    """

    task: str
    score: str
    unit: str
    better: Literal["higher", "lower"]
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    training_seconds: float
    seconds: float

    @property
    def baseline(self) -> Row:
        """The first row."""
        return self.rows[0]

    def row(self, name: str) -> Row:
        """Return the row of an arm.

        Args:
            name: as it was given.

        Raises:
            KeyError: there is none of that name.
        """
        found = {each.name: each for each in self.rows}
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "rows": [{**asdict(row), "seconds": row.seconds} for row in self.rows]}

    def table(self) -> Table:
        """Three lines per arm: what it is, what it reached, what a step costs; for 80 columns."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        from actkit.core.ground.tables import PlainTable

        page = Table.grid()
        unit = f", {self.unit}" if self.unit else ""
        about = f"{self.task}: {self.score}{unit} ({self.better} is better), {len(self.settings['seeds'])} seeds"
        page.add_row(Text(about, style="bold"))
        shown = PlainTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        shown.add_column("arm", overflow="fold", min_width=13)
        pairs = ("parameters\nwidth", "rate\nsteps", "score\nrange", "difference\ninterval")
        for name in (*pairs, "ms/step\nMFLOP\nfunctions\nsaved"):
            shown.add_column(name, justify="right", no_wrap=True)
        styles = {"better": "bold green", "worse": "yellow", "failed": "red"}
        for row in self.rows:
            *others, cost, saved = cells(row)
            style = styles.get(row.word, "")
            shown.add_row(f"{row.name}\n{row.word}", *others, f"{cost}\n{saved}", style=style)
        page.add_row(shown)
        threads = f"{self.machine['threads']} thread{'' if self.machine['threads'] == 1 else 's'}"
        page.add_row(Text(f"\n{self.machine['processor']}, {threads}", style="dim"))
        for note in self.notes:
            page.add_row(Text(f"note: {note}", style="dim"))
        return page


def cells(row: Row) -> list[str]:
    """A row's figures, two lines each, as table and page show them.

    Args:
        row: of a comparison.
    """
    scores = "-"
    if row.mean is not None:
        scores = f"{row.mean:.4g}\n{min(row.scores):.4g} to {max(row.scores):.4g}"
    change = row.difference
    differs = "" if change is None else f"{_signed(change.value, 3)}\n{_signed(change.low)} to {_signed(change.high)}"
    functions = "-" if row.function_flops is None else f"{row.function_flops / 1e6:.2g}"
    return [
        f"{_span(row.parameters)}\n{_span(row.widths)}",
        f"{'-' if row.rate is None else format(row.rate, 'g')}\n{row.steps}",
        scores,
        differs,
        f"{row.milliseconds:.3g}\n{row.flops / 1e6:.3g}",
        f"{functions}\n{format_bytes(row.saved_bytes)}",
    ]


def _signed(value: float, figures: int = 2) -> str:
    """'+0.35' or '-120': some figures, and no power of ten; what rounding left of 0 is 0."""
    value = round(value, 9) + 0.0
    return f"{value:+.{figures}g}" if abs(value) < 99.5 else f"{value:+.0f}"


def _span(values: Mapping[str, int]) -> str:
    """'9,610', or '8,700 to 36,340' over the parts of a task."""
    low, high = min(values.values()), max(values.values())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
