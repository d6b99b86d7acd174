"""How a language model's loss changes as it reads more: by length, by position; and texts that hide a number.

Every length ends at the same token: of a row of T + 1 tokens the model reads the last L before the end, for each L. So
the losses of the last `last` predictions are those of the same tokens, and differ only by what stood before them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.forward.limits import check_length
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.measure.quality import resampled_totals

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class LengthLoss:
    """The loss at one length.

    Attributes:
        length: tokens that were read.
        last: nats, the mean over the last predictions of each row, which are the same tokens at every length.
        mean: nats, over all predictions of the row.
        positions: nats by position, each the mean from a position up to the next one that is listed.
    """

    length: int
    last: Estimate
    mean: Estimate
    positions: dict[int, float]


@dataclass(frozen=True)
class LengthCurve:
    """What `extrapolation_curve` found.

    Attributes:
        lengths: in rising order.
        rows: how many texts.
        last: how many predictions at the end are compared.
        context: of the model's configuration; None if it states none.
        beyond_context: whether longer rows than that were read.
    """

    lengths: tuple[LengthLoss, ...]
    rows: int
    last: int
    context: int | None
    beyond_context: bool

    def at(self, length: int) -> LengthLoss:
        """Return the loss at one of the lengths.

        Args:
            length: that was measured.

        Raises:
            ValueError: it was not.
        """
        found = next((each for each in self.lengths if each.length == length), None)
        if found is None:
            known = ", ".join(str(each.length) for each in self.lengths)
            raise ValueError(f"length: {length} was given; measured were {known}.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        lengths = [
            {
                "length": each.length,
                "last": each.last.to_dict(),
                "mean": each.mean.to_dict(),
                "positions": {str(start): loss for start, loss in each.positions.items()},
            }
            for each in self.lengths
        ]
        others = {"rows": self.rows, "last": self.last, "context": self.context, "beyond_context": self.beyond_context}
        return {"lengths": lengths, **others}

    def table(self) -> Table:
        """A row per length: the loss at the end, the change from the shortest, the mean loss."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        beyond = f", context {self.context}" if self.beyond_context else ""
        title = f"Loss by length, nats ({self.rows} texts, the last {self.last} predictions{beyond})"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("tokens read", f"last {self.last}", "change", "all"):
            table.add_column(name, justify="right", no_wrap=True)
        first = self.lengths[0].last.value
        for each in self.lengths:
            outside = " *" if self.context is not None and each.length > self.context else ""
            change = f"{each.last.value - first:+.3f}"
            table.add_row(f"{each.length}{outside}", each.last.text(".3f"), change, each.mean.text(".3f"))
        return table

    def figure(self) -> Figure:
        """Draw the loss by length, and by position at the longest.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects
        figure = go.Figure()
        x = [each.length for each in self.lengths]
        figure.add_trace(go.Scatter(x=x, y=[each.last.value for each in self.lengths], name=f"last {self.last}"))
        longest = self.lengths[-1]
        places, losses = list(longest.positions), list(longest.positions.values())
        figure.add_trace(go.Scatter(x=places, y=losses, name=f"by position, {longest.length} tokens read"))
        figure.update_xaxes(title="tokens", type="log")
        return figure.update_yaxes(title="loss (nats)")


def extrapolation_curve(
    model: nn.Module,
    tokens: Tensor,
    lengths: Sequence[int],
    last: int | None = None,
    *,
    beyond_context: bool = False,
    batch_size: int = 4,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> LengthCurve:
    """Measure the loss of a causal language model by how much it reads.

    Args:
        model: a causal language model.
        tokens: int64 [rows, longest length + 1], best of documents that are not padded.
        lengths: how many tokens are read.
        last: how many predictions at the end of each row are compared; None for the shortest length.
        beyond_context: read longer rows than the configuration states; refused for models that look positions up.
        batch_size: rows at a time.
        resamples: of the bootstrap over rows.
        seed: of the bootstrap.
        progress: show a bar.

    Returns:
        The losses, with 95 % intervals over rows.

    Raises:
        DataError: the tokens are too few, or a length is beyond the model's context.
        ValueError: a length or `last` is out of bounds.
    """
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] < 2:
        raise ValueError(f"lengths: {list(lengths)} was given; give at least one, each 2 or more.")
    last = lengths[0] if last is None else last
    if not 1 <= last <= lengths[0]:
        raise ValueError(f"last: {last} was given; give 1 to {lengths[0]}, the shortest length.")
    if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] < lengths[-1] + 1:
        raise DataError(
            f"tokens: shape {list(tokens.shape)} was given; give rows of at least {lengths[-1] + 1} tokens, the "
            f"longest length and the token after it."
        )
    context = max(check_length(model, length, "tokens", beyond_context=beyond_context) or 0 for length in lengths)
    found = []
    with evaluating(model):
        for length in track(lengths, "Reading", len(lengths), progress):
            rows = []
            for part in tokens.split(batch_size):
                read, expected = part[:, -(length + 1) : -1], part[:, -length:]
                logits = first_tensor(forward(model, {"input_ids": read})).float()
                loss = F.cross_entropy(logits.flatten(0, 1), expected.flatten().to(logits.device), reduction="none")
                rows.append(loss.view(expected.shape).cpu().double())
            losses = torch.cat(rows)
            ends, means = (_estimate(each, resamples, seed) for each in (losses[:, -last:].mean(1), losses.mean(1)))
            found.append(LengthLoss(length, ends, means, _by_position(losses.mean(0))))
    return LengthCurve(tuple(found), len(tokens), last, context or None, bool(context) and lengths[-1] > context)


def _estimate(rows: Tensor, resamples: int, seed: int) -> Estimate:
    drawn = resampled_totals(rows[:, None], resamples, seed)[:, 0] / len(rows)
    return Estimate(float(rows.mean()), float(drawn.quantile(0.025)), float(drawn.quantile(0.975)))


def _by_position(losses: Tensor) -> dict[int, float]:
    """The mean loss of the positions 0, 1, 2 to 3, 4 to 7 ..., then in steps of a quarter octave."""
    edges = sorted({0, *(round(2 ** (quarter / 4)) for quarter in range(4 * len(losses).bit_length()))})
    edges = [edge for edge in edges if edge < len(losses)]
    return {low: float(losses[low:high].mean()) for low, high in zip(edges, [*edges[1:], len(losses)], strict=True)}


# -- hidden numbers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passkey:
    """A text that hides a number and asks for it at its end.

    Attributes:
        prompt: token ids of the text with the question.
        answer: token ids of the number.
        depth: share of the filler that stands before the number.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


