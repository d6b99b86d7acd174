"""What a linear map of an activation predicts of a sparse autoencoder's error, and what it does not.

    e = x - Sae(x),    W = argmin |e - x W|^2,    linear = x W,    rest = e - x W
    R2 = mean over channels of 1 - RSS / TSS      FVU(x, y) = sum |x - y|^2 / sum |x - mean x|^2

Paper: Decomposing the Dark Matter of Sparse Autoencoders (2024, arXiv:2410.14670). The linear part is read as features
that are not learned yet, which more width finds; the rest as what the autoencoder itself adds, which width hardly
changes. The length of a vector that is a sum of sparse and nearly orthogonal features is nearly linear in x: `lengths`
says of each part how well a linear map predicts |part|^2.
When to use it: before a wider autoencoder is trained, to see what it could gain.
Cost: two passes of the autoencoder over the rows that W is learned on, one over those that are measured.
Settled here: W is found from sums of products in float64, so that rows are streamed; R2 is of rows that W has not seen,
the mean over channels is unweighted as in the authors' code, and FVU is pooled, with the mean of the same rows. Errors
that are dealt out to other rows are the control.
Not built: autoencoders trained on the parts, and the prediction from earlier layers' autoencoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.store.activation_store import StoredBatches
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

PARTS = ("activation", "reconstruction", "error", "linear", "rest", "reconstruction and rest")
CUTOFF = 1e-12  # of eigenvalues of sums of products, relative to the largest


@dataclass(frozen=True)
class ErrorSplit:
    """How an autoencoder's error comes apart.

    Attributes:
        latents: of the autoencoder.
        rows: that were measured.
        explained: R2 of the error from the activation.
        control: the same of errors that were dealt out to other rows.
        lengths: by part, R2 of its squared length from the activation, without an intercept.
        lengths_with_intercept: the same with one.
        fvu: of the reconstruction.
        fvu_rest: of the reconstruction and the linear part.
        active: latents above 0 in a row, on average.
        dead: share of the latents that never fired on the measured rows.
        linear: W [channels, channels], float32; x @ linear is the predicted error.
        sizes: [rows, 3], the lengths of activation, error and rest, in the order of the measured rows.
    """

    latents: int
    rows: int
    explained: float
    control: float
    lengths: Mapping[str, float]
    lengths_with_intercept: Mapping[str, float]
    fvu: float
    fvu_rest: float
    active: float
    dead: float
    linear: Tensor = field(repr=False)
    sizes: Tensor = field(repr=False)

    @property
    def fvu_linear(self) -> float:
        """What the linear part takes of the reconstruction's FVU."""
        return self.fvu - self.fvu_rest

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            **vars(self),
            "lengths": dict(self.lengths),
            "lengths_with_intercept": dict(self.lengths_with_intercept),
            "linear": self.linear.tolist(),
            "sizes": self.sizes.tolist(),
        }

    def table(self) -> Table:
        """The parts with their figures."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Error of {self.latents:,} latents, {self.active:.1f} active, {self.rows:,} held-out rows"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("part", "R2 of its length", "with an intercept"):
            table.add_column(name, justify="left" if name == "part" else "right")
        for part in PARTS:
            table.add_row(part, f"{self.lengths[part]:.3f}", f"{self.lengths_with_intercept[part]:.3f}")
        table.caption = (
            f"R2 of the error {self.explained:.3f} (dealt out {self.control:.3f}); FVU {self.fvu:.4f} = linear "
            f"{self.fvu_linear:.4f} + rest {self.fvu_rest:.4f}"
        )
        return table

    def figure(self) -> Figure:
        """Draw the two parts of the error, and how well lengths are predicted.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        figure = graph_objects.Figure(
            graph_objects.Bar(x=["error", *PARTS], y=[self.explained, *(self.lengths[part] for part in PARTS)])
        )
        figure.update_yaxes(title="R2 from the activation")
        title = f"{self.latents:,} latents: R2 of the error (first), and of squared lengths"
        return figure.update_layout(title=title)


