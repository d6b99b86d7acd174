"""Massive activations: the few values of a layer that are far larger than all others, and where they are.

    strict  = |x| > 100 and |x| > 1000 x median |x|          (Sun et al. 2024, arXiv:2402.17762)
    relaxed: r = mean over sequences of (largest |x| / median |x|), both over all tokens and channels of a sequence

From "Hidden Dynamics of Massive Activations in Transformer Training" (2025, arXiv:2508.03616), which measures r behind
each block and follows it over training (`law`); the strict definition and the intervention (`overwriting`) are those of
the work before it.
When to use it: before activations are rounded (one scale for such a layer loses all else), to see which tokens a model
parks its attention on, or along a training by the rule `meter`.
Cost: one forward pass, and the median of every sequence and layer: about as long again on a small model.
Settled here: magnitudes of bfloat16 are taken as they are and sums in float64; behind the last block is read before the
final norm. The median of the strict definition is over all sequences, to 1/512 (`Quantiles`).
Not checked: the authors' code was not to be had; text of the paper and code of the work before it were read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.model.sites import Site
from actkit.core.page.page import Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import lines_over
from actkit.core.watch.capture import record
from actkit.core.watch.extremes import Extreme, Extremes, SequencePeaks, is_massive
from actkit.core.watch.statistics import Quantiles

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class LayerPeaks:
    """The largest values at one site.

    Attributes:
        site: where.
        block: its block; None outside of all.
        top: the largest values with their places, the first the largest.
        median: of |x| over all sequences.
        ratio: the relaxed one, a mean over sequences.
        ratio_std: its standard deviation over sequences; 0 for one.
        strict: whether the strict definition is met.
    """

    site: str
    block: int | None
    top: tuple[Extreme, ...]
    median: float
    ratio: float
    ratio_std: float
    strict: bool


@dataclass(frozen=True)
class MassiveActivations:
    """The largest values of each layer.

    Attributes:
        site: as it was given.
        sequences: how many were read.
        layers: in the order of the model.
    """

    site: str
    sequences: int
    layers: tuple[LayerPeaks, ...]

    @property
    def strict(self) -> tuple[LayerPeaks, ...]:
        """The layers that meet the strict definition."""
        return tuple(layer for layer in self.layers if layer.strict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        found = asdict(self)
        found["layers"] = [{**layer, "top": list(layer["top"])} for layer in found["layers"]]
        return found

    def table(self) -> Table:
        """A row per layer: the largest value, its token, position and channel, and the ratios."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        count = len(self.strict)
        title = f"Largest activations at {self.site}, {self.sequences} sequences: {count} layers strictly massive (!)"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        for name in ("largest", "token", "place", "channel", "median", "ratio"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            first = layer.top[0]
            token = "" if first.token_id < 0 else f"{first.token_id}"
            where = (token, f"{first.place}", f"{first.channel}")
            ratio = f"{layer.ratio:,.0f} ± {layer.ratio_std:,.0f}{' !' if layer.strict else ''}"
            name = layer.site if layer.block is None else f"block {layer.block}"
            table.add_row(name, f"{first.value:,.4g}", *where, f"{layer.median:.3g}", ratio)
        return table

    def page(self) -> Page:
        """Magnitudes by layer on a logarithmic axis, and all of the largest values with their places."""
        places: list[int | str] = [layer.site if layer.block is None else layer.block for layer in self.layers]
        lines = [
            [(at, abs(layer.top[0].value)) for at, layer in enumerate(self.layers)],
            [(at, layer.median) for at, layer in enumerate(self.layers)],
            [(at, layer.ratio) for at, layer in enumerate(self.layers)],
        ]
        drawn = [
            Picture("the largest (blue) and the median magnitude", lines_over(lines[:2], "magnitudes", places, True)),
            Picture("largest over median, a mean over sequences", lines_over(lines[2:], "ratios", places, True)),
        ]
        where = ("token id", "position", "channel", "document")
        headings = ("layer", "rank", "value", *where, "over the median", "strict")
        rows = []
        for layer in self.layers:
            for rank, one in enumerate(layer.top, start=1):
                place = (one.token_id, one.place, one.channel, one.document)
                strict = "massive" if is_massive(abs(one.value), layer.median) else ""
                rows.append((layer.site, rank, one.value, *place, abs(one.value) / layer.median, strict))
        return Page(
            f"Massive activations at {self.site}",
            f"{self.sequences} sequences. {len(self.strict)} of {len(self.layers)} layers are massive: above 100 "
            "and 1,000 times the median.",
            (Pictures("By layer", drawn, small=True), Sorted("The largest values", headings, rows)),
        )

    def figure(self) -> Figure:
        """Draw the largest magnitudes and the median of each layer, on a logarithmic axis.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = [layer.site for layer in self.layers]
        figure = graph_objects.Figure()
        for rank in range(max(len(layer.top) for layer in self.layers)):
            held = [layer for layer in self.layers if len(layer.top) > rank]
            texts = [
                f"token {layer.top[rank].token_id}, place {layer.top[rank].place}, channel {layer.top[rank].channel}"
                for layer in held
            ]
            sizes = [abs(layer.top[rank].value) for layer in held]
            figure.add_trace(
                graph_objects.Scatter(x=[layer.site for layer in held], y=sizes, text=texts, name=f"largest {rank + 1}")
            )
        figure.add_trace(graph_objects.Scatter(x=names, y=[layer.median for layer in self.layers], name="median"))
        figure.update_yaxes(type="log", title="magnitude")
        return figure


def massive_activations(
    model: nn.Module, batches: Iterable[Any], *, site: str = "block.output", top: int = 3, progress: bool = True
) -> MassiveActivations:
    """Find the largest activations of each layer.

    Args:
        model: neither compiled nor sharded.
        batches: dicts of the model's keywords, or tensors. The first token of a sequence carries most of them, so
            compare models on the same sequences, with or without a first token of its own.
        site: a site, a bare name ('block.output': behind every block) or a pattern.
        top: how many values of each layer are shown.
        progress: show a bar.

    Returns:
        The layers with their largest values and ratios.

    Raises:
        ValueError: the site is unknown, or `top` is below 1.
        DataError: half of the values of a layer are 0, so that no ratio is defined.
        ActkitError: what `record` raises.
    """
    if top < 1:
        raise ValueError(f"top: {top} was given; show at least 1 value of each layer.")
    wanted = {site: [Extremes(top), SequencePeaks(), Quantiles()]}
    seen = record(model, wanted, sequence_of(batches), progress=progress)
    layers = tuple(_layer(found, *seen[found]) for found in seen if seen[found][0].count)
    if not layers:
        raise DataError(f"site: no token reached {site}; choose a site that the model reads.")
    return MassiveActivations(site, len(seen[next(iter(seen))][1].largest), layers)


def _layer(site: Site, extremes: Extremes, peaks: SequencePeaks, quantiles: Quantiles) -> LayerPeaks:
    median = quantiles.quantile(0.5)
    if median == 0 or not bool((peaks.median > 0).all()):
        raise DataError(
            f"{site}: the median magnitude is 0, as half of the values are, so that nothing can be compared with it; "
            f"choose a site without a ReLU, such as block.output."
        )
    ratios = peaks.largest / peaks.median
    spread = float(ratios.std()) if len(ratios) > 1 else 0.0
    first = extremes.entries[0]
    strict = is_massive(abs(first.value), median)
    return LayerPeaks(str(site), site.block, extremes.entries, median, float(ratios.mean()), spread, strict)
