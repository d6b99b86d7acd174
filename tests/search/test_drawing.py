"""The pictures: every point and label is inside, whatever the numbers; and the words are escaped."""

from __future__ import annotations

import math
import random
import re
from xml.etree import ElementTree

import pytest
from made_up import around

from actkit.core.ground.estimate import Estimate
from actkit.core.page.axes import HEIGHT, WIDTH, ticks
from actkit.search.drawing import Bar, Mark, bars, points, scatter


def marks(count: int, spread: float) -> list[Mark]:
    draw = random.Random(count)
    kinds = ("original", "best", "front", "other")
    shares = [around(draw.random(), draw.choice([0.0, 0.3])) for _ in range(count)]
    losses = [around(spread * draw.random(), 0.1 * spread) for _ in range(count)]
    return [
        Mark(share, loss, kinds[min(i, 3)], str(i), f"<{i}>") for i, (share, loss) in enumerate(zip(shares, losses))
    ]


@pytest.mark.parametrize("limit", [0.0, 0.02, 0.5])
@pytest.mark.parametrize(("count", "spread"), [(0, 1.0), (1, 0.0), (13, 0.01), (13, 30.0), (4, 1e-9)])
def test_everything_is_inside(count, spread, limit):
    picture = ElementTree.fromstring(scatter(marks(count, spread), "bytes", limit))
    circles = picture.findall(".//circle") + picture.findall(".//polygon")
    assert len(circles) == count
    for circle in picture.findall(".//circle"):
        assert 0 <= float(circle.attrib["cx"]) <= WIDTH and 0 <= float(circle.attrib["cy"]) <= HEIGHT
    for text in picture.findall(".//text"):
        if "x" in text.attrib:
            assert 0 <= float(text.attrib["x"]) <= WIDTH and 0 <= float(text.attrib["y"]) <= HEIGHT
    assert not re.search("nan|inf", ElementTree.tostring(picture, "unicode").replace("interval", ""))


@pytest.mark.parametrize(("count", "spread"), [(1, 0.0), (2, 1.0), (15, 0.01), (15, 30.0)])
def test_points_and_their_intervals_are_inside(count, spread):
    given = [
        Mark(around(10 * m.share.value), around(m.loss.value - 5), m.kind, m.label, m.title)
        for m in marks(count, spread)
    ]
    picture = ElementTree.fromstring(points(given, "seconds", "score (%)"))
    assert len(picture.findall(".//circle") + picture.findall(".//polygon")) == count
    for circle in picture.findall(".//circle"):
        assert 0 <= float(circle.attrib["cx"]) <= WIDTH and 0 <= float(circle.attrib["cy"]) <= HEIGHT
    for text in picture.findall(".//text"):
        if "x" in text.attrib:
            assert 0 <= float(text.attrib["x"]) <= WIDTH and 0 <= float(text.attrib["y"]) <= HEIGHT
    assert "score (%)" in ElementTree.tostring(picture, "unicode")


def test_a_loss_far_beyond_the_limit_stands_at_the_edge_with_its_value():
    far = Mark(around(0.5), around(20.0), "other", "7", "far")
    picture = scatter([far, *marks(3, 0.01)], "bytes", 0.02)
    assert "7 ▲ 2000%" in picture


def test_unknown_intervals_have_no_bar_and_titles_are_escaped():
    mark = Mark(around(0.5), Estimate(0.01, -math.inf, math.inf), "other", "1", 'a <b> & "c"')
    picture = scatter([mark], "bytes", 0.02)
    assert 'class="interval"' not in picture and "<title>a &lt;b&gt; &amp; &quot;c&quot;</title>" in picture
    ElementTree.fromstring(bars([Bar("<dense>", Estimate(1.0, -math.inf, math.inf), "1 & 2")]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.023), (-0.004, 0.1), (0, 1234), (3, 3.0001)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and low - 1e-9 <= min(found) <= max(found) <= high + 1e-9
