"""The claims of representational geometry in small, and the sign test."""

from __future__ import annotations

import pytest

from actkit.claims.representational_geometry import STATEMENTS, Sizes, fitted, run, sign_test
from actkit.interpretation.representational_geometry.tasks import KernelTask, NudgedXor


def test_it_runs_in_small(monkeypatch):
    monkeypatch.setattr("actkit.claims.representational_geometry.LATER", 1)
    outcome = run(Sizes(seeds=(0,), nets=1, samples=600, epsilons=(2.0, 0.0), xor_nets=1), progress=False)
    assert [claim.statement for claim in outcome.claims] == [each.statement for each in STATEMENTS]


def test_nets_stop_at_the_loss_and_xor_alone_has_biases():
    net, loss = fitted(KernelTask(16, 1), "tanh", 0, 600)
    assert loss <= 0.05 and net.hidden.bias is None
    assert fitted(NudgedXor(1.0), "relu", 0, 200)[0].hidden.bias is not None


def test_the_sign_test_is_that_of_a_coin():
    assert sign_test([2, 2, 2, 1], [1, 1, 1, 1]) == pytest.approx(1 / 8)
    assert sign_test([1], [1]) == 1.0
