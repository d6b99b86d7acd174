"""What is minimised: the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.batch import arguments, first_tensor, labels_of, main_input, mask_of
from actkit.core.ground.errors import DataError
from actkit.core.measure.quality import task_of
from actkit.core.measure.tasks.task import IGNORED

Loss = Callable[[nn.Module, Any], Tensor]


class Objective:
    """The mean loss of a batch over its labels, and how many labels that are.

    Args:
        model: that is trained or measured.
        loss: of the user's own, of (model, batch); None for that of the model's task.
    """

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        self.model, self.loss = model, loss
        self.task = None if loss is not None else task_of(model)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            model: the one to call, perhaps wrapped.
            batch: with its labels.

        Raises:
            DataError: there are no labels, or the model gives no loss for them.
        """
        if self.loss is not None:
            return self.loss(model, batch)
        labels = self._labels(batch)
        device = next(self.model.parameters()).device
        args, kwargs = arguments(self.model, batch)
        if hasattr(self.model, "config"):
            loss = getattr(model(*args, **kwargs, labels=labels.to(device)), "loss", None)
            if loss is None:
                raise DataError(f"loss: {type(self.model).__name__} gives none for its labels; pass loss=.")
            return loss
        logits = first_tensor(model(*args, **kwargs))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(device)
        if labels.is_floating_point():
            return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        if self.task == "language":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    def labels(self, batch: Any) -> int:
        """How many labels the mean is over; 1 for a loss of the user's own.

        Args:
            batch: with its labels.

        Raises:
            DataError: there are none.
        """
        if self.loss is not None:
            return 1
        labels = self._labels(batch)
        if labels.is_floating_point():
            return len(labels)
        count = int((labels[:, 1:] if self.task == "language" else labels).ne(IGNORED).sum())
        if count == 0:
            raise DataError(f"labels: all of a batch are {IGNORED} or padding; give at least one that counts.")
        return count

    def _labels(self, batch: Any) -> Tensor:
        """int64 [batch, length] with IGNORED if nothing is to be predicted, or what the batch holds."""
        labels = labels_of(batch)
        if labels is not None:
            return labels
        if self.task != "language":
            raise DataError(
                f"labels: a batch has none, and {type(self.model).__name__} is no language model that could learn the "
                f"next token; give dicts with 'labels' (a tuple holds the arguments of a call), or pass loss=."
            )
        tokens, mask = main_input(batch, self.model), mask_of(batch)
        return tokens if mask is None else tokens.masked_fill(mask == 0, IGNORED)
