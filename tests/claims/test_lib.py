"""The claims of the local interaction basis in small, and the nets whose blocks rotations hide."""

from __future__ import annotations

import torch

from actkit.claims.lib import STATEMENTS, Sizes, between, blocks_of, rotated, run
from actkit.interpretation.lib.basis import local_interaction_basis


def test_it_runs_in_small(monkeypatch):
    monkeypatch.setattr("actkit.claims.lib.TOLERANCE", 1.0)  # of a net that has learned nothing, all edges may go
    outcome = run(Sizes(seeds=(0,), blocks=1, rows=12, epochs=1), progress=False)
    assert [claim.statement for claim in outcome.claims] == [each.statement for each in STATEMENTS]


def test_each_half_of_the_inputs_reaches_its_half_of_the_outputs():
    sections, x, turns = rotated(0, 5)
    changed = x.clone()
    changed[:, 4:] += 1.0
    one, other = (sections.nodes(each)[-1][:, 1:] for each in (x, changed))
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])
    basis = local_interaction_basis(sections, x, kind="neuron", progress=False)
    assert between(basis.edges(x, progress=False), blocks_of(basis, turns)) > 0.1
