"""The provenance of a table or a figure: its runs, and the code and the hardware that made them."""

import itertools
import json
import math
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
from normlab.common.errors import count, listed
from normlab.common.terminal import plain
from normlab.report.study.load import Study
from normlab.runs import provenance as made_by


@dataclass(frozen=True)
class Provenance:
    """The runs, code and hardware behind one table or figure.

    Attributes:
        runs: names of the runs' folders.
        code: number of these runs by the code that made them; hardware: likewise.
        command: what made the table or figure; reporter: the code that did.
        selection: what was tried and chosen, of runs at the best values of some settings.
    """

    runs: list[str]
    code: dict[str, int]
    hardware: dict[str, int]
    command: str
    reporter: str
    selection: dict[str, Any] | None = None

    def counts(self) -> str:
        """Return the numbers of runs by code and hardware."""
        return f"{count(len(self.runs), 'run')}; code: {_counted(self.code)}; hardware: {_counted(self.hardware)}"

    def sentence(self) -> str:
        """Return it in short and on one line, for whoever reads the table."""
        return " ".join(plain(f"{self.counts()}; made by `{self.command}` ({self.reporter}).").split())

    def as_json(self) -> str:
        """Return it as the text of a file."""
        return json.dumps({key: value for key, value in vars(self).items() if value is not None}, indent=1) + "\n"


def provenance_of(study: Study, rows: pd.DataFrame) -> Provenance:
    """Return that of a table or figure which shows these rows: of single runs (with the column run), or of cells."""
    runs = _runs_of(study, rows)
    made = [study.provenance.get(run, {}) for run in runs]
    reporter = made_by.code({"versions": {"normlab": __version__}, "git": checkout.state()})
    selection = study.tuning.selection() if study.tuning else None
    return Provenance(runs, _tally(map(_code, made)), _tally(map(_hardware, made)), _command(), reporter, selection)


def _runs_of(study: Study, rows: pd.DataFrame) -> list[str]:
    """Return the finished runs that the rows are of, in the study's order; all of them where rows are of no cells."""
    finished = study.finished
    if "run" in rows:
        finished = study.tuning.study.finished if study.tuning else finished  # those that were tried, too
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
        kinds_of = {kinds: list(map(name, made)) for kinds, name in _KINDS.items()}
        known = list(map(made_by.libraries, made))
        for library in sorted({library for versions in known for library in versions}):
            versions = [each.get(library) for each in known]
            kinds_of[f"versions of {library}"] = [f"{library} {version}" if version else "" for version in versions]
        for kinds, names in kinds_of.items():
            tally = _tally(filter(None, names))
            if len(tally) > 1:
                mixtures.setdefault(f"{len(tally)} {kinds}: {_counted(tally)}", []).append(str(setting))
    for mixture, (first, *more) in mixtures.items():
        where = f"{first} and {len(more)} more settings" if more else first
        yield f"{where}: the runs of one table come from {mixture}. A difference between arms may be one between these."


def mixed_cells(study: Study) -> Iterator[str]:
    """Yield a sentence for each thing that seeds of a cell should share, and do not."""
    mixtures: dict[str, list[str]] = {}
    finished = study.finished
    sizes = dict(zip(finished["run"], finished["parameters"], strict=True))
    for (setting, arm, batch), runs in finished.groupby(["setting", "arm", "batch"], sort=False)["run"]:
        if len(runs) == 1:
            continue
        for what, value in _SHARED.items():
            tally = _tally(filter(None, (value(study.provenance.get(run, {}), sizes[run]) for run in runs)))
            if len(tally) > 1:
                mixtures.setdefault(f"{what}: {_counted(tally)}", []).append(f"{arm}, batch {batch} ({setting})")
    for mixture, cells in mixtures.items():
        yield f"The seeds of {listed(cells, 1)} differ in their {mixture}. Their spread is not one of seeds alone."


def continued(study: Study) -> Iterator[str]:
    """Yield a sentence about the runs that went on with other code, versions or hardware than they began with."""
    found: dict[str, list[str]] = {}
    for run in study.finished["run"]:
        parts = made_by.segments(study.provenance.get(run, {}))
        for before, after in itertools.pairwise(parts):
            for difference in made_by.differences(before, after):
                found.setdefault(difference, []).append(f"{study.called(run)} from step {before.get('until_step')} on")
    for difference, runs in found.items():
        yield f"Interrupted and continued under other circumstances ({difference}): {listed(runs, 1)}."


def _command() -> str:
    """Return the command line of this report, or the function where it was called from Python."""
    program = Path(sys.argv[0])
    if program.stem not in ("report", "normlab-report"):
        return "normlab.report.build"
    return shlex.join([*(["python"] if program.suffix == ".py" else []), program.name, *sys.argv[1:]])


def _code(made: dict[str, Any]) -> str:
    if "imported" in made:
        return "not of normlab"
    if not isinstance(made.get("versions"), dict):
        return made_by.UNKNOWN
    found = made_by.circumstances(made)
    return found["code"] + (f", torch {found['torch']}" if "torch" in found else "")


def _hardware(made: dict[str, Any]) -> str:
    return str(made.get("device") or made_by.UNKNOWN)


def _libraries(made: dict[str, Any]) -> str:
    found = made_by.circumstances(made)
    return ", ".join(f"{name} {found[name]}" for name in ("Python", "NumPy", "torchvision") if name in found)


def _tally(names: Iterable[str]) -> dict[str, int]:
    """Return the number of each, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0])))


def _counted(tally: dict[str, int]) -> str:
    counted = [f"{name} ({number} run{'s' if number > 1 else ''})" for name, number in tally.items()]
    return "; ".join(counted if len(tally) > 1 else tally)


def _images(made: dict[str, Any], parameters: float) -> str:
    return str(made.get("data_fingerprint") or "")[:10]


def _files(made: dict[str, Any], parameters: float) -> str:
    data = made.get("data")
    return str(data.get("contents") or "")[:10] if isinstance(data, dict) else ""


def _weights(made: dict[str, Any], parameters: float) -> str:
    return made_by.weights_digest(made)


def _size(made: dict[str, Any], parameters: float) -> str:
    return "" if math.isnan(parameters) else f"{parameters:,.0f}"


def _own_code(made: dict[str, Any], parameters: float) -> str:
    found = made_by.circumstances(made)
    return ", ".join(f"{name} {found[name]}" for name in made_by.OWN_CODE if name in found)


def _threads(made: dict[str, Any], parameters: float) -> str:
    return str(made.get("threads") or "")


_SHARED = {  # by the seeds of a cell
    "images (digest)": _images,
    "files of images (digest)": _files,
    "trained weights at the start (digest)": _weights,
    "number of parameters": _size,
    "own code": _own_code,
    "threads": _threads,
}
_KINDS = {"versions of the code": _code, "kinds of hardware": _hardware, "sets of library versions": _libraries}
