"""Regression, the fourth task: figures from NumPy, a bootstrap of one's own, and models that say that they regress."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from actkit.core.ground.errors import DataError
from actkit.core.measure.quality import measure_quality, task_of
from actkit.core.train.training import train
from actkit.search.workshop import task_for

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Affine(nn.Module):
    """y = x W + b, and that plus an error."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.error = nn.Linear(3, 2), error

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + self.error


def data(rows: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, generator=generator)
    y = x[:, :2] * 2 + torch.randn(rows, 2, generator=generator)
    return [{"inputs": x[:15], "labels": y[:15]}, {"inputs": x[15:], "labels": y[15:]}]


def test_the_figures_are_numpys():
    model, original, batches = Affine(0.3).eval(), Affine().eval(), data()
    found = measure_quality(model, batches, task="regression", reference=original, progress=False)
    x, y = (torch.cat([batch[key] for batch in batches]).numpy() for key in ("inputs", "labels"))
    with torch.no_grad():
        mine, other = (each(torch.from_numpy(x)).double().numpy() for each in (model, original))
    variance = ((y - y.mean()) ** 2).sum()
    explained = [1 - ((each - y) ** 2).sum() / variance for each in (mine, other)]
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values["explained"] == pytest.approx(explained[0], rel=1e-6)
    assert values["error"] == pytest.approx(np.sqrt(((mine - y) ** 2).mean()), rel=1e-6)
    assert values["distance"] == pytest.approx(0.3, rel=1e-5)
    assert found.loss.value == pytest.approx(explained[1] - explained[0], rel=1e-6)
    assert (found.task, found.documents, found.tokens) == ("regression", 40, 80)
    # the interval, from a bootstrap over rows in NumPy
    draws = np.random.default_rng(0).integers(40, size=(4000, 40))
    scores = [1 - ((mine[d] - y[d]) ** 2).sum() / ((y[d] - y[d].mean()) ** 2).sum() for d in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    assert found.metrics["explained"].low == pytest.approx(low, abs=0.05)
    assert found.metrics["explained"].high == pytest.approx(high, abs=0.05)
    assert "explained" in str(found.to_dict()) and found.table().row_count == 4


def test_against_itself_nothing_is_lost():
    model = Affine().eval()
    found = measure_quality(model, data(), task="regression", reference=model, progress=False)
    assert (found.loss.low, found.loss.value, found.loss.high) == (0, 0, 0)


def test_a_model_that_says_so_is_a_regressor():
    assert task_of(BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))) == "regression"
    assert task_of(BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))) == "classification"
    several = BertConfig(**SMALL, num_labels=3, problem_type="regression")
    assert task_of(BertForSequenceClassification(several)) == "regression"
    one = BertConfig(**SMALL, num_labels=1, problem_type="multi_label_classification")
    assert task_of(BertForSequenceClassification(one)) == "classification"


def test_a_transformers_regressor_is_trained_and_measured():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=1)).eval()
    ids = torch.randint(1, 30, (16, 6))
    batches = [{"input_ids": ids, "labels": (ids[:, 0] > 15).float()}]
    before = measure_quality(model, batches, progress=False).metrics["error"].value
    trained = train(model, batches, validation=list(batches), steps=30, learning_rate=1e-2, progress=False).model
    after = measure_quality(trained, batches, progress=False).metrics["error"].value
    assert after < before / 2


def test_a_module_of_ones_own_with_numbers_for_labels_is_trained():
    model, batches = Affine().train(), data()
    before = measure_quality(model, batches, task="regression", progress=False).metrics["error"].value
    train(model, batches, validation=list(batches), steps=60, learning_rate=0.05, progress=False)
    found = measure_quality(model, batches, task="regression", progress=False).metrics["error"].value
    assert found < before and found == pytest.approx(1.0, abs=0.25)  # the noise of the targets


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels: none are in the data, and a regressor's error"),
        (torch.zeros(4, dtype=torch.long), "labels: int64 are in the data"),
        (torch.zeros(4, 3), r"labels: \[4, 3\] were given for an output of shape \[4, 2\]"),
    ],
)
def test_bad_labels(labels, message):
    batch = {"inputs": torch.zeros(4, 3)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(DataError, match=message):
        measure_quality(Affine().eval(), [batch], task="regression", progress=False)


def test_a_search_without_labels_compares_outputs():
    splits = SimpleNamespace(search=[{"input_ids": torch.ones(2, 4)}], test=[{"input_ids": torch.ones(2, 4)}])
    for labels in (1, 3):  # a regressor, and a classifier
        model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=labels))
        task, note = task_for(model, splits)  # type: ignore[arg-type]
        assert task == "embedding" and "no labels" in note
    splits = SimpleNamespace(search=[{"labels": torch.ones(2)}], test=[{"labels": torch.ones(2)}])
    one = BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))
    assert task_for(one, splits) == ("regression", None)  # type: ignore[arg-type]
