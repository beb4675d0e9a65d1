"""A report that is built again whenever records of its study change; time passes only where the watcher waits."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from normlab import report
from normlab.cli.commands import _carry_out
from normlab.common.errors import UserError, storage_error
from normlab.common.installation import CONF
from normlab.report import watching
from normlab.report.render.html.live import as_live
from normlab.report.watching import watch_study
from normlab.runs import files, reading

TABLES = report.options(figures=False)


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def plan(monkeypatch) -> Callable[..., list[tuple[float, str]]]:
    """`plan({7: change}, cost=2)`: after 7 s `change` is called; a build takes 2 s, and builds nothing. Without a cost
    it is a real one that takes no time. Returned are the builds so far: when each began, and the stamp of its page, ""
    of the last one."""
    nothing = SimpleNamespace(page=Path("page"), study=SimpleNamespace(counted=str))

    def start(changes: dict[int, Callable[[], Any]], cost: float = 0.0) -> list[tuple[float, str]]:
        clock, builds = SimpleNamespace(now=0.0), []

        def pass_by(seconds: float) -> None:
            clock.now += seconds
            for due in [due for due in sorted(changes) if due <= clock.now]:
                changes.pop(due)()
            assert clock.now < 1_000, "the watcher does not end"

        def built(real: Callable[..., Any]) -> Callable[..., Any]:
            def build(study: str, output_dir: Path, options: report.Options, stamp: str = "") -> Any:
                builds.append((clock.now, stamp))
                done = nothing if cost else real(study, output_dir, options, *filter(None, [stamp]))
                pass_by(cost)
                return done

            return build

        monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=pass_by))
        for name in ("build", "write_report"):
            monkeypatch.setattr(watching, name, built(getattr(watching, name)))
        return builds

    return start


def finish(run: Path, source: Path) -> None:
    for name in ("metrics.jsonl", "status.json"):
        (run / name).write_text((source / name).read_text())


def interrupted(run: Path, epoch: int) -> None:
    """Write one more evaluation, and the status."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": epoch, "step": epoch, "test_accuracy": 0.1}) + "\n")
    beat(run)


def beat(run: Path) -> None:
    status = {"state": "interrupted", "heartbeat": datetime.now(UTC).isoformat()}
    (run / "status.json").write_text(json.dumps(status))


@pytest.mark.slow
def test_it_builds_when_records_change_and_ends_with_the_last_run(add_run, outputs, plan, capsys) -> None:
    first, second = add_run(), add_run("none", state=None)
    seen: list[str] = []
    page = outputs / "study" / "report" / "index.html"
    builds = plan(
        {
            10: lambda: interrupted(second, 1),
            20: lambda: beat(second),  # which is no news
            30: lambda: interrupted(second, 2),
            31: lambda: seen.append(page.read_text()),
            40: lambda: finish(second, first),
        }
    )
    assert watch_study("study", outputs, TABLES) == page
    assert [begun for begun, _ in builds] == [0, 10, 30, 40, 49]  # nothing was under way for 10 s
    assert [bool(stamp) for _, stamp in builds] == [True] * 4 + [False]
    assert seen[0].startswith(f'<!doctype html>\n<html data-live="{builds[2][1]}"')
    assert "data-live=" not in page.read_text().partition("<head>")[0]
    lines = [line[9:] for line in capsys.readouterr().out.splitlines() if line[2:3] == line[5:6] == ":"]
    assert lines[0] == f"Open {page}: it shows each new state by itself. Ctrl-C ends watching, and no run."
    assert lines[1:] == [
        *("Report built: 1 done, 1 missing.", *["Report built: 1 done, 1 interrupted."] * 2, "Report built: 2 done."),
        "All runs have ended: the report is complete, and not watched any more.",
    ]


def test_a_study_that_has_ended_is_built_once(add_run, outputs, plan) -> None:
    add_run()
    add_run("none", state="failed")
    builds = plan({})
    watch_study("study", outputs, TABLES)
    assert builds == [(0, "")]


@pytest.mark.parametrize(("cost", "gap"), [(0.5, 5), (4.0, 20)])
def test_building_takes_no_more_than_a_fifth_of_the_time(add_run, outputs, plan, cost, gap) -> None:
    first, second = add_run(), add_run("none", state=None)
    changes = {moment: lambda moment=moment: interrupted(second, moment) for moment in range(1, 100)}
    changes[100] = lambda: finish(second, first)
    builds = plan(changes, cost)
    watch_study("study", outputs, TABLES)
    starts = [begun for begun, _ in builds]
    assert len(starts) > 4
    assert all(gap <= later - begun <= gap + 2 for begun, later in pairwise(starts[:-1])), starts


