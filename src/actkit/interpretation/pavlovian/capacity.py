"""How many associations a memory holds, and how reliable layers of heads are.

    o = v_j + sum over i != j of <k_j, k_i> v_i                        unit keys, Hebb's rule
    worst case: sum of |<k_j, k_i>| about (N - 1) sqrt(2 / (pi d))     1 at N about sqrt(pi d / 2)
    mean square: (N - 1) / d for unit values                           1 / 4 at N about d / 4
    layers: (1 - p_H)^L,  p_H = p^H if one right head is enough, or the chance of no majority

The paper states O(sqrt(d)) for retrieval without error; the derivation and the constants are ours, and so are both
models of heads. The law that is found depends on the criterion: counting wrong nearest values is a third one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.interpretation.pavlovian.rules import Name, Rule, State, in_chunks, recurrent

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

Criterion = Literal["worst", "mse", "argmax"]
Keys = Literal["random", "orthogonal"]
CHUNK = 128  # associations that are stored at once
LIMITS = {"worst": 1.0, "mse": 0.25, "argmax": 0.05}


@dataclass(frozen=True)
class CapacityCurve:
    """How a criterion grows with what is stored.

    Attributes:
        rule: its name.
        size: of a key.
        criterion: 'worst': the mean over keys of the sum of |cosines| with the others, of 'hebb' alone; 'mse': the
            squared error of what is retrieved, of unit values; 'argmax': the share of wrong nearest values.
        stored: numbers of associations.
        values: of the criterion, means over trials.
    """

    rule: Name
    size: int
    criterion: Criterion
    stored: tuple[int, ...]
    values: tuple[float, ...]

    def capacity(self, limit: float | None = None) -> float:
        """Return at how many associations the criterion reaches a limit, between two measured numbers by a line.

        Args:
            limit: None for 1 (worst), 0.25 (mse) or 0.05 (argmax).

        Raises:
            DataError: it is not reached, or was from the first number on.
        """
        wanted = LIMITS[self.criterion] if limit is None else limit
        for at in range(1, len(self.stored)):
            low, high = self.values[at - 1 : at + 1]
            if low < wanted <= high:
                share = (wanted - low) / (high - low)
                return self.stored[at - 1] + share * (self.stored[at] - self.stored[at - 1])
        raise DataError(
            f"limit: {wanted:g} is not crossed between {self.values[0]:.3g} and {self.values[-1]:.3g}; measure other "
            f"numbers of associations."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "stored": list(self.stored), "values": list(self.values)}

    def table(self) -> Table:
        """A row for each number of associations."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"{self.rule}, keys of {self.size}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("stored", self.criterion):
            table.add_column(name, justify="right")
        for stored, value in zip(self.stored, self.values, strict=True):
            table.add_row(str(stored), f"{value:.4g}")
        return table

    def figure(self) -> Figure:
        """Draw the criterion over what is stored.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        figure = graph_objects.Figure(graph_objects.Scatter(x=list(self.stored), y=list(self.values), name=self.rule))
        figure.add_hline(y=LIMITS[self.criterion], line_dash="dash")
        return figure.update_xaxes(title="associations").update_yaxes(title=self.criterion)


def capacity_curve(
    rule: Rule | Name,
    size: int,
    stored: Sequence[int],
    *,
    keys: Keys | Tensor = "random",
    criterion: Criterion = "worst",
    passes: int = 1,
    trials: int = 50,
    seed: int = 0,
) -> CapacityCurve:
    """Store more and more associations, and test all of them.

    Args:
        rule: how they are stored.
        size: of a key and of a value.
        stored: numbers of associations, rising.
        keys: 'random' unit vectors, 'orthogonal' ones (at most `size`), or your own [associations, size].
        criterion: as in `CapacityCurve`.
        passes: how often all are presented.
        trials: that the means are over; 1 for keys of your own.
        seed: of the drawing.

    Raises:
        ValueError: a value is out of bounds, or more associations than keys are asked for.
    """
    rule = rule if isinstance(rule, Rule) else Rule(rule)
    most = len(keys) if isinstance(keys, Tensor) else size if keys == "orthogonal" else None
    if criterion not in get_args(Criterion) or not (isinstance(keys, Tensor) or keys in get_args(Keys)):
        raise ValueError(
            f"criterion, keys: {criterion!r}, {keys!r} were given; give {', '.join(get_args(Criterion))}, and "
            f"'random', 'orthogonal' or a tensor."
        )
    if criterion == "worst" and rule.name != "hebb":
        raise ValueError(f"criterion: 'worst' is the crosstalk of Hebb's rule; give 'mse' or 'argmax' for {rule.name}.")
    if size < 1 or trials < 1 or passes < 1 or not stored or min(stored) < 1 or list(stored) != sorted(set(stored)):
        raise ValueError(
            f"size, trials, passes, stored: {size}, {trials}, {passes}, {list(stored)} were given; give 1 or more of "
            f"each, and rising numbers."
        )
    if most is not None and max(stored) > most:
        raise ValueError(
            f"stored: {max(stored)} associations were asked for, and there are {most} keys; give at most these."
        )
    draw = torch.Generator().manual_seed(seed)
    count = 1 if isinstance(keys, Tensor) else trials
    values = []
    for number in stored:
        given = _keys(keys, number, size, count, draw)
        if criterion == "worst":
            alike = (given @ given.mT).abs()
            values.append(float((alike.sum(-1) - alike.diagonal(dim1=-2, dim2=-1)).mean()))
            continue
        outcomes = torch.nn.functional.normalize(torch.randn(count, number, size, generator=draw).double(), dim=-1)
        again = given.repeat(1, passes, 1), outcomes.repeat(1, passes, 1)
        start = State.empty(*again)
        if rule.in_chunks:
            _, _, state = in_chunks(rule, again[0], *again, None, start, CHUNK)
        else:
            _, _, state = recurrent(rule, again[0], *again, None, start)
        told = given @ state.memory
        if criterion == "mse":
            values.append(float((told - outcomes).square().sum(-1).mean()))
        else:
            wrong = (told @ outcomes.mT).argmax(-1) != torch.arange(number)
            values.append(float(wrong.double().mean()))
    return CapacityCurve(rule.name, size, criterion, tuple(stored), tuple(values))


def _keys(keys: Keys | Tensor, number: int, size: int, trials: int, draw: torch.Generator) -> Tensor:
    """Unit keys [trials, number, size]."""
    if isinstance(keys, Tensor):
        return torch.nn.functional.normalize(keys[:number].double(), dim=-1)[None]
    drawn = torch.randn(trials, max(number, 1), size, generator=draw).double()
    if keys == "orthogonal":
        square = torch.randn(trials, size, size, generator=draw).double()
        return torch.linalg.qr(square).Q[:, :number]
    return torch.nn.functional.normalize(drawn, dim=-1)


def capacity_exponent(sizes: Sequence[int], capacities: Sequence[float]) -> float:
    """Return the slope of capacity over the size of a key, both as logarithms.

    Args:
        sizes: two or more.
        capacities: one for each.

    Raises:
        DataError: there are fewer than two, or unequal numbers of them.
    """
    if len(sizes) != len(capacities) or len(set(sizes)) < 2:
        raise DataError(
            f"sizes: {len(sizes)} and {len(capacities)} were given; give two or more, with one capacity each."
        )
    x, y = ([math.log(value) for value in values] for values in (sizes, capacities))
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


HeadModel = Literal["any", "majority"]


def reliability(failure: float, heads: int, layers: int, head_model: HeadModel = "any") -> float:
    """Return the chance that all layers retrieve what they should.

    Args:
        failure: of one head.
        heads: of a layer, which fail independently.
        layers: in series, all of which are needed.
        head_model: 'any': one right head is enough; 'majority': more than half must be right.

    Raises:
        ValueError: a number is out of bounds, or an unknown model.
    """
    if not 0 <= failure <= 1 or heads < 1 or layers < 1 or head_model not in get_args(HeadModel):
        raise ValueError(
            f"failure, heads, layers, head_model: {failure}, {heads}, {layers}, {head_model!r} were given; give 0 to "
            f"1, 1 or more of each, and 'any' or 'majority'."
        )
    if head_model == "any":
        return (1 - failure**heads) ** layers
    right = range(heads // 2 + 1, heads + 1)
    return sum(math.comb(heads, k) * (1 - failure) ** k * failure ** (heads - k) for k in right) ** layers


def heads_needed(failure: float, layers: int, allowed: float) -> int:
    """Return how many heads keep the chance of any failure within bounds, if one right head is enough in each layer.

        H >= ln(L / allowed) / ln(1 / failure)

    Args:
        failure: of one head, below 1.
        layers: in series.
        allowed: chance that any of them fails.

    Raises:
        ValueError: a number is out of bounds.
    """
    if not 0 < failure < 1 or layers < 1 or not 0 < allowed < 1:
        raise ValueError(
            f"failure, layers, allowed: {failure}, {layers}, {allowed} were given; give shares, and 1 or more."
        )
    return max(1, math.ceil(math.log(layers / allowed) / math.log(1 / failure)))
