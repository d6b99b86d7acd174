"""Language models: perplexity, and how far it and the predictions are from the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import labels_of
from actkit.core.forward.outputs import Output
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.measure.tasks.predictions import METRICS, compared, predictions
from actkit.core.measure.tasks.task import IGNORED, Estimating, Sums, Task


class Language(Task):
    """Next tokens: a token counts for its own document, and only if the token before it belongs to the same one."""

    name = "language"
    unit = "predicted tokens"
    metrics: ClassVar[dict[str, tuple[str, str]]] = {
        "perplexity": (".2f", "exp of the mean negative log-likelihood per token; lower is better"),
        "perplexity_ratio": (".4f", "perplexity over the original's; 1 is unchanged"),
        **METRICS,
    }
    loss = "perplexity ratio - 1"
    before_head = True
    nothing = "two tokens in a row"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Say whether it is a transformers model that generates, or a plain module that begins by embedding tokens."""
        can_generate: Any = getattr(model, "can_generate", None)
        if can_generate is not None:
            return bool(can_generate())
        layers = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
        return isinstance(next(layers, None), nn.Embedding)

    def sums(self, logits: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
        tokens = tokens_of(batch)
        if tokens is None or len(logits.shape) != 3 or logits.shape[:2] != tokens.shape:
            given = "no token ids" if tokens is None else f"token ids {list(tokens.shape)}"
            raise DataError(
                f"task='language': a batch holds {given} and the model's output is {list(logits.shape)}; it must be "
                f"logits [batch, length, vocabulary] for input_ids [batch, length]. Choose another task=, or other "
                f"data."
            )
        targets, owners = tokens[:, 1:].cpu(), documents[:, 1:]
        counted = (owners >= 0) & (documents[:, :-1] == owners)
        labels = labels_of(batch)
        if isinstance(labels, Tensor) and labels.shape == tokens.shape:
            counted &= labels[:, 1:].cpu() != IGNORED
        rows, columns = counted.nonzero(as_tuple=True)
        position = rows * tokens.shape[1] + columns
        owners, targets = owners[counted], targets[counted]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
            raise DataError(
                f"input_ids: they hold token {int(targets.max())}, the model predicts 0 to {logits.shape[-1] - 1}; use "
                f"the model's own tokenizer."
            )
        return owners, predictions(logits, other, position, targets, owners, likelihood=True)

    def estimates(self, estimate: Estimating, names: frozenset[str]) -> tuple[dict[str, Estimate], Estimate | None]:
        found = {"perplexity": estimate(lambda s: s["nll"] / s["count"], torch.exp)}
        loss = None
        if "other_nll" in names:
            found["perplexity_ratio"] = estimate(_rise, torch.exp, compares=True)
            loss = estimate(_rise, torch.expm1, compares=True)
        return found | compared(estimate, names), loss


def _rise(sums: Sums) -> Tensor:
    """By how much the mean negative log-likelihood is above the reference's."""
    return (sums["nll"] - sums["other_nll"]) / sums["count"]


def tokens_of(batch: Any) -> Tensor | None:
    """Return the token ids int64 [batch, length] of a batch, or None."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.dtype in (torch.int64, torch.int32):
        return tokens.long()
    return None
