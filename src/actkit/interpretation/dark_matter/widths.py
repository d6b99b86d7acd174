"""Autoencoders of several widths: which tokens stay badly reconstructed, and which part of the error width takes away.

    for widths i < j, over tokens:   |e_j| ~ a |e_i| + b,   then   |e_j| ~ a |e_i| + c |rest_i| + b
    removed = (R2' - R2) / (1 - R2)     of the variance that the first leaves

From `error_split`, the paper's scaling (arXiv:2410.14670).
When to use it: with two or more widths at hand, to see whether the next one pays.
Cost: that of `split_error` for each.
Settled here: regressions are fitted on the first half of the measured rows and measured on the second.
Autoencoders whose dead shares differ by more than 20 points are refused: dead latents count as features not learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actkit.core.ground.figures import plotly
from actkit.interpretation.dark_matter.error_split import ErrorSplit, split_error
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

APART = 0.2  # of dead shares, at most


@dataclass(frozen=True)
class WidthPair:
    """How the error per token of one width foretells that of a larger one.

    Attributes:
        narrow: latents of the one.
        wide: latents of the other.
        explained: R2 of |e| of the wide one from that of the narrow one.
        with_rest: R2 with the narrow one's |rest| beside it.
    """

    narrow: int
    wide: int
    explained: float
    with_rest: float

    @property
    def removed(self) -> float:
        """Share of the variance left that the rest explains."""
        return (self.with_rest - self.explained) / (1 - self.explained)


@dataclass(frozen=True)
class WidthComparison:
    """Splits by width, the narrowest first.

    Attributes:
        splits: of each autoencoder.
        pairs: of each two.
    """

    splits: tuple[ErrorSplit, ...]
    pairs: tuple[WidthPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        pairs = [{**asdict(pair), "removed": pair.removed} for pair in self.pairs]
        return {"splits": [split.to_dict() for split in self.splits], "pairs": pairs}

    def table(self) -> Table:
        """A row per width."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        rows = self.splits[0].rows
        table = PlainTable(title=f"Errors by width, {rows:,} held-out rows", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("latents", "FVU", "linear", "rest", "R2 of the error", "active", "dead"):
            table.add_column(name, justify="right")
        for split in self.splits:
            parts = (f"{split.fvu:.4f}", f"{split.fvu_linear:.4f}", f"{split.fvu_rest:.4f}", f"{split.explained:.3f}")
            table.add_row(f"{split.latents:,}", *parts, f"{split.active:.1f}", f"{split.dead:.1%}")
        table.caption = "; ".join(
            f"|e| at {pair.wide:,} from {pair.narrow:,}: R2 {pair.explained:.3f}, with |rest| {pair.with_rest:.3f}"
            for pair in self.pairs
        )
        return table

    def figure(self) -> Figure:
        """Draw the parts of the FVU over the width.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        widths = [split.latents for split in self.splits]
        figure = graph_objects.Figure()
        parts = {
            "all": [split.fvu for split in self.splits],
            "linear": [split.fvu_linear for split in self.splits],
            "rest": [split.fvu_rest for split in self.splits],
        }
        for name, values in parts.items():
            figure.add_trace(graph_objects.Scatter(x=widths, y=values, name=name))
        figure.update_xaxes(type="log", title="latents")
        figure.update_yaxes(title="fraction of variance unexplained", rangemode="tozero")
        return figure.update_layout(title="What width takes of the error")


def compare_widths(
    autoencoders: Sequence[SparseAutoencoder], learned: Iterable[Tensor], measured: Iterable[Tensor]
) -> WidthComparison:
    """Split the errors of autoencoders of several widths on the same rows.

    Args:
        autoencoders: at least two, of different widths, that were trained alike.
        learned: batches of rows that the maps are learned on.
        measured: others.

    Returns:
        The splits, and what each width foretells of the larger ones.

    Raises:
        ValueError: fewer than two widths, dead shares too far apart, or what `split_error` raises.
        DataError: the activations do not vary.
    """
    ordered = sorted(autoencoders, key=lambda each: each.latents)
    if len({each.latents for each in ordered}) < max(2, len(ordered)):
        raise ValueError(
            f"autoencoders: of {[each.latents for each in ordered]} latents were given; give at least 2 of different "
            f"widths."
        )
    first, second = (given if isinstance(given, Sequence) else list(given) for given in (learned, measured))
    splits = tuple(split_error(each, first, second) for each in ordered)
    dead = [split.dead for split in splits]
    if max(dead) - min(dead) > APART:
        raise ValueError(
            f"autoencoders: {', '.join(f'{share:.0%}' for share in dead)} of their latents are dead, which differ by "
            f"more than {APART:.0%} and would count as features not learned; train them until they are alike."
        )
    pairs = [_pair(narrow, wide) for place, narrow in enumerate(splits) for wide in splits[place + 1 :]]
    return WidthComparison(splits, tuple(pairs))


def _pair(narrow: ErrorSplit, wide: ErrorSplit) -> WidthPair:
    one = torch.ones(narrow.rows, 1, dtype=torch.float64)
    error, rest = narrow.sizes[:, 1:2].double(), narrow.sizes[:, 2:3].double()
    wanted = wide.sizes[:, 1].double()
    found = [_regressed(torch.cat([error, *more, one], 1), wanted) for more in ([], [rest])]
    return WidthPair(narrow.latents, wide.latents, *found)


def _regressed(x: Tensor, y: Tensor) -> float:
    """R2 on the second half of what is fitted on the first."""
    half = len(y) // 2
    solution = torch.linalg.lstsq(x[:half], y[:half, None]).solution
    left = y[half:] - (x[half:] @ solution)[:, 0]
    return float(1 - left.square().sum() / (y[half:] - y[half:].mean()).square().sum())
