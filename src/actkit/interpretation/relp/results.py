"""What patching gives back: an effect for each node, as a table, a picture and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actkit.core.ground.figures import all_plain, plotly
from actkit.core.page.page import Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import signed_grid

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

Method = Literal["exact", "attribution", "relp", "integrated"]
MAP_WIDTH = 64  # positions of a map
LISTED = 200  # nodes of a page


@dataclass(frozen=True)
class Node:
    """One node with its effect.

    Attributes:
        site: 'blocks.3.mlp.output'.
        position: of the token, from 0.
        effect: on the metric.
        head: of `attention.mixed`.
    """

    site: str
    position: int
    effect: float
    head: int | None = None


@dataclass(frozen=True)
class PatchEffects:
    """The effects of all nodes.

    Attributes:
        method: how they were found.
        values: by the name of the site, [blocks, positions], or [blocks, heads, positions] of attention.mixed.
        blocks: by the name of the site, which blocks these are.
        base: the metric of the base.
        patch: the metric of the patch.
        tokens: of the first pair's base, for pictures; empty if they were not given.
        checked: exact effects of the first nodes of `top`; empty if none was patched.
    """

    method: Method
    values: Mapping[str, Tensor]
    blocks: Mapping[str, tuple[int, ...]]
    base: float
    patch: float
    tokens: tuple[str, ...] = ()
    checked: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """What patching everything does: the metric of the patch less that of the base."""
        return self.patch - self.base

    def correlate(self, other: PatchEffects, site: str, *, skip: int = 0) -> float:
        """Pearson's correlation with other effects of the same nodes.

        Args:
            other: of the same sites.
            site: its name.
            skip: leave out so many first positions, whose effects may rule a correlation.

        Returns:
            -1 to 1; NaN if either has no variance.
        """
        pair = torch.stack([each.values[site][..., skip:].flatten().double() for each in (self, other)])
        return float(torch.corrcoef(pair)[0, 1])

    def top(self, count: int = 20) -> tuple[Node, ...]:
        """Return the nodes with the largest effects, in magnitude.

        Args:
            count: how many.
        """
        found: list[Node] = []
        for name, values in self.values.items():
            flat = values.abs().flatten()
            for index in flat.topk(min(count, flat.numel())).indices.tolist():
                place = torch.unravel_index(torch.tensor(index), values.shape)
                block, position = self.blocks[name][int(place[0])], int(place[-1])
                head = int(place[1]) if values.dim() == 3 else None
                found.append(Node(f"blocks.{block}.{name}", position, float(values.flatten()[index]), head))
        return tuple(sorted(found, key=lambda node: -abs(node.effect))[:count])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "method": self.method,
            "base": self.base,
            "patch": self.patch,
            "tokens": list(self.tokens),
            "values": {name: values.tolist() for name, values in self.values.items()},
            "blocks": {name: list(blocks) for name, blocks in self.blocks.items()},
            "checked": list(self.checked),
        }

    def table(self) -> Table:
        """The nodes with the largest effects."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title=f"Effects ({self._about})", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("node", no_wrap=True)
        table.add_column("position", justify="right")
        table.add_column("token")
        table.add_column("effect", justify="right")
        if self.checked:
            table.add_column("exact", justify="right")
        for at, node in enumerate(self.top()):
            exact = [f"{self.checked[at]:.4g}"] if at < len(self.checked) else []
            table.add_row(
                self._name(node), str(node.position), self._token(node.position), f"{node.effect:.4g}", *exact
            )
        return table

    @property
    def _about(self) -> str:
        return f"{self.method}; the metric goes from {self.base:.4g} to {self.patch:.4g} if all is patched"

    @staticmethod
    def _name(node: Node) -> str:
        return node.site if node.head is None else f"{node.site}, head {node.head}"

    def _token(self, position: int) -> str:
        return self.tokens[position] if position < len(self.tokens) else ""

    def page(self) -> Page:
        """Maps of blocks by positions with the tokens above, and the first nodes; heads are summed in the maps."""
        length = next(iter(self.values.values())).shape[-1]
        summed = {name: values.sum(1) if values.dim() == 3 else values for name, values in self.values.items()}
        most = max(float(values.abs().max()) for values in summed.values())
        strength = torch.stack([values.abs().amax(0) for values in summed.values()]).amax(0)
        shown = sorted(strength.topk(min(length, MAP_WIDTH)).indices.tolist())
        columns = [f"{place} {self._token(place)}".strip() for place in shown]
        maps = []
        for name, values in summed.items():
            rows = [f"block {block}" for block in self.blocks[name]]
            picture = signed_grid(values[:, shown].tolist(), rows, columns, f"Effects at {name}", most)
            maps.append(Picture(name, picture))
        left = "" if len(shown) == length else f" Shown are the {len(shown)} of {length} positions with most effect."
        nodes: list[tuple[Any, ...]] = []
        for at, node in enumerate(self.top(LISTED)):
            exact = self.checked[at] if at < len(self.checked) else ""
            nodes.append((self._name(node), node.position, self._token(node.position), node.effect, exact))
        headings: tuple[str, ...] = ("node", "position", "token", "effect", "patched exactly")
        if not self.checked:
            headings, nodes = headings[:-1], [row[:-1] for row in nodes]
        return Page(
            f"What causes the answer: {self.method}",
            f"The metric is {self.base:.4g} for the base and {self.patch:.4g} for the patch. An effect is what one "
            f"place alone adds to it if it is patched.",
            (
                Pictures(
                    "Where",
                    maps,
                    f"Blocks by positions; blue raises the metric, orange lowers it, on one scale. Point at a cell, or "
                    f"reach it by the arrow keys.{left}",
                ),
                Sorted("The first nodes", headings, nodes),
            ),
        )

    def figure(self) -> Figure:
        """Blocks by positions, one picture for each site; heads are summed.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        subplots = plotly().subplots
        names = list(self.values)
        figure: Figure = subplots.make_subplots(rows=len(names), cols=1, subplot_titles=names, shared_xaxes=True)
        summed = {name: values.sum(1) if values.dim() == 3 else values for name, values in self.values.items()}
        largest = max(float(values.abs().max()) for values in summed.values())
        for row, (name, values) in enumerate(summed.items(), 1):
            places = all_plain(f"{place} {token}" for place, token in enumerate(self.tokens)) or None
            scale = {"colorscale": "RdBu", "zmid": 0, "zmin": -largest, "zmax": largest, "showscale": row == 1}
            picture = graph_objects.Heatmap(
                z=values.tolist(), x=places, y=[str(block) for block in self.blocks[name]], **scale
            )
            figure.add_trace(picture, row=row, col=1)
            figure.update_yaxes(title_text="block", row=row, col=1)
        return figure.update_layout(title=f"Effects by {self.method}", height=140 + 220 * len(names))


def mean_effects(parts: Sequence[PatchEffects], weights: Sequence[int]) -> PatchEffects:
    """Average effects over batches of pairs of one length.

    Args:
        parts: of one model, method and sites.
        weights: pairs of each.

    Returns:
        The means; tokens are those of the first.
    """
    total, first = sum(weights), parts[0]
    shares = [weight / total for weight in weights]
    values = {
        name: torch.stack([share * part.values[name] for share, part in zip(shares, parts, strict=True)]).sum(0)
        for name in first.values
    }
    base, patch = (
        sum(share * float(getattr(part, name)) for share, part in zip(shares, parts, strict=True))
        for name in ("base", "patch")
    )
    return PatchEffects(first.method, values, first.blocks, base, patch, first.tokens)
