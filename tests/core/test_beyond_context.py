"""Rows beyond a model's context: only if `load_data` is told, said in the result, never for learned positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import actkit
from actkit.core.ground.errors import DataError
from actkit.core.measure.quality import measure_quality
from actkit.core.train.training import train
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax
from actkit.data import load_data
from actkit.testing import tiny_model

LONG = {"input_ids": torch.randint(40, (2, 48), generator=torch.Generator().manual_seed(0))}  # the context is 32


def test_it_is_an_option_of_the_data_and_said_in_the_result() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match=r"48 tokens, the model's context is 32; .*beyond_context=True"):
        measure_quality(model, [LONG], progress=False)
    given = load_data([LONG], model, beyond_context=True)
    found = measure_quality(model, given, progress=False, resamples=10)
    with torch.no_grad():
        logits = model(**LONG).logits[:, :-1].flatten(0, 1)
    loss = float(F.cross_entropy(logits, LONG["input_ids"][:, 1:].flatten()))
    assert math.isclose(math.log(found.metrics["perplexity"].value), loss, rel_tol=1e-4)
    assert "beyond the context of 32 tokens" in found.data and given[:1].beyond_context
    evaluation = actkit.evaluate(model, LONG, beyond_context=True)
    assert "beyond the context of 32 tokens" in evaluation.data
    record(model, {"mlp.hidden": AbsMax()}, given, progress=False)
    random = load_data("random", model, sequences=2, length=40, beyond_context=True)
    assert random[0]["input_ids"].shape == (2, 40) and "beyond the context" in random.description
    short = load_data("random", model, sequences=2, length=20, beyond_context=True)
    assert "beyond" not in short.description


def test_training() -> None:
    model = tiny_model("llama")
    data, held_out = (load_data("random", model, length=40, seed=seed, beyond_context=True) for seed in (0, 1))
    trained = train(model, data, validation=held_out, steps=1, progress=False)
    assert trained.beyond_context and trained.to_dict()["beyond_context"]
    assert "beyond the context" in str(trained.table().title)
    with pytest.raises(DataError, match="the model's context is 32"):
        train(model, [dict(batch) for batch in data], validation=held_out, steps=1, progress=False)


def test_learned_positions_have_nothing_beyond() -> None:
    for kind in ("gpt2", "bert"):
        model = tiny_model(kind)
        with pytest.raises(DataError, match="looks positions up in a table of"):
            load_data("random", model, length=999, beyond_context=True)
        with pytest.raises(DataError, match="looks positions up in a table of"):
            load_data([{"input_ids": torch.ones(1, 999, dtype=torch.long)}], model, beyond_context=True)