@pytest.mark.slow
def test_it_waits_for_a_study_that_is_started_and_survives_runs_that_go_or_are_damaged(
    add_run, outputs, plan, capsys
) -> None:
    (outputs / "study").mkdir(parents=True)
    source, runs = add_run(study="other"), []

    def remove() -> None:
        for file in runs[1].iterdir():
            file.unlink()
        runs[1].rmdir()

    builds = plan(
        {
            5: lambda: runs.extend(add_run(norm, state=None) for norm in ("bn", "none", "gn")),
            10: lambda: finish(runs[0], source),
            20: lambda: (runs[2] / "status.json").write_text("{"),
            30: remove,
        }
    )
    watch_study("study", outputs, TABLES)
    assert [begun for begun, _ in builds] == [10, 20, 30, 39]
    printed = capsys.readouterr().out
    assert printed.count("No run has been evaluated yet.") == 1
    assert "Report built: 1 done, 1 missing, 1 unreadable." in printed


@pytest.mark.slow
def test_a_full_disk_is_told_once_and_tried_again(add_run, outputs, plan, monkeypatch, capsys) -> None:
    first, second = add_run(), add_run("none", state=None)
    real = files.write_atomically

    def write(path: Path, *arguments: Any, **options: Any) -> None:
        if len(builds) < 3:
            raise storage_error(path, OSError(28, "No space left on device"))
        real(path, *arguments, **options)

    monkeypatch.setattr(files, "write_atomically", write)
    builds = plan({75: lambda: finish(second, first)})
    watch_study("study", outputs, report.options(figures=False, quiet=True))
    assert [begun for begun, _ in builds] == [0, 30, 60, 75, 84]
    out, error = capsys.readouterr()
    folder = outputs / "study" / "report"
    assert out == f"{folder / 'index.html'}\n"
    told, *_ = error.splitlines()
    assert error.count("disk is full") == 1
    assert told[9:].startswith(
        f"The report is not built: Cannot write {folder / 'accuracy.md'}. The disk is full. Free some space"
    )


@pytest.mark.parametrize("own", [True, False])
def test_ctrl_c_takes_the_mark_from_the_page_that_it_made(add_run, outputs, plan, capsys, own) -> None:
    add_run()
    add_run("none", state=None)
    page = outputs / "study" / "report" / "index.html"
    marked = as_live("<!doctype html>\n<html></html>", "another's")

    def stop() -> None:
        if not own:
            page.write_text(marked)
        raise KeyboardInterrupt

    plan({3: stop})
    with pytest.raises(KeyboardInterrupt):
        watch_study("study", outputs, TABLES)
    assert ("data-live=" in page.read_text().partition("<head>")[0]) == (not own)
    assert "Not watched any more" in capsys.readouterr().out


def test_what_cannot_be_watched_is_refused_in_a_sentence(add_run, outputs, plan) -> None:
    run = add_run()
    with pytest.raises(UserError, match=r"There is no study stduy in .*\n.*\nDid you mean study=study\?"):
        watch_study("stduy", outputs, TABLES)
    packed = report.pack_study("study", outputs, quiet=True)
    with pytest.raises(UserError, match=r"in one file, in which no run goes on.*\nLeave out watch=true"):
        watch_study(str(packed), outputs, TABLES)
    menu = reading.read_yaml(CONF / "report.yaml")
    for command in ("claims", "results", "import", "pack", "verify"):
        with pytest.raises(UserError, match=f"watch=true: `{command}` answers once"):
            _carry_out(command, {**menu, "watch": True})
    with pytest.raises(UserError, match=r"watch=yes is not valid.*\nDid you mean watch=true\?"):
        _carry_out(None, {**menu, "watch": "yes"})
    (run / "status.json").write_text(json.dumps({"state": "interrupted"}))
    moved = outputs / "moved"
    plan({3: lambda: (outputs / "study").rename(moved)})
    with pytest.raises(UserError, match="is not there any more, so study study is not watched"):
        watch_study("study", outputs, TABLES)
