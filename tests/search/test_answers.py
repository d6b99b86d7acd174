"""Who is asked questions in a search, what is kept, and what the numbers are."""

from types import SimpleNamespace

import pytest
import torch
from made_up import candidate

from actkit.core.measure.multiple_choice import hits, log_likelihoods
from actkit.data.tasks import documentation
from actkit.search import answers as module
from actkit.search.answers import ask
from actkit.search.budget import Budget
from actkit.search.journal import Journal
from actkit.search.results import Answers
from actkit.zoo.loading import open_model

COUNT = 12


@pytest.fixture
def shop(monkeypatch):
    monkeypatch.setattr(module, "QUESTIONS", COUNT)
    model, tokenizer = open_model("swiglu", dtype="float32")
    splits = SimpleNamespace(test=SimpleNamespace(tokens=10_000))
    kinds = {"task": "language", "by_divergence": False, "base": None, "progress": False}
    return SimpleNamespace(model=model, tokenizer=tokenizer, splits=splits, **kinds)


@pytest.fixture
def journal(tmp_path):
    return Journal.start(tmp_path / "journal.jsonl", {})


def named(*names):
    return [candidate(name, recipe=[{"rtn": {"bits": 8 - number}}]) for number, name in enumerate(names)]


@pytest.fixture
def made_up_hits(monkeypatch):
    """The original answers 10 of 12 questions, candidate number n that many fewer; who was asked is listed."""
    asked = []

    def answer(shop, one, folder, questions):
        right = 10 - (0 if not one.recipe else 9 - one.recipe[0]["rtn"]["bits"])
        asked.append(one.name)
        return {metric: (torch.arange(COUNT) < right).double() for metric in ("acc", "acc_norm")}

    monkeypatch.setattr(module, "_asked", answer)
    return asked


def test_the_original_and_three_candidates_are_asked_once(shop, journal, made_up_hits):
    found = ask(shop, named("a", "b", "c", "d"), journal, Budget(shop.splits), None)
    assert made_up_hits == ["original", "a", "b", "c"] == list(found.scores) and not found.notes
    assert [each[0].value.value for each in found.scores.values()] == pytest.approx([10 / 12, 9 / 12, 8 / 12, 7 / 12])
    assert found.scores["b"][1].difference.value == pytest.approx(-2 / 12)
    again = ask(shop, named("a", "b", "c", "d"), journal, Budget(shop.splits), None)
    assert again == found and len(made_up_hits) == 4  # from the journal
    assert found.lines()[0] == "questions: original answers 83% (±22) of 12 rightly"
    assert found.lines()[2].startswith("questions: b answers 67% (±28) of 12 rightly; difference -0.167 (-0.")
    assert [row[0] for row in found.rows()] == ["original"] * 2 + ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    assert found.to_dict()["scores"]["a"][0]["difference"]["value"] == pytest.approx(-1 / 12)


def test_what_cannot_be_asked_says_why(shop, journal, made_up_hits):
    for change, reason in (
        ({"task": "embedding"}, "no language model"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"by_divergence": True}, "random tokens"),
    ):
        found = ask(SimpleNamespace(**{**vars(shop), **change}), named("a"), journal, Budget(shop.splits), None)
        assert not found.scores and reason in found.notes[0]
    assert not made_up_hits


def test_nobody_is_asked_when_the_minutes_are_over(shop, journal, made_up_hits):
    budget = Budget(shop.splits, minutes=1.0, rest=61.0)
    found = ask(shop, named("a"), journal, budget, None)
    assert not found.scores and "minutes=1" in found.notes[0] and not made_up_hits


def test_an_original_at_chance_is_the_only_one_asked(shop, journal):
    """swiglu is one: it never saw a question. Its numbers are those of the questions asked by hand."""
    found = ask(shop, named("a"), journal, Budget(shop.splits), None)
    questions = documentation(COUNT)
    expected = hits(questions, log_likelihoods(shop.model, shop.tokenizer, questions, progress=False))
    assert {each.metric: each.value.value for each in found.scores["original"]} == {
        metric: float(values.mean()) for metric, values in expected.items()
    }
    assert list(found.scores) == ["original"] and "chance, 25%" in found.notes[0]


def test_a_candidate_that_breaks_is_named(shop, journal, monkeypatch):
    def answer(shop, one, folder, questions):
        if one.recipe:
            raise ValueError("no such folder")
        return {metric: torch.ones(COUNT).double() for metric in ("acc", "acc_norm")}

    monkeypatch.setattr(module, "_asked", answer)
    found = ask(shop, named("a", "b"), journal, Budget(shop.splits), None)
    assert list(found.scores) == ["original"]
    assert [note.split(":")[0] for note in found.notes] == ["a was asked, and failed", "b was asked, and failed"]


def test_a_search_without_questions_has_an_empty_section():
    assert Answers().rows() == Answers().lines() == []
