"""What a model is, at a glance: its parts, its coverage, and what actkit changed on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.edit import changes
from actkit.core.ground.memory import distinct_tensors, format_bytes, parameter_bytes
from actkit.core.layers.activations import groups_of, is_activation, record_of, without_inner
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import anatomy

if TYPE_CHECKING:
    from rich.table import Table

    from actkit.core.model.coverage import Coverage


@dataclass(frozen=True)
class Summary:
    """What a model is.

    Attributes:
        model: name of its class.
        architecture: of its row, or 'traced'.
        source: folder or name that it was loaded from.
        blocks: how many.
        parameters: how many, ties once, quantized weights as the parameters they stand for.
        bytes: of all tensors.
        dtypes: bytes by dtype.
        linears: count of linear layers by what they are ('dense', '4-bit groups of 64, threshold').
        activations: of each activation function that is a module, by name: `count`, and for a standard normal input the
            `mean` and `second_moment` of the output and its share of exact `zeros`, as far as they are known.
        sites: names of the sites that can be read.
        coverage: lines of the coverage report.
        recipe: what was applied.
        edits: count by kind.
        results: what `actkit.json` recorded when the model was saved.
        source_grid: how a quantized source was stored (`changes.SourceGrid`).
    """

    model: str
    architecture: str
    source: str | None
    blocks: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    linears: dict[str, int]
    activations: dict[str, dict[str, float]]
    sites: tuple[str, ...]
    coverage: tuple[str, ...]
    recipe: list[dict[str, Any]]
    edits: dict[str, int]
    results: dict[str, Any]
    source_grid: dict[str, Any] | None = None

    def table(self) -> Table:
        """Show it in two columns, for a terminal."""
        from actkit.core.ground.tables import PlainTable

        table = PlainTable(show_header=False, title=self.model, title_justify="left", box=None, padding=(0, 2))
        for name, text in self._rows():
            table.add_row(name, text, end_section=True)
        return table

    def _rows(self) -> Iterator[tuple[str, str]]:
        if self.source:
            yield "source", self.source
        if self.source_grid is not None:
            grid = changes.SourceGrid.from_dict(self.source_grid)
            yield "quantized source", "\n".join((grid.describe(), *grid.notes))
        yield "architecture", f"{self.architecture}, {self.blocks} block{'s' * (self.blocks != 1)}"
        dtypes = ", ".join(f"{format_bytes(size)} {dtype}" for dtype, size in self.dtypes.items())
        yield "parameters", f"{self.parameters:,} in {format_bytes(self.bytes)} ({dtypes})"
        yield "linear layers", "\n".join(f"{count} x {kind}" for kind, count in self.linears.items()) or "none"
        yield (
            "activations",
            "\n".join(_activation(*each) for each in self.activations.items()) or "none that is a module",
        )
        yield "coverage", "\n".join(self.coverage)
        yield "sites", ", ".join(self.sites)
        if self.recipe:
            yield "recipe", "\n".join(_entry(entry) for entry in self.recipe)
            yield "edits", ", ".join(f"{count} {kind}" for kind, count in self.edits.items())
        else:
            yield "recipe", "none: actkit has not changed this model"
        if self.results:
            yield "measured", "recorded in actkit.json; see --json"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self)


def summarise(model: nn.Module, example: Any = None, results: dict[str, Any] | None = None) -> Summary:
    """Summarise a model.

    Args:
        model: any.
        example: a batch, needed if the architecture has no row and must be traced.
        results: what `actkit.json` recorded when the model was saved.

    Returns:
        What the model is, and what actkit changed on it.

    Raises:
        CoverageError: the model cannot be read.
    """
    view = anatomy(model, example)
    origin, known = changes.source(model), changes.of(model)
    coverage = view.coverage()
    dtypes: Counter[str] = Counter()
    for tensor in distinct_tensors(model):
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    linears: Counter[str] = Counter()
    for index in range(len(view.blocks)):
        linears.update(_kind(linear.module) for linear in view.block(index).linears())
    return Summary(
        model=type(model).__name__,
        architecture=view.architecture,
        source=None if origin is None else origin.name,
        blocks=len(view.blocks),
        parameters=sum(row.numel for row in coverage.rows),
        bytes=parameter_bytes(model),
        dtypes=dict(dtypes.most_common()),
        linears=dict(linears.most_common()),
        activations=_activations(model),
        sites=tuple(dict.fromkeys(site.name for site in view.sites())),
        coverage=_lines(coverage),
        recipe=[] if known is None else known.recipe,
        edits={} if known is None else dict(Counter(next(iter(edit)) for edit in known.edits)),
        results=results or {},
        source_grid=None if origin is None or origin.grid is None else origin.grid.to_dict(),
    )


def _lines(coverage: Coverage) -> tuple[str, ...]:
    lines = [f"{numel:>16,}  {tensors:>6} tensors  {key}" for key, numel, tensors in coverage.groups()]
    return (*(line.strip() for line in lines), coverage.describe())


def _activations(model: nn.Module) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for _, module in without_inner(model):
        if not is_activation(module):
            continue
        record, groups = record_of(module), groups_of(module)
        name = type(module).__name__ + (f" of {groups:,} functions" if groups > 1 else "")
        known = found.setdefault(name if record is None else record.name, {"count": 0})
        known["count"] += 1
        moments = None if record is None else record.moments()
        if record is not None and moments is not None:
            known |= {"mean": moments.mean, "second_moment": moments.second, "zeros": record.share_of_zeros()}
    return found


def _activation(name: str, known: dict[str, float]) -> str:
    line = f"{known['count']} x {name}"
    if "mean" not in known:
        return line
    return (
        f"{line}: of a standard normal input mean {known['mean']:.3f}, second moment {known['second_moment']:.3f}, "
        f"{known['zeros']:.0%} zeros"
    )


def _kind(module: nn.Module) -> str:
    if not isinstance(module, ActLinear):
        return "dense"
    parts = [module.storage.describe()]
    if module.select is not None:
        when = " in decoding only" if module.select.prefill == "dense" else ""
        parts.append(f"inputs selected by {module.select.spec()['kind'].replace('_', ' ')}{when}")
    if module.inputs is not None:
        parts.append(module.inputs.describe())
    if module.correction is not None:
        parts.append(f"low-rank correction of rank {module.correction.left.shape[1]}")
    return ", ".join(parts)


def _entry(entry: dict[str, Any]) -> str:
    name, settings = next(iter(entry.items()))
    return f"{name}: " + ", ".join(f"{key}={value}" for key, value in (settings or {}).items())
