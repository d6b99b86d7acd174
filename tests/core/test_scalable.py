"""The walk over sets of layers that may take a scale, against the sets themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from actkit.core.edit.edits import Note, Skip
from actkit.core.model.anatomy import anatomy, equalization_sets
from actkit.core.recipe.scalable import kind_of, scalable_sets, scalable_sites, scalable_targets
from actkit.testing import tiny_model

LLAMA = ("norm", "value", "norm", "up")


def test_each_set_comes_with_what_was_seen_of_its_input() -> None:
    block = anatomy(tiny_model("llama")).blocks[0]
    groups = equalization_sets(block)
    assert tuple(map(kind_of, groups)) == LLAMA
    sites = scalable_sites(block, ("norm", "value", "up"))
    seen = {site: SimpleNamespace(count=1, site=site) for site in sites.values()}
    found = list(scalable_sets(block, ("norm", "value", "up"), seen))
    assert [group for group, _ in found] == list(groups)  # type: ignore[misc]
    names = [statistic.site.name for _, statistic in found]  # type: ignore[misc]
    assert names == ["attention.input", "attention.mixed", "mlp.input", "mlp.hidden"]
    several = {site: [statistic, "more"] for site, statistic in seen.items()}
    assert [each for _, each in scalable_sets(block, ("value",), several)] == [several[sites[groups[1].inspect]]]  # type: ignore[misc]


def test_what_no_token_reached_is_noted() -> None:
    block = anatomy(tiny_model("llama")).blocks[0]
    seen = {site: SimpleNamespace(count=0) for site in scalable_sites(block, ("value",)).values()}
    (found,) = scalable_sets(block, ("value",), seen)
    assert isinstance(found, Note) and "no calibration token" in found.text


@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_a_set_that_takes_no_scale_says_why(kind: str) -> None:
    block = anatomy(tiny_model(kind)).blocks[0]
    groups = [group for group in equalization_sets(block) if kind_of(group) == "norm"]
    seen = {site: SimpleNamespace(count=1) for site in scalable_sites(block, ("norm",)).values()}
    found = list(scalable_sets(block, ("norm",), seen))
    skipped = [each for each in found if isinstance(each, Skip)]
    assert [(each.path, each.reason) for each in skipped] == [(x.inspect, x.refused) for x in groups if x.refused]
    assert skipped and len(found) == len(groups)


def test_targets_are_the_layers_and_the_weights_of_their_norms() -> None:
    block = anatomy(tiny_model("llama")).blocks[0]
    assert block.attention is not None
    found = [each if isinstance(each, str) else each.path for each in scalable_targets(block, ("norm", "value"))]
    layers = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    assert found[:4] == [*layers, "model.layers.0.input_layernorm.weight"]
    assert block.attention.output.path in found and not any("down_proj" in each for each in found)
