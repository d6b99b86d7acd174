"""Numbers of a batch of outputs that effects are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actkit.core.forward.batch import first_tensor

Metric = Callable[[Tensor], Tensor]


def logits_of(output: Any) -> Tensor:
    """Return what a metric is given: the logits of an output, or its first tensor.

    Args:
        output: of a model.
    """
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else first_tensor(output)


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """The mean over a batch of the logit of a right token less that of a wrong one.

    Attributes:
        right: token ids [batch].
        wrong: token ids [batch].
        position: of the logits, by default the last.
    """

    right: Tensor
    wrong: Tensor
    position: int = -1

    def __post_init__(self) -> None:
        if self.right.dim() != 1 or self.right.shape != self.wrong.shape:
            raise ValueError(
                f"right, wrong: {list(self.right.shape)} and {list(self.wrong.shape)} were given; give one token id "
                f"for each row of the batch."
            )

    def of_rows(self, logits: Tensor) -> Tensor:
        """Return the difference of each row [batch].

        Args:
            logits: [batch, length, vocabulary].
        """
        last = logits[:, self.position]
        rows = torch.arange(len(last), device=last.device)
        return last[rows, self.right.to(last.device)] - last[rows, self.wrong.to(last.device)]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the mean of `of_rows`.

        Args:
            logits: [batch, length, vocabulary].
        """
        return self.of_rows(logits).mean()
