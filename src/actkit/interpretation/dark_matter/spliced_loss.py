"""What each part of an autoencoder's error costs the model: the loss with Sae(x), with a part of the error beside it.

    recovered = (loss with Sae(x) - loss with Sae(x) and the part) / (loss with Sae(x) - loss of the model)

From arXiv:2410.14670. When to use it: to weigh the two parts of `split_error` by what the model makes of them.
Cost: four forward passes.
Settled here: the first positions stay as they are and are not counted, as their activations are unlike all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.batch import forward, main_input, mask_of, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import DataError
from actkit.core.ground.progress import track
from actkit.core.watch.intervene import intervene
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.splice import Splice, check_model

if TYPE_CHECKING:
    from rich.table import Table

SETTINGS = ("model", "nothing", "linear", "rest")  # the model as it is, and what of the error is kept


@dataclass(frozen=True)
class SplicedLoss:
    """The loss of next tokens, in nats.

    Attributes:
        model: of the model as it is.
        nothing: with the reconstruction alone.
        linear: with the linear part of the error beside it.
        rest: with the rest beside it.
        tokens: that were counted.
    """

    model: float
    nothing: float
    linear: float
    rest: float
    tokens: int

    def recovered(self, part: str) -> float:
        """Return the share of the loss that a part gives back.

        Args:
            part: 'linear' or 'rest'.
        """
        return float((self.nothing - getattr(self, part)) / (self.nothing - self.model))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "recovered": {part: self.recovered(part) for part in ("linear", "rest")}}

    def table(self) -> Table:
        """A row per setting."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title=f"Loss over {self.tokens:,} tokens", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("in its place", "loss", "recovered"):
            table.add_column(name, justify="left" if name == "in its place" else "right")
        names = ("the activation", "reconstruction", "and the linear error", "and the rest")
        for name, part in zip(names, SETTINGS, strict=True):
            share = f"{self.recovered(part):.1%}" if part in ("linear", "rest") else ""
            table.add_row(name, f"{getattr(self, part):.4f}", share)
        return table


def spliced_loss(
    model: nn.Module,
    batches: Iterable[Any],
    site: str,
    autoencoder: SparseAutoencoder,
    linear: Tensor,
    *,
    skip: int = 0,
    progress: bool = True,
) -> SplicedLoss:
    """Measure a language model's loss with an autoencoder and parts of its error in it.

    Args:
        model: a language model.
        batches: of its keywords.
        site: of the autoencoder.
        autoencoder: trained there.
        linear: the map of `ErrorSplit.linear`.
        skip: positions at the beginning that stay as they are, and are not counted.
        progress: show a bar.

    Returns:
        The losses.

    Raises:
        DataError: no position is left.
        UnsupportedModelError: the autoencoder is of another model.
        ValueError: it is of another site.
    """
    check_model(autoencoder, model)
    given = sequence_of(batches)
    totals, tokens = dict.fromkeys(SETTINGS, 0.0), 0
    with evaluating(model), torch.no_grad():
        for batch in track(given, "Losses", len(given), progress):
            ids, mask = main_input(batch, model), mask_of(batch)
            length = ids.shape[1]
            if length < skip + 2:
                raise DataError(f"skip: {skip} was given for rows of {length} tokens, which leaves none; give fewer.")
            wanted = ids[:, skip + 1 :]
            counted = torch.ones_like(wanted, dtype=torch.bool) if mask is None else mask[:, skip + 1 :].bool()
            tokens += int(counted.sum())
            for setting in SETTINGS:
                keep = "error" if setting == "model" else setting
                splice = Splice(
                    autoencoder,
                    keep=keep,  # type: ignore[arg-type]
                    linear=linear if keep in ("linear", "rest") else None,
                    positions=list(range(skip, length)) if skip else "all",
                )
                with intervene(model, {} if setting == "model" else {site: splice}):
                    logits = forward(model, batch).logits[:, skip:-1].float()
                losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten().to(logits.device), reduction="none")
                totals[setting] += float(losses[counted.flatten().to(logits.device)].sum())
    if not tokens:
        raise DataError("batches: all positions are padding; give rows with tokens.")
    return SplicedLoss(**{name: total / tokens for name, total in totals.items()}, tokens=tokens)
