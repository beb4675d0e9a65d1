"""What a person sees of a study, as plain values, and how it differs from what was to be seen before an attack."""

import contextlib
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from normlab.report import build, load, options, study_status
from normlab.report.study.load import Study

CLASSES = ("same", "told", "refused", "traceback", "silently changed")
_PLACE = ("run", "setting", "arm", "batch", "seed", "state")
_FACTS = ("epochs", "wall_seconds", "peak_memory_bytes", "parameters", "classes")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def look(study: str, outputs: Path) -> dict[str, Any]:
    """Load a study, report it without figures, and ask for its status."""
    loaded = load(study, outputs)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        page = build(study, outputs, options(figures=False, quiet=True))
        study_status(study, outputs, watch=False)
    texts = {path.name: path.read_text(errors="replace") for path in sorted(page.parent.iterdir())}
    shown = "\n".join([out.getvalue(), error.getvalue(), *texts.values()])
    return {
        "states": {row.run: row.state for row in loaded.runs.itertuples() if row.run},
        "gaps": int((loaded.runs["run"] == "").sum()),
        "numbers": numbers(loaded),
        "tables": {name: text for name, text in texts.items() if name.endswith((".csv", ".tex"))},
        "said": [
            *loaded.warnings,
            *(f"{row.run}: {row.note}" for row in loaded.noted()),
            *error.getvalue().splitlines(),
        ],
        "absurd": [*absurd(loaded), *(f"the output has {found!r}" for found in sorted(set(_CONTROL.findall(shown))))],
    }


def numbers(study: Study) -> dict[str, str]:
    """Return all numbers of each run, as text."""
    found: dict[str, list[Any]] = {}
    for table in (study.runs[["run", *_FACTS]], study.evaluations, *study.probes.values()):
        own = table[[column for column in table if column == "run" or column not in _PLACE]]
        for run, rows in own.groupby("run"):
            part = rows.drop(columns="run").dropna(axis="columns", how="all")
            found.setdefault(str(run), []).append(part.sort_index(axis="columns").to_dict("list"))
    return {run: json.dumps(parts, default=repr) for run, parts in found.items() if run}


def absurd(study: Study) -> list[str]:
    """Return sentences about numbers that no run can have."""
    wrong = []
    for whole in (study.evaluations, study.runs):
        twice = whole.columns.duplicated()
        wrong += [f"there are two columns {column}" for column in whole.columns[twice]]
        table = whole.loc[:, ~twice].select_dtypes("float")
        for column in table:
            low = -math.inf if "loss" in column else 0.0
            high = math.inf if "loss" in column else 1.0 if "accuracy" in column else 1e18
            values = table[column].dropna()
            if not values.between(low, high).all():
                wrong.append(f"{column} is {values[~values.between(low, high)].tolist()[:1]}")
    return wrong


def compared(before: dict[str, Any], after: dict[str, Any], names: Iterable[str]) -> tuple[str, str]:
    """Return the class of an outcome (see CLASSES) and the sentence, or the difference, that it is for.

    Args:
        before, after: what was seen.
        names: the runs that were changed, or the file if it is no run's.
    """
    names = [*names]
    if after["absurd"] != before["absurd"]:
        return "silently changed", f"absurd: {after['absurd'][0]}"
    for what in ("states", "numbers"):
        others = sorted((before[what].keys() | after[what].keys()) - set(names))
        for run in others:
            if before[what].get(run) != after[what].get(run):
                return (
                    "silently changed",
                    f"the {what} of {run}, which nobody touched: {_change(before, after, what, run)}",
                )
    said = [line for line in after["said"] if line not in before["said"]]
    told = next((line for line in said if any(name in line for name in names)), None)
    if told:
        return "told", told
    for what in ("states", "numbers", "tables"):
        for name in sorted(before[what].keys() | after[what].keys()):
            if before[what].get(name) != after[what].get(name):
                return "silently changed", f"{what} of {name}: {_change(before, after, what, name)}"
    return ("silently changed", f"a sentence that does not name it: {said[0]}") if said else ("same", "")


def _change(before: dict[str, Any], after: dict[str, Any], what: str, name: str) -> str:
    old, new = (str(each[what].get(name)) for each in (before, after))
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, at - 20)
    return f"{old[start : at + 30]!r} became {new[start : at + 30]!r}"
