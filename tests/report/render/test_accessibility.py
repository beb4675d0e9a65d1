"""Everybody can use the page: axe-core finds nothing in either theme, everything folded or open, and keys reach it all.

What a person finds who has never seen the project is a test, too.
"""

from pathlib import Path

import pytest
from recorded import adder
from tools import axe_script

from normlab import report

RECORDED = Path(__file__).parents[3] / "outputs" / "reference" / "santurkar2018_landscape_laptop.normlab.zip"
AXE = """([where, rules]) => axe.run(where, rules ? { runOnly: rules } : {}).then(({ violations }) =>
  violations.map(({ id, nodes }) => [id, nodes.slice(0, 3).map((node) => node.html)]))"""
ACCURACIES = {8: {"bn": 0.60, "gn": 0.90, "none": 0.30}, 32: {"bn": 0.90, "gn": 0.89, "none": 0.85}}
NOISE = (0.0, 0.012, -0.008, 0.004)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """gn wins at batch 8 by far; at batch 32 it is not decided."""
    outputs = tmp_path_factory.mktemp("planted") / "outputs"
    add = adder(outputs)
    for batch, arms in ACCURACIES.items():
        for shift, (arm, accuracy) in enumerate(arms.items()):
            for seed in range(4):
                add(arm, batch, seed, (0.1, 0.2, accuracy + NOISE[(seed + shift) % 4]))
    return report.build("study", outputs, report.options())


def recorded(folder: Path) -> Path:
    """Without figures, which take half a minute: `under_way` has some."""
    (folder / RECORDED.name).symlink_to(RECORDED)
    return report.build(str(folder / RECORDED.name), folder, report.options(figures=False, thresholds=[]))


def under_way(folder: Path) -> Path:
    add = adder(folder)
    for seed, state in enumerate(("done", "running", "failed", "diverged")):
        for arm in ("bn", "none"):
            status = {"error": "MemoryError: no memory"} if state == "failed" else {"diverged_step": 3}
            add(arm, 8, seed, (0.2, 0.3, 0.4)[: 3 if state == "done" else 2], state, status=status)
    return report.build("study", folder, report.options(thresholds=[]))


def of_100_arms(folder: Path) -> Path:
    add = adder(folder)
    for arm in range(100):
        name = (
            f"an_arm_with_a_name_of_so_many_words_that_it_needs_a_line_of_its_own_{arm}"
            if arm % 9 == 0
            else f"arm{arm}"
        )
        add(name, accuracies=(0.5, 0.6, 0.6 + arm / 500))
    return report.build("study", folder, report.options(figures=False, thresholds=[]))


def gallery(folder: Path) -> Path:
    """Two studies, one of them of a paper; the page has no cells."""
    for study in ("mine", "theirs"):
        own = {"experiment": "peerthum2023_accuracy", "budget": "laptop"} if study == "theirs" else {}
        for batch, arms in ACCURACIES.items():
            for arm, accuracy in arms.items():
                for seed in range(3):
                    adder(folder)(arm, batch, seed, (0.1, 0.2, accuracy + NOISE[seed]), study=study, **own)
    (folder / "mine" / "notes.md").write_text("What we *checked* <b>.\n\nOf `bn`.")
    page = report.build_results(folder, folder / "all.md", report.options())
    return page.with_name("all_gallery.html")


@pytest.mark.slow
def test_the_gallery_has_verdicts_main_figures_and_every_study(browser, tmp_path) -> None:
    window = browser.new_page(viewport={"width": 1280, "height": 800})
    window.goto(gallery(tmp_path).as_uri())
    row = window.locator("#results tr", has_text="a higher accuracy than no normalization")
    assert "theirs" in row.inner_text()
    assert window.locator("#figures svg").count() == 1
    row.locator("a").click()
    assert window.locator("#study-1[open] .verdict", has_text="than no normalization").count() == 1
    folded = window.locator("#study-0")
    folded.locator("summary").first.click()
    assert "What we *checked* <b>." in folded.inner_text()
    assert folded.locator("code").inner_text() == "bn"
    assert folded.locator("svg").count() == 3
    for link in folded.locator("figcaption a").all():
        assert (tmp_path / link.get_attribute("href")).exists()
    marks = window.locator("svg .mark")
    assert marks.count()
    assert not window.locator("svg [data-cell]").count()
    ids = window.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    window.close()


