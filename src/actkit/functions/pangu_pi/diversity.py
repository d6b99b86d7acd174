"""How alike the tokens of a sequence become, block by block: the feature collapse of PanGu-pi (2023, arXiv:2312.17276).

    diversity of H [tokens, d] = |H - 1 mean(H)|_F / |H|_F            0: all tokens are equal
    likeness                   = mean cosine between two tokens       1: all point one way
    dimension(0.8)             = principal components that explain 80 % of the variance of a layer's tokens

Diversity and likeness are means over sequences; the dimension is of all tokens together. They are read of the residual
stream, after the attention and at the end of each block. The distance alone grows with the scale of the stream, so it
is given as a share. The first token of each sequence is left out: it is often so much larger than the others that it
would be all one sees.
When to use it: to see whether a deep model wastes its last blocks, before and after `add_nonlinearity` or another
change.
Cost: one pass over the data, in float32, and d x d numbers for each place; eigenvalues of as many matrices in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward, mask_of, sequence_of
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.model.anatomy import Block, anatomy

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

Place = Literal["input", "attention", "block"]


@dataclass(frozen=True)
class Spread:
    """The tokens at one place.

    Attributes:
        block: its index; -1 for what the first block reads.
        after: "input" of the first block, or after the "attention" or at the end of a "block".
        diversity: as the head of the module says.
        likeness: mean cosine.
        dimension: principal components.
        width: of the hidden states.
    """

    block: int
    after: Place
    diversity: float
    likeness: float
    dimension: int
    width: int


@dataclass(frozen=True)
class Diversity:
    """All places, in the order of the model.

    Attributes:
        places: what was measured.
        share: of the variance, that `dimension` explains.
        tokens: how many were read, of all sequences.
    """

    places: tuple[Spread, ...]
    share: float
    tokens: int

    def at(self, block: int, after: Place = "block") -> Spread:
        """One place.

        Args:
            block: its index; the last one is -1, as of a list.
            after: as in `Spread`.

        Raises:
            KeyError: it was not measured.
        """
        blocks = sorted({each.block for each in self.places if each.after == "block"})
        wanted = blocks[block] if after != "input" else -1
        for each in self.places:
            if (each.block, each.after) == (wanted, after):
                return each
        raise KeyError(f"site: {after!r} of block {wanted} was not measured; see `places`.")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"share": self.share, "tokens": self.tokens, "places": [asdict(each) for each in self.places]}

    def table(self) -> Table:
        """A row per place."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title=f"Diversity of {self.tokens:,} tokens", title_justify="left")
        table.box = box.SIMPLE_HEAD
        table.add_column("after")
        for name in ("diversity", "likeness", f"dimension ({self.share:.0%})"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.places:
            name = "input" if each.after == "input" else f"{each.block}, {each.after}"
            dimension = f"{each.dimension} of {each.width}"
            table.add_row(name, f"{each.diversity:.3f}", f"{each.likeness:.3f}", dimension)
        return table

    def figure(self) -> Figure:
        """Draw the three over the places.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        subplots = plotly().subplots
        titles = ("diversity", "likeness", f"dimension ({self.share:.0%})")
        figure = subplots.make_subplots(rows=1, cols=3, subplot_titles=titles)
        at = [each.block + (0.5 if each.after == "attention" else 1.0) for each in self.places]
        for column, values in enumerate(
            (
                [each.diversity for each in self.places],
                [each.likeness for each in self.places],
                [each.dimension for each in self.places],
            ),
            1,
        ):
            line = graph_objects.Scatter(x=at, y=values, mode="lines+markers", showlegend=False)
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(title_text="blocks passed")
        figure.update_yaxes(rangemode="tozero")
        return figure


def distance(hidden: Tensor) -> Tensor:
    """Return how far the tokens are from all being equal: |H - 1 mean(H)|_F.

    Args:
        hidden: [..., tokens, d].

    Returns:
        [...].
    """
    return (hidden - hidden.mean(-2, keepdim=True)).flatten(-2).norm(dim=-1)


def diversity(
    model: nn.Module, batches: Iterable[Any], *, share: float = 0.8, skip: int = 1, progress: bool = True
) -> Diversity:
    """Measure how alike the tokens of a sequence are, block by block.

    Args:
        model: of a known architecture.
        batches: dicts of the model's keywords, or single tensors; padding is left out.
        share: of the variance that the principal components explain.
        skip: tokens at the beginning of each sequence that are left out.
        progress: show a bar.

    Returns:
        The input of the first block, then for each block what stands after its attention (if it is added by itself)
        and at its end.

    Raises:
        ValueError: a share outside of (0, 1], or a `skip` below 0.
        DataError: no batches, a model that is not read by blocks, or a sequence of which fewer than two tokens are
        left.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share} was given; give a share of the variance above 0, at most 1.")
    if skip < 0:
        raise ValueError(f"skip: {skip} was given; give how many tokens to leave out, 0 or more.")
    batches = sequence_of(batches)
    if not len(batches):
        raise DataError("batches: 0 were given; pass at least one dict of the model's keywords.")
    view = anatomy(model, batches[0])
    if view.architecture == "traced":
        raise DataError(
            f"model: the blocks of this {type(model).__name__} are not known, as its architecture has no row; register "
            f"one (register_architecture)."
        )
    sums = {place: _Sums() for place in _places(view.blocks)}
    with evaluating(model):
        for batch in track(batches, "Measuring diversity", enabled=progress):
            mask = mask_of(batch)

            def read(place: tuple[int, Place], value: Any, mask: Tensor | None = mask) -> None:
                for hidden in _sequences(first_tensor(value), mask, skip):
                    sums[place].add(hidden)

            with _reading(view.blocks, model, read):
                forward(model, batch)
    places = tuple(each.spread(block, after, share) for (block, after), each in sums.items())
    return Diversity(places, share, next(iter(sums.values())).tokens)


