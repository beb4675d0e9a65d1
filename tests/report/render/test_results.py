"""All studies on one page: what it shows of planted studies, and that the page in docs/ is that of the records."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from normlab.common.errors import UserError
from normlab.report import build_results, figures, options
from normlab.report.analysis.metrics import METRICS
from normlab.report.claims.claims import Comparison, claims
from normlab.report.claims.judge import INCONCLUSIVE, ComparisonResult, Judgement
from normlab.report.render.results import telling

ROOT = Path(__file__).parents[3]
RECORDS, PAGE = ROOT / "outputs" / "reference", ROOT / "docs" / "results.md"
OPTIONS = options()
FIRST = "| Batch normalization reaches a higher accuracy than no normalization."
TABLES_ONLY = replace(OPTIONS, figures=False)


@pytest.mark.slow
def test_the_page_in_the_documentation_is_made_from_the_records(tmp_path, monkeypatch) -> None:
    """With figures that are drawn and laid out, but not turned into pixels, which takes as long again."""

    def laid_out(figure, suffix, canvas):
        with canvas.context():
            figure.draw_without_rendering()
        return b""

    monkeypatch.setattr(figures, "encode", laid_out)
    page = build_results(RECORDS, tmp_path / "results.md", OPTIONS)
    made, kept = texts_below(tmp_path), texts_below(PAGE.parent, "results*")
    assert made == kept, "run ./scripts/reproduce --from-records and look at the difference"
    shown = set()
    for path, text in made.items():
        found = re.findall(r"^!\[.*?\]\((.+?)\)$", text, re.MULTILINE)
        shown |= {(page.parent / path).parent.joinpath(figure).resolve().relative_to(tmp_path) for figure in found}
    assert shown == {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    for figure in shown:
        assert (PAGE.parent / figure).stat().st_size <= 120_000, figure
    every = {path.relative_to(PAGE.parent) for path in (PAGE.parent / "figures").glob("*/*.png")}
    assert every == shown, "docs/figures has what no page shows"


def texts_below(folder, name="*"):
    paths = [each for path in folder.glob(name) for each in (path.rglob("*.md") if path.is_dir() else [path])]
    return {path.relative_to(folder): path.read_text() for path in paths if path.suffix == ".md"}


def test_every_claim_is_at_a_glance() -> None:
    table = PAGE.read_text().partition("## At a glance")[2].partition("\n## ")[0]
    for claim in claims():
        assert table.count(f" | {claim.sentence} ") == 1


def test_the_readme_counts_the_verdicts_of_the_page() -> None:
    tally = re.search(r"^(\d+ claims): (.+?); (\d+ decided)\.", PAGE.read_text(), re.MULTILINE)
    assert tally
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"Of {tally[1]} {tally[3]}: {tally[2]}" in readme.replace("are decided", "decided")


def test_a_study_shows_its_verdicts_its_tables_and_what_a_person_checked(add_run, tmp_path) -> None:
    for seed in range(5):
        for arm, accuracy in (("bn", 0.9 + 0.002 * seed), ("none", 0.6)):
            folder = add_run(arm, 32, seed, (0.5, 0.55, accuracy)).parent
    (folder / "notes.md").write_text("We looked at the moving averages.\n")
    page = build_results(folder.parent, tmp_path / "page" / "all.md", OPTIONS)
    [row] = [line for line in page.read_text().splitlines() if FIRST in line]
    mark, _, _, effect, seeds, study = (cell.strip() for cell in row.split("|")[1:-1])
    assert (mark, seeds, study) == ("✓", "5", f"[{folder.name}](all/{folder.name}.md)")
    assert effect.startswith("bn - none: +30.40 ± 0.39")
    assert "\n\nWe looked at the moving averages.\n" in page.read_text()
    assert "No study here was run at its paper's size." in page.read_text()
    of_study = tmp_path / "page" / "all" / f"{folder.name}.md"
    assert "## What we checked\n\nWe looked at the moving averages." in of_study.read_text()
    for title in ("Difference to bn", "Verdicts on the papers' claims"):
        assert f"\n## {title}" in of_study.read_text()
    shown = re.findall(r"^!\[.*?\]\((.+?)\)$", of_study.read_text(), re.MULTILINE)
    assert shown
    for figure in shown:
        assert (of_study.parent / figure).exists()


def test_the_verdict_of_a_claim_is_that_of_the_longest_study_of_its_own_experiment(add_run, tmp_path) -> None:
    experiment = "peerthum2023_accuracy"
    own_name = f"{experiment}_paper"
    accuracies = {"aside": 0.5, "smoke": 0.6, "laptop": 0.7, "batches": 0.75, own_name: 0.8}
    for study, accuracy in accuracies.items():
        budget = study if study in ("smoke", "laptop") else "paper"
        for seed in range(3):
            added = study == "aside" or seed == 2  # as the commands of `next` add runs, which name no experiment
            own = {} if added else {"experiment": experiment, "budget": budget}
            add_run("bn", 32, seed, (0.3, 0.4, accuracy), study=study, **own)
            add_run("none", 32, seed, (0.3, 0.4, 0.4 + 0.001 * seed), study=study, **own)
    page = build_results(tmp_path / "outputs", tmp_path / "all.md", OPTIONS).read_text()
    [row] = [line for line in page.splitlines() if FIRST in line]
    assert "bn - none: +39.90" in row
    assert f"[{own_name}](all/{own_name}.md)" in row
    assert re.search(r"speak to it: ✓ \[batches\].*; ✓ \[laptop\].*; ✓ \[aside\].*; ✓ \[smoke\].*answers nothing", page)
    assert f"At the size of its paper: batches, {own_name}; 2 others smaller." in " ".join(page.split())
    figure = f"figures/{own_name}/accuracy_by_arm.png"
    assert page.count(figure) == 0  # the main figure of that experiment is by depth
    assert "### [aside](all/aside.md)" in page.partition("## Studies of no paper")[2]


def test_a_study_without_a_finished_run_is_left_out_with_a_warning(add_run, tmp_path, capsys) -> None:
    (add_run("bn", study="torn") / "config.yaml").write_text("norm: {")
    with pytest.raises(UserError, match="no study with a finished run"):
        build_results(tmp_path / "outputs", tmp_path / "results.md", TABLES_ONLY)
    add_run("bn", study="whole")
    page = build_results(tmp_path / "outputs", tmp_path / "results.md", TABLES_ONLY)
    assert "### [whole]" in page.read_text()
    assert "torn has no finished run yet and is left out" in capsys.readouterr().out.replace("\n", " ")
    for path in (page, page.with_name("results_gallery.html")):
        assert "Not read, and not on this page: torn." in " ".join(path.read_text().split())


def test_a_study_of_another_size_than_its_experiment_has_now_says_so(add_run, tmp_path) -> None:
    sizes = {
        **{"dataset__kind": "image_folder", "dataset__image_size": 16, "dataset__test_size": 2000, "depth": 20},
        **{"model__kind": "cifar_resnet", "precision": "bf16", "weight_average": 0.98},
    }
    for study, images in (("alike", 10000), ("smaller", 500)):
        own = {"study": study, "experiment": "ioffe2017_baseline", "budget": "laptop", "dataset__train_size": images}
        add_run("bn", 32, 0, (0.5,) * 20, epochs=20, **own, **sizes)
    page = build_results(tmp_path / "outputs", tmp_path / "all.md", TABLES_ONLY)
    sentence = "Not of the size that its experiment's file has now: dataset.train_size=500 (there 10000)\n"
    assert sentence in (tmp_path / "all" / "smaller.md").read_text()
    assert "Not of the size" not in (tmp_path / "all" / "alike.md").read_text()
    assert "1 of 2 have other sizes than their experiment's file" in " ".join(page.read_text().split())


def test_a_study_that_lacks_the_metric_is_left_out_with_a_warning(add_run, add_losses, tmp_path, capsys) -> None:
    add_losses("bn", (3.0, 2.0), study="losses")
    add_run("bn", study="whole")
    by_accuracy = replace(TABLES_ONLY, metric="test_accuracy")
    page = build_results(tmp_path / "outputs", tmp_path / "results.md", by_accuracy)
    assert "### [whole]" in page.read_text()
    assert "losses is left out: metric=test_accuracy is not" in capsys.readouterr().out.replace("\n", " ")


def test_a_claim_of_which_a_part_was_not_run_is_shown_by_that_part() -> None:
    part, other = (Comparison((), METRICS["test_accuracy"], "greater", 0.0, 0.0) for _ in range(2))
    ran = ComparisonResult(part, 0.05, {0: 1.0}, p_holm=0.01, favors=True)
    missing = ComparisonResult(other, 0.05)
    judgement = Judgement(claims()[0], "study", "digits", "resnet", "laptop", (ran, missing))
    assert judgement.verdict == INCONCLUSIVE
    assert telling(judgement) is missing


def test_names_of_studies_are_those_of_the_format(add_run, tmp_path) -> None:
    for study in ("_u_", "x~1"):
        add_run("bn", 32, study=study, experiment="peerthum2023_accuracy", budget="paper")
    page = build_results(tmp_path / "outputs", tmp_path / "all.md", TABLES_ONLY)
    assert r"At the size of its paper: \_u\_, x" in page.read_text()
    assert "At the size of its paper: _u_, x~1." in (tmp_path / "all_gallery.html").read_text()


def test_pages_of_studies_that_are_gone_are_named(add_run, tmp_path, capsys) -> None:
    add_run("bn")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "old.md").touch()
    build_results(tmp_path / "outputs", tmp_path / "all.md", TABLES_ONLY)
    assert "has pages of no study of" in (told := capsys.readouterr().out.replace("\n", " "))
    assert "old.md" in told
    assert (tmp_path / "all" / "old.md").exists()


def test_pages_do_not_go_into_the_folder_of_a_study(add_run, tmp_path) -> None:
    add_run("bn", study="results")
    with pytest.raises(UserError, match="where the study results is"):
        build_results(tmp_path / "outputs", tmp_path / "outputs" / "results.md", TABLES_ONLY)


@pytest.mark.slow
def test_figures_that_are_drawn_no_more_are_removed(add_run, tmp_path) -> None:
    add_run("bn")
    (tmp_path / "figures" / "study").mkdir(parents=True)
    (tmp_path / "figures" / "study" / "old.png").touch()
    build_results(tmp_path / "outputs", tmp_path / "results.md", OPTIONS)
    assert not (tmp_path / "figures" / "study" / "old.png").exists()
    assert list((tmp_path / "figures" / "study").glob("*.png"))


def test_figures_stay_where_drawing_is_stopped(add_run, tmp_path, monkeypatch) -> None:
    def stopped(*_: object) -> bytes:
        raise KeyboardInterrupt

    add_run("bn")
    (tmp_path / "figures" / "study").mkdir(parents=True)
    (tmp_path / "figures" / "study" / "accuracy.png").touch()
    monkeypatch.setattr(figures, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_results(tmp_path / "outputs", tmp_path / "results.md", OPTIONS)
    assert (tmp_path / "figures" / "study" / "accuracy.png").exists()


@pytest.mark.parametrize("wrong", [{"output_dir": None}, {"page": None}])
def test_a_path_that_is_none_is_a_sentence(tmp_path, wrong) -> None:
    with pytest.raises(UserError, match="null is not valid: expected a path"):
        build_results(**{"output_dir": tmp_path, "page": tmp_path, "options": OPTIONS, **wrong})


@pytest.mark.parametrize("name", ["results", "results.html"])
def test_a_page_is_a_file_in_markdown(tmp_path, name) -> None:
    with pytest.raises(UserError, match=r"expected a page in Markdown, results\.md"):
        build_results(tmp_path, tmp_path / name, OPTIONS)


def test_a_folder_without_studies_is_a_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match="no study with"):
        build_results(tmp_path, tmp_path / "results.md", TABLES_ONLY)
