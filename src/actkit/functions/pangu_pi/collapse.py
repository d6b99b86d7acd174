"""How fast attention may draw tokens together: the bounds of PanGu-pi (2023, arXiv:2312.17276).

    d(H)  = |H - 1 mean(H)|_F
    d(attention(H))              <=  sqrt(lambda heads) s v d(H)
    d(H + attention(H))          <=  (sqrt(lambda heads) s v + 1) d(H)
    d(H + attention(H) + sum_t T_t(H))  <=  (sqrt(lambda heads) s v + 1 + sum_t L |W1_t| |W2_t|) d(H)
    d(down f(up H))              <=  L |up| |down| d(H)                  of a series of n terms: sum_i L max|a_i| in
    place of L

lambda is the largest eigenvalue of A^T (I - 1 1^T / N) A over the attention matrices A of all heads, s the largest
singular value of a head's value projection, v that of the output projection, |W| a largest singular value, L the
Lipschitz constant of the function. Without a norm in between, which the theorems do not have, no measured d exceeds
them; in a model with norms they are the factors of its parts, not bounds of its stream. They bound from above: a
factor below 1 forces tokens together, one above 1 forces nothing.
When to use it: to see which blocks could collapse at all, and what a shortcut adds; `diversity` measures what happens.
Cost: one pass with attention weights (eager attention), and two singular values per block.
Our own reading: lambda and s are the largest over heads, and over the sequences of the batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import forward, mask_of
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.layers.activations import record_of
from actkit.core.model.anatomy import Attention, Mlp, Site, anatomy, read_tap
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.pangu_pi.shortcut import AugmentedShortcut

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class BlockBound:
    """The factors of one block's attention.

    Attributes:
        block: its index.
        spread: lambda.
        value: s.
        output: v.
        attention: of the attention alone.
        residual: with the residual sum.
        augmented: with the shortcuts too; the same if there are none.
        mlp: of an MLP without a gate; None with one, of which nothing is known.
    """

    block: int
    spread: float
    value: float
    output: float
    attention: float
    residual: float
    augmented: float
    mlp: float | None


@dataclass(frozen=True)
class CollapseBound:
    """Of all blocks.

    Attributes:
        blocks: those with an attention that is read.
    """

    blocks: tuple[BlockBound, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"blocks": [asdict(each) for each in self.blocks]}

    def table(self) -> Table:
        """A row per block."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title="Bounds of collapse", title_justify="left")
        table.box = box.SIMPLE_HEAD
        for name in ("block", "lambda", "s", "v", "attention", "with residual", "with shortcut", "MLP"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.blocks:
            values = (each.spread, each.value, each.output, each.attention, each.residual, each.augmented, each.mlp)
            table.add_row(str(each.block), *("" if value is None else f"{value:.3g}" for value in values))
        return table

    def figure(self) -> Figure:
        """Draw the factors, block by block.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        figure = graph_objects.Figure()
        for name in ("attention", "residual", "augmented"):
            values = [getattr(each, name) for each in self.blocks]
            figure.add_trace(graph_objects.Scatter(x=[each.block for each in self.blocks], y=values, name=name))
        figure.update_yaxes(type="log")
        figure.update_xaxes(title_text="block")
        return figure


def spread_of(weights: Tensor) -> float:
    """Return lambda: the largest eigenvalue of A^T (I - 1 1^T / N) A over all matrices.

    Args:
        weights: [..., N, N], the attention weights; rows sum to 1.
    """
    centred = weights.double() - weights.double().mean(-2, keepdim=True)
    return float(torch.linalg.matrix_norm(centred, 2).square().max())


def attention_factor(weights: Tensor, values: Tensor, output: Tensor) -> float:
    """Return sqrt(lambda heads) s v of an attention.

    Args:
        weights: [..., heads, N, N].
        values: [heads, head_dim, d], the value projection of each head.
        output: [d, heads * head_dim].
    """
    spread = math.sqrt(spread_of(weights) * weights.shape[-3])
    return spread * float(_norm(values).max()) * float(_norm(output))


def shortcut_factor(shortcut: AugmentedShortcut) -> float:
    """Return sum_t L |W1_t| |W2_t|."""
    lipschitz = lipschitz_of(shortcut.act_fn)
    pairs = zip(shortcut.down, shortcut.up, strict=True)
    return sum((lipschitz * float(_norm(down.weight)) * float(_norm(up.weight)) for down, up in pairs), 0.0)  # type: ignore[arg-type]


def mlp_factor(mlp: Mlp, model: nn.Module) -> float:
    """Return L |up| |down| of an MLP without a gate.

    Args:
        mlp: of a block.
        model: that holds it.
    """
    weights = float(_norm(mlp.up.weight)) * float(_norm(mlp.down.weight))
    return lipschitz_of(model.get_submodule(mlp.activation)) * weights


def lipschitz_of(function: nn.Module) -> float:
    """Return the largest slope of an activation function, from its record, on a fine grid of [-12, 12].

    Of a series it is at most the sum of its terms' slopes.

    Args:
        function: an activation function.

    Raises:
        DataError: nothing is known of it, or it is not element-wise.
    """
    if isinstance(function, SeriesActivation):
        slopes = function.scale.detach().abs().amax(1).sum() / (function.terms if function.normalize else 1)
        return float(slopes) * lipschitz_of(function.base)
    record = record_of(function)
    if record is None or record.derivative is None:
        raise DataError(f"function: no slope is known of a {type(function).__name__}; give an element-wise function.")
    return float(record.derivative(torch.linspace(-12, 12, 24_001, dtype=torch.float64)).abs().max())


def collapse_bound(model: nn.Module, batch: Any) -> CollapseBound:
    """Read the factors of a model's attentions on one batch.

    Args:
        model: of a known architecture, with eager attention (`model.set_attn_implementation("eager")`).
        batch: a dict of the model's keywords, without padding.

    Returns:
        The factors, block by block.

    Raises:
        DataError: the batch has padding, or no attention is read.
        ValueError: the attention weights are not formed.
    """
    mask = mask_of(batch)
    if mask is not None and not bool((mask != 0).all()):
        raise DataError("batch: it has padding, whose rows would count as tokens; give rows of one length.")
    view = anatomy(model, batch)
    sites = {Site("attention.weights", block.index): block for block in view.blocks if block.attention is not None}
    if not sites:
        raise DataError(f"model: no block of this {type(model).__name__} has an attention that is read.")
    taps, spreads = view.taps(sites), {}

    def reader(site: Site) -> Any:
        def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            spreads[site] = spread_of(read_tap(taps[site], args, kwargs, output))

        return read

    with evaluating(model), hooked(model, after={taps[site].path: reader(site) for site in sites}):
        forward(model, batch)
    found = []
    for site, block in sites.items():
        attention = block.attention
        assert attention is not None
        s, v = float(_norm(_values(attention)).max()), float(_norm(attention.output.weight))
        alone = math.sqrt(spreads[site] * attention.heads) * s * v
        shortcuts = [each for each in block.module.modules() if isinstance(each, AugmentedShortcut)]
        more = sum(map(shortcut_factor, shortcuts), 0.0)
        mlp = None if block.mlp is None or block.mlp.gated else mlp_factor(block.mlp, model)
        found.append(BlockBound(block.index, spreads[site], s, v, alone, alone + 1, alone + 1 + more, mlp))
    return CollapseBound(tuple(found))


def _values(attention: Attention) -> Tensor:
    """The value projection of each value head: [heads, head_dim, d]."""
    if attention.value is not None:
        weight = attention.value.weight
    elif attention.query_key_value is not None and attention.value_rows is not None:
        weight = attention.query_key_value.weight[attention.value_rows.indices(attention.output.weight.device)]
    else:
        raise DataError(f"model: which rows of {attention.path} are the values is not known.")
    return weight.view(attention.key_value_heads, attention.head_dim, -1)


def _norm(weight: Tensor) -> Tensor:
    """The largest singular value of each matrix."""
    return torch.linalg.matrix_norm(weight.detach().double(), 2)
