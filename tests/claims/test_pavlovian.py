"""The claims of conditioning in small, and the sequences that are recalled."""

from __future__ import annotations

import torch

from actkit.claims.pavlovian import STATEMENTS, SYMBOLS, Sizes, run, sequences


def test_it_runs_in_small():
    sizes = Sizes(seeds=(0,), keys=(16, 32), trials=20, draws=2, pairs=(2, 4), steps=2, rates=(1e-3,))
    outcome = run(sizes, progress=False)
    assert [claim.statement for claim in outcome.claims] == [each.statement for each in STATEMENTS]
    assert [claim.passed for claim in outcome.claims][:2] == [True, True]


def test_answers_are_the_last_values_of_their_keys():
    keys, values, answers = sequences(8, 50, torch.Generator().manual_seed(0))
    again = 0
    for row in range(50):
        bound: dict[int, int] = {}
        for key, value in zip(keys[row, :8].tolist(), values[row, :8].tolist(), strict=True):
            again += key in bound
            bound[key] = value
        assert [bound[key] for key in keys[row, 8:].tolist()] == answers[row].tolist()
        assert (values[row, 8:] == SYMBOLS).all()
    assert again == 2 * 50
