"""DOEI's claims run at a small size, and judge what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.claims import doei
from actkit.claims.doei import AT_TEST, EDITED, PLAIN, Arms, Found, Sizes, average_precision

TINY = Sizes(seeds=(0,), few=(0,), training=32, searched=8, test=24, epochs=1, width=16, blocks=3)


def test_it_runs_in_small_and_goes_on_from_its_journal(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal.json"
    claims = doei.run(progress=False, sizes=TINY, journal=journal).claims
    assert all(arm in claims[1].here for arm in doei.ARMS) and AT_TEST in claims[2].here
    monkeypatch.setattr(doei, "train", None)  # nothing is trained again
    again = doei.run(progress=False, sizes=TINY, journal=journal).claims
    assert [claim.here for claim in again] == [claim.here for claim in claims]
    assert doei.Arms(Sizes(), journal)._found == {}  # of other sizes


class Fixed(Arms):
    """Arms whose numbers are given."""

    def __init__(self, **given: list[float]) -> None:
        super().__init__(Sizes())
        self.given = given

    def found(self, arm: str, seed: int) -> Found:
        numbers = self.given.get({PLAIN: "plain", EDITED: "edited"}.get(arm, ""), [20.0] * 3)
        return Found(30.0, numbers[seed], numbers[seed], 5 + (arm == EDITED) * len(self.given.get("more", ())))


@pytest.mark.parametrize(
    ("edited", "passed"),
    [
        ([21.1, 21.1, 21.1], True),
        ([20.9, 20.9, 20.9], False),  # on average too little
        ([26.0, 19.0, 19.0], False),  # in too few seeds
        ([24.0, 20.0, 19.5], True),
    ],
)
def test_what_is_tighter(edited: list[float], passed: bool) -> None:
    assert doei.tighter(Fixed(plain=[20.0] * 3, edited=edited), refined=False).passed == passed
    assert not doei.tighter(Fixed(plain=[20.0] * 3, edited=edited), refined=True).passed  # all alike


def test_what_is_the_same() -> None:
    assert doei.same(Fixed(plain=[50.0] * 3, edited=[49.1] * 3)).passed
    assert not doei.same(Fixed(plain=[50.0] * 3, edited=[48.9] * 3)).passed
    assert not doei.same(Fixed(plain=[50.0] * 3, edited=[60.0] * 3, more=[1.0])).passed


def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 4, generator=draw), (torch.rand(50, 4, generator=draw) < 0.3).float()
    wanted = metrics.average_precision_score(labels.numpy(), logits.numpy(), average="macro")
    assert average_precision(logits, labels) == pytest.approx(wanted)
