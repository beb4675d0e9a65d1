"""Run the tests marked gpu so that one which hangs costs a minute: python -m gpu_checks.limited FOUND.json [WORDS]

A test that takes too long ends its process, wherever it is, in CUDA too; the next process goes on with the tests that
are left. FOUND.json.notes keeps what came out of each, so that tests which passed are not run again by a later command.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import table

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 60
SPOILED = 76  # the exit status of a process that a CUDA error has spoiled
NOT_ENDED = "did not end"  # in time, or its process crashed
SLOWEST = 10


class Limited:
    """Leaves out tests that have an outcome; notes those of the others, and ends the process if one takes too long."""

    def __init__(self, notes: Path, limit: float = LIMIT_SECONDS) -> None:
        self.notes, self.limit, self.outcomes = notes, limit, read(notes)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.outcomes]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.outcomes[item.nodeid] = {"outcome": NOT_ENDED, "seconds": 0.0}
        self._write()
        with os.fdopen(os.dup(2), "w") as stderr:  # which pytest is about to replace
            faulthandler.dump_traceback_later(self.limit, exit=True, file=stderr)
            try:
                return (yield)
            finally:
                faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        one = self.outcomes[report.nodeid]
        one["seconds"] += report.duration
        if report.outcome != "passed":
            one["outcome"] = report.outcome
        elif report.when == "teardown" and one["outcome"] == NOT_ENDED:
            one["outcome"] = "passed"
        self._write()
        if report.failed and "CUDA error" in report.longreprtext:  # which every later call would meet, too
            print(report.longreprtext, file=sys.__stderr__, flush=True)
            os._exit(SPOILED)

    def _write(self) -> None:
        self.notes.write_text(json.dumps(self.outcomes, indent=1))


def read(notes: Path) -> dict[str, Any]:
    outcomes: dict[str, Any] = json.loads(notes.read_text()) if notes.is_file() else {}
    return outcomes


def marked() -> list[str]:
    """The files that have tests marked gpu: others may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def main(found: Path, words: list[str]) -> int:
    """Run one process after the other, until one comes to its end."""
    notes = found.with_suffix(".notes")
    # What did not pass in an earlier command is tried again.
    notes.write_text(json.dumps({test: one for test, one in read(notes).items() if one["outcome"] == "passed"}))
    code = SPOILED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # at the limit of all of them
    try:
        goes_on = True
        while goes_on:
            stuck = number(read(notes), NOT_ENDED)
            code = subprocess.run([sys.executable, "-m", "gpu_checks.limited", "--here", str(notes), *words]).returncode
            goes_on = code == SPOILED or number(read(notes), NOT_ENDED) > stuck
    finally:
        outcomes = read(notes)
        found.write_text(json.dumps({"outcomes": outcomes, "table": shown(outcomes)}))
        print(shown(outcomes), flush=True)
    good = number(outcomes, "passed") + number(outcomes, "skipped")
    return 0 if code in (0, pytest.ExitCode.NO_TESTS_COLLECTED) and 0 < good == len(outcomes) else 1


def number(outcomes: dict[str, Any], outcome: str) -> int:
    return sum(one["outcome"] == outcome for one in outcomes.values())


def shown(outcomes: dict[str, Any]) -> str:
    """How many there are of each outcome, those that are not good by name, and the slowest."""
    counts = Counter(one["outcome"] for one in outcomes.values())
    bad = [(test, one) for test, one in outcomes.items() if one["outcome"] not in ("passed", "skipped")]
    slowest = sorted(outcomes.items(), key=lambda each: -each[1]["seconds"])[:SLOWEST]
    rows = [[f"`{test}`", one["outcome"], f"{one['seconds']:.1f}"] for test, one in dict([*bad, *slowest]).items()]
    sentence = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no test"
    return f"{sentence}.\n\n{table(['not good, and the slowest', '', 'seconds'], rows)}"


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        options = ["-m", "gpu", "-p", "no:cacheprovider", "-W", "default", f"--durations={SLOWEST}", "-rfE"]
        notes = Path(sys.argv[2])
        options += ["--basetemp", str(notes.with_suffix(".folders"))]  # else pytest removes those of other sessions
        sys.exit(pytest.main([*options, *marked(), *sys.argv[3:]], plugins=[Limited(notes)]))
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
