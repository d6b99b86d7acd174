"""How many units an activation silences: the dead neuron rate of a network with ReLU.

    dead at x:    the output of the activation at x is 0        static if every weight into the unit is 0, else dynamic
    rate          = mean over inputs x of (dead units / all units)

From AP (2022, arXiv:2212.06145): a static unit was pruned away, a dynamic one is computed and still silent. A unit
is an element: of a convolution each channel at each position, of a language model each hidden unit at each token. With
`granularity="channel"` a channel is dead at an example if it is 0 at all of its positions.
One pass, in evaluation mode, padding left out. This is not "dead on every input", a much smaller number, which
`neuron_activity` counts. The paper's text was not at hand: the definitions are ours, from memory of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.layers.activations import gives_zeros
from actkit.core.model.anatomy import Anatomy, Linear, Site, anatomy
from actkit.core.model.called_functions import called_functions
from actkit.core.model.parts import Mlp
from actkit.core.watch.capture import opened_experts, record
from actkit.core.watch.statistics import Rows, Statistic

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

Granularity = Literal["element", "channel"]


@dataclass(frozen=True, eq=False)
class DeadLayer:
    """The units behind one activation.

    Attributes:
        path: of the activation, or the name of the function and what reads it.
        rows: at how many inputs (tokens, positions of images; for channels, examples) each channel was read.
        dead: float64 [channels], the share of these at which each is 0.
        pruned: bool [channels], whether every weight into it is 0.
    """

    path: str
    rows: int
    dead: Tensor = field(repr=False)
    pruned: Tensor = field(repr=False)

    @property
    def static(self) -> float:
        """The share of the layer that is dead because it is pruned away."""
        return float(self.dead[self.pruned].sum()) / len(self.dead)

    @property
    def dynamic(self) -> float:
        """The share that the activation silences."""
        return float(self.dead[~self.pruned].sum()) / len(self.dead)


@dataclass(frozen=True, eq=False)
class DeadNeurons:
    """The rates of all layers; each element, or channel, counts once.

    Attributes:
        granularity: what a unit is.
        eps: outputs up to it count as 0.
        layers: one for each activation.
    """

    granularity: Granularity
    eps: float
    layers: tuple[DeadLayer, ...]

    @property
    def static(self) -> float:
        """Over all units, the share that is dead because it is pruned away."""
        return self._mean([layer.static for layer in self.layers])

    @property
    def dynamic(self) -> float:
        """Over all units, the share that activations silence: the paper's measure."""
        return self._mean([layer.dynamic for layer in self.layers])

    @property
    def total(self) -> float:
        """Both."""
        return self.static + self.dynamic

    def _mean(self, rates: Sequence[float]) -> float:
        sizes = [layer.rows * len(layer.dead) for layer in self.layers]
        return sum(size * rate for size, rate in zip(sizes, rates, strict=True)) / sum(sizes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        layers = [
            {
                "path": layer.path,
                "channels": len(layer.dead),
                "rows": layer.rows,
                "static": layer.static,
                "dynamic": layer.dynamic,
                "pruned": int(layer.pruned.sum()),
                "dead": layer.dead.tolist(),
            }
            for layer in self.layers
        ]
        rates = {"static": self.static, "dynamic": self.dynamic, "total": self.total}
        return {"granularity": self.granularity, "eps": self.eps, **rates, "layers": layers}

    def table(self) -> Table:
        """A row per layer."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Dead units: {self.dynamic:.1%} silenced, {self.static:.1%} pruned away (of every {self.granularity})"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        for name in ("channels", "inputs", "silenced", "pruned away"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            cells = (f"{len(layer.dead)}", f"{layer.rows}", f"{layer.dynamic:.1%}", f"{layer.static:.1%}")
            table.add_row(layer.path, *cells)
        return table

    def figure(self) -> Figure:
        """Draw both rates of each layer, one on the other.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = all_plain(layer.path for layer in self.layers)
        bars = {"silenced": "dynamic", "pruned away": "static"}
        figure = graph_objects.Figure(
            [
                graph_objects.Bar(name=name, x=names, y=[100 * getattr(layer, rate) for layer in self.layers])
                for name, rate in bars.items()
            ]
        )
        figure.update_layout(barmode="stack")
        figure.update_yaxes(title_text="dead units (%)", range=[0, 100])
        return figure


def dead_neuron_rate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    granularity: Granularity = "element",
    eps: float = 0.0,
    progress: bool = True,
) -> DeadNeurons:
    """Measure which share of its units a network's activations silence.

    Args:
        model: in evaluation mode meanwhile. In a transformer the units of its MLPs are read, behind a gate the gate's.
        batches: held-out ones.
        layers: patterns of the activations' paths; None for all.
        granularity: whether a unit is an element or a channel.
        eps: outputs of magnitudes up to it count as 0; 0 for ReLU and its kin, more for others.
        progress: show a bar.

    Returns:
        The rates.

    Raises:
        ValueError: an activation has no exact zeros and eps is 0, `layers` fits none, or a value out of bounds.
        DataError: no batch, or no activation.
    """
    if granularity not in ("element", "channel"):
        raise ValueError(f"granularity: {granularity!r} was given; allowed are 'element' and 'channel'.")
    if not (eps >= 0 and isfinite(eps)):
        raise ValueError(f"eps: {eps} was given; it is a magnitude, give 0 or more, finite.")
    batches = sequence_of(batches)
    if not len(batches):
        raise DataError("batches: 0 were given; pass at least one.")
    view = anatomy(model, batches[0])
    with opened_experts(view):
        places = _places(view)
        if not places:
            raise DataError("layers: this model has no activation between two layers, or it is not seen; give another.")
        found = {site: place for site, place in places.items() if _wanted(place.path, layers)}
        if not found:
            names = ", ".join(place.path for place in places.values())
            raise ValueError(f"layers: {list(layers or ())} fit no activation; the model has {names}.")
        smooth = sorted({place.path for place in found.values() if not place.zeros})
        if smooth and eps == 0:
            raise ValueError(
                f"eps: 0 was given, and {', '.join(smooth[:3])} gives no exact zeros; give the magnitude up to which "
                f"a unit counts as silent, or other layers."
            )
        pruned = {site: place.pruned() for site, place in found.items()}
        wanted: dict[Site, Statistic] = {site: Silence(eps) for site in found}
        seen = record(model, wanted, batches, anatomy=view, progress=progress)
    measured: list[DeadLayer] = []
    for site, place in found.items():
        silence = seen[site]
        assert isinstance(silence, Silence)
        if silence.count:
            rows, dead = silence.rates(granularity)
            measured.append(DeadLayer(place.path, rows, dead, _spread(pruned[site], len(dead))))
    return DeadNeurons(granularity, eps, tuple(measured))


