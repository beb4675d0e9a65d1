"""What a person is told about runs under way and at their end."""

import pytest

from normlab.progress import Display, outcome, span


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
    monkeypatch.setattr("normlab.progress.time.monotonic", lambda: clock)
    display = Display({"resumed": 100.0, "new": 300.0})
    display.news({"name": "resumed", "step": 50, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 9})
    assert display.time_left() is None
    clock = 10.0
    display.ended("resumed", "done")
    assert display.time_left() == pytest.approx(10.0 * 300 / 50)
    display.news({"name": "new", "step": 0, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 0})
    clock = 20.0
    display.news({"name": "new", "step": 50, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 10})
    assert display.time_left() == pytest.approx(20.0 * 150 / 200)


def test_outside_a_terminal_there_are_lines_and_no_bars(capsys) -> None:
    with Display({"a": 1.0}) as display:
        display.news({"name": "a", "step": 1, "steps": 2, "epoch": 0, "epochs": 1, "wall_seconds": 1})
        display.ended("a", "test accuracy 90.0% (1 s)")
    assert capsys.readouterr().err == "[1/1] a: test accuracy 90.0% (1 s)\n"
