"""Regressors: how much of the targets' variance is explained, and how far the outputs are from the original's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import labels_of
from actkit.core.forward.outputs import Output, Whole
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.measure.tasks.task import Estimating, Sums, Task, check_finite, of_rows


class Regression(Task):
    """Numbers per example: labels float [batch] or [batch, targets], for outputs of as many numbers."""

    name = "regression"
    unit = "numbers"
    metrics: ClassVar[dict[str, tuple[str, str]]] = {
        "explained": (".2%", "1 - squared error / variance of the targets (R squared); higher is better"),
        "error": (".4g", "root of the mean squared error, in the units of the targets; lower is better"),
        "distance": (".4g", "root of the mean squared difference from the original's outputs; 0 is unchanged"),
    }
    loss = "explained by the original - explained"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Say whether it is a transformers model for classification that regresses.

        Args:
            model: its config says so by its problem or by one label.

        Returns:
            Whether it is one.
        """
        config = getattr(model, "config", None)
        if config is None or "Classification" not in type(model).__name__:
            return False
        problem = getattr(config, "problem_type", None)
        return problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1)

    def sums(self, output: Output, other: Output | None, batch: Any, documents: Tensor) -> tuple[Tensor, Sums]:
        labels = labels_of(batch)
        if not isinstance(labels, Tensor) or not labels.is_floating_point():
            given = "none are" if not isinstance(labels, Tensor) else f"{str(labels.dtype).removeprefix('torch.')} are"
            raise DataError(
                f"labels: {given} in the data, and a regressor's error needs the right number of each example; give "
                f"batches like {{'input_ids': ..., 'labels': float32 [batch]}}."
            )
        assert isinstance(output, Whole)
        found, targets = output.tensor.double().cpu(), labels.double().cpu()
        if found.numel() != targets.numel() or len(found) != len(targets):
            raise DataError(
                f"labels: {list(labels.shape)} were given for an output of shape {list(found.shape)}; give one number "
                f"for each that the model gives."
            )
        rows = of_rows(documents)
        kept = rows >= 0
        found, targets, owners = found.reshape(len(rows), -1)[kept], targets.reshape(len(rows), -1)[kept], rows[kept]
        check_finite(found, owners, "the model's outputs")
        sums = {
            "count": torch.full((len(owners),), float(targets.shape[1])),
            "squares": (found - targets).square().sum(1),
            "targets": targets.sum(1),
            "target_squares": targets.square().sum(1),
        }
        if other is not None:
            assert isinstance(other, Whole)
            others = other.tensor.double().cpu().reshape(len(rows), -1)[kept]
            check_finite(others, owners, "the reference's outputs")
            sums["other_squares"] = (others - targets).square().sum(1)
            sums["distances"] = (found - others).square().sum(1)
        return owners, {name: value.double() for name, value in sums.items()}

    def estimates(self, estimate: Estimating, names: frozenset[str]) -> tuple[dict[str, Estimate], Estimate | None]:
        found = {
            "explained": estimate(lambda s: 1 - s["squares"] / _variance(s)),
            "error": estimate(lambda s: s["squares"] / s["count"], torch.sqrt),
        }
        if "other_squares" not in names:
            return found, None
        found["distance"] = estimate(lambda s: s["distances"] / s["count"], torch.sqrt, compares=True)
        return found, estimate(lambda s: (s["squares"] - s["other_squares"]) / _variance(s), compares=True)


def _variance(sums: Sums) -> Tensor:
    """The squared distances of all targets from their mean, summed."""
    return sums["target_squares"] - sums["targets"].square() / sums["count"]
