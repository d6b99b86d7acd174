"""OFQ's claims at tiny sizes: what is trained, at which rate, and how it is judged."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from actkit.claims import ofq
from actkit.claims.ofq import ANNEALED, FLOOR, HELD, LSQ, PRODUCT, STATSQ, Bench
from actkit.core.layers.latent_product import LatentProduct
from actkit.core.layers.latent_weight import LatentWeight

TINY = ofq.Sizes(
    seeds=(0,), input_bits=(2,), epochs=1, annealing=1, rates=(1e-3,), batch=512, starts=2, steps=20
)  # two steps of each arm


def test_the_learning_rate_rises_and_falls_to_its_floor() -> None:
    rates = [ofq.share(step, 600) for step in range(600)]
    assert rates[9] == 1 and all(later <= before for before, later in pairwise(rates[9:]))
    assert rates[0] == 0.1 and rates[-1] == pytest.approx(FLOOR, rel=1e-3)
    assert rates[305] == pytest.approx(FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi / 2)) / 2)


def test_one_weight_of_the_regression_begins_at_a_threshold() -> None:
    assert ofq.flips(0, True, 5) >= 0
    assert ofq.flips(3, False, 5) == ofq.flips(3, False, 5)
    found = ofq.toy(TINY)
    assert "over 2 starts" in found.here


def test_what_each_arm_trains() -> None:
    bench = Bench(TINY)
    for arm, kinds in ((LSQ, 24), (STATSQ, 24), (PRODUCT, 20)):
        weights = [module for module in bench.made(arm, 2).modules() if isinstance(module, LatentWeight)]
        assert len(weights) == kinds
        assert all((weight.step is not None) == (arm == LSQ) for weight in weights)
        assert sum(isinstance(weight, LatentProduct) for weight in weights) == (4 if arm == PRODUCT else 0)


@pytest.mark.slow(reason="trains four arms of the digits ViT for two steps each")
def test_all_arms_are_judged() -> None:
    outcome = ofq.run(subject="vit", progress=False, sizes=TINY)
    (claim,) = outcome.claims
    for arm in (LSQ, HELD, STATSQ, STATSQ + ANNEALED, PRODUCT, PRODUCT + ANNEALED):
        assert f"{arm} (rate 0.001)" in claim.here
    assert claim.condition == ofq.TWO.condition and torch.is_grad_enabled()
