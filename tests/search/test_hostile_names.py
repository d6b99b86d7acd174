"""Names from a model, a recipe or a path reach the report, the figures and the card as text, never as markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import yaml
from made_up import a_speed, around, candidate, the_original
from torch import nn

from actkit.core.ground.machine import machine
from actkit.core.measure.summary import summarise
from actkit.core.recipe.proposals import LeftOut
from actkit.search.card import model_card
from actkit.search.profile import profile
from actkit.search.report import render
from actkit.search.results import Optimization
from actkit.search.speed_row import Row, SpeedRow
from actkit.search.verdict import Limits, decide

NAMES = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "</script></title></style></svg><svg onload=alert(3)>",
    "'onmouseover='alert(4)",
    "<a href=javascript:alert(5)>[x](javascript:alert(6))",
    "```\n<b>`|",
)
SVG = {"svg", "g", "line", "circle", "rect", "polygon", "polyline", "text", "title"}
PAGE = {"html", "head", "meta", "style", "body", "main", "header", "section", "div", "figure", "figcaption", "details"}
WORDS = {"h1", "h2", "h3", "p", "ul", "li", "dl", "dt", "dd", "pre", "code", "b", "i", "span", "small", "mark", "a"}
TABLE = {"table", "thead", "tbody", "tr", "th", "td", "summary", "label", "input", "button", "script"}
ALLOWED = SVG | PAGE | WORDS | TABLE
ATTRIBUTES = {
    *(
        "lang",
        "charset",
        "name",
        "content",
        "http-equiv",
        "class",
        "id",
        "style",
        "colspan",
        "href",
        "viewbox",
        "role",
        "aria-label",
        "aria-live",
        "tabindex",
        "scope",
        "type",
        "data-of",
        "data-label",
        "data-value",
    ),
    *("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "width", "height", "points", "transform", "text-anchor"),
}


class Markup(HTMLParser):
    """All elements, attributes, links and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.last = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links |= {value for name, value in attributes if name in ("href", "src")}
        self.words += [value for name, value in attributes if name == "aria-label"]
        self.last = tag

    def handle_data(self, data):
        (self.scripts if self.last == "script" else self.words).append(data)

    def handle_endtag(self, tag):
        self.last = ""


class Hostile(nn.Module):
    """Two layers and a ReLU under hostile names."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(NAMES[0], nn.Linear(8, 16))
        self.add_module(NAMES[1], nn.Linear(16, 16))
        self.add_module(NAMES[2], nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.children()
        return third(torch.relu(second(torch.relu(first(x)))))


Hostile.__name__ = NAMES[0]


@pytest.fixture(scope="module")
def found() -> Optimization:
    """A search of that model, with hostile names wherever a result holds a text."""
    torch.manual_seed(0)
    model = Hostile().eval()
    data = [torch.randn(6, 8)]
    seen = profile(model, data, progress=False)
    assert any(NAMES[0] in site.site for site in seen.sites)
    original = replace(the_original(), text=NAMES[5])
    recipe = [{"r_sparse": {"alpha": {NAMES[5]: 0.5, NAMES[0]: 0.5}, "sparsity": 0.5}}]
    tried = [
        replace(
            candidate(f"{index} {name}", disk=0.5),
            recipe=recipe,
            why=name,
            text=name,
            skipped=[[name, name, name]],
            notes=[name],
            coverage={name: 0.5},
            metrics={f"perplexity {name}": around(20.0)},
            density=0.5,
        )
        for index, name in enumerate(NAMES)
    ]
    tried[1] = replace(tried[1], failed=NAMES[1])
    tried[2] = replace(tried[2], speed_failed=NAMES[2], proof=replace(tried[2].proof, reason=NAMES[2]))
    tried[3] = replace(tried[3], speed=replace(a_speed(around(1.1)), engine="transformers", engine_reason=NAMES[3]))
    row = SpeedRow(10**9, 2 * 10**9, (Row(0.0, around(30.0), None, None, 1e9, NAMES[4]),), NAMES[2], 2, 16, 12, 5, 9.0)
    part = {"data": NAMES[4], "rows": 3, "tokens": 40, "fingerprint": "ab" * 32}
    verdict = decide(tried, original, Limits(0.02))
    assert verdict.best is not None
    return Optimization(
        name=NAMES[2],
        profile=seen,
        original=original,
        candidates=tuple(tried),
        left_out=tuple(LeftOut(name, name) for name in NAMES),
        front=("original", verdict.best),
        verdict=verdict,
        best=None,
        proof=tried[0].proof,
        speed_row=row,
        speed_row_note="",
        prompt=NAMES[0],
        coverage=tuple(summarise(model, data[0]).coverage),
        settings={"max_loss": 0.02, "max_recipes": 5, "threads": 1, "seed": 0, "dtype": NAMES[1], "data": NAMES[3]}
        | {"length": None, "batch_size": 4, "given_dtype": None, "target": None},
        data=dict.fromkeys(("calibration", "search", "test"), part),
        machine={**machine(), "processor": NAMES[0], "system": NAMES[1], "last_level_cache": None},
        versions={"actkit": NAMES[0]},
        notes=NAMES,
        seconds=1.0,
    )


def test_the_report_holds_no_element_attribute_or_link_of_theirs(found):
    page = Markup(render(found))
    assert page.tags <= ALLOWED and page.attributes <= ATTRIBUTES, (page.tags - ALLOWED, page.attributes - ATTRIBUTES)
    assert all(link.startswith("https://arxiv.org/abs/") for link in page.links)
    words = "".join(page.words)
    for name in NAMES:
        assert name in words, name  # shown as it is
    assert len(page.scripts) == 1 and not any(name in page.scripts[0] for name in NAMES)


def test_the_figure_holds_no_script_and_no_markup_of_theirs(found):
    figure = found.profile.figure()
    page = Markup(figure.to_html(include_plotlyjs=False))
    assert page.tags <= {"html", "head", "meta", "body", "div", "style", "script"}
    scripts = "".join(page.scripts)
    assert "alert(1)" in scripts and not any(name in scripts for name in NAMES)
    texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(figure.to_plotly_json(), default=str))
    assert any("&lt;script&gt;" in text for text in texts)
    assert not any("<" in text for text in texts)  # what plotly would read as its own small HTML


def test_the_card_is_markdown_with_names_as_text(found):
    best = found.candidate(found.verdict.best)
    _, front, body = model_card(found, best).split("---\n", 2)
    about = yaml.safe_load(front)
    assert (about["library_name"], about["base_model"]) == ("actkit", found.name)
    above, fence, rest = body.partition("\n````yaml\n")  # longer than any run of backticks in the recipe
    recipe, closing, below = rest.partition("\n````\n")
    assert fence and closing and not below
    assert yaml.safe_load(recipe)["transforms"] == [dict(entry) for entry in best.recipe]
    prose = re.sub(r"```python\n.*?```", "", above, flags=re.DOTALL)
    assert "<" not in prose and "](" not in prose.replace("\\]", "")
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
