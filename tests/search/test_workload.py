"""What speed is measured on: as it is given, or as it fits the context."""

from __future__ import annotations

import pytest
import tiny_models
from torch import nn

from actkit.search.workload import Workload


@pytest.mark.parametrize(
    ("workload", "context", "expected"),
    [
        (Workload(), None, (128, 32)),
        (Workload(), 2048, (128, 32)),
        (Workload(), 100, (50, 32)),
        (Workload(), 8, (4, 4)),
        (Workload(prompt=2000), 2048, (2000, 32)),
        (Workload(prompt=2000), 2016, (2000, 16)),
        (Workload(max_new_tokens=64), 2048, (128, 64)),
        (Workload(max_new_tokens=64), 80, (16, 64)),
        (Workload(prompt=10, max_new_tokens=64), None, (10, 64)),
    ],
)
def test_tokens_fit_the_context(workload, context, expected):
    prompt, new = workload.tokens(context)
    assert (prompt, new) == expected and (context is None or prompt + new <= context)


def test_what_cannot_be_measured_is_refused():
    model = tiny_models.build("llama", hidden_size=32, num_hidden_layers=1, max_position_embeddings=64)
    for workload, words in (
        (Workload(prompt=0), "prompt: 0 was given; give the tokens before"),
        (Workload(max_new_tokens=1), "max_new_tokens: 1 was given; give 2 or more"),
        (Workload(batch=0), "batch: 0 was given; give the rows"),
    ):
        with pytest.raises(ValueError, match=words):
            workload.check(speed=True)
    for workload, words in (
        (Workload(prompt=4), "prompt: 4 was given with speed=False"),
        (Workload(max_new_tokens=4), "max_new_tokens: 4 was given with speed=False"),
        (Workload(batch=4), "batch: 4 was given with speed=False"),
    ):
        with pytest.raises(ValueError, match=words):
            workload.check(speed=False)
    for workload, words in (
        (Workload(prompt=63), "prompt: 63 was given; give 1 to 62, as the model's context is 64"),
        (Workload(prompt=40, max_new_tokens=30), "prompt: 40 was given; give 1 to 34"),
        (Workload(max_new_tokens=64), "max_new_tokens: 64 was given; give 2 to 63"),
    ):
        with pytest.raises(ValueError, match=words):
            workload.check_model(model)
    with pytest.raises(ValueError, match="prompt: 4 was given, and Linear decodes no text"):
        Workload(prompt=4).check_model(nn.Linear(2, 2))
    Workload(batch=4).check_model(nn.Linear(2, 2))
    assert Workload(batch=4).given() == {"batch": 4}
