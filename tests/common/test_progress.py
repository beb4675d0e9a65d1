"""What a person is told about runs under way and at their end."""

import io
from collections.abc import Sequence

import pytest

from normlab.common.console import Console
from normlab.common.progress import Display, Progress, headline, one_line, outcome, span

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
        ({"state": "interrupted", "error": "interrupted by SIGTERM"}, "interrupted: by SIGTERM"),
    ],
)
def test_an_outcome_is_a_few_words(status, text) -> None:
    assert outcome(status) == text


def test_time_left_is_the_time_so_far_scaled_by_the_work_done_here(monkeypatch) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({"resumed": "resumed", "new": "new"}, {"resumed": 100.0, "new": 300.0})
    display.news("resumed", {"step": 50, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 9})
    assert display.time_left() is None
    clock = 10.0
    display.ended("resumed", DONE)
    assert display.time_left() == pytest.approx(10.0 * 300 / 50)
    display.news("new", {"step": 0, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 0})
    clock = 20.0
    display.news("new", {"step": 50, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 10})
    assert display.time_left() == pytest.approx(20.0 * 150 / 200)


@pytest.mark.parametrize("change", ["news", "ended"])
def test_the_time_left_can_be_asked_for_at_any_moment(change) -> None:
    display = Display({"a": "a"}, quiet=True)

    class Watched(dict):
        """Asks after each change, as the thread does that draws the live lines."""

        def __setitem__(self, key: str, value: float) -> None:
            super().__setitem__(key, value)
            display.time_left()

    display.done = Watched()
    getattr(display, change)("a", {**DONE, "step": 1, "steps": 2})


def test_outside_a_terminal_there_are_lines_and_no_bars(capsys) -> None:
    with Display({"a": "a"}) as display:
        display.news("a", {"step": 1, "steps": 2, "epoch": 0, "epochs": 1, "wall_seconds": 1})
        display.ended("a", DONE)
    assert capsys.readouterr().err == "[1/1] a: test accuracy 90.0% (1 s)\n"


def test_a_log_hears_of_a_long_run_after_evaluations_and_at_most_once_a_minute(monkeypatch, capsys) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({"a": "a"})
    for second in range(601):  # an epoch of 7 s each, and news every second
        clock = float(second)
        display.news("a", {"step": second, "steps": 700, "epoch": second // 7, "epochs": 100, "wall_seconds": 1})
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 10
    assert lines[0].startswith("a: epoch 9/100, ")


def test_a_log_hears_of_an_epoch_that_takes_hours(monkeypatch, capsys) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({"a": "a"})
    for minute in range(61):
        clock = 60.0 * minute
        display.news("a", {"step": minute, "steps": 100, "epoch": 0, "epochs": 1, "wall_seconds": 60 * minute})
    assert len(capsys.readouterr().err.splitlines()) == 6


def test_of_many_runs_a_log_hears_no_more_than_of_one(monkeypatch, capsys) -> None:
    clock = 0.0
    monkeypatch.setattr("normlab.common.progress.time.monotonic", lambda: clock)
    display = Display({name: name for name in map(str, range(64))})
    for minute in range(129):
        clock = 60.0 * minute
        for name in display.work:
            display.news(name, {"step": 1, "steps": 2, "epoch": minute, "epochs": 999, "wall_seconds": 1})
    assert 100 <= len(capsys.readouterr().err.splitlines()) <= 128


@pytest.mark.parametrize(("state", "told"), [("done", ""), ("failed", "[1/1] a: failed: Out of luck.\n")])
def test_a_quiet_display_tells_of_failures_only(capsys, state, told) -> None:
    with Display({"a": "a"}, quiet=True) as display:
        display.say("starting")
        display.news("a", {"step": 1, "steps": 2, "epoch": 0, "epochs": 1, "wall_seconds": 1})
        display.ended("a", {**DONE, "state": state, "error": "Out of luck."})
    assert capsys.readouterr().err == told


def test_an_error_that_is_too_long_keeps_its_last_line() -> None:
    assert one_line("One.\nTwo.\n") == "One. Two."
    long = one_line("RuntimeError: a\n" + "  in some frame\n" * 99 + "ValueError: the shapes differ\n")
    assert len(long) <= 240
    assert long.startswith("RuntimeError: a in some frame")
    assert long.endswith("me in some frame ValueError: the shapes differ")
    assert len(one_line("x\n" + "word " * 99)) <= 240
    assert one_line("x" * 999) == f"{'x' * 157}...{'x' * 80}"
    assert Progress({"doing": "x" * 999}).words == (f"{'x' * 37}...{'x' * 20}",)


def test_a_run_that_prepares_its_data_says_so() -> None:
    assert Progress({"doing": "Decoding photos: 512 of 1,000 images"}).words == (
        "Decoding photos: 512 of 1,000 images",
    )


@pytest.mark.parametrize(
    ("speed", "text"), [(1234.4, "1,234 images/s"), (3.14159, "3.1 images/s"), (0, ""), (None, ""), ("fast", "")]
)
def test_words_of_a_run_are_epoch_accuracy_speed_and_time_left(speed, text) -> None:
    status = {"epoch": 1, "epochs": 4, "step": 25, "steps": 100, "wall_seconds": 20, "test_accuracy": 0.912}
    progress = Progress({**status, "images_per_second": speed})
    assert progress.words == ("epoch 2/4", "test 91.2%", text, "1 min 00 s left")


def lines(names: Sequence[str], width: int, height: int = 24) -> list[str]:
    """What a display shows of runs under way, in a terminal of that size."""
    console = Console(file=io.StringIO(), width=width, height=height)
    display = Display({name: name for name in names}, console=console)
    status = {"epoch": 1, "epochs": 4, "step": 25, "steps": 100, "wall_seconds": 20}
    for name in names[:-1]:
        display.news(name, {**status, "test_accuracy": 0.912, "images_per_second": 1234.4})
    display.news(names[-1], {"doing": "Decoding photos: 512 of 1,000 images"})
    console.print(display._lines())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 80, 200])
def test_no_live_line_is_wider_than_the_terminal_and_names_go_last(width) -> None:
    names = ["bn (eps=0.001) b=32 seed=1", "none b=8 seed=0", "last"]
    shown = lines(names, width)
    assert len(shown) == 4
    assert max(map(len, shown)) <= width
    if width >= 40:
        assert shown[0] == "3 runs: 3 running"
        assert [line.startswith(name) for line, name in zip(shown[1:], names, strict=True)] == [True] * 3
    assert ("epoch 2/4" in shown[1]) is (width >= 40)
    assert ("images/s" in shown[1]) is (width >= 100)
    assert ("1 min 00 s left" in shown[1]) is (width >= 60)


def test_counts_follow_what_becomes_of_runs(capsys) -> None:
    names = {name: name for name in "abcd"}
    display = Display(names)
    display.news("a", {})
    display.ended("b", {**DONE, "state": "failed", "error": "Out of luck."})
    display.news("c", {})
    display.put_off("c", "No memory.")
    assert headline("", list(display.states.values()), 7.0).plain == (
        "4 runs: 1 running, 1 failed, 2 planned; about 7 s left"
    )
    assert capsys.readouterr().err == "[1/4] b: failed: Out of luck.\nc: No memory.\n"
