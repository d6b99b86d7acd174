"""RePaViT's experiments on tiny sizes: they measure what they say; what does not hold is reported so."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import repavit
from actkit.claims.repavit import ARMS, FOLDED, MOST, PLAIN, Arms
from actkit.compression.repavit.folded import FoldedMlp
from actkit.compression.repavit.idle import IdleMlp

TINY = repavit.Sizes(seeds=(0, 1), epochs=1, training=64, layers=1, widths=(32,), rounds=1, images=64)


def test_folds_are_exact_and_a_difference_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repavit.exact().passed and "30 blocks" in repavit.exact().here
    assert repavit.whole(TINY).passed
    monkeypatch.setattr(repavit, "NARROW", 0.0)
    assert not repavit.exact().passed and not repavit.within([(1e-7, 1e-16)]).passed


def test_weights_and_times_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    assert "width 32" in repavit.cheap(TINY).here and "0.375 x the weights" in repavit.cheap(TINY).here
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(repavit, "FASTER", 0.0)
    assert not repavit.cheap(TINY).passed


def test_arms_begin_alike_and_are_what_they_are_called() -> None:
    arms = Arms(TINY)
    models = {arm: arms.fresh(arm, 3) for arm in (PLAIN, *ARMS)}
    kinds = {arm: type(model.vit.layers[0].mlp) for arm, model in models.items()}
    assert kinds[MOST] is IdleMlp and kinds[FOLDED] is FoldedMlp
    assert torch.equal(models[PLAIN].vit.layers[0].mlp.fc1.weight, models[MOST].vit.layers[0].mlp.up.weight)
    torch.testing.assert_close(repavit.logits(models[FOLDED]), repavit.logits(models[MOST]))
    assert repavit.trained_exact(arms).passed


def test_accuracies_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {PLAIN: 0.96, MOST: 0.95, FOLDED: 0.953}
    monkeypatch.setattr(Arms, "accuracies", lambda self, arm: [found.get(arm, 0.9)])
    monkeypatch.setattr(Arms, "rate", lambda self, arm: 1e-3)
    arms = Arms(TINY)
    assert repavit.kept(arms).passed and repavit.full(arms).passed
    assert all(arm in repavit.kept(arms).here for arm in (PLAIN, *ARMS))
    found |= {PLAIN: 0.966, FOLDED: 0.956}
    assert not repavit.kept(arms).passed and not repavit.full(arms).passed
