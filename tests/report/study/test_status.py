import dataclasses
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console
from terminal import CONTROL, in_terminal
from terminal import shown as on_screen

from normlab.common.errors import UserError
from normlab.report import study_status
from normlab.report.study import status
from normlab.report.study.load import load
from normlab.report.study.status import RunStatus, Survey, show_status, summary, time_left, view
from normlab.runs import lock

ROOT = Path(__file__).parents[3]


@pytest.fixture
def claim():
    """Leave a claim on a run's folder: of this process, but for `changes`; touched `age` seconds ago."""

    def leave(folder: Path, age: float = 0.0, **changes) -> None:
        holder = dataclasses.asdict(dataclasses.replace(lock.Holder.myself(), **changes))
        del holder["sign_of_life"]
        lock._held.add(holder["token"])  # as if this process held it
        path = folder / lock.CLAIM
        path.write_text(json.dumps(holder))
        touched = path.stat().st_mtime - age
        os.utime(path, (touched, touched))

    return leave


@pytest.fixture
def run(add_run, now):
    """A run in the middle of training, if nothing else is said."""

    def add(state="running", **facts) -> Path:
        middle = {"epoch": 1, "epochs": 4, "step": 40, "steps": 100, "wall_seconds": 20.0, "test_accuracy": 0.912}
        run.seed += 1
        return add_run(
            seed=run.seed, state=state, status={**middle, "host": "node7", "pid": 12, **facts} if state else None
        )

    run.seed = 0
    return add


def states(study: Path) -> list[str]:
    return [run.state for run in Survey(study).read()]


def shown(study: Path, now=None) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(view("study", Survey(study).read(), now))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("recorded", "state"),
    [
        *((state, state) for state in ("done", "diverged", "failed", "interrupted")),
        ("running", "lost"),
        (None, "planned"),
    ],
)
def test_a_run_has_the_state_that_it_recorded_and_one_that_nobody_holds_is_lost(run, study, recorded, state) -> None:
    run(recorded)
    (study / "report").mkdir()  # without configuration, no run
    assert states(study) == [state]


@pytest.mark.parametrize(
    ("age", "changes", "state"),
    [
        (0, {}, "running"),
        (500, {}, "running"),  # a process that is there, and only slow
        (0, {"pid": 2**22 + 1}, "lost"),
        (0, {"started": "1"}, "lost"),  # the number has been given to another process
        (5, {"machine": "elsewhere"}, "running"),
        (lock.STALE_SECONDS + 60, {"machine": "elsewhere"}, "lost"),
    ],
)
def test_a_run_whose_process_is_gone_is_lost_and_not_running(run, claim, study, age, changes, state) -> None:
    claim(run("running"), age, **changes)
    assert states(study) == [state]


def test_the_report_notes_that_a_run_is_lost(run, claim, study, now) -> None:
    claim(run("running"), pid=2**22 + 1)
    assert load(study, now=now).runs["note"].item().startswith("lost: its process is gone")


def test_a_run_that_ends_while_it_is_looked_at_is_not_lost(run, study, monkeypatch) -> None:
    folder = run("running")

    def ends(_: Path) -> None:
        text = (folder / "status.json").read_text()
        (folder / "status.json").write_text(text.replace("running", "done"))

    monkeypatch.setattr(status, "holder", ends)
    assert states(study) == ["done"]


@pytest.mark.parametrize("content", ['{"state": "do', "[]", '{"state": 7}', '{"state": "dnoe"}', "", "\0" * 99])
def test_a_damaged_status_is_told_with_its_reason(run, study, content) -> None:
    (run("done") / "status.json").write_text(content)
    run("done")
    text = shown(study)
    assert states(study) == ["unreadable", "done"] or states(study) == ["done", "unreadable"]
    assert "1 unreadable" in text
    assert "status.json cannot be read: " in text or "unknown state" in text


FACTS = [
    "epoch",
    "epochs",
    "step",
    "steps",
    "wall_seconds",
    "test_accuracy",
    "images_per_second",
    "host",
    "pid",
    "heartbeat",
    "error",
]


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        *((fact, True) for fact in FACTS),
        *(
            ("step", -1),
            ("images_per_second", -1.0),
            ("epoch", 10**30),
            ("test_accuracy", 7),
            ("wall_seconds", 1e300),
            ("pid", [{}]),
            ("host", "\t"),
        ),
    ],
)
def test_a_fact_that_makes_no_sense_costs_its_run(run, study, fact, value) -> None:
    run("done", **dict.fromkeys(FACTS))  # what is not known is null
    run("done", **{fact: value})
    text = shown(study)
    assert "Study study, 2 runs: 1 unreadable, 1 done" in text
    assert f"status.json cannot be read: {fact} is {value!r}" in text or value == 10**30


def test_a_running_run_is_shown_with_its_progress_its_process_and_its_time_left(run, claim, study, now) -> None:
    claim(run("running"), job="4711", host="node7", machine="elsewhere")
    claim(run("running", test_accuracy=None, test_loss=0.5), host="here")
    text = shown(study, now + timedelta(seconds=65))
    for words in ("epoch 2/4, 40%", "30 s", "91.2%", "loss 0.5", "1 min 05 s ago", "node7 job 4711"):
        assert words in text
    assert f"here process {os.getpid()}" in text


