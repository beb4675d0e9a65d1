"""A page that is open while its study is watched, in a real Chromium whose clock the tests move."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from recorded import adder
from tools import start_chromium

from normlab import report
from normlab.report.render.html.live import as_still
from normlab.report.write import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow
FIRST, SECOND = "2026-01-01T12:00:00.000000+00:00", "2026-01-01T12:01:00.000000+00:00"
LONG = 120  # seconds after which a page that loads itself again has done so


class Live(NamedTuple):
    """The window in which the page of a study under way is open, and the page's file."""

    window: Any
    page: Path

    def passes(self, seconds: float = LONG) -> bool:
        """Whether the page loads itself again in that time."""
        self.window.evaluate("window.mine = true")
        for _ in range(round(seconds / 5)):
            self.window.clock.fast_forward(5_000)
            if not self.window.evaluate("window.mine"):
                self.window.wait_for_load_state()
                return True
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        chromium = start_chromium(tool)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("live") / "outputs"
    add = adder(outputs)
    for norm in ("bn", "none", "gn", "in"):
        for batch in (8, 32):
            for seed in (0, 1):
                add(norm, batch, seed, (0.5, 0.6, 0.7 + (seed + len(norm)) / 100))
    write_report("study", outputs, report.options(), FIRST)
    return outputs


@pytest.fixture
def live(browser, outputs, tmp_path) -> Iterator[Live]:
    page = tmp_path / "index.html"
    page.write_bytes((outputs / "study" / "report" / "index.html").read_bytes())
    context = browser.new_context(viewport={"width": 1280, "height": 800}, timezone_id="UTC", locale="en-GB")
    window = context.new_page()
    complaints: list[str] = []
    window.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.set_default_timeout(10_000)
    window.clock.install()
    window.goto(page.as_uri())
    yield Live(window, page)
    context.close()
    assert complaints == []


def test_it_shows_the_new_state_and_is_as_its_reader_left_it(live, outputs, tmp_path) -> None:
    window = live.window
    assert window.locator("p.live time").inner_text() == "01/01/2026, 12:00:00"
    table = window.locator("#table-accuracy")
    hidden = window.locator("figure .key", has_text="none").first
    hidden.click()
    for _ in range(2):
        table.locator("th button.sort").nth(2).click()
    window.locator("#theme").click()
    table.locator("input").fill("n")
    opened, shut = window.locator("#more > details").all()[1:3]
    opened.locator("summary").first.click()
    shut.locator("summary").first.click()
    shut.locator("summary").first.click()
    names = [each.get_attribute("id") for each in (opened, shut)]
    theme = window.evaluate("document.documentElement.dataset.theme")
    table.locator("input").focus()
    window.evaluate("document.getElementById('runs').scrollIntoView()")
    window.evaluate("scrollBy(0, -200)")
    offset = "document.getElementById('runs').getBoundingClientRect().top"
    before = window.evaluate(offset)
    assert before > 100

    shutil.copytree(outputs / "study", tmp_path / "study")
    for seed in (0, 1):
        adder(tmp_path)("renorm", 8, seed, (0.5, 0.6, 0.75))
    write_report("study", tmp_path, report.options(), SECOND).page.replace(live.page)
    assert live.passes()
    assert window.locator("p.live time").inner_text() == "01/01/2026, 12:01:00"
    assert [window.locator(f"#{name}").evaluate("details => details.open") for name in names] == [True, False]
    assert table.locator("tbody tr").count() == 5
    assert table.locator("th").nth(2).get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody tr:visible").count() == 5
    assert table.locator("input").input_value() == "n"
    assert window.evaluate("document.activeElement.className") == "filter"
    assert window.evaluate("document.documentElement.dataset.theme") == theme
    assert window.evaluate(offset) == pytest.approx(before, abs=2)
    keys = window.locator("figure").first.locator(".key").all()
    pressed = {key.text_content().strip(): key.get_attribute("aria-pressed") for key in keys}
    assert pressed == dict.fromkeys(("bn", "gn", "in", "renorm"), "true") | {"none": "false"}
    window.clock.run_for(1_000)
    assert window.locator("p.live [role=status]").inner_text() == "Updated."


def test_it_waits_for_a_reader_who_pauses_selects_opens_a_cell_prints_or_is_at_work(live) -> None:
    window = live.window
    window.locator("#live-pause").click()
    assert window.locator("#live-pause").inner_text() == "Resume updates"
    assert not live.passes()
    window.locator("#live-pause").click()
    assert live.passes()
    assert window.evaluate("document.activeElement.id") == "live-pause"
    window.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
    assert not live.passes()
    window.evaluate("getSelection().removeAllRanges()")
    assert live.passes()
    window.locator("#table-accuracy button.cell").first.click()
    assert not live.passes()
    window.keyboard.press("Escape")
    assert live.passes()
    window.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not live.passes()
    window.evaluate("dispatchEvent(new Event('afterprint'))")
    assert live.passes()
    window.evaluate("setInterval(() => dispatchEvent(new Event('pointermove')), 1000)")
    assert not live.passes()


def test_a_page_of_a_study_that_has_ended_stays(live) -> None:
    window = live.window
    window.locator("#more > details summary").first.click()
    window.evaluate("scrollTo(0, 700)")
    live.page.write_text(as_still(live.page.read_text(), FIRST))
    assert live.passes()
    assert window.locator("#more > details").first.evaluate("details => details.open")
    assert window.evaluate("scrollY") == pytest.approx(700, abs=2)
    window.clock.run_for(1_000)
    assert window.locator("p.live").inner_text() == "Not watched any more: this page stays as it is."
    assert not live.passes(600)
    window.reload()
    assert window.locator("p.live").count() == 0


def test_it_is_loaded_less_often_while_nothing_changes(live) -> None:
    assert live.passes(10)
    for _ in range(8):
        assert live.passes()
    assert not live.passes(30)
    live.page.write_text(live.page.read_text().replace(FIRST, SECOND))
    assert live.passes()
    assert live.passes(10)
