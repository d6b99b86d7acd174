"""The entropy of attention, head by head: over how many keys a head spreads.

    H = -sum_j A_j log A_j       of each query's weights;   exp(H): as many keys, equally read, have this entropy

Softmax spreads over more and more keys as a text grows; LSSA's scale keeps the entropy nearly constant, and LSSAR's
re-weighting lowers it. The weights are formed for the time of the measurement ('eager' in place of 'sdpa'), and the
model is as before at its end. A row that reads nothing (padding) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import ATTENTION, Configure, temporarily
from actkit.core.forward.batch import check_batch, forward, mask_of, reads_beyond, sequence_of
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.ground.progress import track
from actkit.core.layers.attention_function import function_of
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.model.parts import attention_implementation, forms_weights
from actkit.core.model.sites import Tap, read_tap
from actkit.functions.softplus_attention.attention import WeightedAttention

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

WEIGHTS = "attention.weights"


@dataclass(frozen=True)
class HeadEntropy:
    """The entropy of one block's heads.

    Attributes:
        site: of the weights.
        heads: nats, the mean over the queries of each head.
    """

    site: str
    heads: tuple[float, ...]


@dataclass(frozen=True)
class AttentionEntropy:
    """What `attention_entropy` found.

    Attributes:
        blocks: the heads of each block.
        attention: the name of the attention function.
        queries: how many rows of weights the means are over, per head.
    """

    blocks: tuple[HeadEntropy, ...]
    attention: str
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        blocks = [{"site": block.site, "heads": list(block.heads)} for block in self.blocks]
        return {"blocks": blocks, "attention": self.attention, "queries": self.queries}

    def table(self) -> Table:
        """A row per block: the mean, the sharpest and the widest head."""
        from math import exp

        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Entropy of attention ({self.attention}), nats (as many keys equally read); {self.queries:,} queries"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("site", "mean", "sharpest head", "widest head"):
            table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
        for block in self.blocks:
            middle, low, high = sum(block.heads) / len(block.heads), min(block.heads), max(block.heads)
            table.add_row(block.site, *(f"{each:.2f} ({exp(each):.3g})" for each in (middle, low, high)))
        return table

    def figure(self) -> Figure:
        """Draw a heat map of blocks and heads.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects
        values, sites = [list(block.heads) for block in self.blocks], all_plain(block.site for block in self.blocks)
        figure = go.Figure(go.Heatmap(z=values, y=sites, colorbar={"title": "nats"}))
        figure.update_xaxes(title="head")
        return figure.update_yaxes(autorange="reversed")


def attention_entropy(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> AttentionEntropy:
    """Measure the entropy of a model's attention weights, by head.

    Args:
        model: of transformers, described by a row.
        batches: dicts of the model's keywords, or tensors.
        progress: show a bar.

    Returns:
        The mean entropy of each head.

    Raises:
        UnsupportedModelError: its attention weights cannot be formed.
        DataError: a batch does not fit the model, or there is none.
    """
    batches = sequence_of(batches)
    for batch in batches:
        check_batch(model, batch, beyond_context=reads_beyond(batches))
    if not len(batches):
        raise DataError("batches: they hold no token; give at least one.")
    view = anatomy(model, batches[0])
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with temporarily(model, _forming(model)), evaluating(model):
        taps = _taps(view)
        for batch in track(batches, "Measuring attention", enabled=progress):
            mask = mask_of(batch)

            def read(name: str, tap: Tap, mask: Tensor | None) -> Any:
                def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    weights = read_tap(tap, args, kwargs, output).double()  # [batch, heads, queries, keys]
                    entropy = -torch.special.xlogy(weights, weights).sum(-1)
                    real = weights.sum((1, 3)) > 0
                    if mask is not None and mask.shape == real.shape:
                        real = real & mask.bool().to(real.device)
                    sums[name] = sums.get(name, 0) + (entropy * real[:, None]).sum((0, 2)).cpu()
                    counts[name] = counts.get(name, 0) + int(real.sum())

                return hook

            with hooked(model, after={tap.path: read(name, tap, mask) for name, tap in taps.items()}):
                forward(model, batch)
    if not min(counts.values()):
        raise DataError("batches: they hold no token; give at least one.")
    blocks = tuple(HeadEntropy(name, tuple((total / counts[name]).tolist())) for name, total in sums.items())
    return AttentionEntropy(blocks, str(attention_implementation(model)), min(counts.values()))


def _forming(model: nn.Module) -> list[Configure]:
    """What lets a model form its weights."""
    if forms_weights(model):
        return []
    function = function_of(model)
    if isinstance(function, WeightedAttention):
        return [Configure(ATTENTION, replace(function, weights=True).spec())]
    if attention_implementation(model) == "sdpa" and model._can_set_attn_implementation():  # type: ignore[operator]
        return [Configure(ATTENTION, "eager")]
    raise UnsupportedModelError(
        f"model: the attention {attention_implementation(model)!r} of {type(model).__name__} forms no weights; give a "
        f"transformers model whose attention is 'sdpa', 'eager', 'lssa' or 'lssar'."
    )


def _taps(view: Anatomy) -> dict[str, Tap]:
    """Where the weights of each block are read, by the name of the site."""
    sites = [Site(WEIGHTS, block.index) for block in view.blocks if block.attention is not None]
    if not sites:
        raise UnsupportedModelError(
            f"model: no attention of {type(view.model).__name__} is described; give a model of a family that is."
        )
    return {str(site): view.tap(site) for site in sites}
