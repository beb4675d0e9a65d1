"""Studies that lead elsewhere, and what is beside them."""

import html
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from normlab import report
from normlab.common.errors import UserError
from normlab.report.study.find import find_studies, find_study
from normlab.report.study.status import study_status
from normlab.report.write import build_results

TABLES_ONLY = report.options(figures=False)


def content(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "at", ["study/report", "study/report/accuracy.csv", "study/report/deep/er", "figures", "figures/study"]
)
@pytest.mark.parametrize("kind", ["folder", "file", "absent", "pipe"])
def test_a_report_writes_and_removes_nothing_elsewhere(at, kind, add_run, tmp_path):
    outputs, others = add_run("bn").parents[1], tmp_path / "others"
    (others / "folder").mkdir(parents=True)
    for name in ("file", "folder/x.csv", "folder/x.sources.json", "folder/x.png"):
        (others / name).write_text("theirs")
    before = content(others)
    (outputs / at).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(outputs / at) if kind == "pipe" else (outputs / at).symlink_to(others / kind)
    said = rf"{at.rpartition('/')[2]} is (a link|neither a file nor a folder)"
    if at.startswith("figures"):
        with pytest.raises(UserError, match=said):
            build_results(outputs, outputs / "results.md", report.options())
    else:
        with pytest.raises(UserError, match=said):
            report.build("study", outputs, TABLES_ONLY)
    assert content(others) == before
    assert not (others / "absent").exists()


def test_links_loops_pipes_and_odd_names_beside_a_study_are_no_studies(add_run, tmp_path):
    outputs = add_run("bn").parents[1]
    (outputs / "loop").symlink_to(outputs)
    (outputs / "one").symlink_to("two")
    (outputs / "two").symlink_to("one")
    (outputs / "again").symlink_to("study")
    os.mkfifo(outputs / "pipe.normlab.zip")
    for name in (".normlab.zip", "..normlab.zip", "...normlab.zip"):  # what is before the suffix names no folder
        (outputs / name).touch()
        with pytest.raises(UserError, match="has no name before"):
            find_study(name, outputs)
    (outputs / "device.normlab.zip").symlink_to("/dev/zero")
    Path(os.fsdecode(os.fsencode(outputs) + b"/a\xff/run")).mkdir(parents=True)
    (tmp_path / "elsewhere").symlink_to(outputs)
    for folder in (outputs, tmp_path / "elsewhere"):
        assert find_studies(folder) == ["study"]
    assert find_study("again", outputs) == ("again", outputs / "again")
    for name in ("loop", "one", "pipe", "device", "x" * 300, "a/" * 2000, "nul\0"):
        with pytest.raises(UserError, match=r"There is no study|has no run yet"):
            find_study(name, outputs)


@pytest.mark.parametrize("state", ["running", None, "nothing", "empty"])
def test_a_study_under_way_has_a_report_of_what_is_there(state, add_run, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    if state in ("nothing", "empty"):
        (outputs / "study" / ("run" if state == "nothing" else "")).mkdir(parents=True)
        for ask in (
            lambda: report.build("study", outputs, TABLES_ONLY),
            lambda: study_status("study", outputs, watch=False),
        ):
            with pytest.raises(UserError, match="Study study has no run yet"):
                ask()
        return
    add_run("bn", state=state)
    add_run("none", state="running", accuracies=())
    if state is None:
        with pytest.raises(UserError, match=r"1 running, 1 missing\.\nIts runs are under way"):
            report.build("study", outputs, TABLES_ONLY)
        return
    page = report.build("study", outputs, TABLES_ONLY).read_text()
    assert "No run has finished yet" in page
    assert '"values": [50.0, 80.0, 90.0]' in page


@pytest.mark.parametrize("name", ["$x_$", "=1+1|<b>[x](javascript:a)$\\frac{", "[red]x[/]"])
def test_an_odd_name_is_in_every_file_of_a_report_as_it_is(name, add_run, tmp_path, capsys):
    for batch, norm in ((8, "bn"), (8, "none"), (32, "none")):
        add_run(norm, batch, norm__name=name if norm == "none" else norm, dataset__name=name)
    folder = report.build("study", tmp_path / "outputs", report.options()).parent
    assert (folder / "accuracy_against_batch.png").exists()
    assert name in capsys.readouterr().out
    assert pd.read_csv(folder / "accuracy.csv")["arm"].str.removeprefix("'").tolist()[-1] == name
    page = (folder / "index.html").read_text()
    assert html.escape(name).replace("&#x27;", "&#39;") in page
    assert json.dumps(f"{name}, batch 8")[1:-12].replace("<", "\\u003c").replace(">", "\\u003e") in page