def test_an_error_is_shown_on_a_line_that_has_its_last_one(run, study) -> None:
    run("failed", error="ValueError: weights[0] [red]and[/blue]\n" + "  a frame\n" * 90 + "KeyError: 'last'")
    text = " ".join(shown(study).split())
    assert "ValueError: weights[0] [red]and[/blue] a frame" in text
    assert "KeyError: 'last'" in text
    assert load("study", study.parent).noted()[0].note.endswith("KeyError: 'last'")


def test_finished_runs_are_counted_and_listed_only_in_a_small_study(run, study) -> None:
    first = run("done")
    id_ = first.name.rpartition("-")[2]
    assert f"bn seed=1  {id_}" in shown(study)
    for _ in range(status.ROWS):
        run("done")
    assert shown(study).strip() == f"Study study, {status.ROWS + 1} runs: {status.ROWS + 1} done"


def test_a_long_list_is_cut(run, study) -> None:
    for _ in range(status.ROWS + 3):
        run("failed", error="ValueError")
    text = shown(study)
    assert text.count("ValueError") == status.ROWS
    assert "and 3 more" in text


def test_where_nothing_runs_one_is_told_how_to_go_on(run, claim, study) -> None:
    run("interrupted")
    assert "goes on where it stopped" in shown(study)
    claim(run("running"))
    assert "goes on where it stopped" not in shown(study)


def test_the_time_left_follows_finished_runs_of_the_same_cell() -> None:
    def one(name: str, state: str, seconds: float, step: int) -> RunStatus:
        return RunStatus(f"{name}-0123456789", state, {"wall_seconds": seconds, "step": step, "steps": 10})

    finished = [one("small-s0", "done", 10.0, 10), one("large-s0", "done", 100.0, 10)]
    running = [one("small-s1", "running", 6.0, 5), one("large-s1", "running", 30.0, 2)]
    waiting = [RunStatus("large-s2-0123456789", "planned"), one("small-s3", "interrupted", 4.0, 4)]
    assert time_left(finished) is None  # nothing runs
    assert time_left([*finished, *running]) == pytest.approx(120.0)  # as long as the longest
    # large took 100 s and takes 150 s: 125 s; small took 10 s and takes 12 s: 11 s, of which 0.6 is left.
    assert time_left([*finished, *running, *waiting]) == pytest.approx((6 + 120 + 125 + 0.6 * 11) / 2)
    assert "; about 2 min 09 s left" in summary("x", [*finished, *running, *waiting]).plain


def test_a_finished_run_is_read_once(run, claim, study, monkeypatch) -> None:
    run("done")
    folder = run("running")
    claim(folder)
    read: list[str] = []
    real = status.read_status
    monkeypatch.setattr(status, "read_status", lambda folder: read.append(folder.name) or real(folder))
    survey = Survey(study)
    survey.read()
    survey.read()
    assert len(read) == 2
    facts = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**facts, "step": 80}))
    os.utime(folder / "status.json", ns=(0, 1))
    assert max(run.progress.share for run in survey.read()) == 0.8
    assert read[2:] == [folder.name]


def test_watching_prints_a_line_per_change_and_ends_when_all_is_done(run, claim, study, monkeypatch) -> None:
    folder = run("running")
    claim(folder)
    moments = iter(enumerate(["running", "running", "done"]))

    def passes(_: float) -> None:
        moment, state = next(moments)
        facts = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps({**facts, "state": state}))
        os.utime(folder / "status.json", ns=(0, moment))

    monkeypatch.setattr(status.time, "sleep", passes)
    console = Console(file=io.StringIO(), width=200)
    show_status("study", study, watch=True, console=console)
    lines = [line for line in console.file.getvalue().splitlines() if ":" in line[:3]]
    assert [line.partition(": ")[2].split(";")[0] for line in lines] == ["1 running", "1 done"]
    assert "[1/1] bn seed=1: test accuracy 91.2% (20 s)\n" in console.file.getvalue()


def change(folder: Path, **facts: object) -> None:
    """Replace facts of a run's status, as its process would."""
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, **facts}))
    os.utime(folder / "status.json", ns=(0, time.time_ns()))


def test_a_watch_in_a_log_tells_of_failures_when_they_happen_and_counts_earlier_ones(
    run, claim, study, monkeypatch
) -> None:
    run("failed", error="OSError: full")
    first, second = run("running"), run("running")
    claim(first)
    claim(second)
    error = "ValueError: weights[0]\n  a frame\nKeyError: [red]last[/red]"
    moments = iter([lambda: change(first, state="failed", error=error), lambda: change(second, state="done")])
    monkeypatch.setattr(status.time, "sleep", lambda _: next(moments)())
    console = Console(file=io.StringIO(), width=200)
    show_status("study", study, watch=True, console=console)
    lines = [re.sub(r"^..:..:..", "TIME", line) for line in console.file.getvalue().splitlines()]
    assert lines[:5] == [
        "TIME Study study, 3 runs: 2 running, 1 failed; about 30 s left",
        "[2/3] bn seed=2: failed: ValueError: weights[0] a frame KeyError: [red]last[/red]",
        "TIME Study study, 3 runs: 1 running, 2 failed; about 30 s left",
        "[3/3] bn seed=3: test accuracy 91.2% (20 s)",
        "TIME Study study, 3 runs: 2 failed, 1 done",
    ]


