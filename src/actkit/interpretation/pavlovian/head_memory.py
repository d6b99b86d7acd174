"""Any head of a model opened as a memory: how full it is, how its keys get in each other's way, what it retrieves.

    load = keys that a query sees / d      effective dimension = (tr C)^2 / tr(C^2), C of unit keys
    crosstalk = mean over keys of the sum of |<k_j, k_i>| over the others      fidelity = cos(o_j, v of the first key)

A head of softmax stores every key with its value and weighs them by likeness with the query. Its keys are those that
the attention function gets, behind the rotary embedding; the first key of a query is the one with the largest weight.
When to use it: to see which heads retrieve one token's value and which mix many, and how far real keys are from the
random ones that capacities are derived for.
Cost: a forward pass with attention weights formed ('eager'), and a matrix [keys, keys] for each head and text.
Our own reading: all four measures, as the paper gives none for trained models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import ATTENTION, Configure, temporarily
from actkit.core.forward.batch import forward, mask_of, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.model.parts import attention_implementation, forms_weights
from actkit.core.page.page import Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import lines_over, signed_grid
from actkit.core.watch.capture import live

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

PARTS = ("key", "value", "weights")
MEASURES = ("load", "dimension", "crosstalk", "fidelity", "first")


@dataclass(frozen=True)
class Head:
    """One head as a memory; means over queries (and keys) of all texts.

    Attributes:
        block: its block.
        head: its number there.
        load: keys that a query sees, over the size of a key.
        dimension: over which unit keys of a text spread.
        crosstalk: of a key with all others of its text.
        fidelity: cosine of what is retrieved and the value of the first key.
        first: the weight of the first key.
    """

    block: int
    head: int
    load: float
    dimension: float
    crosstalk: float
    fidelity: float
    first: float


@dataclass(frozen=True)
class HeadMemories:
    """All heads.

    Attributes:
        size: of a key.
        queries: that the means are over.
        heads: in order.
    """

    size: int
    queries: int
    heads: tuple[Head, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "heads": [asdict(head) for head in self.heads]}

    def table(self) -> Table:
        """A row per block: means over its heads, and the head that retrieves best."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Heads as memories: keys of {self.size}, {self.queries} queries"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("block", "load", "dimension", "crosstalk", "fidelity", "best head", "its fidelity"):
            table.add_column(name, justify="right", no_wrap=True)
        for block in dict.fromkeys(head.block for head in self.heads):
            mine = [head for head in self.heads if head.block == block]
            means = [sum(getattr(head, name) for head in mine) / len(mine) for name in MEASURES[:4]]
            best = max(mine, key=lambda head: head.fidelity)
            cells = (f"{means[0]:.2f}", f"{means[1]:.1f}", f"{means[2]:.1f}", f"{means[3]:.3f}")
            table.add_row(str(block), *cells, str(best.head), f"{best.fidelity:.3f}")
        return table

    def page(self) -> Page:
        """The fidelity of each head as a grid, means by block, and all numbers."""
        blocks = list(dict.fromkeys(head.block for head in self.heads))
        by_block = [[head for head in self.heads if head.block == block] for block in blocks]
        values = [[head.fidelity for head in mine] for mine in by_block]
        columns = [str(head) for head in range(max(map(len, by_block)))]
        drawn = [
            Picture("blocks by heads", signed_grid(values, [f"block {b}" for b in blocks], columns, "fidelity", 1.0))
        ]
        lines = []
        for name in MEASURES[:3]:
            means = [(at, sum(getattr(head, name) for head in mine) / len(mine)) for at, mine in enumerate(by_block)]
            lines.append(Picture(name, lines_over([means], name, blocks, False)))
        headings = ("block", "head", *MEASURES)
        rows = [(head.block, head.head, *(getattr(head, name) for name in MEASURES)) for head in self.heads]
        return Page(
            "Heads as memories",
            f"Keys of {self.size}; means over {self.queries} queries.",
            (
                Pictures("Fidelity of retrieval", drawn, "Cosine of what is retrieved and the value of the first key."),
                Pictures("Means by block", lines, small=True),
                Sorted("Heads", headings, rows, "first: the weight of the key that is weighed most."),
            ),
        )

    def figure(self) -> Figure:
        """Draw the fidelity of each head, blocks by heads.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        blocks = list(dict.fromkeys(head.block for head in self.heads))
        rows = [[head.fidelity for head in self.heads if head.block == block] for block in blocks]
        figure = graph_objects.Figure(
            graph_objects.Heatmap(z=rows, y=[str(block) for block in blocks], colorscale="Viridis")
        )
        return (
            figure.update_layout(title="Fidelity of retrieval").update_xaxes(title="head").update_yaxes(title="block")
        )


def head_memory(
    model: nn.Module, batches: Iterable[Any], *, blocks: tuple[int, ...] | None = None, progress: bool = True
) -> HeadMemories:
    """Open the heads of a model as memories.

    Args:
        model: a transformer that can form attention weights; as it was afterwards.
        batches: texts, or what it takes.
        blocks: which; None for all.
        progress: show a bar.

    Returns:
        Load, dimension, crosstalk and fidelity of each head.

    Raises:
        ValueError: a block does not exist.
        DataError: no batch, or no token in them.
        UnsupportedModelError: the model has no attention that is seen, or cannot form its weights.
    """
    given = sequence_of(batches)
    if not len(given):
        raise DataError("batches: 0 were given; pass at least one.")
    view = anatomy(model, given[0])
    seen = [block.index for block in view.blocks if block.attention is not None]
    if not seen or view.architecture == "traced":
        raise UnsupportedModelError("model: no attention was found in it; head_memory opens heads of transformers.")
    wrong = sorted(set(blocks or ()) - set(seen))
    if wrong:
        raise ValueError(f"blocks: {wrong} were given; those with attention are {seen[0]} to {seen[-1]}.")
    chosen = [index for index in seen if blocks is None or index in blocks]
    sites = {(index, part): Site(f"attention.{part}", index) for index in chosen for part in PARTS}
    eager = [] if forms_weights(model) else [Configure(ATTENTION, "eager")]
    if eager and not (attention_implementation(model) == "sdpa" and model._can_set_attn_implementation()):  # type: ignore[operator]
        raise UnsupportedModelError(
            f"model: the attention {attention_implementation(model)!r} of {type(model).__name__} forms no weights; "
            f"give a transformers model whose attention is 'sdpa' or 'eager'."
        )
    sums: dict[int, Tensor] = {}
    counts = torch.zeros(len(MEASURES), dtype=torch.float64)
    size = 0
    with evaluating(model), torch.no_grad(), temporarily(model, eager), live(model, sites.values(), view) as found:
        for batch in track(given, "Opening heads", len(given), progress):
            found.clear()
            forward(model, batch)
            mask = mask_of(batch)
            for at, index in enumerate(chosen):
                key, value, weights = (found[sites[index, part]][0].double() for part in PARTS)
                size = key.shape[-1]
                total, count = _measured(key, value, weights, mask)
                sums[index] = sums[index] + total if index in sums else total
                if at == 0:
                    counts += count
    if not bool((counts > 0).all()):
        raise DataError("batches: they hold no token; give at least one.")
    heads = tuple(
        Head(index, head, *(sums[index][head] / counts).tolist())
        for index in chosen
        for head in range(len(sums[index]))
    )
    return HeadMemories(size, int(counts[0]), heads)


def _measured(key: Tensor, value: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums [heads, measures] of one batch, and what they are over [measures].

    Args:
        key: [batch, key heads, length, size].
        value: [batch, key heads, length, size].
        weights: [batch, heads, queries, keys].
        mask: [batch, length], 0 for padding.
    """
    batch, heads, length, _ = weights.shape
    repeat = heads // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    queries = real[:, None, :].expand(batch, heads, length)
    visible = weights > 0
    first, at = weights.max(-1)
    told = weights @ value
    target = value.gather(2, at[..., None].expand(*at.shape, value.shape[-1]))
    fidelity = nn.functional.cosine_similarity(told, target, dim=-1)
    unit = nn.functional.normalize(key, dim=-1) * real[:, None, :, None]
    alike = (unit @ unit.mT).abs()
    others = alike.sum(-1) - alike.diagonal(dim1=-2, dim2=-1)
    spread = unit.mT @ unit  # [batch, heads, size, size]
    dimension = real.sum(-1)[:, None] ** 2 / spread.square().sum((-1, -2))  # the trace is the number of unit keys

    def over_queries(x: Tensor) -> Tensor:
        return (x * queries).sum((0, 2))

    total = torch.stack(
        [
            over_queries(visible.sum(-1) / key.shape[-1]),
            dimension.sum(0),
            over_queries(others),
            over_queries(fidelity),
            over_queries(first),
        ],
        -1,
    )
    number = float(real.sum())
    return total, torch.tensor([number, float(batch), number, number, number], dtype=torch.float64)
