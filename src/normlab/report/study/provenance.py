"""The provenance of a table or a figure: its runs, and the code and the hardware that made them."""

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

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Provenance:
    """The runs, code and hardware behind one table or figure.

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
        """Return it in short and on one line, for whoever reads the table."""
        text = (
            f"{len(self.runs)} runs; code: {_counted(self.code)}; hardware: {_counted(self.hardware)};"
            f" made by `{self.command}` ({self.reporter})."
        )
        return " ".join(text.split())

    def as_json(self) -> str:
        """Return it as the text of a file."""
        return json.dumps(vars(self), indent=1, ensure_ascii=False) + "\n"


def provenance_of(study: Study, rows: pd.DataFrame) -> Provenance:
    """Return that of a table or figure which shows these rows: of single runs (with the column run), or of cells."""
    runs = _runs_of(study, rows)
    made = [study.provenance.get(run, {}) for run in runs]
    reporter = _version({"versions": {"normlab": __version__}, "git": checkout.state()})
    return Provenance(runs, _tally(map(_code, made)), _tally(map(_hardware, made)), _command(), reporter)


def _runs_of(study: Study, rows: pd.DataFrame) -> list[str]:
    """Return the finished runs that the rows are of, in the study's order; all of them where rows are of no cells."""
    finished = study.finished
    if "run" in rows:
        return list(finished["run"][finished["run"].isin(rows["run"].unique())])
    if not {"arm", "batch"} <= set(rows):
        return list(finished["run"])
    arms = [rows[column] for column in ("arm", "baseline") if column in rows]
    cells = {cell for arm in arms for cell in zip(rows["setting"], arm, rows["batch"], strict=True)}
    places = zip(finished["setting"], finished["arm"], finished["batch"], strict=True)
    return list(finished["run"][[place in cells for place in places]])


def mixed_provenance(study: Study) -> Iterator[str]:
    """Yield a sentence for each setting whose table compares runs of different code or hardware."""
    mixtures: dict[str, list[str]] = {}
    for setting, runs in study.finished.groupby("setting", sort=False)["run"]:
        made = [study.provenance.get(run, {}) for run in runs]
        tallies = {"versions of the code": _tally(map(_code, made)), "kinds of hardware": _tally(map(_hardware, made))}
        for kinds, tally in tallies.items():
            if len(tally) > 1:
                mixtures.setdefault(f"{len(tally)} {kinds}: {_counted(tally)}", []).append(str(setting))
    for mixture, (first, *more) in mixtures.items():
        where = f"{first} and {len(more)} more settings" if more else first
        yield f"{where}: the runs of one table come from {mixture}. A difference between arms may be one between these."


def _command() -> str:
    """Return the command line of this report, or the function where it was called from Python."""
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
    """Return the number of each, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0])))


def _counted(tally: dict[str, int]) -> str:
    counted = [f"{name} ({number} run{'s' if number > 1 else ''})" for name, number in tally.items()]
    return "; ".join(counted if len(tally) > 1 else tally)
