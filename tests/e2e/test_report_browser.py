"""The page in a browser, from the disk: it works, asks nobody, and fits a telephone.

PARITY_SCREENSHOTS=DIR keeps what the browser showed.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parity.report import html
from parity.report.changes import changes
from parity.report.changes_page import write_changes
from parity.report.contrast import write_contrast
from parity.report.invariance import write_invariance
from tests.conftest import ROOT
from tests.engine_example import contrast, invariance
from tests.report_example import everything, hostile, large, matching

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """A page that was opened from the disk, and what the tests ask of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, scheme: str = "light", width: int = 1280, anchor: str = "") -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + anchor)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def cell(self, site: str) -> Any:
        return next(c for c in self.all(".grid button") if c.get_attribute("aria-label").startswith(f"{site}:"))

    def requests(self) -> list[str]:
        """What the page asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def errors(self) -> list[str]:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def shoot(self, name: str, height: int = 900) -> None:
        if folder := os.environ.get("PARITY_SCREENSHOTS"):
            clip = {"x": 0, "y": 0, "width": self.js("return innerWidth"), "height": height, "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip} if height > 900 else {}
            shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", **options})
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.get("about:blank")  # what the browser starts with must be over before a test listens
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pages")
    for make in (everything, hostile):
        (where / f"{make.__name__}.html").write_text(html.render(make()), encoding="utf-8")
    return where


@pytest.fixture
def page(browser: Browser, folder: Path) -> Browser:
    browser.open(folder / "everything.html")
    return browser


@pytest.mark.parametrize("name", ["everything", "hostile"])
def test_no_error_and_no_request(browser: Browser, folder: Path, name: str) -> None:
    browser.requests(), browser.errors()
    browser.open(folder / f"{name}.html")
    for button in browser.all(".grid button"):
        browser.js("arguments[0].click()", button)
        assert browser.find("#site h3").text
    browser.find("input[type=search]").send_keys("norm")
    asked = [url for url in browser.requests() if not url.startswith(("about:", "data:"))]
    assert asked == [(folder / f"{name}.html").as_uri()]
    assert browser.errors() == []
    assert browser.js("return document.querySelectorAll('script').length") == 2


def test_a_cell_opens_the_details_of_its_site(page: Browser) -> None:
    cell = page.cell("model.layers.1.self_attn.q_rope")
    cell.click()
    panel = page.find("#site")
    assert page.find("#site h3").text == "model.layers.1.self_attn.q_rope"
    assert "wrong" in panel.text
    assert "12345" in panel.text
    assert "bfloat16" in panel.text
    assert "transposed (token, head, head_dim)" in panel.text
    assert len(page.all("#site svg.bars")) == 2, "by token and by head"
    assert len(page.all("#site svg.bars")[0].find_elements("css selector", "rect")) == 8
    assert cell.get_attribute("aria-pressed") == "true"
    page.find("#site .close").click()
    assert "Choose a cell" in page.find("#site").text


def test_the_details_hold_a_histogram_of_the_local_error(page: Browser) -> None:
    page.cell("model.layers.1.self_attn.q_rope").click()
    assert "both on the candidate's inputs" in page.find("#site").text
    rows = [row.text.split(maxsplit=1) for row in page.all("#site .ulps tr")]
    assert rows == [["0", "93.8 %"], ["1", "4.69 %"], ["2", "1.41 %"], ["3–4", "0.16 %"]]
    widths = [bar.rect["width"] for bar in page.all("#site .ulps rect")]
    assert widths == pytest.approx([widths[0] * n / 600 for n in (600, 30, 9, 1)], abs=1)
    assert widths[0] > 100
    assert "of 640 values" in page.find("#site").text


def test_without_a_histogram_the_details_say_why(browser: Browser, tmp_path: Path) -> None:
    run = everything()
    old = tmp_path / "old.html"
    sites = tuple(dataclasses.replace(m, ulps=None) for m in run.sites)
    old.write_text(html.render(dataclasses.replace(run, sites=sites)), encoding="utf-8")
    for site, words in (
        ("model.embed_tokens", "All values are equal."),
        ("model.norm", "Not recorded."),
        ("model.layers.1.mlp.act_fn", None),
    ):
        browser.open(old)
        browser.cell(site).click()
        assert [p.text for p in browser.all("#site p.none")] == ([words] if words else [])
        assert not browser.all("#site .ulps")


def test_an_unmeasured_cell_says_why(page: Browser) -> None:
    page.cell("model.layers.1.mlp.act_fn").click()
    assert "shape (8, 3) does not fit token=8 feature=4" in page.find("#site").text


def test_a_finding_leads_to_its_worst_site(page: Browser) -> None:
    page.find("#finding-1 a[data-site]").click()
    assert page.find("#site h3").text == "model.layers.1.self_attn.q_rope"


def test_the_worst_site_of_the_first_finding_is_open_from_the_start(browser: Browser, folder: Path) -> None:
    browser.open(folder / "everything.html")
    assert browser.find("#site h3").text == "model.layers.1.self_attn.q_rope"
    assert browser.js("return scrollY") == 0
    browser.open(folder / "everything.html", width=400)
    assert browser.find("#site h3").text == "model.layers.1.self_attn.q_rope"
    legend = browser.find("#map .legend").rect
    panel, table = browser.find("#site").rect, browser.find(".map .scroll").rect
    assert table["y"] + table["height"] <= panel["y"] <= legend["y"], "below the map, over nothing"
    browser.cell("model.norm").click()
    assert browser.js("return getComputedStyle(document.getElementById('site')).position") == "fixed"


def test_the_names_of_layers_stay_where_the_map_scrolls(browser: Browser) -> None:
    browser.open(ROOT / "reports" / "example" / "index.html", width=400)
    assert browser.js("const s = document.querySelector('.map .scroll'); s.scrollLeft = 120; return s.scrollLeft") > 40
    left = "return document.querySelector(arguments[0]).getBoundingClientRect().left"
    edge = browser.js(left, ".map .scroll")
    for corner in (".grid thead th", ".grid tbody th"):
        assert abs(browser.js(left, corner) - edge) < 2, corner


def test_an_address_leads_to_a_site(browser: Browser, folder: Path) -> None:
    browser.open(folder / "everything.html", anchor="#site-2")
    assert browser.find("#site h3").text == everything().sites[2].site


def test_the_keyboard_is_enough(page: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    focused = "return document.activeElement.getAttribute('aria-label').split(':')[0]"
    assert len(page.all(".grid button[tabindex='0']")) == 1
    first = page.find(".grid button[tabindex='0']")
    page.js("arguments[0].focus()", first)
    assert page.js(focused) == "model.embed_tokens"
    for key, site in (
        (Keys.ARROW_DOWN, "model.layers.0.input_layernorm"),
        (Keys.ARROW_RIGHT, "model.layers.0.self_attn.q_rope"),
        (Keys.ENTER, "model.layers.0.self_attn.q_rope"),
        (Keys.ARROW_DOWN, "model.layers.1.self_attn.q_rope"),
        (Keys.ARROW_LEFT, "model.layers.1.input_layernorm"),
        (Keys.ARROW_LEFT, "model.layers.1.input_layernorm"),
    ):
        page.driver.switch_to.active_element.send_keys(key)
        assert page.js(focused) == site
    assert page.find("#site h3").text == "model.layers.1.input_layernorm"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.all("#site h3") == []
    assert page.js(focused) == "model.layers.1.input_layernorm"


def labels(page: Browser) -> list[str]:
    return [row.text for row in page.all("#rows tbody th") if row.is_displayed()]


def test_rows_are_sorted(page: Browser) -> None:
    everyone = ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
    assert labels(page) == everyone
    ratio = next(b for b in page.all("#rows thead button") if b.text == "ratio")
    ratio.click()
    assert labels(page) == ["embed_tokens", "lm_head", "norm", "layers.0", "layers.1"]
    ratio.click()
    assert labels(page) == ["layers.1", "layers.0", "norm", "lm_head", "embed_tokens"]
    assert page.find("#rows th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.find("#rows thead button").click()
    assert labels(page) == everyone


def test_rows_are_filtered(page: Browser) -> None:
    page.find("#filter input[type=checkbox]").click()
    assert labels(page) == ["layers.0", "layers.1"]
    page.find("#filter input[type=search]").send_keys("NonFinite")
    assert labels(page) == ["layers.1"]
    assert page.find("#filter output").text == "1 of 5 rows"


def test_it_is_read_without_javascript(browser: Browser, folder: Path) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(folder / "everything.html")
        assert browser.find("h1").is_displayed()
        assert browser.find(".finding .fix").is_displayed()
        assert "need JavaScript" in browser.find("#site").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


CONTRAST = """
const light = (c) => { const v = c / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const parse = (s) => s.match(/[\\d.]+/g).map(Number);
const lum = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
};
return [...document.querySelectorAll(arguments[0])].map((e) => {
  const a = lum(parse(getComputedStyle(e).color)), b = lum(ground(e));
  return [e.className || e.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_can_be_read(browser: Browser, scheme: str, width: int) -> None:
    browser.open(ROOT / "reports" / "example" / "index.html", scheme, width)
    assert browser.js("return document.documentElement.scrollWidth") <= width, "no sideways scroll of the page"
    browser.shoot(f"top-{scheme}-{width}")
    browser.find("#finding-1 a[data-site]").click()
    browser.shoot(f"map-{scheme}-{width}")
    browser.shoot(f"page-{scheme}-{width}", height=1880)
    assert browser.js("return document.documentElement.scrollWidth") <= width
    box = browser.find("#site").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    ground = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(250, 250, 248)", "dark": "rgb(20, 23, 26)"}[scheme]
    for selector, least in ((".badge, p, dd, dt, h1, h2, li, .grid .v-wrong, a, td", 4.5), (".grid button", 3.0)):
        poor = [(name, ratio) for name, ratio in browser.js(CONTRAST, selector) if ratio < least]
        assert not poor, poor[:5]


@pytest.mark.parametrize("width", [1280, 400])
def test_pages_of_engines_fit_and_can_be_read(browser: Browser, width: int, tmp_path: Path) -> None:
    pages = (write_contrast(contrast(), tmp_path / "engines"), write_invariance(invariance(), tmp_path / "invariance"))
    for page in pages:
        browser.open(page, "dark" if width < 600 else "light", width)
        assert browser.js("return document.documentElement.scrollWidth") <= width, "no sideways scroll of the page"
        browser.shoot(f"{page.parent.name}-{width}", height=2000)
        poor = [
            (name, ratio)
            for name, ratio in browser.js(CONTRAST, ".badge, p, dd, dt, h1, h2, li, a, td, th")
            if ratio < 4.5
        ]
        assert not poor, poor[:5]
        assert browser.errors() == []
    browser.open(pages[0], width=width)
    first, second = (card.rect for card in browser.all(".sides article"))
    assert (first["y"] == second["y"]) == (width == 1280), "side by side, or below each other on a telephone"


def test_a_command_and_a_fix_can_be_copied(page: Browser) -> None:
    # What a click gives to the clipboard; the clipboard of a machine without a screen keeps nothing.
    page.js("window.kept = []; navigator.clipboard.writeText = async (text) => { window.kept.push(text); }")
    texts = ["read rope_theta from config.json", everything().environment.command]
    for place in (".fix .copy", ".command .copy"):
        page.find(place).click()
    assert page.js("return window.kept") == texts


def test_words_are_explained_where_they_stand(page: Browser) -> None:
    word = page.find(".finding .size .word")
    assert word.text == "floor"
    meaning = page.find("#word-floor")
    assert not meaning.is_displayed()
    word.click()
    assert meaning.is_displayed()
    assert "rounding error" in meaning.text
    assert {each.get_attribute("popovertarget") for each in page.all(".word")} <= {
        each.get_attribute("id") for each in page.all(".meaning")
    }


def test_a_finding_shows_where_its_error_lies(page: Browser) -> None:
    figure = page.find("#finding-1 .residual")
    assert "worst tokens: 3 (500x)" in figure.text
    assert "0–" not in figure.text
    assert [row.text.split()[0] for row in figure.find_elements("css selector", "tr")] == ["0", "1", "2", "3–4"]


def test_the_chart_fits_a_telephone(browser: Browser, folder: Path) -> None:
    for width, shown in ((1280, "wide"), (400, "narrow")):
        browser.open(folder / "everything.html", width=width)
        (chart,) = [each for each in browser.all("svg.depth") if each.is_displayed()]
        assert shown in chart.get_attribute("class")
        assert chart.rect["width"] <= width


AXE = Path(os.environ.get("PARITY_AXE") or ROOT / "node_modules" / "axe-core" / "axe.min.js")
VIOLATIONS = """
const done = arguments[0];
axe.run(document, {resultTypes: ["violations"]}).then((found) =>
  done(found.violations.map((v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html])));
"""


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there: npm install --no-save axe-core")
def test_axe_finds_nothing(browser: Browser, folder: Path, tmp_path: Path) -> None:
    sides = matching(), everything()
    changed = write_changes(sides, changes(*sides), tmp_path)
    code = AXE.read_text(encoding="utf-8")
    for path in (folder / "everything.html", folder / "hostile.html", changed):
        for width, scheme in ((1280, "light"), (400, "dark")):
            browser.open(path, scheme, width)
            browser.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": code})
            assert browser.driver.execute_async_script(VIOLATIONS) == [], (path.name, width, scheme)


def test_a_large_page_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(html.render(large(64, 20)), encoding="utf-8")
    browser.open(path)
    timing = "const t = performance.getEntriesByType('navigation')[0]; return t.domContentLoadedEventEnd"
    assert browser.js(timing) < 3000
    assert len(browser.all(".grid button")) == 1280
