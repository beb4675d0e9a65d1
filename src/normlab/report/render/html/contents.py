"""What the page shows, gathered from a study; `index.html.j2` says how it stands there."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd

from normlab import runs
from normlab.report.analysis.cells import Table, named_rows
from normlab.report.analysis.highlight import CLOSE
from normlab.report.analysis.metric import Measure
from normlab.report.analysis.tables import outcomes
from normlab.report.claims.judge import Judgement
from normlab.report.claims.texts import format_effect, format_expectation
from normlab.report.render.markdown import split_number
from normlab.report.study.arms import flatten
from normlab.report.study.load import Study
from normlab.report.study.provenance import Sources

POINTS = 60  # of a run's curve
LOG_BYTES = {"done": 1_000}  # the end of its log that the page holds
LOG_BYTES_OF_OTHERS = 4_000
_OF_A_RUN = ("seed", "study", "output_dir", "data_dir")  # settings that runs of one cell may differ in


class Drawing(NamedTuple):
    """A figure for the page: its panels as Plotly has them, its legend, and as an image for paper."""

    name: str
    caption: str
    panels: Sequence[Mapping[str, Any]]
    legend: Sequence[Mapping[str, str]]
    png: bytes
    sources: Sources


def html_page(
    study: Study,
    question: str,
    tables: Sequence[tuple[Table, Sources]],
    judgements: Sequence[Judgement],
    drawings: Sequence[Drawing],
    measure: Measure,
    facts: Sequence[str],
    warnings: Sequence[str],
) -> str:
    """The page, all of it in one text. Texts from disk are escaped, numbers are as the tables have them."""
    numbers = {cell: i for i, cell in enumerate(_cells(study))}
    data = {
        **_runs(study, numbers, measure),
        "measure": {"label": measure.label, "unit": measure.unit, "images": measure.images},
        "figures": [{"panels": drawing.panels, "legend": drawing.legend} for drawing in drawings],
    }
    states = study.states()
    return (
        _environment()
        .get_template("index.html.j2")
        .render(
            study=study,
            question=question,
            states={state: number for state, number in states.items() if number or state == "done"},
            noted=_noted(study),
            verdicts=[_verdict(judgement) for judgement in judgements],
            tables=[_table(table, made, numbers, study) for table, made in tables if table.name != "verdicts"],
            judged=next((pair for pair in tables if pair[0].name == "verdicts"), None),
            drawings=[(drawing, base64.b64encode(drawing.png).decode()) for drawing in drawings],
            close=CLOSE,
            facts=facts,
            warnings=warnings,
            data=data,
            style=_text("page.css"),
            script=_text("page.js"),
            plotly=_plotly() if drawings or data["runs"] else "",
            reporter=tables[0][1].reporter,
            command=tables[0][1].command,
        )
    )


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_text)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # a browser would read none of it
    return environment


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Plotly's script, which its Python package has with it; the package itself is slow to import."""
    spec = find_spec("plotly")
    assert spec
    assert spec.origin
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _cells(study: Study) -> list[tuple[str, str, int]]:
    placed = study.runs.dropna(subset=["arm"])
    return list(dict.fromkeys(zip(placed["setting"], placed["arm"], placed["batch"].astype(int), strict=True)))


def _noted(study: Study) -> list[dict[str, Any]]:
    """What is not as it should be: runs with a note, gaps of the grid, and whatever has not finished."""
    return [
        {
            "run": run.run or "(no folder)",
            "href": _href(run.run) if run.run else "",
            "place": "" if pd.isna(run.batch) else f"{run.setting}, {run.arm}, batch {run.batch}, seed {run.seed}",
            "state": run.state,
            "note": run.note or "",
        }
        for run in named_rows(study.runs[study.runs["state"] != "done"])
    ]


def _table(table: Table, made: Sources, numbers: Mapping[Any, int], study: Study) -> dict[str, Any]:
    parts = []
    lost = _lost(study)
    for setting, rows in table.rows.items():
        headings = list(dict.fromkeys(heading for row in rows for heading in row))
        shown = []
        for row in rows:
            arm = row["arm"].text if "arm" in row else ""
            line = []
            for heading in headings:
                cell = row.get(heading)
                key = (setting, arm, cell.batch) if cell and cell.batch is not None else None
                number, notes = split_number(cell.text) if cell and cell.standing else ("", "")
                line.append(
                    {
                        "text": cell.text if cell else "--",
                        "marked": number,
                        "notes": notes,
                        "value": "" if not cell or math.isnan(cell.value) else repr(float(cell.value)),
                        "number": numbers.get(key, "") if key else "",
                        "standing": cell.standing if cell else "",
                        "lost": lost.get(key, "") if key else "",
                    }
                )
            shown.append(line)
        # A column of numbers sorts by these, and is aligned to the right.
        numeric = [any(line[i]["value"] for line in shown) for i in range(len(headings))]
        parts.append({"setting": setting, "headings": list(zip(headings, numeric, strict=True)), "rows": shown})
    return {"table": table, "parts": parts, "sources": made}


