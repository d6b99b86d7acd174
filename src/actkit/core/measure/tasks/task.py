"""The contract of a task. Ours and those of other packages are registered under the entry-point group `actkit.tasks`.

A task sums over examples: for each it gives a document and some numbers, and `quality` adds these up per document, so
that documents can be drawn anew. From the sums the task makes its metrics and the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from actkit.core.forward.outputs import Output
from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.estimate import Estimate

IGNORED = -100  # the label that losses leave out, as in transformers
Sums = dict[str, Tensor]  # float64, one value per token, image or sequence; or per document
Scale = Callable[[Tensor], Tensor]


class Estimating(Protocol):
    """Makes an estimate with its interval of what is computed from sums."""

    def __call__(self, mean: Callable[[Sums], Tensor], scale: Scale = ..., compares: bool = False) -> Estimate:
        """Estimate a number.

        Args:
            mean: from the sums over all documents, and over documents drawn anew.
            scale: what rises with the mean and is applied to it and to its ends, so that these stay finite longer.
            compares: it compares with the original, so that it is exact if the model is the original itself.

        Returns:
            The number with its interval.
        """
        ...


class Task(ABC):
    """How the quality of a kind of model is measured. It holds nothing.

    Attributes:
        name: the registered one.
        unit: what is counted, for tables.
        counted: which of the sums counts it.
        metrics: name -> (format of a number, what it is).
        loss: what the loss is, for tables.
        hidden_states: whether it looks at last hidden states before logits.
        before_head: whether the pass may end before the head, whose logits are then computed for some rows at a time.
        needs_reference: why it measures nothing without the original, or None.
        nothing: what no document has, if there is nothing to measure.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    counted: ClassVar[str] = "count"
    metrics: ClassVar[dict[str, tuple[str, str]]]
    loss: ClassVar[str]
    hidden_states: ClassVar[bool] = False
    before_head: ClassVar[bool] = False
    needs_reference: ClassVar[str | None] = None
    nothing: ClassVar[str] = "anything to measure"

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Say whether a model is of the kind that this task is for."""

    @abstractmethod
    def sums(self, output: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
        """Compute what one batch adds.

        Args:
            output: of the model.
            other: of the original, None without one; the same object as `output` if the model is the original.
            batch: as the model was called with it, and its labels.
            documents: of each token int64 [batch, length], or of each row [batch]; -1 on padding.

        Returns:
            The documents int64 [n] of n examples, and sums float64 [n]; `count` is among them.

        Raises:
            DataError: the task cannot use the batch.
        """

    @abstractmethod
    def estimates(self, estimate: Estimating, names: frozenset[str]) -> tuple[dict[str, Estimate], Estimate | None]:
        """Compute the metrics and the loss from sums.

        Args:
            estimate: makes an estimate of what is computed from sums.
            names: of the sums there are.

        Returns:
            The metrics, in their order, and the loss; None without an original.
        """


def check_finite(values: Tensor, owners: Tensor, whose: str) -> None:
    """Check that no value is NaN or Inf.

    Args:
        values: [n, columns].
        owners: int64 [n], the document of each row.
        whose: words for the error, such as 'the outputs'.

    Raises:
        NonFiniteError: one is; the error names the document.
    """
    bad = ~torch.isfinite(values).all(-1)
    if bool(bad.any()):
        document = int(owners[bad.cpu()][0])
        raise NonFiniteError(
            f"{whose} hold NaN or Inf in document {document}; check the weights and scales of the model, or compute in "
            f"a wider dtype."
        )


def of_rows(documents: Tensor) -> Tensor:
    """Return the document of each row: that of its first real token.

    Args:
        documents: of each token int64 [batch, length], or of each row [batch]; -1 on padding.

    Returns:
        int64 [batch]; -1 if a row is all padding.
    """
    if documents.dim() == 1:
        return documents
    first = (documents >= 0).int().argmax(1, keepdim=True)
    return documents.gather(1, first)[:, 0]
