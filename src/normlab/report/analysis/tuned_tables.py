"""The tables of a tuned study: what was chosen, the range of learning rates that an arm tolerates, what trying cost."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from normlab.common.errors import per_cent
from normlab.report.analysis import cells, frames, statistics
from normlab.report.analysis.cells import NOTHING, Row, Table, TableCell, lists, note_on_cut
from normlab.report.analysis.frames import CELL, COUNTS, named_rows
from normlab.report.analysis.metrics import METRICS, NEAR_BEST, RATES, SHARE, rates_near_the_best
from normlab.report.analysis.tuning import rate_curves
from normlab.report.study.load import Study
from normlab.report.study.tuned import Choice, Tuning, value_text

_CHOSEN = (
    "The value of {settings} with the best mean validation accuracy over seeds, for each cell; test images have no part"
    " in the choice. Values are compared on the same seeds, which more than half of them have (where that leaves no two"
    " values: those that most share), without values that lack one of these; of equal means the middle one. Validation:"
    " mean over these seeds, which seeds counts, of the chosen value, ± half of the {percent} % t-interval, optimistic"
    " as the best of several; a diverged run counts as chance. not told from: values whose paired differences to the"
    " chosen one have an interval that holds 0."
)
_RATES = (
    "The range of learning rates that an arm tolerates: of the rates tried, those without a gap around the best whose"
    " test accuracy is within {near:g} points of the best one's (the distance is ours), per seed; its width in decades"
    " and its largest rate: mean over seeds, ± half of the {percent} % t-interval (of the largest rate geometric, with"
    " the ends of the interval). A diverged run counts as chance. at least: the range ends with the grid in some seed."
)


def tuned_tables(study: Study, confidence: float) -> Iterator[Table]:
    """Yield the table of the chosen values, and that of the tolerated learning rates where enough were tried."""
    if study.tuning is None:
        return
    yield _chosen_table(study.tuning, confidence)
    yield from _rates_table(study, study.tuning, confidence)


def _chosen_table(tuning: Tuning, confidence: float) -> Table:
    rows: dict[str, list[Row]] = defaultdict(list)
    tidy = []
    for choice in tuning.choices:
        chosen = choice.chosen
        scores = [chosen.scores[seed] for seed in choice.seeds] if chosen else ()
        interval = statistics.t_interval(scores, confidence, SHARE)
        values = dict(zip(tuning.settings, chosen.values if chosen else [None] * len(tuning.settings), strict=True))
        place: dict[str, Any] = {"setting": choice.setting, "arm": choice.arm, "batch": choice.batch}
        tidy.append(
            place
            | {f"chosen.{name}": value for name, value in values.items()}
            | {"tried": len(choice.tried), "quantity": "validation_accuracy", **interval._asdict()}
            | {"edge": bool(choice.edges), "tied": bool(choice.ties), "marks": "; ".join(choice.marks)}
        )
        shown = cells.with_interval(_Shown(interval), 1)
        rows[choice.setting].append(
            {"arm": TableCell(choice.arm), "batch": TableCell(str(choice.batch), choice.batch, choice.batch)}
            | {name: _value_cell(value, chosen is not None) for name, value in values.items()}
            | {
                "values": TableCell(str(len(choice.tried)), len(choice.tried)),
                "seeds": TableCell(str(interval.n), interval.n),
                "validation (%)": TableCell(shown, interval.mean),
                "tried": TableCell("; ".join(each.text for each in choice.tried)),
                "remarks": TableCell("; ".join(choice.marks)),
            }
        )
    caption = _CHOSEN.format(settings=" and ".join(tuning.settings), percent=per_cent(confidence))
    found = pd.DataFrame(tidy)
    caption += note_on_cut(found, "0 and 100 %")
    return Table("tuned", "Chosen settings", caption, found, dict(rows), runs=_all_tried(tuning))


class _Shown:
    """An interval as `cells.with_interval` takes it."""

    def __init__(self, interval: statistics.Interval) -> None:
        self.mean, self.low, self.high, self.n = interval


def _value_cell(value: Any, chosen: bool) -> TableCell:
    number = float(value) if isinstance(value, int | float) else math.nan
    return TableCell(value_text(value) if chosen else NOTHING, number)


def _all_tried(tuning: Tuning) -> list[str]:
    return [run for choice in tuning.choices for each in choice.tried for run in each.runs.values()]


def _rates_table(study: Study, tuning: Tuning, confidence: float) -> Iterator[Table]:
    curves = rate_curves(study)
    if not curves:
        return
    metrics = {name: metric for name, metric in METRICS.items() if metric.probe == RATES}
    here = study.runs[study.runs["run"].isin(curves)]
    measured = [{name: metric.read(curves[run]) for name, metric in metrics.items()} for run in here["run"]]
    values = pd.concat([here[["run", *CELL, "seed"]].reset_index(drop=True), pd.DataFrame(measured)], axis=1)
    of_cells = study.runs.merge(here[CELL].drop_duplicates(), on=CELL)
    tidy = frames.summarize(of_cells, values, list(metrics), confidence)
    tidy["at_least"] = [_is_open(row, here, curves) for row in named_rows(tidy)]
    logs = tidy["quantity"] == "lr_highest"
    tidy.loc[logs, ["mean", "low", "high"]] = np.exp(tidy.loc[logs, ["mean", "low", "high"]])

    def text(row: Any) -> str:
        shown = cells.with_geometric_interval(row) if row.quantity == "lr_highest" else cells.with_interval(row, 2)
        return f"at least {shown}" if row.at_least and row.n else shown

    yield Table(
        "rates", "Tolerated learning rates", _RATES.format(near=NEAR_BEST, percent=per_cent(confidence)), tidy,
        lists(tidy, {name: metric.heading for name, metric in metrics.items()}, text), runs=_all_tried(tuning),
    )  # fmt: skip


def _is_open(row: Any, here: pd.DataFrame, curves: Mapping[str, pd.DataFrame]) -> bool:
    """Return whether the range of a seed of this row's cell ends with the grid, so that it may be larger."""
    of_cell = here[(here["setting"] == row.setting) & (here["arm"] == row.arm) & (here["batch"] == row.batch)]
    for curve in map(curves.__getitem__, of_cell["run"]):
        near = rates_near_the_best(curve)
        ends = [curve["lr"].iloc[-1]] if row.quantity == "lr_highest" else [curve["lr"].iloc[0], curve["lr"].iloc[-1]]
        if any(end in near for end in ends):
            return True
    return False


