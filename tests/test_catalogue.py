"""The catalogue: what papers.toml holds, how it is filtered and checked, and that docs/papers.md is up to date."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from actkit import catalogue
from actkit.catalogue import FAMILIES, KINDS, STATUSES, CatalogueError, Paper, load, paper, papers

ROOT = Path(__file__).parents[1]

ENTRY = """
[[paper]]
slug = "one"
title = "One"
short = "One"
year = 2024
family = "models"
kind = ["model"]
summary = "A paper."
"""


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """A folder of evidence of its own; call it to record claims for a slug."""
    monkeypatch.setattr(catalogue, "EVIDENCE", tmp_path)

    def record(slug: str, *passed: bool) -> None:
        texts = {"statement": "s", "paper": "1", "here": "2", "condition": "c"}
        subjects = ["swiglu", "swiglu", "smollm2"]
        claims = [{**texts, "subject": on, "passed": value} for on, value in zip(subjects, passed, strict=False)]
        runs = [{"subjects": ["swiglu", "smollm2"], "seeds": [0]}]
        (tmp_path / f"{slug}.json").write_text(json.dumps({"slug": slug, "claims": claims, "runs": runs}))

    return record


def test_seventy_nine_papers_with_unique_slugs_and_titles():
    found = papers()
    assert len(found) == 79
    for field in ("slug", "title", "short"):
        values = Counter(getattr(entry, field) for entry in found)
        assert max(values.values()) == 1, values.most_common(1)


def test_every_entry_is_well_formed():
    for entry in papers():
        assert entry.family in FAMILIES
        assert entry.kind and list(entry.kind) == [kind for kind in KINDS if kind in entry.kind], entry.slug
        assert 80 <= len(entry.summary) <= 160, entry.slug
        assert entry.summary.endswith("."), entry.slug
        assert entry.unsure is None or entry.unsure.endswith("."), entry.slug
        assert entry.reference is None or re.fullmatch(r"[\w.-]+/[\w.-]+( \(third party\))?", entry.reference), (
            entry.slug
        )


def test_years_are_those_of_the_arxiv_numbers():
    for entry in papers():
        if entry.arxiv:
            assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv), entry.slug
            assert entry.year == 2000 + int(entry.arxiv[:2]), entry.slug


def test_the_file_is_in_the_order_of_the_catalogue():
    written = re.findall(r'^slug = "(.*)"$', catalogue.CATALOGUE.read_text(encoding="utf-8"), re.MULTILINE)
    assert written == [entry.slug for entry in papers()]


def test_filters():
    assert [entry.slug for entry in papers(family="robustness")] == ["ft-clipact", "genbab"]
    assert all("rule" in entry.kind for entry in papers(kind="rule"))
    assert {entry.year for entry in papers(year=2017)} == {2017}
    assert [entry.slug for entry in papers(text="neuron Weight-column")] == ["wina"]
    assert [entry.slug for entry in papers(family="sparsity", kind="runtime", year=2023)] == ["edgemoe"]
    assert sum(len(papers(family=family)) for family in FAMILIES) == 79
    assert sum(len(papers(status=status)) for status in STATUSES) == 79


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("family", "vision", "robustness"),
        ("kind", "method", "runtime"),
        ("status", "done", "planned"),
        ("year", 1905, "2017"),
    ],
)
def test_an_unknown_filter_value_lists_the_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=rf"{name}: {value!r} is not known.*{allowed}"):
        papers(**{name: value})


def test_an_unknown_slug_suggests_near_names():
    assert paper("awq").title.startswith("AWQ")
    with pytest.raises(CatalogueError, match="omniquant"):
        paper("OmniQuantt")
    with pytest.raises(CatalogueError, match="actkit papers"):
        paper("zzzzzz")


def test_status_follows_the_entry_and_the_evidence(evidence):
    entry = paper("awq")
    assert (entry.status, entry.evidence, entry.passed, entry.failed) == ("built", None, 0, 0)
    evidence("awq", True, False, True)
    assert (entry.status, entry.passed, entry.failed) == ("working", 2, 1)
    assert entry in papers(status="working")
    assert entry.by_subject == {"swiglu": (1, 2), "smollm2": (1, 1)}
    assert "| working: 2 of 3 claims hold (on swiglu 1 of 2, on smollm2 1 of 1) |" in catalogue.readme_table()
    assert paper("analog-crossbar").status == "planned"


def test_to_dict_is_plain(evidence):
    evidence("awq", True)
    entry = paper("awq").to_dict()
    assert json.loads(json.dumps(entry)) == entry
    assert (
        entry["status"] == "working" and entry["kind"] == ["transform"] and entry["evidence"]["runs"][0]["seeds"] == [0]
    )


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"slug": "awq"}',
        '{"slug": "wina", "claims": [{"passed": true, "subject": "swiglu"}], "runs": []}',
        '{"slug": "awq", "claims": [{"passed": true}], "runs": []}',  # as it was before claims had subjects
        '{"slug": "awq", "claims": [{"passed": true, "subject": "swiglu"}]}',
    ],
)
def test_broken_evidence_is_an_error_that_names_the_file(evidence, content):
    (catalogue.EVIDENCE / "awq.json").write_text(content)
    with pytest.raises(CatalogueError, match=r"awq\.json"):
        _ = paper("awq").status


def test_a_small_catalogue_loads(tmp_path):
    path = tmp_path / "papers.toml"
    path.write_text(ENTRY)
    assert load(path) == (Paper("one", "One", "One", 2024, "models", ("model",), "A paper."),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("year = 2024", "", "'one' lacks year"),
        ("year = 2024", 'year = "2024"', "'one' has year"),
        ('slug = "one"', "", "'number 1' lacks slug"),
        ('slug = "one"', 'slug = "One!"', "malformed slug"),
        ('title = "One"', 'title = ""', "'one' has title"),
        ('short = "One"', 'short = "One"\nauthor = "Me"', "'one' has the unknown key author"),
        ('"models"', '"vision"', "'one' has family = 'vision'.*functions"),
        ('["model"]', '["model", "method"]', "'one' has the unknown kind 'method'.*layer"),
        ('["model"]', "[]", "'one' has kind"),
        ("year = 2024", 'year = 2024\nentry = "os:system"', "'one' has entry"),
        ("\n", ENTRY, "'one' occurs twice"),
        ("year =", "year", "not TOML"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, old, new, message):
    path = tmp_path / "papers.toml"
    path.write_text(ENTRY.replace(old, new, 1))
    with pytest.raises(CatalogueError, match=message):
        load(path)


def test_docs_are_up_to_date():
    assert (ROOT / "docs" / "papers.md").read_text(encoding="utf-8") == catalogue.document(), (
        "Run: python -m actkit.catalogue > docs/papers.md"
    )


def test_the_catalogue_does_not_import_torch():
    code = "import sys, actkit.catalogue as c; c.papers(status='planned'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
