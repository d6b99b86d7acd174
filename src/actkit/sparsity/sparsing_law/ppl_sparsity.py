"""Find the neurons of a model that may be skipped if perplexity may rise by p percent (2024, arXiv:2411.02335).

The share is one number for any activation function, and comes with the thresholds that realise it.
`perplexity_sparsity.py`, whose transform applies them, says how they are found, what is settled and what it costs. On
the text that they were fitted to, the rise is p by construction: give `held_out` to see what it is elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.forward.batch import BatchContext
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.train.objective import Loss
from actkit.sparsity.sparsing_law.cett import Method
from actkit.sparsity.sparsing_law.shared_cett import SharedCett, Sparse, in_float32, largest_cett, sequence

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class PerplexitySparsityResult:
    """What `ppl_sparsity` found.

    Attributes:
        p: the rise that is allowed, in percent.
        activation_ratio: share of the neurons that are active, over all layers and tokens.
        ratios: the same by the path of each output layer.
        per_token: 5th, 50th and 95th percentile over tokens, by path.
        cett: shared by all layers.
        thresholds: eps by path, as `PerplexitySparsity(thresholds=...)` takes them.
        ppl_dense: exp of the loss on the batches, without thresholds.
        ppl_sparse: the same with them.
        bracket: the last one around cett.
        reached: False if perplexity stays below 1 + p % even with every neuron dropped.
        held_out: the same measurement on other batches, if they were given.
        trace: (cett, perplexity ratio) in the order tried.
        tokens: of the batches.
    """

    p: float
    activation_ratio: float
    ratios: dict[str, float]
    per_token: dict[str, tuple[float, float, float]]
    cett: float
    thresholds: dict[str, float]
    ppl_dense: float
    ppl_sparse: float
    bracket: tuple[float, float]
    reached: bool
    held_out: Sparse | None
    trace: tuple[tuple[float, float], ...]
    tokens: int

    @property
    def sparsity(self) -> float:
        """Share of the neurons that are skipped."""
        return 1 - self.activation_ratio

    @property
    def ppl_ratio(self) -> float:
        """Perplexity with thresholds over perplexity without."""
        return self.ppl_sparse / self.ppl_dense

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "sparsity": self.sparsity, "ppl_ratio": self.ppl_ratio}

    def table(self) -> Table:
        """One row per layer, and the whole."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        said = "" if self.reached else "; not reached: every neuron may be dropped"
        title = (
            f"PPL-{self.p:g}% sparsity {self.sparsity:.1%} at CETT {self.cett:.4g}: perplexity {self.ppl_dense:.4g} to"
        )
        title += f" {self.ppl_sparse:.4g} (x {self.ppl_ratio:.4f}) on {self.tokens:,} tokens{said}"
        if self.held_out is not None:
            title += f"; held out x {math.exp(self.held_out.rise):.4f}, {1 - self.held_out.ratio:.1%}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("output layer")
        for name in ("active", "5 to 95 % of the tokens", "threshold"):
            table.add_column(name, justify="right")
        for path, ratio in self.ratios.items():
            low, _, high = self.per_token[path]
            table.add_row(path, f"{ratio:.1%}", f"{low:.1%} to {high:.1%}", f"{self.thresholds[path]:.4g}")
        return table

    def figure(self) -> Figure:
        """Draw active neurons by layer, with percentiles over tokens.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        middle = list(self.ratios.values())
        spread = {
            "array": [max(0, self.per_token[path][2] - ratio) for path, ratio in self.ratios.items()],
            "arrayminus": [max(0, ratio - self.per_token[path][0]) for path, ratio in self.ratios.items()],
        }
        figure = graph_objects.Figure(
            graph_objects.Bar(
                x=all_plain(self.ratios), y=middle, error_y={"type": "data", "symmetric": False, **spread}
            )
        )
        return figure.update_yaxes(title=f"active neurons at PPL-{self.p:g}%", tickformat=".0%")


def ppl_sparsity(
    model: nn.Module,
    batches: Sequence[Any],
    p: float = 1.0,
    *,
    held_out: Sequence[Any] | None = None,
    tolerance: float = 0.01,
    method: Method = "sort",
    sample: int = 1024,
    loss: Loss | None = None,
    progress: bool = True,
) -> PerplexitySparsityResult:
    """Find the share of neurons that may be skipped if perplexity may rise by p percent, and the thresholds for it.

    Args:
        model: the model to measure.
        batches: what the thresholds are fitted to, at least 20,000 tokens to be stable; dicts of the model's keywords.
            A model that is no language model needs 'labels'.
        p: in percent.
        held_out: batches to measure on as well.
        tolerance: as in `PerplexitySparsity`.
        method: as in `PerplexitySparsity`.
        sample: as in `PerplexitySparsity`.
        loss: of (model, batch), a mean over the batch, for a model without one; "perplexity" is then exp of it.
        progress: show a bar.

    Returns:
        The share, the thresholds, and what was measured.

    Raises:
        ValueError: a value is out of bounds.
        DataError: there is no loss.
        CoverageError: there is no MLP.
        NonFiniteError: the loss is NaN.
    """
    batches = sequence(batches)
    with in_float32(model, batches[0]) as view:
        search = SharedCett(view, batches, method=method, sample=sample, loss=loss, progress=progress)
        root = largest_cett(search.rise, p, tolerance)
        found = search.at(root.low)
        return PerplexitySparsityResult(
            p=p,
            activation_ratio=found.ratio,
            ratios=found.ratios,
            per_token=found.per_token,
            cett=root.low,
            thresholds=search.thresholds(root.low),
            ppl_dense=math.exp(found.dense_loss),
            ppl_sparse=math.exp(found.dense_loss + found.rise),
            bracket=(root.low, root.high),
            reached=root.reached,
            held_out=None if held_out is None else search.at(root.low, sequence(held_out)),
            trace=tuple((cett, math.exp(rise)) for cett, rise in root.trace),
            tokens=sum(BatchContext.of(batch, model).tokens for batch in batches),
        )
