"""The verdict: a table of candidates at each side of each limit, the choice among those that pay, and the words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from made_up import a_proof, around, candidate, the_original

from actkit.core.quality import Estimate
from actkit.search.measured import Candidate
from actkit.search.verdict import decide, gain, judge

PAYS = [
    candidate(ratio=(1.031, 1.2)),
    candidate(disk=0.9),
    candidate(memory=0.9),
    candidate(ratio=None, disk=0.5),
    candidate(disk=0.5, loss=0.0195, half=0.0005),  # the upper bound is the limit itself
    candidate(disk=0.5, loss=-0.01),
    candidate(disk=0.5, ratio=(0.2, 0.3)),  # slower, and said to be
    candidate(disk=0.5, writes=""),
]
DOES_NOT = [
    (candidate(ratio=(1.03, 1.2)), "no gain: speed 1.11x"),
    (candidate(disk=0.91, memory=0.91), "memory 91%, disk 91%"),
    (candidate(disk=0.5, loss=0.0195, half=0.0006), "though the loss itself may be within it"),
    (candidate(disk=0.5, loss=0.3, half=0.01), "loss 30.0% on the search split, the limit is 2.0%"),
    (candidate(disk=0.5, search_loss=None), "the loss on the search split was not measured"),
    (replace(candidate(disk=0.5), loss=around(0.5)), "loss 50.0% on the test split"),
    (replace(candidate(disk=0.5), loss=Estimate(0.0, -math.inf, math.inf)), "the data are one document"),
    (replace(candidate(disk=0.5), loss=Estimate(math.nan, math.nan, math.nan)), "test split"),
    (candidate(disk=0.5, proof=a_proof(False)), "does not reload"),
    (candidate(disk=0.5, writes="stuck"), "it does not write: stuck"),
    (Candidate("broken", failed="NonFiniteError: NaN"), "it failed: NonFiniteError: NaN"),
    (candidate(ratio=None), "speed not measured, memory not measured, disk 100%"),
]


@pytest.mark.parametrize("tried", PAYS)
def test_pays(tried):
    found = judge(tried, the_original(), 0.02)
    assert found.pays and found.gains and not found.against


@pytest.mark.parametrize(("tried", "reason"), DOES_NOT)
def test_does_not_pay_and_says_why(tried, reason):
    found = judge(tried, the_original(), 0.02)
    assert not found.pays and reason in "; ".join(found.against)


def test_the_best_has_the_largest_gain_then_the_fewest_bytes_then_the_smallest_loss():
    half, third = candidate("half", disk=0.5), candidate("third", disk=0.33)
    assert decide([half, third], the_original(), max_loss=0.02).best == "third"
    nearly = candidate("reads less", disk=0.335, read=0.2, loss=0.01)  # 1.5 % more disk is no difference
    assert decide([half, third, nearly], the_original(), max_loss=0.02).best == "reads less"
    lossy = candidate("lossier", disk=0.33, loss=0.015)
    assert decide([lossy, third], the_original(), max_loss=0.02).best == "third"
    fast = candidate("fast", ratio=(4.0, 4.2), disk=0.8)
    assert decide([third, fast], the_original(), max_loss=0.02).best == "fast"
    assert gain(fast, the_original()) == 4.0  # by the lower bound


def test_the_test_split_rejects_but_does_not_rank():
    third = replace(candidate("third", disk=0.33), loss=around(0.05))
    half = candidate("half", disk=0.5, loss=0.015)
    assert decide([third, half], the_original(), max_loss=0.02).best == "half"


def test_speed_is_refused_in_words_where_the_weights_fit_in_the_cache():
    original = the_original(10_000_000)
    found = decide([candidate(disk=0.5)], original, max_loss=0.02, cache=32_000_000)
    assert found.speed == (
        "speed: no gain; the weights (10 MB) fit in the last-level cache (32 MB), "
        "where nothing is saved by reading less"
    )
    beyond = decide([candidate(disk=0.5)], original, max_loss=0.02, cache=1_000_000)
    assert beyond.speed == (
        "speed: no gain; the best is tried with 1.00x (0.95 to 1.05), and the lower bound must exceed 1.03"
    )


def test_words_of_the_other_verdicts():
    original = the_original()
    nothing = decide([candidate(), candidate("lossy", 0.5, disk=0.4)], original, max_loss=0.02, cache=10**9)
    assert not nothing.pays and nothing.best is None
    assert nothing.headline == "Nothing pays here: keep the model as it is."
    assert nothing.memory.startswith("memory: no gain;") and nothing.disk.startswith("disk: no gain;")
    assert "1 of 2 measured candidates are within the limit of 2.0%" in nothing.quality
    fast = decide([candidate("quick", ratio=(1.2, 1.4))], original, max_loss=0.02, cache=10**9)
    assert fast.speed == "speed: 1.30x (1.20 to 1.40) the original's with quick"
    lossy = decide([candidate("quick", 0.5, ratio=(1.2, 1.4))], original, max_loss=0.02)
    assert "quick has 1.30x (1.20 to 1.40), and loses too much" in lossy.speed
    slow = decide([candidate("small", ratio=(0.2, 0.4), disk=0.5)], original, max_loss=0.02)
    assert slow.headline.startswith("small pays: 50% of the disk")
    assert "It is slower, though: 0.30x" in slow.headline
    failed = decide([Candidate("broken", failed="no")], original, max_loss=0.02)
    assert failed.headline == "Nothing pays here: none of the candidates could be made."
    empty = decide([], original, max_loss=0.02)
    assert empty.headline == "Nothing pays here: no method of the search applies to this model."
    assert empty.speed == "speed: not measured"
    unmeasured = decide([candidate(ratio=None, speed_failed="no memory")], original, max_loss=0.02)
    assert unmeasured.speed == "speed: not measured (no memory)"


def test_a_candidate_survives_json():
    import json

    tried = candidate(disk=0.5, loss=0.01, skipped=[["a", "b", "c"]], coverage={"rtn": 0.9})
    tried = replace(tried, search_loss=Estimate(0.1, -math.inf, math.inf))
    again = Candidate.from_dict(json.loads(json.dumps(tried.to_dict(), allow_nan=False)))
    assert again == tried