def with_cost_of_trials(table: Table, study: Study) -> Table:
    """Return the table of costs with the number of all runs that were tried and their seconds in all; others as is."""
    if study.tuning is None or table.name != "cost":
        return table
    seconds = _seconds(study.tuning.study)
    spent = {(choice.setting, choice.arm, choice.batch): _spent(choice, seconds) for choice in study.tuning.choices}
    rows, nothing = {}, (0, math.nan)  # of gaps of the grid
    for setting, lines in table.rows.items():
        keys = [(setting, row["arm"].text, int(row["batch"].value)) for row in lines]
        rows[setting] = [{**row, **_cost_cells(*spent.get(key, nothing))} for row, key in zip(lines, keys, strict=True)]
    more = []
    for cell in table.tidy.drop_duplicates(CELL).to_dict("records"):
        number, in_all = spent.get((cell["setting"], cell["arm"], cell["batch"]), nothing)
        of_cell = {key: cell[key] for key in (*CELL, *COUNTS)} | {"low": math.nan, "high": math.nan, "n": number}
        more += [of_cell | {"quantity": "tried_runs", "mean": number}]
        more += [of_cell | {"quantity": "tried_seconds", "mean": in_all}]
    tidy = pd.concat([table.tidy, pd.DataFrame(more)], ignore_index=True) if more else table.tidy
    caption = f"{table.caption} all tried: every run that the choice is from, and their seconds in all."
    return replace(table, rows=rows, tidy=tidy, caption=caption, runs=_all_tried(study.tuning))


def _seconds(study: Study) -> dict[str, float]:
    """Return the seconds of each run until its last evaluation, where it was recorded."""
    seconds = frames.column_of(study.evaluations, "wall_seconds").groupby(study.evaluations["run"]).max().dropna()
    return {str(run): float(each) for run, each in seconds.items()}


def _spent(choice: Choice, seconds: Mapping[str, float]) -> tuple[int, float]:
    """Return the number of runs of a cell and the seconds that they took in all."""
    names = [name for each in choice.tried for name in each.runs.values()]
    return len(names), math.fsum(seconds.get(name, 0.0) for name in names)


def _cost_cells(number: int, seconds: float) -> Row:
    return {
        "all tried": TableCell(str(number), number),
        "seconds of all tried": TableCell(NOTHING if math.isnan(seconds) else f"{seconds:,.0f}", seconds),
    }