@pytest.mark.slow
@pytest.mark.parametrize("made", [recorded, under_way, of_100_arms, gallery])
def test_axe_finds_nothing_and_nothing_is_wider_than_a_phone(made, browser, tmp_path) -> None:
    page, axe = made(tmp_path), axe_script()
    for scheme, rules in {"light": None, "dark": ["color-contrast"]}.items():  # a theme changes colors alone
        context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, bypass_csp=True)
        window = context.new_page()
        window.goto(page.as_uri())
        assert window.evaluate("document.documentElement.scrollWidth") <= 390
        window.set_viewport_size({"width": 1280, "height": 800})
        if made is not of_100_arms:  # whose tables are all alike
            window.locator("#unfold").click()
        window.add_script_tag(content=axe)
        assert window.evaluate(AXE, ["body", rules]) == [], scheme
        if made is gallery:  # which has no cells
            context.close()
            continue
        window.locator("#tables button.cell").first.click()
        assert window.evaluate(AXE, ["dialog", None]) == [], f"{scheme}, with the runs of a cell"
        context.close()


@pytest.mark.slow
def test_a_stranger_finds_winner_reality_seeds_latex_and_the_command_of_more_seeds(browser, planted) -> None:
    window = browser.new_page(viewport={"width": 1280, "height": 800})
    window.goto(planted.as_uri())
    answer = window.locator(".answer", has_text="batch 8")
    assert answer.bounding_box()["y"] < 700  # without scrolling
    assert "batch 8: gn" in answer.inner_text()
    assert "gn has the highest final test accuracy at batch 8." in window.locator(".headline").inner_text()
    assert window.locator(".answer .badge").all_inner_texts() == ["real", "not decided"]
    assert "seeds 0 to 3" in answer.inner_text()
    answer.locator("button").click()  # whose runs these are
    assert window.locator("dialog tbody tr td:first-child").all_inner_texts() == ["0", "1", "2", "3"]
    window.keyboard.press("Escape")
    window.locator("#tables summary", has_text="LaTeX").click()
    latex = window.locator("#tables .latex pre").inner_text()
    assert latex.strip() == (planted.parent / "accuracy.tex").read_text().strip()
    assert window.locator("#tables a", has_text="tex").first.get_attribute("href") == "accuracy.tex"
    command = window.locator("#table-seeds .command")
    if command.count():  # of a report that has the table
        assert command.first.is_visible()
        assert "train.py -m" in command.first.inner_text()
    window.close()


@pytest.mark.slow
def test_keys_alone_reach_the_results_what_is_folded_and_the_runs_of_a_cell(browser, planted) -> None:
    window = browser.new_page(viewport={"width": 1280, "height": 800})
    window.goto(planted.as_uri())
    window.keyboard.press("Tab")
    focused = window.locator(":focus")
    assert focused.inner_text() == "Skip to the results"
    assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    folded = window.locator("#table-cost")
    folded.locator("summary").first.focus()
    window.keyboard.press("Enter")
    assert folded.get_attribute("open") is not None
    window.locator("#tables button.cell").first.focus()
    window.keyboard.press("Enter")
    assert window.locator("dialog[open] .close").is_visible()
    window.keyboard.press("Escape")
    assert window.locator(":focus").get_attribute("class") == "cell"  # where the reader was
    window.goto(f"{planted.as_uri()}#table-convergence")
    window.locator("#table-convergence[open]").wait_for()
    window.goto(f"{planted.as_uri()}#cell-0")
    window.locator("dialog[open]").wait_for()
    window.close()
