"""What the real commands leave in a real terminal and in files."""

import os
import re
import sys
import zipfile

import pytest
from launchers.commands import ROOT, SMALL
from terminal import COLOR, CONTROL, in_terminal, shown

from normlab.config import hydra

PYTHON = (sys.executable, str(ROOT / "train.py"))
TRAIN = (*SMALL, "epochs=50")
SWEEP = ("-m", *TRAIN, "norm=bn,none", "hydra.launcher.slots=2")


@pytest.fixture(autouse=True)
def modules_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.slow
def test_a_run_has_one_live_line_which_is_gone_at_the_end(tmp_path) -> None:
    with (tmp_path / "out").open("w") as out:
        status, written = in_terminal([*PYTHON, *TRAIN], cwd=tmp_path, stdout=out)
    assert status == 0
    assert re.search(r"bn seed=0 .*epoch \d+/50 +test \d.* images/s", written)
    assert "1 run:" not in written
    left = shown(written)
    starts = [r"bn seed=0: starting\.", r"\[1/1\] bn seed=0: test accuracy"]
    assert all(re.match(start, line) for start, line in zip(starts, left, strict=True))
    record, *more = (tmp_path / "out").read_text().splitlines()
    assert record.startswith("Its record is in outputs/default/small-digits-bn-b128-s0-")
    assert more == []


@pytest.mark.slow
def test_a_sweep_has_a_live_line_per_run_and_one_for_all(tmp_path) -> None:
    with (tmp_path / "out").open("w") as out:
        status, written = in_terminal(
            [*PYTHON, *SWEEP, "epochs=300"], cwd=tmp_path, stdout=out
        )  # long enough to be seen
    assert status == 0
    for name in ("bn seed=0", "none seed=0"):
        assert re.search(rf"(\x1b\[2K|\n){name} .*epoch \d+/300 .* images/s", written)
    assert re.search(r"2 runs: .*2 running", written)
    first, *ended, last = shown(written)
    assert first.startswith("Runs to train: 2, 2 at a time")
    assert [line[:6] for line in ended] == ["[1/2] ", "[2/2] "]
    assert last.startswith("2 of 2 runs finished in")
    assert (tmp_path / "out").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("words", [TRAIN, SWEEP], ids=["run", "sweep"])
def test_files_get_neither_escapes_nor_carriage_returns(command, words) -> None:
    status, out, err = command("train.py", *words, FORCE_COLOR="1", TERM="xterm-256color")
    assert status == 0
    assert not set("\r\x1b") & set(out + err)
    assert re.search(r"^\[1/\d\] (bn|none) seed=0: ", err, re.MULTILINE)


@pytest.mark.slow
def test_quiet_commands_print_nothing_but_what_went_wrong(command) -> None:
    words = ["model.target=small.SmallNet,greedy.Insatiable", "norm=bn", "quiet=true"]
    status, out, err = command("train.py", *SWEEP, *words)
    assert (status, out) == (1, "")
    put_off, failed, heading, log, error = err.splitlines()
    assert "Tried again alone" in put_off
    assert re.match(r"\[\d/2\] bn target=greedy.Insatiable seed=0: failed: .* does not fit into the memory", failed)
    assert (heading, error[:22]) == ("Failed:", "1 of 2 runs failed. Th")
    assert re.search(r"run.log: .* does not fit into the memory", log)
    assert command("train.py", *TRAIN, "quiet=true") == (0, "", "")  # finished


@pytest.mark.slow
def test_a_quiet_report_prints_its_page_alone(tmp_path, command) -> None:
    with zipfile.ZipFile(ROOT / "outputs" / "reference" / "cifar10_jpeg_laptop.normlab.zip") as recorded:
        runs = [name for name in recorded.namelist() if re.match("resnet18-cifar10_jpeg-(bn|affine)-b32-s0-", name)]
        recorded.extractall(tmp_path / "outputs" / "default", runs)
    (tmp_path / "results.csv").write_text("arm,test_accuracy\nmine,0.5\n")
    where = "set={dataset.name: digits, model.name: x, batch: 8, epochs: 1}"
    for words, told in (
        (["figures=false"], "outputs/default/report/index.html"),
        (["status"], "Study default, 2 runs: 2 done"),
        (["claims"], "outputs/claims.md"),
        (["import", "source=results.csv", "study=mine", where], "outputs/mine"),
    ):
        status, out, warnings = command("report.py", *words, "quiet=true")
        assert (status, out) == (0, f"{told}\n")
        assert all(line.startswith("Warning: 2 of 2 runs carry no checksums") for line in warnings.splitlines())


MANY = """
import sys, time
from normlab.common.progress import Display
names = [f"{norm} cifar_resnet20 b={2**i} seed=0" for i in range(20) for norm in ("bn", "none")]
with Display(dict(zip(names, names)), quiet="quiet" in sys.argv) as display:
    status = {"step": 5, "steps": 10, "epoch": 0, "epochs": 2, "wall_seconds": 3, "images_per_second": 99}
    for name in names:
        display.news(name, status)
    time.sleep(0.6)
    with display.hearing() as voice:
        if voice:
            import os
            os.write(voice.fileno(), b"\\x1b[31mfrom a worker\\x1b[0m\\n")
    for name in names:
        display.ended(name, {"state": "done", "test_accuracy": 0.5, "wall_seconds": 3})
    display.warn("a warning")
"""


@pytest.mark.parametrize(("columns", "rows"), [(100, 12), (38, 50), (20, 6)])
def test_live_lines_fit_the_terminal(columns, rows) -> None:
    status, written = in_terminal([sys.executable, "-c", MANY], columns=columns, rows=rows)
    assert status == 0
    assert columns < 100 or COLOR.search(written)
    assert (columns, rows) != (100, 12) or "40 running; 30 under way not shown" in CONTROL.sub("", written)
    redrawn = [part.count("\x1b[1A") for part in written.split("\n")]
    assert 0 < max(redrawn) < rows
    left = shown(written, columns)
    assert left[0] == "from a worker"
    assert left[-1] == "a warning"
    assert not any("under way" in line or "40 runs:" in line for line in left)


@pytest.mark.slow
def test_terminals_that_are_dumb_colorless_or_quiet_get_what_they_can_show() -> None:
    _, dumb = in_terminal([sys.executable, "-c", MANY], env={"TERM": "dumb"})
    assert "\x1b" not in dumb
    assert dumb.replace("\r\n", "\n").count("\r") == 0
    assert dumb.splitlines()[0].startswith("[1/40] ")
    _, colorless = in_terminal([sys.executable, "-c", MANY], env={"NO_COLOR": "1"})
    assert not COLOR.search(colorless)
    assert "40 runs" in colorless
    assert in_terminal([sys.executable, "-c", MANY, "quiet"])[1] == "a warning\r\n"


def test_variables_that_would_stop_a_library_are_left_out(monkeypatch) -> None:
    kept = {"COLUMNS": "80", "SOURCE_DATE_EPOCH": "0"}
    for given, left in (({"COLUMNS": "0", "LINES": "x", "SOURCE_DATE_EPOCH": "abc"}, {}), (kept, kept)):
        monkeypatch.setattr(os, "environ", dict(given))
        hydra._mend_environment()
        assert {
            name: os.environ[name] for name in ("COLUMNS", "LINES", "SOURCE_DATE_EPOCH") if name in os.environ
        } == left