# -- where, and of what ------------------------------------------------------------------------------------------------


def _places(blocks: Iterable[Block]) -> list[tuple[int, Place]]:
    found: list[tuple[int, Place]] = [(-1, "input")]
    for block in blocks:
        if _after_attention(block) is not None:
            found.append((block.index, "attention"))
        found.append((block.index, "block"))
    return found


def _after_attention(block: Block) -> tuple[str, bool] | None:
    """The norm at which the stream is read after the attention, and whether at its input; None if there is none."""
    norm = next((norm for norm in block.norms if norm.role == "mlp"), None)
    return None if norm is None or block.attention is None else (norm.path, not norm.feeds_residual)


def _reading(blocks: Iterable[Block], model: nn.Module, read: Any) -> Any:
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for block in blocks:
        if block.index == 0:
            before[block.path] = lambda module, args, kwargs: read(
                (-1, "input"), args[0] if args else kwargs["hidden_states"]
            )
        after[block.path] = lambda module, args, kwargs, output, at=block.index: read((at, "block"), output)
        norm = _after_attention(block)
        if norm is not None and norm[1]:
            before[norm[0]] = lambda module, args, kwargs, at=block.index: read((at, "attention"), args[0])
        elif norm is not None:
            after[norm[0]] = lambda module, args, kwargs, output, at=block.index: read((at, "attention"), output)
    return hooked(model, before=before, after=after)


def _sequences(hidden: Tensor, mask: Tensor | None, skip: int) -> Iterable[Tensor]:
    """The real tokens of each sequence, float32 [tokens, d], without the first ones."""
    hidden = hidden.detach().float()
    for index, sequence in enumerate(hidden if hidden.dim() == 3 else hidden[None]):
        real = sequence if mask is None else sequence[mask[index].to(sequence.device) != 0]
        if len(real) - skip < 2:
            raise DataError(
                f"batches: a sequence of {len(real)} tokens was given, of which {max(len(real) - skip, 0)} are left "
                f"after skip={skip}; one token has no diversity, give sequences of {skip + 2} or more."
            )
        yield real[skip:]


class _Sums:
    """What is added up at one place."""

    def __init__(self) -> None:
        self.tokens, self.sequences, self.diversity, self.likeness = 0, 0, 0.0, 0.0
        self.total, self.products = torch.zeros(()), torch.zeros(())

    def add(self, hidden: Tensor) -> None:
        """Read one sequence [tokens, d]."""
        count = len(hidden)
        wide = hidden.double()
        unit = wide / wide.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        self.diversity += float(distance(wide) / wide.norm().clamp(min=torch.finfo(torch.float64).tiny))
        self.likeness += float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))
        self.total = self.total.to(hidden.device) + wide.sum(0)
        self.products = self.products.to(hidden.device) + (hidden.t() @ hidden).double()
        self.tokens, self.sequences = self.tokens + count, self.sequences + 1

    def spread(self, block: int, after: Place, share: float) -> Spread:
        """What they come to."""
        mean = self.total / self.tokens
        variances = torch.linalg.eigvalsh(self.products / self.tokens - mean.outer(mean)).flip(0).clamp(min=0)
        explained = variances.cumsum(0) / variances.sum()
        dimension = min(int((explained < share - 1e-9).sum()) + 1, len(mean))
        count = self.sequences
        return Spread(block, after, self.diversity / count, self.likeness / count, dimension, len(mean))
