"""Which neurons of the MLPs fire, how often, layer by layer: the measure of the lazy neuron phenomenon.

    share of a layer     = mean over tokens of the share of its neurons with |a| > threshold
    frequency of neuron i = share of the tokens at which |a_i| > threshold

From "The Lazy Neuron Phenomenon" (2022, arXiv:2210.06313): in transformers with ReLU, training by itself leaves very
few non-zeros per token. The paper counts strictly positive entries, which after a ReLU are the non-zeros.
One pass over the data, in evaluation mode (dropout would change the counts), padding left out; memory: two integers per
neuron and layer. For GELU or SiLU exact zeros do not exist: then the result carries a note, and a threshold above 0 or
the transform `ppl_sparsity` says more. How often two neurons fire together is not counted.
A layer's share says what the down projection may skip, exactly. What the up projection could skip is not known before
it is computed, which the paper leaves to approximate search; `flops` states both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import all_plain, plain, plotly
from actkit.core.layers.activations import activation_function, function_names, name_of
from actkit.core.model.anatomy import Anatomy, Linear, Site, anatomy
from actkit.core.watch.capture import opened_experts, record
from actkit.core.watch.statistics import Density

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


HIDDEN, GATE = "mlp.hidden", "mlp.gate"


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the measured MLPs over all their tokens (2 per weight and token).

    Attributes:
        dense: all neurons are computed.
        achievable: the down projections skip the neurons that are off, exactly.
        ideal: the layers before the activation skip them too, as if it were known beforehand which ones.
    """

    dense: float
    achievable: float
    ideal: float


@dataclass(frozen=True, eq=False)
class LayerActivity:
    """One layer's neurons over all tokens.

    Attributes:
        site: where they were read.
        activation: the name of the function before it; None if unknown.
        tokens: how many reached it.
        share: mean over tokens of the share of neurons that are on.
        low: the 5th percentile of that share over tokens.
        high: its 95th percentile.
        frequency: float64 [neurons], the share of tokens at which each is on.
        before: weights of the linear layers before the activation; 0 if unknown.
        after: weights of the linear layers after it; 0 if unknown.
    """

    site: str
    activation: str | None
    tokens: int
    share: float
    low: float
    high: float
    frequency: Tensor = field(repr=False)
    before: int = 0
    after: int = 0

    @property
    def neurons(self) -> int:
        """How many neurons the layer has."""
        return self.frequency.numel()

    @property
    def count(self) -> float:
        """How many neurons are on, as a mean over tokens."""
        return self.share * self.neurons

    @property
    def dead(self) -> tuple[int, ...]:
        """The neurons that were never on."""
        return tuple((self.frequency == 0).nonzero().flatten().tolist())


