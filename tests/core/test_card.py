"""The card of a saved model: its metadata come back through huggingface_hub, whatever names it holds."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_models import batches, build

import actkit
from actkit.core.ground.estimate import Estimate
from actkit.core.measure.evaluation import evaluate
from actkit.core.recipe.runner import apply
from actkit.core.store.card import Card, card_of, escape, measured_before
from actkit.core.store.checkpoint import load, read_manifest, save

HOSTILE = "a|b\n---\nlicense: x `c` <script> [d](e) *f* \\ ```` g: {h}"
METRICS = {
    "perplexity": Estimate(31.23456789, 30.1, 32.4),
    "perplexity_ratio": Estimate(1.01, -math.inf, math.inf),
    "kl": Estimate(math.nan, 0.0, 0.0),
}


def card(**given):
    fields = {"title": "t", "library": "actkit", "made": "Made.", "use": "x = 1", "metrics": METRICS, "data": "text"}
    return ModelCard(Card(**fields | given).text())


def test_measured_numbers_are_the_hubs_evaluation_results():
    data = card(base_model="swiglu", methods=["awq", "wina"]).data
    assert data.base_model == "swiglu" and data.library_name == "actkit" and data.pipeline_tag == "text-generation"
    assert data.tags == ["actkit", "awq", "wina"]
    found = {result.metric_type: result for result in data.eval_results}
    assert set(found) == {"perplexity", "perplexity_ratio"}  # what is not finite is left out
    assert found["perplexity"].metric_value == 31.2346 and found["perplexity"].dataset_name == "text"
    assert found["perplexity"].metric_name == "perplexity, 95 % interval [30.1, 32.4]"
    assert found["perplexity_ratio"].metric_name.endswith("[unknown]")


@pytest.mark.parametrize(
    "field", ["title", "data", "base_model", "machine", "methods", "notes", "use", "recipe", "rows"]
)
def test_no_name_breaks_out(field):
    """Metadata, table and code blocks are the same with a harmless name in the hostile one's place."""
    places = {
        "methods": lambda text: [text],
        "notes": lambda text: [text],
        "rows": lambda text: [(text, text)],
        "recipe": lambda text: [{text: {"where": text}}],
    }
    place = places.get(field, lambda text: text)
    hostile, harmless = card(**{field: place(HOSTILE)}), card(**{field: place("name")})
    assert set(hostile.data.to_dict()) == set(harmless.data.to_dict())
    assert hostile.data.get("license") is None and len(hostile.data.eval_results) == 2
    assert "<script>" not in hostile.text or field in ("use", "recipe")  # there it is inside a block of code
    rows = [line for line in hostile.text.splitlines() if line.startswith("|")]
    assert len(rows) == len([line for line in harmless.text.splitlines() if line.startswith("|")])
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    again = ModelCard(str(hostile))
    assert str(again) == str(hostile)
    if field == "title":
        assert again.data.model_name == HOSTILE


def test_escape_is_one_line():
    assert escape("a\n|b|") == "a \\|b\\|"


def test_saved_models_have_cards(tmp_path):
    """A plain model, a changed one with its evaluation, and one saved over it again."""
    plain = save(build("llama"), tmp_path / "plain")
    (plain / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nbase_model: other\n---\n# theirs\n")
    model = load(plain)
    apply(model, {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}, None, progress=False)
    measured = evaluate(model, batches("llama"), reference=load(plain), generation=False, resamples=20, progress=False)
    folder = save(model, tmp_path / "changed", evaluation=measured)
    found = ModelCard.load(folder / "README.md")
    assert (found.data.license, found.data.language, found.data.base_model) == ("mit", ["en"], "plain")
    values = {result.metric_type: result.metric_value for result in found.data.eval_results}
    expected = {name: float(f"{each.value:.6g}") for name, each in measured.quality.metrics.items()}
    assert values == expected and "perplexity" in values
    assert "```yaml" in found.text and str(tmp_path) not in found.content
    recipe = yaml.safe_load(found.text.split("```yaml\n")[1].split("```")[0])
    assert actkit.Recipe.parse(recipe).dump() == recipe
    before = measured_before(read_manifest(folder)["results"])
    assert before["metrics"] == measured.quality.metrics and before["data"] == measured.quality.data

    unmeasured = ModelCard.load(save(load(folder), tmp_path / "again") / "README.md")
    assert unmeasured.data.base_model == "plain"  # not "changed", from which it was loaded
    assert unmeasured.data.eval_results is None and "not measured" in unmeasured.text


def test_a_search_results_numbers_come_back():
    candidate = {"metrics": {"kl": {"value": 0.1, "low": None, "high": None}, "x": {"value": None}}}
    found = measured_before(json.loads(json.dumps({"candidate": candidate, "data": "test"})))
    assert found == {"metrics": {"kl": Estimate(0.1, -math.inf, math.inf)}, "data": "test"}
    assert measured_before({}) == {}


def test_a_plain_module_has_a_card():
    found = ModelCard(card_of(torch.nn.Linear(2, 2)).text())
    assert found.data.library_name == "actkit" and found.data.get("base_model") is None
