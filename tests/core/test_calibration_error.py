"""The expected calibration error against its definition written out, and in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.core.measure.calibration_error import expected_calibration_error


def by_loops(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    total = 0.0
    items = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        weights = [math.exp(value - max(row)) for value in row]
        best = max(range(len(row)), key=row.__getitem__)
        items.append((weights[best] / sum(weights), best == label))
    for b in range(bins):
        inside = [item for item in items if b / bins < item[0] <= (b + 1) / bins]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(items) * abs(accuracy - confidence)
    return total


def test_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes, scale, bins in ((2, 1.0, 10), (10, 3.0, 15), (10, 30.0, 15), (5, 0.1, 1)):
        logits = scale * torch.randn(400, classes, generator=generator)
        labels = torch.randint(classes, (400,), generator=generator)
        labels[:200] = logits[:200].argmax(-1)
        expected = by_loops(logits, labels, bins)
        assert expected_calibration_error(logits, labels, bins) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_closed_forms() -> None:
    """Confidence 3/4 everywhere: no error at 3 of 4 right, 1/4 at all right; certain and wrong is an error of 1."""
    logits = torch.tensor([[math.log(3.0), 0.0]] * 4, dtype=torch.float64)
    assert expected_calibration_error(logits, torch.tensor([0, 0, 1, 0])) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(logits, torch.tensor([0, 0, 0, 0])) == pytest.approx(0.25)
    assert expected_calibration_error(1e4 * logits, torch.tensor([1, 1, 1, 1])) == 1.0


def test_bad_input() -> None:
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    for bad in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="logits, labels"):
            expected_calibration_error(bad, labels if len(bad) else labels[:0])
    with pytest.raises(ValueError, match=r"labels: 0 to 2 were given for 2 classes"):
        expected_calibration_error(logits, torch.tensor([0, 2, 1]))
    with pytest.raises(ValueError, match="bins: 0"):
        expected_calibration_error(logits, labels, 0)