def _lost(study: Study) -> dict[tuple[str, str, int], str]:
    """The worse of what a cell's runs came to, if not all are done."""
    found: dict[tuple[str, str, int], str] = {}
    for run in named_rows(study.runs.dropna(subset=["arm"])):
        if run.state != "done":
            key = (run.setting, run.arm, int(run.batch))
            found[key] = "diverged" if "diverged" in (run.state, found.get(key)) else "missing"
    return found


def _verdict(judgement: Judgement) -> dict[str, Any]:
    claim = judgement.claim
    return {
        "verdict": judgement.verdict,
        "sentence": claim.sentence,
        "place": judgement.place,
        "source": claim.paper + ("" if claim.place == "n/a" else f", {claim.place}"),
        "paper_number": claim.number,
        "notes": claim.notes,
        "findings": [
            {
                "label": f"{finding.label}, {finding.comparison.measure.label}",
                "expected": format_expectation(finding.comparison),
                "effect": format_effect(finding),
                "n": finding.interval.n,
                "p": None if math.isnan(finding.p_holm) else f"{finding.p_holm:.3g}",
                "remarks": "; ".join(finding.remarks),
            }
            for finding in judgement.results
        ],
    }


def _runs(study: Study, numbers: Mapping[tuple[str, str, int], int], measure: Measure) -> dict[str, Any]:
    """The runs behind each cell: seed, state, result, curve, settings and the end of the log."""
    of_runs = dict(iter(study.evaluations.groupby("run", sort=False)))
    ends = {run.run: {"final": run.final, "best": run.best} for run in named_rows(outcomes(study, measure))}
    flat = {run: _settings(config) for run, config in study.configs.items()}
    first = next(iter(flat.values()), {})
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in flat.values())}
    cells: list[dict[str, Any]] = [
        {"setting": setting, "arm": arm, "batch": batch, "runs": [], "own": {}} for setting, arm, batch in numbers
    ]
    found: list[dict[str, Any]] = []
    axes: dict[tuple[float, ...], int] = {}
    for run in named_rows(study.runs.dropna(subset=["arm"])):
        cell = cells[numbers[run.setting, run.arm, int(run.batch)]]
        cell["runs"].append(len(found))
        row: dict[str, Any] = {"name": run.run, "seed": int(run.seed), "state": run.state, "note": run.note or ""}
        if run.run:
            cell["own"] = {key: value for key, value in flat.get(run.run, {}).items() if key not in common}
            row |= {"href": _href(run.run), "log": _end_of_log(study.folder / run.run, run.state)}
            row |= _curve(of_runs.get(run.run), measure, axes)
            row |= {end: _rounded(value) for end, value in ends.get(run.run, {}).items() if math.isfinite(value)}
        found.append(row)
    return {"cells": cells, "runs": found, "axes": [list(axis) for axis in axes], "common": common}


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    flat = flatten({key: value for key, value in config.items() if key not in _OF_A_RUN})
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


def _curve(rows: pd.DataFrame | None, measure: Measure, axes: dict[tuple[float, ...], int]) -> dict[str, Any]:
    if rows is None or measure.column not in rows:
        return {}
    kept = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(POINTS, len(rows))).round().astype(int))]
    epochs = tuple(int(epoch) for epoch in kept["epoch"])

    def values(column: str) -> list[float | None]:
        if column not in kept:
            return []
        scaled = measure.scale * kept[column].astype(float)
        return [_rounded(value) if math.isfinite(value) else None for value in scaled]

    found = {"axis": axes.setdefault(epochs, len(axes)), "values": values(measure.column)}
    found["train"] = values(measure.train_column) if measure.train_column != measure.column else []
    seconds = float(rows["wall_seconds"].iloc[-1]) if "wall_seconds" in rows else math.nan
    return found | ({"seconds": round(seconds, 1)} if math.isfinite(seconds) else {})


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _end_of_log(folder: Path, state: str) -> str:
    """The last lines of run.log, as a text; nothing if there is none."""
    length = LOG_BYTES.get(state, LOG_BYTES_OF_OTHERS)
    try:
        with (folder / runs.LOG).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - length))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text if size <= length else "... " + text.partition("\n")[2]


def _href(run: str) -> str:
    """From the page to the folder of a run."""
    return f"../{quote(run)}/"
