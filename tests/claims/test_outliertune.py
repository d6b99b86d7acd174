"""OutlierTune's experiments on tiny sizes: the twin computes the same, and what is judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actkit.claims import outliertune
from actkit.claims.outliertune import OURS, SMOOTHED, TOKENS, UNCENTRED
from actkit.claims.subject import Subject
from actkit.core.model.anatomy import Site
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax

TINY = outliertune.Sizes(seeds=(0, 1), calibration=1, held_out=1, steps=0)


@pytest.fixture(scope="module")
def natural():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        use_parallel_residual=False,
    )
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return Subject("swiglu", calibration=1, split="train", held_out=1, model=model.eval())


def test_the_twin_computes_the_same_with_other_channels(natural):
    twin: nn.Module = outliertune.planted(natural)
    batch = natural.held_out[0]
    with torch.no_grad():
        before, after = natural.model(**batch).logits, twin(**batch).logits
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
    site = Site("mlp.input", 1)
    largest = [
        record(m, {site: AbsMax()}, natural.calibration(0), progress=False)[site].value for m in (natural.model, twin)
    ]
    ratios = (largest[1] / largest[0]).sort().values
    torch.testing.assert_close(ratios[-4:], torch.full((4,), 20.0, dtype=torch.float64), rtol=1e-3, atol=0)
    assert (ratios[-8:-4] > 3.9).all() and (ratios[-8:-4] < 6.1).all()
    torch.testing.assert_close(ratios[:-8], torch.ones(24, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("ours", "token", "smoothed", "without", "passed"),
    [(31, 33, 32, 31.5, True), (32, 33, 34, 32.5, False), (31, 33, 31.05, 31.5, False), (31, 33, 32, 30.9, False)],
)
def test_the_central_claim_is_judged_by_the_gaps(natural, monkeypatch, ours, token, smoothed, without, passed):
    arms = {TOKENS: [token], SMOOTHED: [smoothed] * 2, UNCENTRED: [without] * 2, OURS: [ours] * 2}
    monkeypatch.setattr(outliertune, "arms", lambda *_: arms)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert outliertune.on_the_twin(natural, natural, TINY).passed is passed
    assert outliertune.on_a_real_model(natural, TINY).passed is (passed or without == 30.9)


def test_every_arm_rounds_alike(natural):
    found = outliertune.arms(natural, TINY, 6)
    assert [len(values) for values in found.values()] == [2, 1, 2, 2, 2]
    assert len({round(value, 6) for values in found.values() for value in values}) >= 7
    assert "relative error" in outliertune.errors_of_weights(natural, TINY).here