def passkeys(
    tokenizer: Any, filler: str, length: int, *, count: int = 20, digits: int = 5, seed: int = 0
) -> list[Passkey]:
    """Make texts that hide a number, each at another depth.

    Args:
        tokenizer: of the model.
        filler: what stands around the number; repeated as often as needed.
        length: tokens of a prompt, at most.
        count: how many texts; their depths are spread from 0 to 1.
        digits: of the number.
        seed: of the numbers.

    Raises:
        ValueError: a number is out of bounds, the filler is empty, or the length leaves no room.
    """
    if count < 1 or digits < 1:
        raise ValueError(f"count, digits: {count} and {digits} were given; give at least 1.")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    around, draw, found = encode(filler), random.Random(seed), []
    if not around:
        raise ValueError("filler: it has no token; give a text.")
    for index in range(count):
        number = str(draw.randrange(10 ** (digits - 1), 10**digits))
        told, asked = encode(f"\nThe pass key is {number}. Remember it.\n"), encode("\nThe pass key is ")
        room = length - len(told) - len(asked)
        if room < 0:
            raise ValueError(f"length: {length} was given; the number and the question alone have {length - room}.")
        depth = index / max(1, count - 1)
        text = (around * (room // len(around) + 1))[:room]
        before = round(depth * room)
        prompt = [*text[:before], *told, *text[before:], *asked]
        found.append(Passkey(tuple(prompt), tuple(encode(number)), depth))
    return found
