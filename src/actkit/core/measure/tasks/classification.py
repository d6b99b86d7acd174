"""Classifiers: accuracy, and how far the predictions are from the original's."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from actkit.core.forward.batch import labels_of
from actkit.core.forward.outputs import Output
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.measure.tasks.predictions import METRICS, compared, predictions
from actkit.core.measure.tasks.task import IGNORED, Estimating, Sums, Task, of_rows


class Classification(Task):
    """One of many classes per example or token."""

    name = "classification"
    unit = "predictions"
    metrics: ClassVar[dict[str, tuple[str, str]]] = {
        "accuracy": (".2%", "share of labels that are the first choice; higher is better"),
        **METRICS,
    }
    loss = "accuracy of the original - accuracy"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Say whether it is a transformers model named for classification, or a plain module of no other kind."""
        if getattr(model, "can_generate", None) is None:
            return True
        return "Classification" in type(model).__name__

    def sums(self, logits: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
        labels = labels_of(batch)
        if not isinstance(labels, Tensor):
            raise DataError(
                "labels: none are in the data, and accuracy needs the right class of each example; give batches like "
                "{'pixel_values': ..., 'labels': int64 [batch]}, or pass task='embedding' with a reference to compare "
                "outputs instead."
            )
        if labels.is_floating_point() or len(logits.shape) < 2 or labels.shape != logits.shape[:-1]:
            raise DataError(
                f"labels: {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)} were given for an output of "
                f"shape {list(logits.shape)}; accuracy needs one whole number per prediction, "
                f"{list(logits.shape[:-1])}."
            )
        labels = labels.cpu()
        per_token = labels.dim() == 2 and labels.shape == documents.shape
        owners = documents if per_token else of_rows(documents).view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)
        counted = ((owners >= 0) & (labels != IGNORED)).flatten()
        owners, targets = owners.flatten()[counted], labels.flatten()[counted]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
            wrong = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
            raise DataError(
                f"labels: class {wrong} was given, the model knows 0 to {logits.shape[-1] - 1}; give labels of this "
                f"model."
            )
        position = counted.nonzero(as_tuple=True)[0]
        return owners, predictions(logits, other, position, targets, owners, likelihood=False)

    def estimates(self, estimate: Estimating, names: frozenset[str]) -> tuple[dict[str, Estimate], Estimate | None]:
        found = {"accuracy": estimate(lambda s: s["hits"] / s["count"])}
        loss = None
        if "other_hits" in names:
            loss = estimate(lambda s: (s["other_hits"] - s["hits"]) / s["count"], compares=True)
        return found | compared(estimate, names), loss
