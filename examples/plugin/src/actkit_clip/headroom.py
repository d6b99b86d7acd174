"""How far the largest activation of each MLP lies above the limit that `clip` would set: an analysis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.model.anatomy import anatomy
from actkit.core.watch.capture import opened_experts, record
from actkit.core.watch.statistics import AbsMax, Quantiles
from actkit_clip.clip import site_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Headroom:
    """What `clip` would cut off.

    Attributes:
        share: of the values that would be clipped.
        limits: the (1 - share)-quantile of |f(x)| by site.
        largest: the largest |f(x)| by site.
    """

    share: float
    limits: dict[str, float]
    largest: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def table(self) -> Table:
        """A row per MLP."""
        from rich.table import Table

        table = Table("site", title=f"What clip with share {self.share:g} would cut off", title_justify="left")
        for name in ("limit", "largest"):
            table.add_column(name, justify="right")
        for site, limit in self.limits.items():
            table.add_row(site, f"{limit:.3g}", f"{self.largest[site]:.3g}")
        return table

    def figure(self) -> Figure:
        """Draw two bars per MLP. Raises ImportError if plotly (the extra `report`) is missing."""
        from plotly.graph_objects import Bar, Figure

        bars = [
            Bar(x=list(self.limits), y=list(values.values()), name=name)
            for name, values in (("limit", self.limits), ("largest", self.largest))
        ]
        return Figure(bars).update_yaxes(title="magnitude")


def headroom(model: nn.Module, batches: Iterable[Any], share: float = 0.001, *, progress: bool = True) -> Headroom:
    """Measure what `Clip(share=share)` would cut off, in one pass over the batches; the model stays as it is."""
    view = anatomy(model)
    with opened_experts(view):
        blocks = [view.block(block.index) for block in view.blocks]
        sites = [site_of(block, expert, mlp) for block in blocks for expert, mlp in block.mlps()]
        wanted = {site: [Quantiles(), AbsMax()] for site in sites}
        seen = record(model, wanted, batches, anatomy=view, progress=progress)
    found = {str(site): seen[site] for site in sites if site not in seen.unseen}
    limits = {name: float(quantiles.quantile(1 - share)) for name, (quantiles, _) in found.items()}
    return Headroom(share, limits, {name: float(largest.value.max()) for name, (_, largest) in found.items()})
