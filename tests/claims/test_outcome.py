"""Claims are run, judged and recorded: structure, errors, and evidence that agrees with the conditions in the code."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import FrozenInstanceError

import pytest
from rich.console import Console

from actkit import catalogue, claims
from actkit.catalogue import CatalogueError, paper
from actkit.claims import Outcome, Statement, reproduce, slugs
from actkit.claims.outcome import Finding, conduct

TRUE = Statement("The earth is round", "r = 6371 km", "the ratio of two radii is between 0.99 and 1.01")
FALSE = Statement("Two is [at least] three", "no figure", "2 >= 3")


def outcome(slug: str = "wina") -> Outcome:
    experiments = [(TRUE, lambda: Finding("0.997", True)), (FALSE, lambda: Finding("2 < 3", 2 >= 3))]
    return conduct(slug, experiments, [0, 1], progress=False)


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """A folder of evidence of its own, and claims of wina that take no time."""
    folder = tmp_path / "evidence"
    monkeypatch.setattr(catalogue, "EVIDENCE", folder)
    monkeypatch.setattr("actkit.claims.wina.run", lambda progress: outcome())
    return folder


def test_an_outcome_says_what_was_found_and_where():
    found = outcome()
    assert [claim.passed for claim in found.claims] == [True, False]
    assert not found.passed
    content = found.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert set(content) == {"slug", "claims", "seeds", "seconds", "machine", "versions", "date"}
    assert all(set(claim) == {"statement", "paper", "here", "condition", "passed"} for claim in content["claims"])
    assert content["seeds"] == [0, 1] and content["seconds"] >= 0 and content["versions"]["torch"]
    with pytest.raises(FrozenInstanceError):
        found.slug = "awq"  # type: ignore[misc]


def test_the_table_shows_every_claim_with_its_verdict():
    console = Console(file=io.StringIO(), width=200)
    console.print(outcome().table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("claim", "paper", "here", "pass", "1 of 2 claims hold", "Two is [at least] three", "2 >= 3", "no"):
        assert part in text


def test_an_experiment_that_breaks_is_no_outcome():
    with pytest.raises(ZeroDivisionError):
        conduct("wina", [(TRUE, lambda: Finding("", bool(1 / 0)))], [0], progress=False)


def test_without_record_nothing_is_written(evidence):
    assert reproduce("wina", progress=False).slug == "wina"
    assert not evidence.exists()


def test_a_record_is_the_evidence_of_the_catalogue(evidence):
    found = reproduce("wina", record=True, progress=False)
    assert [path.name for path in evidence.iterdir()] == ["wina.json"]
    entry = paper("wina")
    assert entry.evidence == found.to_dict()
    assert (entry.status, entry.passed, entry.failed) == ("working", 1, 1)


def test_a_run_that_dies_leaves_the_old_record_whole(evidence, monkeypatch):
    reproduce("wina", record=True, progress=False)
    before = (evidence / "wina.json").read_bytes()

    def die(file: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(OSError, match="no space"):
        reproduce("wina", record=True, progress=False)
    assert [path.name for path in evidence.iterdir()] == ["wina.json"]
    assert (evidence / "wina.json").read_bytes() == before


def test_an_unknown_slug_names_the_catalogue():
    with pytest.raises(CatalogueError, match=r"'winaa' is not in the catalogue.*wina"):
        reproduce("winaa")


def test_a_paper_without_claims_names_those_that_have_some():
    with pytest.raises(CatalogueError, match=r"'kat'.*catalogue.*not built.*wina, awq"):
        reproduce("kat")
    with pytest.raises(CatalogueError, match="not in the catalogue"):
        reproduce("outcome")  # a module of the package, but no paper


def test_a_record_that_could_not_be_written_is_refused_before_the_run(evidence, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("actkit.claims.wina.run", lambda progress: pytest.fail("the claims ran"))
    with pytest.raises(PermissionError, match="without record"):
        reproduce("wina", record=True)


def test_papers_with_claims():
    sparsity = ["active-dendrites", "cats", "lazy-neuron", "prosparse", "r-sparse", "spark", "sparsing-law", "wina"]
    assert slugs() == [*sparsity, "awq"]  # in the order of the catalogue: sparsity before quantization
    for slug in slugs():
        module = importlib.import_module(f"actkit.claims.{slug.replace('-', '_')}")
        statements = [each.statement for each in module.STATEMENTS]
        assert len(set(statements)) == len(statements)
        assert all(each.paper and each.condition for each in module.STATEMENTS)


@pytest.mark.parametrize("slug", slugs())
def test_the_recorded_evidence_is_of_the_claims_in_the_code(slug):
    entry = paper(slug)
    recorded = entry.evidence
    assert recorded is not None, f"run: actkit reproduce {slug} --record"
    module = importlib.import_module(f"actkit.claims.{slug.replace('-', '_')}")
    texts = [(claim["statement"], claim["paper"], claim["condition"]) for claim in recorded["claims"]]
    assert texts == [(each.statement, each.paper, each.condition) for each in module.STATEMENTS]
    assert all(type(claim["passed"]) is bool and claim["here"] for claim in recorded["claims"])
    assert tuple(recorded["seeds"]) == module.Sizes().seeds
    assert recorded["seconds"] > 1 and recorded["machine"]["processor"] and recorded["versions"]["python"]
    assert entry.status == "working"
    assert claims.slugs().count(slug) == 1
