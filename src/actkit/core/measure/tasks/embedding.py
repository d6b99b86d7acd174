"""Encoders: how close the embeddings are to the original's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.outputs import Output, Whole
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.measure.tasks.task import Estimating, Sums, Task, check_finite, of_rows


class Embedding(Task):
    """The cosine between the mean output of model and original, example by example."""

    name = "embedding"
    unit = "tokens"
    counted = "tokens"
    metrics: ClassVar[dict[str, tuple[str, str]]] = {
        "fidelity": (".5f", "mean cosine between changed and original embedding; 1 is unchanged"),
    }
    loss = "1 - fidelity"
    hidden_states = True
    needs_reference = "the quality of an encoder is how close its embeddings are to those of the original"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Say whether it is a transformers model that neither generates nor classifies."""
        can_generate: Any = getattr(model, "can_generate", None)
        return can_generate is not None and not can_generate() and "Classification" not in type(model).__name__

    def sums(self, output: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
        assert isinstance(output, Whole) and isinstance(other, Whole)
        owners = of_rows(documents)
        mask = (documents >= 0) if documents.dim() == 2 else None
        kept = owners >= 0
        vectors, others = (
            _pooled(each.tensor, mask, owners, whose)
            for each, whose in ((output, "the model's output"), (other, "the reference's output"))
        )
        # For vectors of length 1 this is their cosine, exact if they are equal and sharp if they nearly are. A
        # vector of zeros has no direction: it is like another one of zeros, and like nothing else.
        distance = (vectors - others).square().sum(1)
        zeros = ~(vectors.any(1) & others.any(1))
        cosine = torch.where(zeros, (distance == 0).double(), 1 - distance / 2)
        real = mask.sum(1) if mask is not None else torch.ones(len(owners))
        sums = {"cosine": cosine, "count": torch.ones(len(owners)), "tokens": real}
        return owners[kept], {name: value.double()[kept] for name, value in sums.items()}

    def estimates(self, estimate: Estimating, names: frozenset[str]) -> tuple[dict[str, Estimate], Estimate | None]:
        found = {"fidelity": estimate(lambda s: s["cosine"] / s["count"], compares=True)}
        return found, estimate(lambda s: 1 - s["cosine"] / s["count"], compares=True)


def _pooled(output: Tensor, mask: Tensor | None, owners: Tensor, whose: str) -> Tensor:
    """float64 [batch, channels] of length 1: the mean over the real tokens, patches or pixels."""
    if output.dim() < 2 or len(output) != len(owners):
        raise DataError(
            f"task='embedding': the output has shape {list(output.shape)} for {len(owners)} rows; it must be "
            f"[batch, channels], [batch, length, channels] or [batch, channels, height, width]."
        )
    values = output.cpu().double()
    if values.dim() == 3:
        if mask is not None and mask.shape == values.shape[:2]:
            values = values.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        else:
            values = values.mean(1)
    elif values.dim() > 3:
        values = values.flatten(2).mean(2)
    check_finite(values[owners >= 0], owners[owners >= 0], whose)
    return F.normalize(values, dim=1)