WATCH = """
import json, os, sys, time
from pathlib import Path
from normlab.report.study import status
failing, going = map(Path, sys.argv[1:])
changes = iter([(failing, "failed"), (going, "done")])
wait = time.sleep

def sleep(_):
    wait(0.4)
    folder, state = next(changes)
    facts = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**facts, "state": state, "error": "ValueError: no luck"}))

status.time.sleep = sleep
status.show_status("study", failing.parent, watch=True)
"""


def test_a_terminal_shows_runs_under_way_live_and_failures_when_they_happen(run, claim, study) -> None:
    failing, going = run("running", images_per_second=1234.4), run("running", images_per_second=99.0)
    for folder in (failing, going):
        claim(folder)
    code, written = in_terminal([sys.executable, "-c", WATCH, str(failing), str(going)])
    assert code == 0
    plain = CONTROL.sub("", written)
    assert "Study study, 2 runs: 2 running; about 30 s left" in plain
    assert re.search(r"bn seed=1 ━[━╺╸]+ epoch 2/4 +test 91.2% +1,234 images/s +30 s left", plain)
    assert plain.index("bn seed=1: failed: ValueError: no luck") < plain.rindex("99 images/s")  # the other one goes on
    assert "\x1b[2J" not in written  # lines are rewritten, and the screen is not cleared
    assert on_screen(written)[:3] == [
        "[1/2] bn seed=1: failed: ValueError: no luck",
        "[2/2] bn seed=2: test accuracy 91.2% (20 s)",
        "Study study, 2 runs: 1 failed, 1 done",
    ]


def test_a_run_is_called_by_what_tells_it_apart_in_its_study(add_run, study) -> None:
    for batch, lr in itertools.product((8, 32), (0.1, 0.2)):
        add_run(batch=batch, optimizer__lr=lr)
    broken = add_run(batch=64)
    (broken / "config.yaml").write_text("seed: [")
    survey = Survey(study)
    titles = {run.title for run in survey.read()}
    assert titles == {*(f"bn b={batch} lr={lr} seed=0" for batch in (8, 32) for lr in (0.1, 0.2)), broken.name}
    add_run(norm="none", batch=8)
    assert "none b=8 lr=0.1 seed=0" in {run.title for run in survey.read()}


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_watching_quietly(run, claim, study, monkeypatch, terminal) -> None:
    claim(run("running"))
    run("running", error=None)  # nobody holds it

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", stop)
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    show_status("study", study, watch=True, console=console)
    assert "1 running, 1 lost" in console.file.getvalue()


def test_a_quiet_watch_keeps_what_it_read_last_alone(study, monkeypatch) -> None:
    class Runs(list):
        """To be weakly referenced."""

    def poll(_: Survey):
        made = []
        for _ in range(9):
            made.append(weakref.ref(runs := Runs()))
            yield runs
        assert sum(each() is not None for each in made) == 1

    monkeypatch.setattr(status, "_poll", poll)
    show_status("study", study, watch=True, quiet=True, console=Console(file=io.StringIO()))


def test_a_watch_waits_for_the_first_run_of_a_sweep_that_has_just_begun(add_run, study, monkeypatch, capsys) -> None:
    study.mkdir(parents=True)
    moments = iter([lambda: None, lambda: add_run("bn")])
    monkeypatch.setattr(status.time, "sleep", lambda _: next(moments)())
    study_status("study", study.parent, watch=True)
    lines = [re.sub(r"^..:..:..", "TIME", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "TIME Study study has no run yet: waiting for the first."
    assert lines[1].startswith("[1/1] bn seed=0: test accuracy")
    assert lines[2] == "TIME Study study, 1 run: 1 done"
    (study.parent / "gone").mkdir()
    moments = iter([(study.parent / "gone").rmdir])
    with pytest.raises(UserError, match="is not there any more"):
        study_status("gone", study.parent, watch=True)


def test_a_study_that_is_not_there_and_a_watch_that_is_no_truth_value_are_told(tmp_path, run) -> None:
    run("done")
    with pytest.raises(UserError, match=r"There is no study stduy in .*\n.*\nDid you mean study=study\?"):
        study_status("stduy", tmp_path / "outputs", watch=False)
    with pytest.raises(UserError, match="watch=yes is not valid"):
        study_status("study", tmp_path / "outputs", watch="yes")


@pytest.mark.slow
def test_the_command_watches_a_nested_study_until_ctrl_c(add_run, tmp_path) -> None:
    add_run(state=None, study="mine/first")
    command = [sys.executable, str(ROOT / "report.py"), "status", "study=mine/first", "watch=true"]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert "Study mine/first, 1 run: 1 planned" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error == ""
