"""The report in a real browser: the front is read out, the table sorted, and a telephone shows all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up import candidate, the_original
from torch import nn

from actkit.core.ground.machine import machine
from actkit.core.measure.summary import summarise
from actkit.search.profile import profile
from actkit.search.report import render
from actkit.search.results import Optimization
from actkit.search.verdict import Limits, decide


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a search with made-up numbers: 1 is slower and smaller, 2 pays, 3 loses too much, 4 failed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [torch.randn(6, 8)]
    original = replace(the_original(), reads={"float32": 1000.0}, text="went on.")
    tried = [
        candidate("small", 0.001, disk=0.5, ratio=(0.7, 0.8), read=0.5, reads={"8 bits": 400.0, "float32": 100.0}),
        candidate("fast", 0.004, ratio=(1.4, 1.6), disk=0.8, memory=0.9, text="went elsewhere."),
        candidate("worse", 0.03, ratio=(1.1, 1.2), disk=0.7),
        candidate("broken", failed="RuntimeError: no"),
    ]
    verdict = decide(tried, original, Limits(0.02))
    part = {"data": "numbers", "rows": 3, "tokens": 40, "fingerprint": "ab" * 32}
    result = Optimization(
        name="made up",
        profile=profile(model, data, progress=False),
        original=original,
        candidates=tuple(tried),
        left_out=(),
        front=("original", "small", "fast"),
        verdict=verdict,
        best=None,
        proof=None,
        speed_row=None,
        speed_row_note="",
        prompt="It ",
        coverage=tuple(summarise(model, data[0]).coverage),
        settings={"max_loss": 0.02, "max_recipes": 5, "threads": 1, "seed": 0, "dtype": "float32", "data": None}
        | {"length": None, "batch_size": 4, "given_dtype": None, "target": None},
        data=dict.fromkeys(("calibration", "search", "test"), part),
        machine={**machine(), "last_level_cache": None},
        versions={"actkit": "0"},
        notes=(),
        seconds=1.0,
    )
    assert verdict.best == "fast"
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(render(result), encoding="utf-8")
    return path


def names(browser) -> list[str]:
    rows = "[...document.querySelectorAll('.cards tbody tr')].filter(row => !row.hidden)"
    return browser.execute_script(f"return {rows}.map(row => row.cells[1].firstChild.textContent.trim())")


def test_the_front_is_read_out_by_pointer_and_keys_and_opens_the_details(browser, report):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    browser.get(report.as_uri())
    pointed = browser.find_element(By.CSS_SELECTOR, "#front .pointed")
    picture = browser.find_element(By.CSS_SELECTOR, "#front svg")
    point = picture.find_element(By.CSS_SELECTOR, "[data-of='candidate-2'] circle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    assert pointed.text == (
        "2. fast: loss 0.40% (0.30% to 0.50%); 1.50x (1.40 to 1.60) as fast; 90% of the peak memory; 80% of the disk; "
        "100% of the bytes read per token; [{rtn: {bits: 8, group_size: -1}}]"
    )
    marked = browser.find_elements(By.CSS_SELECTOR, ".at")
    assert {each.tag_name for each in marked} == {"g", "tr"}  # in all pictures, and in the table
    browser.execute_script("document.querySelector('#front [tabindex]').focus()")
    keys = browser.switch_to.active_element
    keys.send_keys(Keys.ARROW_RIGHT)
    assert not pointed.text.startswith("2. fast")
    keys.send_keys(Keys.ARROW_LEFT)
    assert pointed.text.startswith("2. fast")
    keys.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "candidate-2").is_displayed()
    assert browser.get_log("browser") == []


def test_the_table_sorts_by_what_was_measured_and_what_was_not_stands_last(browser, report):
    from selenium.webdriver.common.by import By

    browser.get(report.as_uri())
    assert names(browser) == ["original", "small", "fast", "worse", "broken"]
    heads = {
        each.text.removesuffix(" ↕"): each for each in browser.find_elements(By.CSS_SELECTOR, "#candidates th button")
    }
    heads["speed"].click()
    assert names(browser) == ["fast", "worse", "original", "small", "broken"]
    heads["speed"].click()
    assert names(browser) == ["small", "original", "worse", "fast", "broken"]
    browser.find_element(By.CSS_SELECTOR, "#candidates input").send_keys("fast")
    assert names(browser) == ["fast"]
    assert browser.get_log("browser") == []


def test_the_bytes_of_a_token_stand_by_what_multiplies_them(browser, report):
    from selenium.webdriver.common.by import By

    browser.get(report.as_uri())
    parts = browser.find_elements(By.CSS_SELECTOR, "#bytes svg g title")
    assert [each.get_attribute("textContent") for each in parts] == [
        "original, float32: 1 KB, 100% of its bytes",
        "small, 8 bits: 400 B, 80% of its bytes",
        "small, float32: 100 B, 20% of its bytes",
    ]


def test_a_telephone_shows_every_column(browser, report):
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    browser.get(report.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    cells = "[...document.querySelectorAll('.cards td')].map(each => each.getBoundingClientRect())"
    assert browser.execute_script(f"return {cells}.every(each => each.left >= 0 && each.right <= 390)")
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
