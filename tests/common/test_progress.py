"""What a person is told about runs under way and at their end."""

import pytest

from normlab.common.progress import Display, outcome, span

DONE = {"state": "done", "test_accuracy": 0.9, "wall_seconds": 1}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (3599.6, "1 h 00 min")],
)
def test_durations_read_as_people_say_them(seconds, text) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ({"state": "done", "test_accuracy": 0.9123, "wall_seconds": 61}, "test accuracy 91.2% (1 min 01 s)"),
        ({"state": "done", "test_loss": 1234.5678, "wall_seconds": 1}, "test loss 1235 (1 s)"),
        ({"state": "diverged", "diverged_step": 7}, "diverged at step 7"),
        ({"state": "failed", "error": "One.\nTwo."}, "failed: One. Two."),
    ],
)
def test_an_outcome_is_a_few_words(status, text) -> None:
    assert outcome(status) == text


def test_time_left_is_the_time_so_far_scaled_by_the_work_done_here(monkeypatch) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({"resumed": 100.0, "new": 300.0})
    display.news("resumed", {"step": 50, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 9})
    assert display.time_left() is None
    clock = 10.0
    display.ended("resumed", DONE)
    assert display.time_left() == pytest.approx(10.0 * 300 / 50)
    display.news("new", {"step": 0, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 0})
    clock = 20.0
    display.news("new", {"step": 50, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 10})
    assert display.time_left() == pytest.approx(20.0 * 150 / 200)


def test_outside_a_terminal_there_are_lines_and_no_bars(capsys) -> None:
    with Display({"a": 1.0}) as display:
        display.news("a", {"step": 1, "steps": 2, "epoch": 0, "epochs": 1, "wall_seconds": 1})
        display.ended("a", DONE)
    assert capsys.readouterr().err == "[1/1] a: test accuracy 90.0% (1 s)\n"


def test_a_log_hears_of_a_long_run_after_evaluations_and_at_most_once_a_minute(monkeypatch, capsys) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({"a": 1.0})
    for second in range(601):  # an epoch of 7 s each, and news every second
        clock = float(second)
        display.news("a", {"step": second, "steps": 700, "epoch": second // 7, "epochs": 100, "wall_seconds": 1})
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 10
    assert lines[0].startswith("a: epoch 9/100, ")


def test_a_log_hears_of_an_epoch_that_takes_hours(monkeypatch, capsys) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({"a": 1.0})
    for minute in range(61):
        clock = 60.0 * minute
        display.news("a", {"step": minute, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 60 * minute})
    assert len(capsys.readouterr().err.splitlines()) == 6


def test_of_many_runs_a_log_hears_no_more_than_of_one(monkeypatch, capsys) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display(dict.fromkeys(map(str, range(64)), 1.0))
    for minute in range(129):
        clock = 60.0 * minute
        for name in display.work:
            display.news(name, {"step": 1, "steps": 2, "epoch": minute, "epochs": 999, "wall_seconds": 1})
    assert 100 <= len(capsys.readouterr().err.splitlines()) <= 128


@pytest.mark.parametrize(("state", "told"), [("done", ""), ("failed", "[1/1] a: failed: Out of luck.\n")])
def test_a_quiet_display_tells_of_failures_only(capsys, state, told) -> None:
    with Display({"a": 1.0}, quiet=True) as display:
        display.say("starting")
        display.news("a", {"step": 1, "steps": 2, "epoch": 0, "epochs": 1, "wall_seconds": 1})
        display.ended("a", {**DONE, "state": state, "error": "Out of luck."})
    assert capsys.readouterr().err == told


def test_a_run_that_prepares_its_data_says_so(capsys) -> None:
    display = Display({"a": 1.0})
    display.news("a", {"doing": "Decoding photos, once: 512 of 1,000 images"})
    assert display.under_way == {"a": "Decoding photos, once: 512 of 1,000 images"}


def test_live_lines_call_runs_by_what_tells_them_apart() -> None:
    names = ["r18-digits-bn-b8-s0-0123456789", "r18-digits-bn-b8-s0-abcdef0123", "r18-digits-gn-b8-s0-0123456789"]
    labels = Display(dict.fromkeys(names, 1.0)).labels
    assert list(labels.values()) == ["bn-b8-s0-0123456789", "bn-b8-s0-abcdef0123", "gn-b8-s0"]
    assert list(Display({names[0]: 1.0}).labels.values()) == ["r18-digits-bn-b8-s0"]


def test_runs_of_one_name_in_two_folders_are_told_apart(capsys) -> None:
    with Display({"a/bn-s0": 1.0, "b/bn-s0": 1.0, "b/none-s0": 1.0}) as display:
        for key in display.work:
            display.ended(key, {"state": "done", "test_accuracy": 0.5, "wall_seconds": 1})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["a/bn-s0:", "b/bn-s0:", "none-s0:"]
