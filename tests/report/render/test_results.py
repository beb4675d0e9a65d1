"""All studies on one page: what it shows of planted studies, and that the page in docs/ is that of the records."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from normlab.common.errors import UserError
from normlab.report import build_results, figures, options
from normlab.report.claims.claims import claims

ROOT = Path(__file__).parents[3]
RECORDS, PAGE = ROOT / "outputs" / "reference", ROOT / "docs" / "results.md"
OPTIONS = options()
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
    assert page.read_text() == PAGE.read_text(), "run ./scripts/reproduce --from-records and look at the difference"
    shown = set(re.findall(r"^!\[.*?\]\((.+?)\)$", page.read_text(), re.MULTILINE))
    assert shown == {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    for figure in shown:
        assert (PAGE.parent / figure).stat().st_size <= 120_000, figure
    every = {path.relative_to(PAGE.parent).as_posix() for path in (PAGE.parent / "figures").glob("*/*.png")}
    assert every == shown, "docs/figures has what no page shows"


def test_every_claim_is_at_a_glance() -> None:
    table = PAGE.read_text().partition("## At a glance")[2].partition("\n## ")[0]
    for claim in claims():
        assert table.count(f"| {claim.sentence} ") == 1


def test_the_readme_counts_the_verdicts_of_the_page() -> None:
    numbers = re.search(r": (\d+) supported, (\d+) contradicted, (\d+) inconclusive", PAGE.read_text())
    assert numbers
    supported, contradicted, inconclusive = numbers.groups()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f'{supported} verdicts on the papers\' claims were "supported"' in readme
    assert f'{contradicted} "contradicted", {inconclusive} "inconclusive"' in readme


def test_a_study_shows_its_verdicts_its_tables_and_what_a_person_checked(add_run, tmp_path) -> None:
    for seed in range(5):
        for arm, accuracy in (("bn", 0.9 + 0.002 * seed), ("none", 0.6)):
            folder = add_run(arm, 32, seed, (0.5, 0.55, accuracy)).parent
    (folder / "notes.md").write_text("We looked at the moving averages.\n")
    text = build_results(folder.parent, tmp_path / "page" / "all.md", OPTIONS).read_text()
    start = "| Batch normalization reaches a higher accuracy than no"
    [row] = [line for line in text.splitlines() if line.startswith(start)]
    _, _, _, supported, contradicted, inconclusive, _ = (cell.strip() for cell in row.split("|"))
    assert supported.startswith(folder.name)
    assert not contradicted
    assert not inconclusive
    assert "#### What we checked\n\nWe looked at the moving averages." in text
    assert "#### Difference to bn" in text
    for figure in re.findall(r"^!\[.*?\]\((.+?)\)$", text, re.MULTILINE):
        assert (tmp_path / "page" / figure).exists()


def test_a_study_without_a_finished_run_is_left_out_with_a_warning(add_run, tmp_path, capsys) -> None:
    (add_run("bn", study="torn") / "config.yaml").write_text("norm: {")
    with pytest.raises(UserError, match="no study with a finished run"):
        build_results(tmp_path / "outputs", tmp_path / "results.md", TABLES_ONLY)
    add_run("bn", study="whole")
    page = build_results(tmp_path / "outputs", tmp_path / "results.md", TABLES_ONLY)
    assert "### whole" in page.read_text()
    assert "torn has no finished run yet and is left out" in capsys.readouterr().out.replace("\n", " ")


def test_a_study_that_lacks_the_metric_is_left_out_with_a_warning(add_run, add_losses, tmp_path, capsys) -> None:
    add_losses("bn", (3.0, 2.0), study="losses")
    add_run("bn", study="whole")
    by_accuracy = replace(TABLES_ONLY, metric="test_accuracy")
    page = build_results(tmp_path / "outputs", tmp_path / "results.md", by_accuracy)
    assert "### whole" in page.read_text()
    assert "losses is left out: metric=test_accuracy is not" in capsys.readouterr().out.replace("\n", " ")


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


def test_a_folder_without_studies_is_a_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match="no study with"):
        build_results(tmp_path, tmp_path / "results.md", TABLES_ONLY)
