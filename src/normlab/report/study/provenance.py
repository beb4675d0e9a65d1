"""Where the numbers of a table or a figure come from: its runs, the code and the hardware that made them."""

import hashlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from normlab import __version__
from normlab.common import git as checkout
from normlab.report.study.load import Study
from normlab.runs.states import FINISHED

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Sources:
    """What one table or figure was made from.

    Attributes:
        runs: names of the runs' folders.
        code: number of these runs by the code that made them; hardware: likewise.
        command: what made the table or figure; reporter: the code that did.
    """

    runs: list[str]
    code: dict[str, int]
    hardware: dict[str, int]
    command: str
    reporter: str

    def sentence(self) -> str:
        """In short and on one line, for whoever reads the table."""
        told = (
            f"{len(self.runs)} runs; code: {_counted(self.code)}; hardware: {_counted(self.hardware)};"
            f" made by `{self.command}` ({self.reporter})."
        )
        return " ".join(told.split())

    def as_json(self) -> str:
        return json.dumps(vars(self), indent=1, ensure_ascii=False) + "\n"


def sources(study: Study, rows: pd.DataFrame) -> Sources:
    """Of a table or figure that shows these rows: of single runs (with the column run), or of cells."""
    runs = runs_of(study, rows)
    return Sources(
        runs=runs,
        code=_tally(_code(study.provenance.get(run, {})) for run in runs),
        hardware=_tally(_hardware(study.provenance.get(run, {})) for run in runs),
        command=command(),
        reporter=_version({"versions": {"normlab": __version__}, "git": checkout.state()}),
    )


def runs_of(study: Study, rows: pd.DataFrame) -> list[str]:
    """The finished runs that the rows are of, in the study's order; all of them where rows are of no cells."""
    finished = study.runs[study.runs["state"].isin(FINISHED)]
    if "run" in rows:
        return finished["run"][finished["run"].isin(rows["run"].unique())].tolist()
    if "arm" not in rows or "batch" not in rows:
        return finished["run"].tolist()
    arms = [rows["arm"]] + ([rows["baseline"]] if "baseline" in rows else [])
    cells = {cell for arm in arms for cell in zip(rows["setting"], arm, rows["batch"], strict=True)}
    places = zip(finished["setting"], finished["arm"], finished["batch"], strict=True)
    return finished["run"][[place in cells for place in places]].tolist()


def mixtures(study: Study) -> Iterator[str]:
    """A sentence for each setting whose table compares runs of different code or hardware."""
    finished = study.runs[study.runs["state"].isin(FINISHED)]
    found: dict[str, list[str]] = {}
    for setting, runs in finished.groupby("setting", sort=False)["run"]:
        made = [study.provenance.get(run, {}) for run in runs]
        for what, tally in (
            ("versions of the code", _tally(map(_code, made))),
            ("kinds of hardware", _tally(map(_hardware, made))),
        ):
            if len(tally) > 1:
                found.setdefault(f"{len(tally)} {what}: {_counted(tally)}", []).append(str(setting))
    for mixture, settings in found.items():
        told = settings[0] if len(settings) == 1 else f"{settings[0]} and {len(settings) - 1} more settings"
        yield f"{told}: the runs of one table come from {mixture}. A difference between arms may be one between these."


def command() -> str:
    """The command line of this report, or the function where it was called from Python."""
    program = Path(sys.argv[0])
    if program.stem not in ("report", "normlab-report"):
        return "normlab.report.build"
    return shlex.join([*(["python"] if program.suffix == ".py" else []), program.name, *sys.argv[1:]])


def _code(made: dict[str, Any]) -> str:
    if "imported" in made:
        return "not of normlab"
    versions = made.get("versions")
    if not isinstance(versions, dict):
        return UNKNOWN
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    return _version(made) + torch


def _version(made: dict[str, Any]) -> str:
    git = made.get("git")
    if not isinstance(git, dict):
        return f"normlab {made['versions'].get('normlab')}"
    diff = str(git.get("diff") or "")
    changed = f" with changes {hashlib.sha256(diff.encode()).hexdigest()[:7]}" if diff else ""
    return f"normlab {made['versions'].get('normlab')}, commit {str(git.get('commit'))[:7]}{changed}"


def _hardware(made: dict[str, Any]) -> str:
    return str(made.get("device") or UNKNOWN)


def _tally(names: Iterable[str]) -> dict[str, int]:
    """Number of each, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0])))


def _counted(tally: dict[str, int]) -> str:
    if len(tally) == 1:
        return next(iter(tally))
    return "; ".join(f"{name} ({number} run{'s' if number > 1 else ''})" for name, number in tally.items())
