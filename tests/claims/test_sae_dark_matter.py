"""The claims of sparse autoencoders' error on tiny sizes: what is trained, what is judged, and that each can fail."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from actkit.claims import sae_dark_matter as claim
from actkit.interpretation.dark_matter import widths
from actkit.interpretation.dark_matter.error_split import split_error
from actkit.interpretation.dark_matter.widths import WidthComparison, WidthPair
from actkit.testing import tiny_model

TINY = claim.Sizes(
    seeds=(0,), tokens=640, length=16, skip=2, widths=(32, 64, 96), k=4, steps=20, size=32, rows=40, synthetic=60
)


class Small(claim.Bench):
    """On a tiny model with random tokens."""

    @cached_property
    def model(self) -> Any:
        return tiny_model("llama")

    def text(self, split: str, rows: int) -> Any:
        ids = torch.randint(0, 40, (min(rows, 40), 16), generator=torch.Generator().manual_seed(len(split)))
        return [{"input_ids": part} for part in ids.split(8)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> claim.Bench:
    return Small(TINY, tmp_path_factory.mktemp("bench"), progress=False)


def test_the_claims_run(bench: claim.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "APART", -1.0)
    assert claim.split(bench).here.startswith("invalid with seed 0") and not claim.split(bench).passed
    monkeypatch.setattr(widths, "APART", 1.0)
    found = claim.split(bench)
    assert "seed 0: R2 of the error" in found.here and "gradient pursuit" in found.here and "gives back" in found.here
    synthetic = claim.synthetic(bench)
    assert f"{len(claim.LEVELS) * len(claim.LEFT_OUT)} cases" in synthetic.here
    assert bench.site == "blocks.0.block.output"
    assert [each.latents for each in bench.autoencoders(0)] == [32, 64, 96]
    first, second = bench.held_out()
    assert not set(first.rows.tolist()) & set(second.rows.tolist())  # type: ignore[union-attr]


def comparison(bench: claim.Bench, **changes: Any) -> WidthComparison:
    """One that meets all conditions, but for what is changed."""
    split = split_error(bench.autoencoders(0)[0], *bench.held_out())
    fine = {"explained": 0.5, "control": 0.0, "lengths": {**split.lengths, "error": 0.9}, "fvu": 0.3, "fvu_rest": 0.1}
    narrow = replace(split, **{**fine, "latents": 512, **changes})
    wide = replace(split, **{**fine, "latents": 2048, "fvu": 0.19, "fvu_rest": 0.09})
    return WidthComparison((narrow, wide), (WidthPair(512, 2048, 0.6, 0.7),))


@pytest.mark.parametrize(
    ("changes", "pursued", "passed"),
    [
        ({}, 0.1, True),
        ({"explained": 0.95}, 0.1, False),
        ({"explained": 0.1}, 0.1, False),
        ({"control": 0.45}, 0.1, False),
        ({"lengths": {"error": 0.6}}, 0.1, False),
        ({}, 0.3, False),
    ],
)
def test_each_condition_can_fail(bench: claim.Bench, changes: Any, pursued: float, passed: bool) -> None:
    text, fine = claim.judged(comparison(bench, **changes), pursued, 0.2)
    assert fine == passed and "drop of the linear part 50.0%, of the rest 10.0%" in text


def test_the_pairs_and_the_drops_can_fail(bench: claim.Bench) -> None:
    found = comparison(bench)
    pair = WidthComparison(found.splits, (WidthPair(512, 2048, 0.4, 0.7),))
    assert not claim.judged(pair, 0.1, 0.2)[1]
    narrow, wide = found.splits
    shrinks = WidthComparison((narrow, replace(wide, fvu=0.15, fvu_rest=0.05)), found.pairs)
    assert not claim.judged(shrinks, 0.1, 0.2)[1]


def test_the_synthetic_check_can_fail(bench: claim.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "FOLLOWS", -1.0)
    assert claim.synthetic(bench).passed
    monkeypatch.setattr(claim, "FOLLOWS", 1.1)
    assert not claim.synthetic(bench).passed
    assert claim.STATEMENTS[0].subject == "swiglu" and Path(claim.__file__).stem == "sae_dark_matter"