def split_error(
    autoencoder: SparseAutoencoder,
    learned: Iterable[Tensor],
    measured: Iterable[Tensor],
    *,
    ridge: float = 0.0,
    seed: int = 0,
) -> ErrorSplit:
    """Split the error of an autoencoder by what a linear map of the activation predicts of it.

    Args:
        autoencoder: of these activations.
        learned: batches of rows [n, channels] that the map is learned on, such as `ActivationStore.batches`.
        measured: others that it is measured on.
        ridge: added to the diagonal, as a share of its mean.
        seed: of the control.

    Returns:
        The split.

    Raises:
        ValueError: rows are on both sides, or there are fewer than 2 x channels to learn on.
        DataError: the activations do not vary.
    """
    if ridge < 0:
        raise ValueError(f"ridge: {ridge} was given; give 0 or more.")
    first, second = (_sequence(given) for given in (learned, measured))
    if learned is measured or _overlap(first, second):
        raise ValueError(
            "learned, measured: rows are on both sides, on which any map is right if there are as many channels; give "
            "two parts, such as those of ActivationStore.split."
        )
    rows, channels = sum(map(len, first)), autoencoder.channels
    if rows < 2 * channels or not sum(map(len, second)):
        raise ValueError(
            f"learned, measured: {rows} and {sum(map(len, second))} rows were given for {channels} channels; give at "
            f"least {2 * channels} to learn on, and some to measure on."
        )
    before = autoencoder.training
    autoencoder.eval()
    try:
        with torch.no_grad():
            found = _split(_Encoded(autoencoder, first), _Encoded(autoencoder, second, counting=True), ridge, seed)
    finally:
        autoencoder.train(before)
    return found


def split_reconstruction(
    learned: Sequence[tuple[Tensor, Tensor]],
    measured: Sequence[tuple[Tensor, Tensor]],
    *,
    ridge: float = 0.0,
    seed: int = 0,
) -> ErrorSplit:
    """Split the error of reconstructions that are at hand, of whatever made them.

    Args:
        learned: pairs of rows and their reconstruction, each [n, channels], that the map is learned on.
        measured: others that it is measured on.
        ridge: as in `split_error`.
        seed: of the control.

    Returns:
        The split; latents, active and dead are 0.

    Raises:
        DataError: the activations do not vary.
    """
    with torch.no_grad():
        return _split(_Given(learned), _Given(measured), ridge, seed)


class _Given:
    """Pairs in float64."""

    latents, fired = 0, torch.zeros(0, dtype=torch.int64)

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.double(), made.double()) for x, made in self.pairs)


class _Encoded:
    """Pairs that an autoencoder makes anew each time; `fired` counts rows by latent."""

    def __init__(self, autoencoder: SparseAutoencoder, batches: Sequence[Tensor], counting: bool = False) -> None:
        self.autoencoder, self.batches, self.counting = autoencoder, batches, counting
        self.latents = autoencoder.latents
        self.fired = torch.zeros(autoencoder.latents, dtype=torch.int64, device=autoencoder.decoder.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self.batches)):
            x = self.batches[index].to(self.autoencoder.decoder.device, torch.float32)
            latents = self.autoencoder.encode(x)
            if self.counting:
                self.fired += (latents > 0).sum(0)
            yield x.double(), self.autoencoder.decode(latents).double()