class Silence(Statistic):
    """How often each channel is 0: at single rows, and at all rows of a sequence or an image.

    Args:
        eps: magnitudes up to it count as 0.
    """

    _settings = ("eps",)
    _in_chunks = False  # an example's rows come together

    _rows: Tensor
    _examples: Tensor
    _number: Tensor

    def __init__(self, eps: float = 0.0) -> None:
        self.eps = eps

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        sizes = {"rows": channels, "examples": channels, "number": 1}
        return {name: torch.zeros(size, dtype=torch.int64, device=device) for name, size in sizes.items()}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        silent = x.abs() <= self.eps
        self._rows += silent.sum(0)
        owners = torch.arange(len(x)) if rows is None else rows.sequences
        numbers, places = owners.to(x.device).unique(return_inverse=True)
        awake = torch.zeros(len(numbers), x.shape[1], dtype=torch.int64, device=x.device)
        awake.index_add_(0, places, (~silent).long())
        self._examples += (awake == 0).sum(0)
        self._number += len(numbers)

    def _merge(self, other: Self) -> None:
        for name in self._fields:
            getattr(self, f"_{name}").add_(getattr(other, f"_{name}").to(self._device))

    def rates(self, granularity: Granularity) -> tuple[int, Tensor]:
        """Return how many rows, or examples, were seen, and at which share of them each channel was 0.

        Args:
            granularity: 'element' for rows, 'channel' for examples.
        """
        number, silent = (self.count, self._rows) if granularity == "element" else (int(self._number), self._examples)
        return number, silent.double().cpu() / number


# -- where the units are -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """One activation. before: the layers whose rows make its units, with the rows; None if not known."""

    path: str
    zeros: bool
    before: Tensor | None

    def pruned(self) -> Tensor:
        return torch.zeros(1, dtype=torch.bool) if self.before is None else (self.before == 0).all(1).cpu()


def _places(view: Anatomy) -> dict[Site, _Place]:
    modules = dict(view.model.named_modules())
    blocks = [view.block(block.index) for block in view.blocks]  # experts may have been opened since
    if view.architecture != "traced":
        return {
            mlp.zeros_at(block.index, expert): _Place(
                _named(mlp.activation, block.index, expert), gives_zeros(modules[mlp.activation]), _rows_before(mlp)
            )
            for block in blocks
            for expert, mlp in block.mlps()
        }
    firsts = {chain.nonlinearity: chain.first for chain in blocks[0].chains if chain.nonlinearity in modules}
    found = {
        Site("activation.output", path=path): _Place(path, gives_zeros(modules[path]), _weight(view, firsts.get(path)))
        for path in view.activations()
    }
    for called in called_functions(view):
        found[called.site] = _Place(called.label, called.gives_zeros, _weight(view, called.chain.first))
    return found


def _named(path: str, block: int, expert: int | None) -> str:
    """The path of an activation; blocks or experts that share a module are told apart."""
    return path if expert is None else f"{path} (block {block}, expert {expert})"


def _rows_before(mlp: Mlp) -> Tensor:
    """The weights [units, in] that make the units."""
    if mlp.up_rows is None:
        return (mlp.up if mlp.gate is None else mlp.gate).weight.detach()
    weight = mlp.up.weight.detach()
    gate = torch.ones(len(weight), dtype=torch.bool).index_fill(0, mlp.up_rows.indices(), False)
    return weight[gate.to(weight.device)]


def _weight(view: Anatomy, first: Linear | str | None) -> Tensor | None:
    if first is None:
        return None
    return (
        first.weight.detach() if isinstance(first, Linear) else view.model.get_parameter(f"{first}.weight").flatten(1)
    )


def _spread(pruned: Tensor, channels: int) -> Tensor:
    """Whether each channel that was read is pruned away; an image's are flattened to several for each filter."""
    return (
        pruned.repeat_interleave(channels // len(pruned)) if channels % len(pruned) == 0 else pruned.new_zeros(channels)
    )


def _wanted(path: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(path, pattern) for pattern in patterns)
