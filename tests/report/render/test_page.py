"""The HTML page, in a real Chromium that opens it from its file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from recorded import adder

from normlab import report
from normlab.report.importing import import_runs

LINES = "(link) => { const r = document.createRange(); r.selectNodeContents(link); return r.getClientRects().length; }"
EVIL = "<script>document.title='harmed'</script></script><b>&\"' $x_$"
MEANS = {"bn": [90.0, 91.0], "none": [70.0, 71.0], "gn": [80.0, 99.0]}  # by batch size: 8, 32


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A study of three arms, two batch sizes and two seeds: one run diverged, one failed, one was never started; and an
    arm and a failure whose names are attacks."""
    outputs = tmp_path_factory.mktemp("page") / "outputs"
    add = adder(outputs)
    for norm, means in MEANS.items():
        for batch, mean in zip((8, 32), means, strict=True):
            for seed in (0, 1):
                state = {("gn", 8, 1): "diverged", ("none", 32, 1): "failed"}.get((norm, batch, seed), "done")
                if (norm, batch, seed) == ("gn", 32, 1):
                    continue
                final = (mean + (seed - 0.5)) / 100
                told = {"error": EVIL} if state == "failed" else {"diverged_step": 7}
                accuracies = (0.5, 0.6, final) if state == "done" else (0.2,)
                run = add(norm, batch, seed, accuracies, state, status=told, optimizer__note=EVIL)
                (run / "run.log").write_text(f"first line\nthe log of {norm} {batch} {seed} {EVIL}\n")
                commit = "a" * 40 if batch == 8 else "b" * 40
                made = {"device": "a processor", "versions": {"normlab": "1", "torch": "2"}}
                (run / "provenance.json").write_text(json.dumps({**made, "git": {"commit": commit, "diff": ""}}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["norm"]["name"] = EVIL
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return report.build("study", outputs, report.options())


@pytest.fixture
def opened(browser, page) -> Iterator[Any]:
    """The page as a window of 1280 pixels shows it; at its end nothing has complained and nothing left the machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    window = context.new_page()
    complaints: list[str] = []
    window.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.on(
        "request", lambda request: complaints.extend([request.url] * (not request.url.startswith(("file:", "data:"))))
    )
    window.goto(page.as_uri())
    yield window
    context.close()
    assert complaints == []


def column(window: Any, place: int = 0) -> list[str]:
    return window.locator(f"#table-accuracy tbody tr > :nth-child({place + 1})").all_inner_texts()


@pytest.mark.slow
def test_a_table_is_sorted_and_filtered_and_shows_what_is_not_done(opened) -> None:
    heading = opened.locator("#table-accuracy th").nth(1)
    assert column(opened)[:2] == ["bn", "none"]
    heading.locator("button").click()
    assert column(opened)[:3] == ["bn", "gn", "none"]  # by numbers
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert column(opened)[:3] == ["none", "gn", "bn"]
    assert column(opened, 1)[-1] == "-- missing"  # what has no number stays at the end
    opened.locator("#table-accuracy th button").first.click()
    assert column(opened)[1:] == ["bn", "gn", "none"]
    opened.locator("#table-accuracy input.filter").fill("non")
    shown = opened.locator("#table-accuracy tbody tr:visible")
    assert shown.count() == 1
    assert shown.inner_text().startswith("none")
    opened.locator("#table-accuracy input.filter").fill("")
    assert shown.count() == 4
    assert opened.locator(".states").inner_text() == "9 done 1 diverged 1 failed 5 missing"
    noted = opened.locator("#runs table.noted").inner_text()
    assert "at step 7" in noted
    assert "(no folder)" in noted
    assert opened.locator("#table-accuracy td.diverged").inner_text() == "79.5 (n=1, 1 of 2 diverged)"
    assert opened.locator("#table-accuracy td.missing").count() > 0
    assert "2 versions of the code" in opened.locator(".warning").all_inner_texts()[-1]


@pytest.mark.slow
def test_a_cell_opens_its_runs_with_their_seeds_results_curves_settings_and_log(opened) -> None:
    opened.locator("#table-accuracy button.cell", has_text="70.0").click()
    dialog = opened.locator("dialog[open]")
    assert dialog.locator("h2").inner_text() == "none, batch 8; digits, resnet18"
    rows = [row.split("\t") for row in dialog.locator("tbody tr").all_inner_texts()]
    assert [(row[0], row[2]) for row in rows] == [("0", "69.5"), ("1", "70.5")]
    assert dialog.locator("tbody a").first.get_attribute("href").startswith("../none-b8-s0-")
    assert "norm.name: none" in dialog.locator("pre").first.inner_text()
    assert dialog.locator(".curves path").count() == 4  # test and training of two seeds
    swatches = dialog.locator("tbody .swatch").evaluate_all("all => all.map((e) => getComputedStyle(e).borderTopColor)")
    curves = dialog.locator(".curves path").evaluate_all("all => all.map((e) => getComputedStyle(e).stroke)")
    assert swatches == list(dict.fromkeys(curves))
    assert len(swatches) == 2
    dialog.locator("summary", has_text="Log of seed 1").click()
    assert f"the log of none 8 1 {EVIL}" in dialog.locator("details[open] pre").inner_text()
    opened.keyboard.press("Escape")
    assert opened.locator("dialog[open]").count() == 0


@pytest.mark.slow
def test_a_link_opens_what_is_folded_and_one_that_leads_nowhere_harms_nothing(opened) -> None:
    opened.evaluate("location.hash = '%'")
    opened.reload()
    [name, *_] = opened.locator("details.folded:not([open])[id]").evaluate_all("all => all.map((each) => each.id)")
    opened.evaluate("(name) => location.hash = name.replace('-', '%2D')", name)
    opened.wait_for_function("(name) => document.getElementById(name).open", arg=name)


@pytest.mark.slow
def test_a_mark_tells_the_numbers_of_the_table_and_opens_its_runs(opened, page) -> None:
    figure, tip = opened.locator("#figure-accuracy_against_batch"), opened.locator(".tip")
    table = pd.read_csv(page.parent / "accuracy.csv").set_index(["arm", "batch"])
    mark = figure.locator('.mark[aria-label^="bn, batch 32"]')
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    row = table.loc[("bn", 32)]
    heading, value, interval, seeds = tip.inner_text().split("\n")
    assert (heading, seeds) == ("bn, batch 32", "seeds 0: 90.5, 1: 91.5")
    half = row["high"] - row["mean"]
    assert value == f"{row['mean']:.1f} ± {half:.1f} (n={row['n']})"
    assert interval == f"interval: {row['low']:.4g} to {row['high']:.4g}"
    opened.mouse.move(0, 0)
    assert not tip.is_visible()
    box = mark.bounding_box()
    opened.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert opened.locator("dialog[open] h2").inner_text() == "bn, batch 32; digits, resnet18"


@pytest.mark.slow
def test_a_figure_is_used_by_the_keyboard(opened) -> None:
    figure, tip = opened.locator("#figure-accuracy_against_batch"), opened.locator(".tip")
    keys = figure.locator(".key")
    keys.first.focus()
    opened.keyboard.press("ArrowRight")
    focused = opened.locator(":focus")
    assert (focused.get_attribute("aria-label"), focused.get_attribute("aria-pressed")) == ("none", "true")
    lines = figure.locator(f"g.s{focused.get_attribute('data-series')}")
    display = "lines => [...new Set(lines.map((line) => getComputedStyle(line).display))]"
    assert lines.evaluate_all(display) == ["inline"]
    opened.keyboard.press("Space")
    assert focused.get_attribute("aria-pressed") == "false"
    assert lines.evaluate_all(display) == ["none"]
    opened.keyboard.press("Tab")
    heard = []
    for _ in range(4):
        heard.append(focused.get_attribute("aria-label").split("\n")[0])
        assert tip.inner_text() == focused.get_attribute("aria-label")
        opened.keyboard.press("ArrowRight")
    assert heard[:3] == ["bn, batch 8", "bn, batch 32", "gn, batch 8"]  # none is passed over
    opened.keyboard.press("Home")
    for key, place in (("ArrowDown", "gn, batch 8"), ("ArrowUp", "bn, batch 8")):  # past bn at 32
        opened.keyboard.press(key)
        assert focused.get_attribute("aria-label").startswith(place)
    opened.keyboard.press("Home")
    opened.keyboard.press("Escape")
    assert not tip.is_visible()
    opened.keyboard.press("Enter")
    assert opened.locator("dialog[open] h2").inner_text() == "bn, batch 8; digits, resnet18"
    opened.keyboard.press("Escape")
    assert focused.get_attribute("aria-label").startswith("bn, batch 8")


@pytest.mark.slow
def test_the_first_touch_of_a_mark_shows_its_values_and_the_second_opens_its_runs(browser, page) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    window = context.new_page()
    window.goto(page.as_uri())
    mark = window.locator('#figure-accuracy_against_batch [aria-label^="bn, batch 8"]').first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    for dialogs in (0, 1):
        window.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert window.locator(".tip").inner_text().startswith("bn, batch 8")
        assert window.locator("dialog[open]").count() == dialogs
    context.close()


@pytest.mark.slow
def test_names_from_disk_are_texts(opened) -> None:
    assert opened.title() == "study · normlab"
    assert EVIL in column(opened)
    assert EVIL in opened.locator("#runs table.noted").inner_text()
    key = opened.locator('.key[aria-label*="harmed"]').first
    assert key.get_attribute("aria-label") == EVIL
    key.click()
    opened.locator("#table-accuracy tr", has_text="harmed").locator("button.cell").first.click()
    assert opened.title() == "study · normlab"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_it_is_readable_on_a_phone_and_in_the_dark(browser, page, width, scheme) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    window = context.new_page()
    window.goto(page.as_uri())
    ink = window.locator("#figure-accuracy_against_batch text").first.evaluate("text => getComputedStyle(text).fill")
    assert (sum(map(int, re.findall(r"\d+", ink))) > 500) == (scheme == "dark")
    assert window.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
    assert window.eval_on_selector_all("nav a", f"links => links.map({LINES})") == [1] * 4  # no word is broken
    ground = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    window.locator("#theme").click()
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    context.close()


@pytest.mark.slow
def test_it_prints_what_is_folded(browser, page) -> None:
    window = browser.new_page()
    window.goto(page.as_uri())
    window.emulate_media(media="print")
    assert window.locator("#figure-accuracy_against_batch svg").is_visible()
    assert window.pdf()[:5] == b"%PDF-"
    folded = window.locator("details.verdict, details.folded:not(.cells)")
    assert [each.get_attribute("open") for each in folded.all()] == [None] * folded.count()  # closed again
    window.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert None not in [each.get_attribute("open") for each in folded.all()]
    window.close()


def data_of(page: Path) -> Any:
    """What the page's script reads, by the rules that a browser has for it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text, parse_constant=refuse)


def test_a_cell_tells_the_values_of_its_table(tmp_path) -> None:
    """The best epoch is that of the validation images; a last evaluation without a value is not an earlier one's."""
    add = adder(tmp_path / "outputs")
    for norm, accuracies in (("bn", (0.5, 0.9, 0.8)), ("none", (0.5, 0.8, None))):
        file = add(norm, 8, 0, accuracies) / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        told = [row | {"val_accuracy": value} for row, value in zip(rows, (0.99, 0.1, 0.2), strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in told))
    bn, none = data_of(report.build("study", tmp_path / "outputs", report.options(figures=False)))["runs"]
    assert (bn["final"], bn["best"]) == (80.0, 50.0)
    assert "final" not in none
    assert none["best"] == 50.0


def test_a_metric_that_is_no_test_is_called_what_it_is(tmp_path) -> None:
    adder(tmp_path / "outputs")()
    options = report.options(figures=False, metric="train_accuracy")
    data = data_of(report.build("study", tmp_path / "outputs", options))
    assert data["measure"]["images"] == "training"
    [run] = data["runs"]
    assert (run["values"], run["train"]) == ([55.0, 85.0, 95.0], [])  # once


def test_a_run_without_seconds_is_on_the_page_and_no_verdict_names_imported_ones(tmp_path) -> None:
    add = adder(tmp_path / "outputs")
    for norm in ("bn", "none"):
        for seed in (0, 1, 2):
            add(norm, 8, seed, (0.5, 0.8, 0.9 + 0.01 * seed))
    (tmp_path / "results.csv").write_text("arm,test_accuracy\ntheirs,0.7\n")
    settings = {"dataset.name": "digits", "model.name": "resnet", "depth": 18, "batch": 8, "epochs": 3}
    import_runs("study", tmp_path / "outputs", {"source": str(tmp_path / "results.csv"), "set": settings})
    page = report.build("study", tmp_path / "outputs", report.options(figures=False))
    data = data_of(page)
    done = [run for run in data["runs"] if run["state"] == "done"]
    assert ["seconds" in run for run in done].count(False) == 1
    made = {name: json.loads((page.parent / f"{name}.sources.json").read_text()) for name in ("verdicts", "accuracy")}
    assert {name: len(listed["runs"]) for name, listed in made.items()} == {"verdicts": 6, "accuracy": 7}


@pytest.mark.slow
def test_a_run_costs_the_page_little(tmp_path) -> None:
    """At 200 evaluations and a long log: 1,000 runs have to fit into 8 MB beside the figures."""
    add = adder(tmp_path / "outputs")

    def size(seeds: range) -> int:
        for seed in seeds:
            curve = tuple(0.3 + 0.6 * (epoch + seed / 7) / 200 for epoch in range(200))
            run = add("bn", 8, seed, curve, epochs=200)
            (run / "run.log").write_text("a line of the log\n" * 200)
        return report.build("study", tmp_path / "outputs", report.options(figures=False)).stat().st_size

    few = size(range(10))
    assert (size(range(10, 30)) - few) / 20 < 3_500


def test_every_table_and_figure_has_its_runs_beside_it(page) -> None:
    folder = page.parent
    for path in [*folder.glob("*.csv"), *folder.glob("*.png")]:
        made = json.loads((folder / f"{path.stem}.sources.json").read_text())
        assert made["runs"], path
        assert set(made["runs"]) <= {run.name for run in folder.parent.iterdir()}
        assert sum(made["code"].values()) == sum(made["hardware"].values()) == len(made["runs"])
    made = json.loads((folder / "accuracy.sources.json").read_text())
    assert made["code"] == {"normlab 1, commit aaaaaaa, torch 2": 6, "normlab 1, commit bbbbbbb, torch 2": 4}
    assert made["hardware"] == {"a processor": 10}
    assert "10 runs; code: normlab 1, commit aaaaaaa" in (folder / "accuracy.tex").read_text()
