"""What a trained model made of its polynomials: the coefficients of PolyReLU and PolyNorm, and what each power adds.

    contribution of x^i = |a_i| * rms(term i),   term i = relu(x)^i or N(x^i),   over tokens and units

From PolyCom (2024, arXiv:2411.03884). A coefficient alone says little for PolyReLU, whose powers differ by orders of
magnitude; those of PolyNorm have a root mean square of 1 each, up to eps. The mean degree is the powers' mean, weighted
by their contributions: 1 for a function that stayed linear on its support, 3 for one that is all cube.
One pass over the data, padding left out; memory: a number per power and layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plain, plotly
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.watch.capture import record
from actkit.core.watch.streaming import Rows, Statistic
from actkit.functions.polycom.polynomials import Polynomial, PolyNorm

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


class PowerSquares(Statistic):
    """The mean squares of the terms of a polynomial: of relu(x)^i, or of normalised powers.

    Args:
        order: the highest power.
        eps: of the normalisation; None for powers of relu(x).
    """

    _settings = ("order", "eps")
    _squares: Tensor

    def __init__(self, order: int, eps: float | None = None) -> None:
        self.order, self.eps = order, eps

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"squares": torch.zeros(self.order, dtype=torch.float64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        x = x.double() if self.eps is not None else x.double().relu()
        for power in range(1, self.order + 1):
            squares = (x ** (2 * power)).mean(1)
            self._squares[power - 1] += (squares if self.eps is None else squares / (squares + self.eps)).sum()

    def _merge(self, other: Self) -> None:
        self._squares += other._squares.to(self._device)

    @property
    def rms(self) -> tuple[float, ...]:
        """The root mean square of each term over rows and channels, lowest power first."""
        self._needs_rows()
        return tuple((self._squares / self.count).sqrt().tolist())


@dataclass(frozen=True)
class LayerDegrees:
    """One polynomial.

    Attributes:
        path: of its module.
        kind: of which class it is.
        bias: its constant.
        coefficients: a_1, a_2 ...
        contributions: |a_i| times the root mean square of its term.
    """

    path: str
    kind: str
    bias: float
    coefficients: tuple[float, ...]
    contributions: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The contributions as shares of their sum; zeros if that is 0."""
        total = sum(self.contributions)
        return tuple(each / total if total else 0.0 for each in self.contributions)

    @property
    def degree(self) -> float:
        """The mean power, weighted by contribution; 0 if there is none."""
        return sum(power * share for power, share in enumerate(self.shares, 1))


@dataclass(frozen=True)
class PolynomialDegrees:
    """All polynomials of a model.

    Attributes:
        layers: in the order of the model.
    """

    layers: tuple[LayerDegrees, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "layers": [
                {**asdict(layer), "coefficients": list(layer.coefficients), "contributions": list(layer.contributions)}
                | {"shares": list(layer.shares), "degree": layer.degree}
                for layer in self.layers
            ]
        }

    def table(self) -> Table:
        """A row per polynomial: its coefficients, the share of each power, the mean degree."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        most = max(len(layer.coefficients) for layer in self.layers)
        table = PlainTable(title="Learned polynomials", title_justify="left")
        table.box = box.SIMPLE_HEAD
        table.add_column("layer", overflow="fold")
        names = ["b", *(f"a{power}" for power in range(1, most + 1)), *(f"x^{power}" for power in range(1, most + 1))]
        for name in (*names, "degree"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            empty = [""] * (most - len(layer.coefficients))
            coefficients = [f"{value:.3f}" for value in layer.coefficients] + empty
            shares = [f"{share:.0%}" for share in layer.shares] + empty
            table.add_row(layer.path, f"{layer.bias:.3f}", *coefficients, *shares, f"{layer.degree:.2f}")
        return table

    def figure(self) -> Figure:
        """Draw the share of each power, layer by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        most = max(len(layer.coefficients) for layer in self.layers)
        figure = graph_objects.Figure()
        names = [plain(each.path) for each in self.layers]
        for power in range(most):
            shares = [100 * layer.shares[power] if power < len(layer.shares) else 0.0 for layer in self.layers]
            figure.add_trace(graph_objects.Bar(x=names, y=shares, name=f"x^{power + 1}"))
        figure.update_layout(barmode="stack", yaxis_title="share of the contributions (%)")
        return figure


def polynomial_degrees(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> PolynomialDegrees:
    """Report what the polynomials of a model have become.

    Args:
        model: with PolyReLU or PolyNorm in it; those with a polynomial per channel are left out.
        batches: dicts of the model's keywords, or single tensors.
        progress: show a bar.

    Returns:
        A layer for each polynomial that the model calls.

    Raises:
        DataError: there are no batches, or no polynomials in the model.
        ActkitError: what `record` raises.
    """
    batches = sequence_of(batches)
    if not len(batches):
        raise DataError("batches: 0 were given; pass at least one dict of the model's keywords.")
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Polynomial) and module.channels is None and not module.weight.is_meta
    }
    if not found:
        raise DataError(
            f"model: this {type(model).__name__} has no PolyReLU or PolyNorm with one polynomial for all channels; put "
            f"them in with actkit.swap(model, 'silu', 'poly_norm') or the transform `ungate`."
        )
    wanted = {
        Site("activation.input", path=path): PowerSquares(
            module.order, module.eps if isinstance(module, PolyNorm) else None
        )
        for path, module in found.items()
    }
    seen = record(model, wanted, batches, anatomy=anatomy(model, batches[0]), progress=progress)
    layers = []
    for site, squares in seen.items():
        if squares.count:
            path = str(site.path)
            bias, *coefficients = found[path].coefficients() or ()
            contributions = tuple(abs(a) * rms for a, rms in zip(coefficients, squares.rms, strict=True))
            layers.append(LayerDegrees(path, type(found[path]).__name__, bias, tuple(coefficients), contributions))
    return PolynomialDegrees(tuple(layers))
