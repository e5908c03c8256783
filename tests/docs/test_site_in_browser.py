"""The site in a real browser: on a desk and on a phone, light and dark, by the keyboard, as a screen reader has it."""

import sys
from pathlib import Path

import axe_core_python
import pytest
import warm
from browser import WIDTHS
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

DOCS = Path(__file__).parents[2] / "docs"
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
VIOLATIONS = """
const done = arguments[0];
axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}).then(
    found => done(found.violations.map(v => [v.impact, v.id, v.nodes.length, v.nodes[0].html])));
"""
# What can be pressed and is on the page: in no closed menu, in no folded answer.
CONTROLS = """
return [...document.querySelectorAll("a[href], button, input, summary, [role=button]")].filter(e =>
    e.checkVisibility({visibilityProperty: true}) && e.getClientRects().length);
"""
FOCUSED = """
const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
return [e, style.outlineStyle != "none" && parseFloat(style.outlineWidth) >= 2, box.right > 0 && box.left < innerWidth];
"""
SAMPLE = ["index.html", "start.html", "learn/loss.html"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """Some pages, without the outputs of their cells."""
    out = tmp_path_factory.mktemp("sample")
    kept = {name.removesuffix(".html") + ".md" for name in [*SAMPLE, "learn/index.html"]}
    left_out = [str(page.relative_to(DOCS)) for end in ("md", "ipynb") for page in DOCS.rglob(f"*.{end}")]
    options = ["nb_execution_mode=off", "exclude_patterns=" + ",".join(["_build", *sorted({*left_out} - kept)])]
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", *(f"-D{option}" for option in options)]
    warm.run([*command, str(DOCS), str(out)], check=True)
    return out


def pages(site: Path) -> list[Path]:
    return [page for page in sorted(site.rglob("*.html")) if not {"_static", "_modules"} & set(page.parts)]


def show(browser, page: Path, width: int, colours: str = "light") -> None:
    """Nothing moves, so that what is seen is seen at once."""
    features = [
        {"name": "prefers-color-scheme", "value": colours},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.open(page, width)


def check(browser, page: Path) -> None:
    for width in WIDTHS:
        for colours in ("light", "dark"):
            show(browser, page, width, colours)
            browser.check()  # no sideways scrolling, no error, no request to a host, no broken picture
            browser.driver.execute_script(AXE)
            assert browser.driver.execute_async_script(VIOLATIONS) == [], f"{page.name}, {width}, {colours}"


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_page_fits_both_screens_in_both_colours_and_has_no_finding_of_axe(sample, browser, name):
    check(browser, sample / name)


@pytest.mark.long
def test_all_pages_fit_both_screens_in_both_colours_and_have_no_finding_of_axe(site, browser):
    assert len(pages(site)) > 40
    for page in pages(site):
        check(browser, page)


def press(browser, *keys: str) -> None:
    ActionChains(browser.driver).send_keys(*keys).perform()


def walk(browser) -> list:
    """What Tab comes to, in order; each with a visible mark, on the screen."""
    reached = []
    while len(reached) < 1000:
        press(browser, Keys.TAB)
        element, is_marked, is_on_screen = browser.js(FOCUSED)
        if element.tag_name == "body" or (reached and element == reached[0]):
            return reached
        assert is_marked, element.get_attribute("outerHTML")[:200]
        assert is_on_screen, element.get_attribute("outerHTML")[:200]
        reached.append(element)
    raise AssertionError("the keyboard does not come to an end")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_keyboard_reaches_all_that_can_be_pressed_and_shows_where_it_is(sample, browser, width):
    show(browser, sample / "learn/loss.html", width)
    controls = browser.js(CONTROLS)
    reached = walk(browser)
    assert len(controls) > 10
    missed = [each.get_attribute("outerHTML")[:200] for each in controls if each not in reached]
    assert not missed


def test_the_first_key_offers_to_skip_the_menu(sample, browser):
    show(browser, sample / "start.html", 1200)
    press(browser, Keys.TAB)
    link = browser.driver.switch_to.active_element
    assert link.text == "Skip to content"
    press(browser, Keys.ENTER)
    press(browser, Keys.TAB)
    inside = "return document.getElementById('furo-main-content').contains(document.activeElement)"
    assert browser.js(inside)


def test_the_menu_of_a_phone_opens_and_closes_by_the_keyboard(sample, browser):
    show(browser, sample / "start.html", 390)
    press(browser, Keys.TAB, Keys.TAB)
    button = browser.driver.switch_to.active_element
    assert (button.accessible_name, button.get_attribute("aria-expanded")) == ("Pages", "false")
    assert not browser.driver.find_element(By.CSS_SELECTOR, ".sidebar-drawer").is_displayed()
    press(browser, Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    inside = "return document.querySelector('.sidebar-drawer').contains(document.activeElement)"
    assert browser.js(inside)
    press(browser, Keys.ESCAPE)
    assert browser.driver.switch_to.active_element == button
    assert button.get_attribute("aria-expanded") == "false"


@pytest.mark.long
def test_a_folded_answer_opens_by_the_keyboard(sample, browser):
    show(browser, sample / "learn/loss.html", 390)
    answer = browser.driver.find_elements(By.TAG_NAME, "details")[-1]
    assert answer.get_attribute("open") is None
    summary = answer.find_element(By.TAG_NAME, "summary")
    while browser.driver.switch_to.active_element != summary:
        press(browser, Keys.TAB)
    press(browser, Keys.ENTER)
    assert answer.get_attribute("open") is not None
    assert answer.find_element(By.TAG_NAME, "p").is_displayed()
