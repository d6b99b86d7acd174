"""The last words of a search, for searches with made-up numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import candidate, the_original

from actkit.search.closing import in_short
from actkit.search.verdict import Limits, decide


def search(*candidates: Any, best: bool = True, prompt: str | None = None) -> Any:
    original = the_original()
    verdict = decide(candidates, original, Limits(0.02))
    every = {each.name: each for each in (original, *candidates)}
    return SimpleNamespace(
        name="tiny", original=original, verdict=verdict, best=Path("best") if best else None, prompt=prompt,
        candidate=every.__getitem__,
    )  # fmt: skip


def test_what_was_gained_what_it_cost_and_where_it_is(tmp_path):
    text = in_short(search(candidate("rtn 4 bit", 0.004, 0.001, ratio=(1.8, 2.2), disk=0.4)), tmp_path)
    assert text == (
        "In short: rtn 4 bit gives 2.00x (1.80 to 2.20) as fast, 40% of the disk. It costs 0.40% more perplexity on "
        "text that no step of the search saw (95% sure that it is at most 0.50%). The model is in "
        f"{tmp_path / 'best'}, loaded again and compared; the report is {tmp_path / 'index.html'}."
    )


def test_a_loss_below_zero_is_no_gain_of_quality(tmp_path):
    assert "It costs 0.00% more perplexity" in in_short(search(candidate(loss=-0.004, disk=0.4)), tmp_path)


@pytest.mark.parametrize(("metric", "words"), [("fidelity", "likeness of its embeddings"), ("accuracy", "accuracy")])
def test_the_cost_is_said_in_the_terms_of_the_task(tmp_path, metric, words):
    found = candidate(disk=0.4)
    found = replace(found, metrics={metric: found.metrics["perplexity"]})
    assert f"0.10% less {words}" in in_short(search(found), tmp_path)


def test_a_chat_model_is_talked_to(tmp_path):
    found = search(candidate(disk=0.4), prompt='Return "a" $HOME `of` the list')
    assert f'Let it write: actkit generate {tmp_path / "best"} "Return a HOME"' in in_short(found, tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "chat_template.jinja").touch()
    assert in_short(found, tmp_path).endswith('"What does a list comprehension do?" --chat')


def test_nothing_pays(tmp_path):
    text = in_short(search(candidate(loss=0.5), best=False), tmp_path)
    assert text.startswith("In short: nothing that was tried makes tiny cheaper at this limit on the loss")
