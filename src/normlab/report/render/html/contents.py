"""The contents of the page, gathered from a study; `index.html.j2` lays them out."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import pandas as pd

from normlab import runs
from normlab.common.errors import count
from normlab.common.terminal import plain
from normlab.report.analysis.cells import Table
from normlab.report.analysis.frames import CELL, evenly, named_rows, outcomes
from normlab.report.analysis.highlight import CLOSE
from normlab.report.analysis.metrics import Metric
from normlab.report.claims.judge import INCONCLUSIVE, Judgement
from normlab.report.claims.texts import format_effect, format_expectation
from normlab.report.render.answers import OPEN, REAL, Answers
from normlab.report.render.description import facts, question
from normlab.report.render.html.svg import PageFigure, figure_html
from normlab.report.render.layout import filled, split_number
from normlab.report.study.load import Study
from normlab.report.study.provenance import Provenance
from normlab.runs import reading

POINTS = 60  # of a run's curve
DIGITS = 5  # of a number on the page
LOG_BYTES = {"done": 1_000}  # the end of its log that the page holds
LOG_BYTES_OF_OTHERS = 4_000
_OF_A_RUN = ("seed", "study", "output_dir", "data_dir")  # settings that runs of one cell may differ in

SEEDS, VERDICTS, CURVES = "seeds", "verdicts", "learning_curves"  # tables and figures with a place of their own
UNFOLDED = ("tuned",)  # tables without which the first cannot be understood

CellKey = tuple[str, str, int | None]  # setting, arm and batch size; None: a cell of a table that is of no single one


class PageTable(NamedTuple):
    """A table for the page, with the text of its LaTeX file."""

    table: Table
    sources: Provenance
    latex: str


def cell_numbers(study: Study) -> dict[tuple[str, str, int], int]:
    """Return the number of each cell on the page."""
    places = study.placed.astype({"batch": int})
    keys = dict.fromkeys(zip(*(places[key] for key in CELL), strict=True))
    return {key: number for number, key in enumerate(keys)}


def html_page(
    study: Study,
    tables: Sequence[PageTable],
    judgements: Sequence[Judgement],
    drawings: Sequence[PageFigure],
    metric: Metric,
    warnings: Sequence[str],
    answers: Answers,
) -> str:
    """Return the whole page as one text. Texts from disk are escaped; numbers are those of the tables.

    Args:
        study: the runs.
        tables: all of them, that of the metric first.
        judgements: the verdicts on claims.
        drawings: all figures, the main one first.
        metric: that the study is compared by.
        warnings: sentences about the study.
        answers: what stands above everything else.
    """
    numbers: dict[Any, int] = cell_numbers(study)
    lost = _lost(study)
    data = {
        **_runs(study, numbers, metric),
        "measure": {"label": metric.label, "unit": metric.unit, "images": metric.images},
    }
    shown = [(each, list(_parts(each.table, numbers, lost))) for each in tables]
    by_name = {each.table.name: (each, parts) for each, parts in shown}
    title, _, rest = _sentence(question(study))
    return (
        environment()
        .get_template("index.html.j2")
        .render(
            study=study,
            title=title,
            question=rest,
            answers=answers,
            numbers=numbers,
            states={state: number for state, number in study.states().items() if number or state == "done"},
            noted=_noted(study),
            judgements=sorted(judgements, key=lambda judgement: judgement.verdict == INCONCLUSIVE),
            first=shown[0],
            unfolded=UNFOLDED,
            seeds=by_name.get(SEEDS),
            tables=[part for part in shown[1:] if part[0].table.name not in (SEEDS, VERDICTS)],
            verdicts=by_name.get(VERDICTS),
            main=drawings[:1],
            curves=[each for each in drawings[1:] if each.name.startswith(CURVES)],
            others=[each for each in drawings[1:] if not each.name.startswith(CURVES)],
            facts=facts(study),
            warnings=warnings,
            data=_shown(data),
            made_by=tables[0].sources,
        )
    )


def _sentence(text: str) -> tuple[str, str, str]:
    """Return the first sentence of a text, and the rest of it behind the space."""
    end = re.search(r"(?<=[?.:])\s+(?=[A-Z])", text)
    return (text[: end.start()], end[0], text[end.end() :]) if end else (text, "", "")


@cache
def environment() -> jinja2.Environment:
    """Return what lays out a page: its templates, style and scripts."""
    loader = jinja2.FunctionLoader(_text)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # a browser would read none of it
    environment.filters |= {
        "counted": count,
        "effect": format_effect,
        "expectation": format_expectation,
        "split_number": split_number,
    }
    environment.tests["nan"] = math.isnan
    script, style = (f"{_text(f'page.{kind}')}{_text(f'figures.{kind}')}" for kind in ("js", "css"))
    script += _text("live.js")
    environment.globals |= {"style": style, "script": script, "allowed": _digest(script), "figure_html": figure_html}
    environment.globals |= {"close": CLOSE, "real": REAL, "open": OPEN, "inconclusive": INCONCLUSIVE}
    return environment


def _shown(value: Any) -> Any:
    """Return JSON whose texts are as `plain` has them."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(key): _shown(each) for key, each in value.items()}
    return list(map(_shown, value)) if isinstance(value, list | tuple) else value


