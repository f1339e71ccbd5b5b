"""The page in a real browser; without Chromium, or playwright to drive it, the tests skip."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.evaluation.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is absent: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if not CHROMIUM:
    pytest.skip("no Chromium on the PATH: apt-get install chromium", allow_module_level=True)

CLASSES = {
    "classes": ["cat <b>", "dog", "fish"],
    "images": [10, 20, 50],
    "correct": {"dense": [9, 18, 40], "tome_r8": [9, 12, 41], "tome_r13": [8, 18, 10], "s2winc7_r16": [9, 18, 40]},
}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def report(tmp_path, make_rows):
    (tmp_path / "per_class.json").write_text(json.dumps(CLASSES))
    (tmp_path / "gallery").mkdir()
    Image.new("RGB", (1400, 400), "teal").save(tmp_path / "gallery" / "000_cat.png")
    rows = make_rows(model="vit_small_patch16_224.augreg_in21k_ft_in1k", reference_top1=0.81402)
    rows[3] |= {"schedule": "dense:1,local:6:r16:w2x2,global:5:r16", "kl": None}
    write_report(rows, tmp_path)
    return tmp_path / "report.html"


@pytest.fixture
def open_page(browser, report):
    """Return a function that opens the report in a window of a width; console output and requests are failures."""
    said, asked, contexts = [], [], []

    def open_page(width=1280):
        narrow = width < 500
        context = browser.new_context(viewport={"width": width, "height": 900}, has_touch=narrow, is_mobile=narrow)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("#chart .legend")
        contexts.append(context)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {report.as_uri()}


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def hover(page, line, point):
    """Point at a result, with the mouse or a finger; returns the lines of the text that appears."""
    page.locator("#chart").scroll_into_view_if_needed()
    box = page.locator("#chart .scatterlayer .trace").nth(line).locator(".point").nth(point).bounding_box()
    spot = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if page.evaluate("matchMedia('(pointer: coarse)').matches"):
        page.touchscreen.tap(*spot)
    else:
        page.mouse.move(*spot)
    name = page.evaluate(f"chart._fullData[{line}].hovertext[{point}]").split("<br>")[0].removeprefix("<b>")[:-4]
    page.wait_for_selector(f"#chart .hovertext tspan.line >> text='{name}'")
    return page.locator("#chart .hovertext tspan.line").all_text_contents()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("#chart", "#rows", ".gallery .box", "#classes .box", "select >> nth=0"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] >= 0, selector
        assert box["x"] + box["width"] <= width, selector
    # The names of the lines are below the axis title, and within the chart, whatever is drawn.
    for axis in ("gmacs", "speedup"):
        page.select_option("#x", axis)
        title, legend, chart = (page.locator(selector).bounding_box() for selector in (".xtitle", ".legend", "#chart"))
        assert title["y"] + title["height"] <= legend["y"]
        assert legend["y"] + legend["height"] <= chart["y"] + chart["height"]
        assert page.evaluate("chart._fullLayout._size.h") > 200


@pytest.mark.parametrize("width", [1280, 390])
def test_pointing_at_a_result_shows_its_row(open_page, width):
    page = open_page(width)
    titles = texts(page, "#rows th")
    for line, point, row in [(0, 0, 0), (1, 0, 2), (1, 1, 1), (2, 0, 3)]:
        cells = page.locator("#rows tbody tr").nth(row).locator("td").all_inner_texts()
        expected = [cells[0], *(f"{title}: {cell}" for title, cell in zip(titles[1:], cells[1:], strict=True))]
        assert hover(page, line, point) == expected


def test_no_button_sends_the_data_away(open_page):
    buttons = open_page().locator("#chart .modebar-btn")
    titles = buttons.evaluate_all("(buttons) => buttons.map((button) => button.dataset.title)")
    assert len(titles) == 4
    assert titles[1:] == ["Zoom", "Pan", "Reset axes"]
    assert titles[0].startswith("Download")


def drawn(page):
    """Return what the chart shows: {line: [(x, y)]} of the visible lines."""
    lines = page.evaluate("chart._fullData.map((line) => [line.name, line.x, line.y])")
    return {name: list(zip(x, y, strict=True)) for name, x, y in lines}


def test_axes_are_chosen(open_page):
    page = open_page()
    assert texts(page, "#x option") == [
        "GMACs an image (fewer is cheaper)",
        "images/s (model alone)",
        "speed-up over dense",
        "tokens after the last layer",
    ]
    np.testing.assert_allclose(drawn(page)["tome"], [(2.7, 85), (3.4, 88)])
    assert "published (Heo et al., digitised)" in drawn(page)
    colours = page.evaluate("chart._fullData.map(({ line, marker }) => [line.color, marker.color])")
    assert colours[:3] == [["#000000"] * 2, ["#0072b2"] * 2, ["#d55e00"] * 2]
    page.select_option("#x", "speedup")
    page.select_option("#y", "drop")
    assert page.locator(".xtitle").text_content() == "speed-up over dense"
    assert page.locator(".ytitle").text_content() == "points of top-1 lost"
    now = drawn(page)
    assert list(now) == ["dense", "tome", "dense:1,local:6:r:w2x2,global:5:r"]  # nobody published speed-ups
    np.testing.assert_allclose(now["tome"], [(1.3, 2), (1.7, 5)])
    page.select_option("#y", "kl")
    assert drawn(page)["dense:1,local:6:r:w2x2,global:5:r"] == []  # not measured


def test_a_heading_sorts(open_page):
    page = open_page()

    def schedules():
        return [name.split(":")[0] if ":" in name else name for name in texts(page, "#rows tbody td:first-child")]

    page.click("#rows th:has-text('GMACs') button")
    assert schedules() == ["dense", "tome_r8", "tome_r13", "dense"]
    assert page.locator("#rows th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.click("#rows th:has-text('GMACs') button")
    assert schedules() == ["dense", "tome_r13", "tome_r8", "dense"]
    assert texts(page, "#rows tbody td:first-child")[0] == "dense:1,local:6:r16:w2x2,global:5:r16"
    page.click("#rows th:has-text('KL') button")
    assert texts(page, "#rows tbody td:first-child")[:3] == ["tome_r13", "tome_r8", "dense"]
    page.click("#rows th:has-text('KL') button")  # rows without a measurement stay last
    assert texts(page, "#rows tbody td:first-child")[:3] == ["dense", "tome_r8", "tome_r13"]
    page.click("#rows th:has-text('schedule') button")
    assert texts(page, "#rows tbody td:first-child")[:2] == ["tome_r13", "tome_r8"]  # 13 is more than 8


def test_classes_that_lose(open_page):
    page = open_page()
    # The schedule that loses most is shown first.
    assert page.locator("#schedule option:checked").inner_text() == "tome_r13"
    assert page.inner_text("#told") == "2 of 3 classes lose, 0 gain, the others have as many right as dense."
    rows = [row.split("\t") for row in texts(page, "#hurt tr")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["fish", "-60.0", "10", "40", "50"],
        ["cat <b>", "-10.0", "8", "9", "10"],
    ]
    page.select_option("#schedule", label="tome_r8")
    assert page.inner_text("#told") == "1 of 3 classes lose, 1 gain, the others have as many right as dense."
    assert texts(page, "#hurt td:first-child") == ["dog"]
    bar, cell = (page.locator(f"#hurt {part}").first.bounding_box() for part in (".bar", "td:nth-child(2)"))
    assert 10 < bar["width"] < cell["width"]
    page.select_option("#schedule", label="s2winc7_r16")
    assert page.inner_text("#told").startswith("0 of 3 classes lose, 0 gain")
    assert not page.locator("#losing").is_visible()


def test_pictures_are_shown(open_page):
    page = open_page(390)
    image = page.locator(".gallery img")
    assert image.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [1400, 400]
    assert image.bounding_box()["width"] > 390  # wide enough to see something: it scrolls inside its box
    page = open_page(1280)
    image, box = page.locator(".gallery img"), page.locator(".gallery .box")
    assert image.bounding_box()["width"] <= box.bounding_box()["width"]
    image.click()
    assert image.bounding_box()["width"] == 1400
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    image.click()
    assert image.bounding_box()["width"] <= box.bounding_box()["width"]
