"""A page that is open while its study is watched, in a real Chromium whose clock the tests move."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from recorded import adder

from normlab import report
from normlab.report.render.html.live import as_still
from normlab.report.write import write_report

pytestmark = pytest.mark.slow
FIRST, SECOND = "2026-01-01T12:00:00.000000+00:00", "2026-01-01T12:01:00.000000+00:00"
CLOCK = """(() => {  // which stands still until `pass` moves it
  let now = 0;
  const timers = [];
  Date.now = () => now;
  window.setTimeout = (call, after) => timers.push({ call, at: now + after, every: Infinity });
  window.setInterval = (call, every) => timers.push({ call, at: now + every, every });
  window.pass = (seconds) => {
    for (const end = now + 1000 * seconds; now < end; now += 100)
      for (const timer of timers.filter((each) => each.at <= now)) {
        timer.at += timer.every;
        timer.call();
      }
  };
})()"""


class Live(NamedTuple):
    """The window in which the page of a study under way is open, and the page's file."""

    window: Any
    page: Path

    def loads_again(self, *, within: float = 100.0) -> bool:
        """Whether the page loads itself again within so many of its seconds."""
        self.window.evaluate("(seconds) => { window.mine = true; pass(seconds); }", within)
        self.window.wait_for_timeout(400)
        return not self.window.evaluate("window.mine")

    def load(self) -> None:
        """Let the page load itself again."""
        with self.window.expect_navigation():
            self.window.evaluate("pass(100)")


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
    window.add_init_script(CLOCK)
    window.goto(page.as_uri())
    yield Live(window, page)
    context.close()
    assert complaints == []


def test_it_shows_the_new_state_and_is_as_its_reader_left_it(live, outputs, tmp_path) -> None:
    window = live.window
    assert window.locator("p.live time").inner_text() == "01/01/2026, 12:00:00"
    table = window.locator("#table-accuracy")
    hidden = window.locator("figure .key[aria-label^=none]").first
    hidden.click()
    for _ in range(2):
        table.locator("th button.sort").nth(2).click()
    order = table.locator("th").nth(2).get_attribute("aria-sort")
    assert order == "ascending"
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
    live.load()
    assert window.locator("p.live time").inner_text() == "01/01/2026, 12:01:00"
    assert [window.locator(f"#{name}").evaluate("details => details.open") for name in names] == [True, False]
    assert table.locator("tbody tr").count() == 5
    assert table.locator("th").nth(2).get_attribute("aria-sort") == order
    assert table.locator("tbody tr:visible").count() == 5
    assert table.locator("input").input_value() == "n"
    assert window.evaluate("document.activeElement.className") == "filter"
    assert window.evaluate("document.documentElement.dataset.theme") == theme
    assert window.evaluate(offset) == pytest.approx(before, abs=2)
    keys = window.locator("figure").first.locator(".key").all()
    pressed = {key.get_attribute("aria-label"): key.get_attribute("aria-pressed") for key in keys}
    assert pressed == dict.fromkeys(("bn", "gn", "in", "renorm"), "true") | {"none": "false"}
    window.evaluate("pass(1)")
    assert window.locator("p.live [role=status]", has_text="Updated.").count() == 1


def test_a_table_stays_scrolled_both_ways(live) -> None:
    live.window.set_viewport_size({"width": 240, "height": 120})
    table = live.window.locator("#table-accuracy .scroll")
    table.evaluate("table => table.scrollTo(20, 30)")
    live.load()
    assert table.evaluate("table => [table.scrollLeft, table.scrollTop]") == [20, 30]


def test_it_waits_for_a_reader_who_pauses_selects_opens_a_cell_prints_or_is_at_work(live) -> None:
    window = live.window
    window.locator("#live-pause").click()
    assert window.locator("#live-pause").inner_text() == "Resume updates"
    assert not live.loads_again()
    window.locator("#live-pause").click()
    live.load()
    assert window.evaluate("document.activeElement.id") == "live-pause"
    window.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
    assert not live.loads_again()
    window.evaluate("getSelection().removeAllRanges()")
    live.load()
    window.locator("#table-accuracy button.cell").first.click()
    assert not live.loads_again()
    window.keyboard.press("Escape")
    live.load()
    window.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not live.loads_again()
    window.evaluate("dispatchEvent(new Event('afterprint'))")
    live.load()
    window.evaluate("setInterval(() => dispatchEvent(new Event('pointermove')), 500)")
    assert not live.loads_again()


def test_a_page_of_a_study_that_has_ended_stays(live) -> None:
    window = live.window
    window.locator("#more > details summary").first.click()
    window.evaluate("scrollTo(0, 700)")
    offset = "document.getElementById('runs').getBoundingClientRect().top"
    before = window.evaluate(offset)
    live.page.write_text(as_still(live.page.read_text(), FIRST))
    live.load()
    assert window.locator("#more > details").first.evaluate("details => details.open")
    assert window.evaluate(offset) == pytest.approx(before, abs=2)
    window.evaluate("pass(1)")
    assert window.locator("p.live").inner_text() == "Not watched any more: this page stays as it is."
    assert not live.loads_again()
    window.reload()
    assert window.locator("p.live").count() == 0


def test_it_is_loaded_less_often_while_nothing_changes(live) -> None:
    for _ in range(8):
        live.load()
    assert not live.loads_again(within=40)
    live.load()
    live.page.write_text(live.page.read_text().replace(FIRST, SECOND))
    live.load()
    assert live.loads_again(within=60)
