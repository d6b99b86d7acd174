"""The page of a result: its script in a real browser, texts that stay texts, and what is refused."""

from __future__ import annotations

import pytest

from actkit.core.page.page import LARGEST, Context, Facts, Page, Picture, Pictures, Table
from actkit.core.page.pictures import signed_grid

HOSTILE = '</script><img src=x onerror="alert(1)"><b>&amp;'


def page(rows: int = 3) -> Page:
    values = [[1.0, -2.0, 0.0], [0.5, 0.25, 3.0]]
    grid = signed_grid(values, ["block 0", "block 1"], ["a", HOSTILE, "c"], "Effects")
    table = Table(
        "Features",
        ("feature", "share", "word"),
        [(index, 10.0 / (index + 1), f"word {index % 7}" if index else HOSTILE) for index in range(rows)],
        contexts=[[Context(("The ", HOSTILE, " end"), (0.0, 2.0, 1.0))] for _ in range(rows)],
    )
    facts = Facts("What", [("model", HOSTILE)])
    return Page(f"Title {HOSTILE}", "about", (facts, Pictures("Where", [Picture("grid", grid)]), table))


def opened(browser, path, given: Page):
    path.write_text(given.html(), encoding="utf-8")
    browser.get(path.as_uri())
    return browser


def column(browser, index: int) -> list[str]:
    script = "return [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden && r.cells.length > 1)"
    return browser.execute_script(f"{script}.map(r => r.cells[{index}].textContent)")


def test_sorting_filtering_and_contexts(browser, tmp_path):
    from selenium.webdriver.common.by import By

    opened(browser, tmp_path / "page.html", page(20))
    assert column(browser, 0) == [str(index) for index in range(20)]
    share = browser.find_elements(By.CSS_SELECTOR, "th button")[1]
    share.click()
    share.click()
    assert column(browser, 0) == [str(index) for index in reversed(range(20))]
    assert [head.get_attribute("aria-sort") for head in browser.find_elements(By.TAG_NAME, "th")] == [
        None,
        "ascending",
        None,
    ]
    browser.find_element(By.CSS_SELECTOR, "input").send_keys("WORD 3")
    assert column(browser, 0) == ["17", "10", "3"]
    assert browser.find_element(By.CSS_SELECTOR, ".shown").text == "3 of 20 rows"
    row = next(each for each in browser.find_elements(By.CSS_SELECTOR, "td .opens") if each.text.endswith("17"))
    row.click()
    context = browser.find_element(By.CSS_SELECTOR, ".context")
    assert context.text == f"The {HOSTILE} end" and row.get_attribute("aria-expanded") == "true"
    shades = [span.get_attribute("style") for span in context.find_elements(By.TAG_NAME, "span")]
    assert shades == ["", "--shade: 1;", f"--shade: {4 / 9};"]  # half of 9 is rounded to 4
    row.click()
    assert not browser.find_elements(By.CSS_SELECTOR, ".context")
    assert browser.get_log("browser") == []


def test_a_grid_is_read_by_pointer_and_by_keys(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    opened(browser, tmp_path / "page.html", page())
    pointed = browser.find_element(By.CSS_SELECTOR, ".pointed")
    cells = browser.find_elements(By.CSS_SELECTOR, "svg g")
    ActionChains(browser).move_to_element(cells[2]).perform()
    assert pointed.text == "block 0, c: 0"
    browser.execute_script("document.querySelector('.beside .scroll').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert pointed.text == "block 1, c: 3"
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert pointed.text == f"block 1, {HOSTILE}: 0.25"
    assert browser.get_log("browser") == []


def test_hostile_texts_stay_texts_and_nothing_is_wider_than_a_telephone(browser, tmp_path):
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    opened(browser, tmp_path / "page.html", page())
    assert not browser.execute_script("return document.querySelectorAll('img').length")
    assert browser.title == f"actkit: Title {HOSTILE}"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_needs_nothing_else():
    written = page().html()
    assert "http" not in written.replace("http-equiv", "") and "import " not in written
    assert len(page(2000).html()) < LARGEST


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="row 0 of 'T' has 1 cells for 2 columns"):
        Page("", "", [Table("T", ("a", "b"), [(1,)])]).html()
    with pytest.raises(ValueError, match="contexts for 1 of 2 rows"):
        Page("", "", [Table("T", ("a",), [(1,), (2,)], contexts=[[]])]).html()
    with pytest.raises(ValueError, match=r"page: it has 3\.1 MB"):
        Page("", "", [Facts("F", [("a", "x" * 3_100_000)])]).html()