@dataclass(frozen=True, eq=False)
class NeuronActivity:
    """The activity of all layers.

    Attributes:
        site: as it was given.
        threshold: a neuron is on if |a| exceeds it.
        layers: one per layer.
        notes: what to know before reading the numbers.
    """

    site: str
    threshold: float
    layers: tuple[LayerActivity, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Mean of the layers' shares; each layer counts once."""
        return mean(layer.share for layer in self.layers)

    @property
    def flops(self) -> Flops:
        """The operations of the layers whose weights are known."""
        dense = sum(2.0 * layer.tokens * (layer.before + layer.after) for layer in self.layers)
        before = sum(2.0 * layer.tokens * layer.before for layer in self.layers)
        skipping = sum(2.0 * layer.tokens * layer.after * layer.share for layer in self.layers)
        ideal = sum(2.0 * layer.tokens * (layer.before + layer.after) * layer.share for layer in self.layers)
        return Flops(dense, before + skipping, ideal)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        layers = [
            {
                "site": layer.site,
                "activation": layer.activation,
                "tokens": layer.tokens,
                "neurons": layer.neurons,
                "share": layer.share,
                "low": layer.low,
                "high": layer.high,
                "count": layer.count,
                "dead": list(layer.dead),
                "frequency": layer.frequency.tolist(),
            }
            for layer in self.layers
        ]
        return {
            "site": self.site,
            "threshold": self.threshold,
            "share": self.share,
            "flops": asdict(self.flops),
            "layers": layers,
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """A row per layer: share and count of the neurons that are on, spread over tokens, rare and dead neurons."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        above = f" above {self.threshold:g}" if self.threshold else ""
        title = f"Neurons on{above} at {self.site}: {self.share:.1%} (mean over layers)"
        flops = self.flops
        lines = list(self.notes)
        if flops.dense:
            lines.insert(
                0,
                f"Operations of the MLPs: {flops.achievable / flops.dense:.1%} of dense if the down projections skip "
                f"what is off, {flops.ideal / flops.dense:.1%} if all layers could.",
            )
        table = PlainTable(title=title, caption="\n".join(lines), title_justify="left", caption_justify="left")
        table.box = box.SIMPLE_HEAD
        table.add_column("layer", overflow="fold")
        for name in ("on", "5-95 % of tokens", "count", "neurons", "on < 10 %", "dead"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            rare = float((layer.frequency < 0.1).double().mean())
            span = f"{layer.low:.1%} to {layer.high:.1%}"
            cells = (f"{layer.share:.1%}", span, f"{layer.count:.1f}", f"{layer.neurons}", f"{rare:.0%}")
            table.add_row(layer.site.removesuffix(f".{self.site}"), *cells, f"{len(layer.dead)}")
        return table

    def figure(self) -> Figure:
        """Draw two panels: the share of each layer with its spread over tokens; the sorted frequencies of its neurons.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        subplots, graphs = plotly().subplots, plotly().graph_objects
        titles = ("Neurons on (%), mean and 5-95 % of tokens", "How often each neuron is on (% of tokens), sorted")
        figure = subplots.make_subplots(rows=1, cols=2, subplot_titles=titles)
        shares = [100 * layer.share for layer in self.layers]
        spread = {
            "type": "data",
            "array": [100 * layer.high - share for layer, share in zip(self.layers, shares, strict=True)],
            "arrayminus": [share - 100 * layer.low for layer, share in zip(self.layers, shares, strict=True)],
        }
        names = all_plain(layer.site for layer in self.layers)
        figure.add_trace(graphs.Bar(x=names, y=shares, error_y=spread, showlegend=False), row=1, col=1)
        for layer in self.layers:
            sorted_ = (100 * layer.frequency.sort(descending=True).values).tolist()
            figure.add_trace(graphs.Scatter(y=sorted_, name=plain(layer.site), mode="lines"), row=1, col=2)
        figure.update_yaxes(rangemode="tozero", row=1, col=1)
        figure.update_yaxes(type="log", row=1, col=2)  # a zero, a dead neuron, is not drawn
        figure.update_xaxes(title_text="neurons, most active first", row=1, col=2)
        return figure


# -- measuring ---------------------------------------------------------------------------------------------------------


def neuron_activity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    site: str = HIDDEN,
    threshold: float = 0.0,
    progress: bool = True,
) -> NeuronActivity:
    """Measure which neurons are on.

    Args:
        model: the model to measure.
        batches: dicts of the model's keywords, or single tensors; of sequences with an attention_mask only real tokens
            count.
        site: 'mlp.hidden' is what the down projection reads (behind a gate, the product), 'mlp.gate' the gate's output.
            Any other site of `record` is measured too, without flops. In a traced model, 'mlp.hidden' stands for the
            input of every layer that follows a nonlinearity.
        threshold: a neuron is on if |a| exceeds it.
        progress: show a bar.

    Returns:
        The activity of each layer.

    Raises:
        ValueError: the site is unknown, or the threshold is below 0.
        DataError: no layer has an activation.
        ActkitError: what `record` raises.
    """
    if not (threshold >= 0 and isfinite(threshold)):
        raise ValueError(f"threshold: {threshold} was given; it is a magnitude, give 0 or more, finite.")
    batches = sequence_of(batches)
    if not len(batches):
        raise DataError("batches: 0 were given; pass at least one dict of the model's keywords.")
    view = anatomy(model, batches[0])
    with opened_experts(view):
        known = _layers(view, site)
        wanted = dict.fromkeys(known or (site,), Density(threshold=threshold))
        seen = record(model, wanted, batches, anatomy=view, progress=progress)
    silent = {str(one) for one in seen.unseen}
    layers = tuple(_measured(one, density, known.get(one)) for one, density in seen.items() if density.count)
    notes = [f"{name} was reached by no token and is left out" for name in sorted(silent)]
    named = {layer.activation for layer in layers if layer.activation is not None} & set(function_names())
    smooth = {name for name in named if not activation_function(name).zeros}
    if smooth and threshold == 0:
        notes.append(
            f"{', '.join(sorted(smooth))} has no exact zeros, so with threshold 0 nearly every neuron counts "
            f"as on; give a threshold above 0, or see the transform ppl_sparsity"
        )
    return NeuronActivity(site, threshold, layers, tuple(notes))


# -- the layers of a model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """What is known of a measured layer before it runs."""

    activation: str | None
    before: int
    after: int


def _layers(view: Anatomy, site: str) -> dict[Site, _Layer]:
    """The layers that `site` stands for if it is one of the MLP; empty for another site."""
    blocks = [view.block(block.index) for block in view.blocks]  # experts may have been opened since
    if site == HIDDEN and view.architecture == "traced":
        found: dict[Site, _Layer] = {}
        for chain in blocks[0].chains:
            module = dict(view.model.named_modules()).get(chain.nonlinearity)
            name = chain.nonlinearity if module is None else name_of(module)
            path = chain.second.path if isinstance(chain.second, Linear) else chain.second
            found.setdefault(Site("layer.input", path=path), _Layer(name, _size(chain.first), _size(chain.second)))
        if not found:
            raise DataError(
                "site: no nonlinearity between two layers was found in this model, so it has no mlp.hidden; name the "
                "layer whose input you mean, as in site='layer.input:path.of.the.layer'."
            )
        return found
    return {
        Site(site, block.index, expert): _Layer(
            name_of(view.model.get_submodule(mlp.activation)), sum(map(_size, mlp.inputs)), _size(mlp.down)
        )
        for block in blocks
        for expert, mlp in block.mlps()
        if site == HIDDEN or (site == GATE and mlp.gated)
    }


def _size(layer: Linear | str) -> int:
    """Count the weights; 0 for a convolution, whose work depends on the image."""
    return layer.in_features * layer.out_features if isinstance(layer, Linear) else 0


def _measured(site: Site, density: Density, layer: _Layer | None) -> LayerActivity:
    layer = layer or _Layer(None, 0, 0)
    if not (layer.before and layer.after):  # half of it is no basis for a ratio
        layer = _Layer(layer.activation, 0, 0)
    return LayerActivity(
        str(site),
        layer.activation,
        density.count,
        density.density,
        density.spread(0.05),
        density.spread(0.95),
        density.per_channel.cpu(),
        layer.before,
        layer.after,
    )