def _split(learned: _Given | _Encoded, measured: _Given | _Encoded, ridge: float, seed: int) -> ErrorSplit:
    """Sums of products over the rows that are learned on, then the measured rows."""
    generator = torch.Generator().manual_seed(seed)
    gram, by_error, sums, count = _Sum(), _Sum(), _Sum(), 0
    for x, made in learned:
        error = x - made
        gram.add(x.T @ x)
        by_error.add(x.T @ torch.cat([error, _dealt(error, generator)], 1))
        sums.add(x.sum(0))
        count += len(x)
    squares = gram.total
    squares.diagonal().add_(ridge * squares.diagonal().mean())
    inverse = torch.linalg.pinv(squares, hermitian=True, rtol=CUTOFF)
    linear, control = (inverse @ by_error.total).chunk(2, 1)
    ones = torch.cat([sums.total, sums.total.new_tensor([count])])[None]
    wide = torch.cat([torch.cat([squares, sums.total[:, None]], 1), ones])  # with a column of ones
    by_length = _Sum()
    for x, made in learned:
        by_length.add(torch.cat([x, torch.ones_like(x[:, :1])], 1).T @ _lengths(x, made, linear))
    plain = inverse @ by_length.total[:-1]
    with_ones = torch.linalg.pinv(wide, hermitian=True, rtol=CUTOFF) @ by_length.total

    fits = {name: _Fit() for name in ("error", "control", "lengths", "with ones", "fvu", "fvu of the rest")}
    sizes = []
    for x, made in measured:
        error, predicted = x - made, x @ linear
        lengths, dealt = _lengths(x, made, linear), _dealt(error, generator)
        fits["error"].add(error, error - predicted)
        fits["control"].add(dealt, dealt - x @ control)
        fits["lengths"].add(lengths, lengths - x @ plain)
        fits["with ones"].add(lengths, lengths - x @ with_ones[:-1] - with_ones[-1])
        fits["fvu"].add(x, error)
        fits["fvu of the rest"].add(x, error - predicted)
        sizes.append(lengths[:, [0, 2, 4]].sqrt().float())
    if not bool((fits["fvu"].squares > 0).any()):
        raise DataError("measured: the activations do not vary; give rows of several tokens.")
    rows, fired = fits["fvu"].rows, measured.fired
    return ErrorSplit(
        latents=measured.latents,
        rows=rows,
        explained=float(fits["error"].r2().nanmean()),
        control=float(fits["control"].r2().nanmean()),
        lengths=dict(zip(PARTS, fits["lengths"].r2().tolist(), strict=True)),
        lengths_with_intercept=dict(zip(PARTS, fits["with ones"].r2().tolist(), strict=True)),
        fvu=fits["fvu"].fvu(),
        fvu_rest=fits["fvu of the rest"].fvu(),
        active=float(fired.sum()) / rows,
        dead=float((fired == 0).double().mean()) if len(fired) else 0.0,
        linear=linear.float().cpu(),
        sizes=torch.cat(sizes).cpu(),
    )


def _dealt(error: Tensor, generator: torch.Generator) -> Tensor:
    """The errors of other rows."""
    return error[torch.randperm(len(error), generator=generator).to(error.device)]


def _lengths(x: Tensor, made: Tensor, linear: Tensor) -> Tensor:
    """Squared lengths of PARTS [rows, 6]."""
    error, predicted = x - made, x @ linear
    rest = error - predicted
    return torch.stack([part.square().sum(1) for part in (x, made, error, predicted, rest, made + rest)], 1)


class _Sum:
    """A sum whose shape the first part gives."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())

    def add(self, part: Tensor) -> None:
        self.total = part if self.total.dim() == 0 else self.total + part


class _Fit:
    """Sums of squares of what is predicted about its mean, and of what is left, by column."""

    def __init__(self) -> None:
        self.rows = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())
        self.left: Tensor = torch.zeros(())

    def add(self, value: Tensor, left: Tensor) -> None:
        """By Chan's update, so that no digits are lost far from 0."""
        count, own = len(value), value.mean(0)
        mean = self.mean.to(own) if self.rows else torch.zeros_like(own)
        squares = (value - own).square().sum(0) + (own - mean).square() * self.rows * count / (self.rows + count)
        self.squares = self.squares.to(own) + squares
        self.mean = mean + (own - mean) * count / (self.rows + count)
        self.left = self.left.to(own) + left.square().sum(0)
        self.rows += count

    def r2(self) -> Tensor:
        """Of each column; NaN of one that does not vary."""
        return torch.where(self.squares > 0, 1 - self.left / self.squares, torch.nan)

    def fvu(self) -> float:
        return float(self.left.sum() / self.squares.sum())


def _sequence(given: Iterable[Tensor]) -> Sequence[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return given if isinstance(given, Sequence) else list(given)


def _overlap(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether rows of one store are in both."""
    if not (isinstance(first, StoredBatches) and isinstance(second, StoredBatches)):
        return any(one is other for one in first for other in second)
    if (first.store.folder, first.site) != (second.store.folder, second.site):
        return False
    if first.rows is None or second.rows is None:
        return True
    return bool(torch.isin(first.rows, second.rows).any())