def _digest(script: str) -> str:
    """Return the source that lets a page run a script, and no other (Content Security Policy)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _noted(study: Study) -> list[dict[str, Any]]:
    """Return the runs that are not done, those that were tried among them, and the gaps of the grid."""
    return [
        {
            "run": study.called(run.run) if run.run else "(no folder)",
            "href": _href(study, run.run),
            "place": "" if pd.isna(run.batch) else f"{run.setting}, {run.arm}, batch {run.batch}, seed {run.seed}",
            "state": run.state,
            "note": run.note or "",
        }
        for run in named_rows(study.every[study.every["state"] != "done"])
    ]


def _lost(study: Study) -> dict[CellKey, str]:
    """Return the worst state of a cell's runs, if not all are done: diverged or missing."""
    found: dict[CellKey, str] = {}
    for run in named_rows(study.placed):
        if run.state != "done":
            key = (run.setting, run.arm, int(run.batch))
            found[key] = "diverged" if "diverged" in (run.state, found.get(key)) else "missing"
    return found


def _parts(table: Table, numbers: Mapping[CellKey, int], lost: Mapping[CellKey, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table per setting; a column of numbers is sorted by these and aligned to the right."""
    for setting, unfilled in table.rows.items():
        rows = filled(unfilled)
        keys = [(setting, row["arm"].text if "arm" in row else "") for row in rows]
        yield {
            "setting": setting,
            "numeric": {heading: any(not math.isnan(row[heading].value) for row in rows) for heading in rows[0]},
            "rows": [
                {
                    heading: {
                        "cell": cell,
                        "value": "" if math.isnan(cell.value) else repr(float(cell.value)),
                        "number": numbers.get((*key, cell.batch), ""),
                        "lost": lost.get((*key, cell.batch), ""),
                    }
                    for heading, cell in row.items()
                }
                for key, row in zip(keys, rows, strict=True)
            ],
        }


def _runs(study: Study, numbers: Mapping[CellKey, int], metric: Metric) -> dict[str, Any]:
    """Return the runs behind each cell: seed, state, result, curve, settings and the end of the log."""
    of_runs = dict(iter(study.evaluations.groupby("run", sort=False)))
    ends = {run.run: {"final": run.final, "best": run.best} for run in named_rows(outcomes(study, metric))}
    settings = {run: _settings(config) for run, config in study.configs.items()}
    first = next(iter(settings.values()), {})
    common = {key: value for key, value in first.items() if all(each.get(key) == value for each in settings.values())}
    cells: list[dict[str, Any]] = [
        {"setting": setting, "arm": arm, "batch": batch, "runs": [], "own": {}} for setting, arm, batch in numbers
    ]
    found: list[dict[str, Any]] = []
    axes: dict[tuple[int, ...], int] = {}
    for run in named_rows(study.placed):
        cell = cells[numbers[run.setting, run.arm, int(run.batch)]]
        cell["runs"].append(len(found))
        row: dict[str, Any] = {
            "name": study.called(run.run),
            "seed": int(run.seed),
            "state": run.state,
            "note": run.note or "",
        }
        if run.run:
            cell["own"] = {key: value for key, value in settings.get(run.run, {}).items() if key not in common}
            row |= {"href": _href(study, run.run), "log": _end_of_log(study.folder / run.run, run.state)}
            row |= _curve(of_runs.get(run.run), metric, axes)
            row |= {end: rounded(value) for end, value in ends.get(run.run, {}).items() if math.isfinite(value)}
        found.append(row)
    return {"cells": cells, "runs": found, "axes": [list(axis) for axis in axes], "common": common}


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    flat = runs.flatten({key: value for key, value in config.items() if key not in _OF_A_RUN})
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


def _curve(rows: pd.DataFrame | None, metric: Metric, axes: dict[tuple[int, ...], int]) -> dict[str, Any]:
    """Return the evaluations of a run, at most `POINTS`; `axes` numbers the different sequences of epochs."""
    if rows is None or metric.name not in rows:
        return {}
    kept = rows.iloc[evenly(len(rows), POINTS)]
    epochs = tuple(int(epoch) for epoch in kept["epoch"])

    def values(column: str) -> list[float | None]:
        return [rounded(metric.scale * value) for value in kept[column].astype(float)] if column in kept else []

    found: dict[str, Any] = {"axis": axes.setdefault(epochs, len(axes)), "values": values(metric.name)}
    found["train"] = values(metric.train_column) if metric.train_column != metric.name else []
    seconds = float(rows["wall_seconds"].iloc[-1]) if "wall_seconds" in rows else math.nan
    return found | ({"seconds": round(seconds, 1)} if math.isfinite(seconds) else {})


def rounded(value: float) -> float | None:
    """Return a number with `DIGITS` digits, a whole one as it is (a step); None where it is not finite, as in JSON."""
    if not math.isfinite(value):
        return None
    return value if value.is_integer() else float(f"{value:.{DIGITS}g}")


def _end_of_log(folder: Path, state: str) -> str:
    """Return the last lines of run.log; "" if there is none."""
    length = LOG_BYTES.get(state, LOG_BYTES_OF_OTHERS)
    if folder.is_symlink():
        return ""
    try:
        content, size = reading.read_end(folder / runs.LOG, length)
    except OSError:
        return ""
    text = content.decode(errors="replace")
    return text if size <= length else "... " + text.partition("\n")[2]


def _href(study: Study, run: str) -> str:
    """Return the link from the page to the folder of a run; "" where it has none."""
    return f"../{quote(run, errors='surrogateescape')}/" if run and not study.packed else ""
