"""Figures of a tuned study: the measure against each tuned setting, with the chosen values marked."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from normlab.report.analysis.frames import CELL, outcomes
from normlab.report.analysis.metrics import Metric
from normlab.report.analysis.statistics import t_interval
from normlab.report.analysis.tuning import along_setting
from normlab.report.figures.accuracy import Axis, Finals, estimates
from normlab.report.figures.marks import mark
from normlab.report.figures.panels import Drawing, Panel, Theme, arrange, by_variant, multiples, paged, rows_of, split
from normlab.report.study.load import Study
from normlab.report.study.tuned import Choice, value_order, value_text

_TICKS = 5  # values that are named on an axis of rates; of more, decades are


def figures(study: Study, metric: Metric, confidence: float, theme: Theme) -> Iterator[Drawing]:
    """Yield the pages of each tuned setting of which a cell has several values."""
    if study.tuning is None:
        return
    results = outcomes(study.tuning.study, metric).set_index("run")[metric.epoch]
    for position, name in enumerate(study.tuning.settings):
        rows, values = _against(study.tuning.choices, position, results, metric, confidence)
        if rows.groupby(CELL).size().max() < 2 or not rows["n"].any():
            continue
        panels = split(arrange(study, rows))
        draw = partial(sensitivity, finals=Finals(metric, values, (*CELL, "x")), theme=theme, label=name)
        pages = paged(panels, theme.canvas.panels, draw)
        yield from ((figure, _runs(shown)) for figure, shown in pages)


def _against(
    choices: Sequence[Choice], position: int, results: pd.Series, metric: Metric, confidence: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row per cell and value of a setting, at the chosen values of the others; and the single results."""
    rows, single = [], []
    for choice in choices:
        for each in along_setting(choice, position):
            place = {"setting": choice.setting, "arm": choice.arm, "batch": choice.batch}
            place["x"] = each.values[position]
            done = {seed: float(results[run]) for seed, run in each.runs.items() if run in results.index}
            rows.append(
                {
                    **place,
                    **t_interval(list(done.values()), confidence, metric.bounds)._asdict(),
                    "done": len(done),
                    "diverged": each.diverged,
                    "missing": 0,
                }
                | {"chosen": each is choice.chosen, "runs": list(each.runs.values())}
            )
            single += [{**place, "seed": seed, "value": value} for seed, value in done.items()]
    return pd.DataFrame(rows), pd.DataFrame(single, columns=[*CELL, "x", "seed", "value"])


def _runs(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"run": [run for runs in rows["runs"] for run in runs]}, dtype=object)


def sensitivity(panels: Sequence[Panel], finals: Finals, theme: Theme, label: str) -> Figure:
    """Draw the final measure against a tuned setting, a line per arm, with a ring around the chosen value.

    Positive numbers that span a factor of ten are on a logarithmic axis, all other values evenly spaced.

    Args:
        panels: rows have the columns x, mean, low, high, n, diverged, chosen.
        finals: the measure, and the done runs' results with their x.
        theme: the styles and the canvas.
        label: the setting.
    """
    chosen = Line2D([], [], ls="", marker="o", ms=8, mfc="none", color="0.4", label="chosen")
    figure, axes = multiples(panels, theme, [chosen], height=2.3)
    every = rows_of(panels)
    distinct = sorted({(value,) for value in every["x"]}, key=value_order)
    values = [value for (value,) in distinct]
    logarithmic = _spans_a_factor_of_ten(values)
    places = {value: float(value) if logarithmic else i + 0.5 for i, value in enumerate(values)}
    for ax, panel in axes:
        for i, (arm, unsorted) in enumerate(by_variant(panel.rows)):
            offset = min(0.03, 0.3 / len(panel.arms)) * (i - (len(panel.arms) - 1) / 2)
            at = {value: x * 10**offset if logarithmic else x + offset for value, x in places.items()}
            rows = unsorted.assign(at=unsorted["x"].map(at)).sort_values("at").reset_index(drop=True)
            style = theme.styles[arm]
            estimates(Axis(ax, "x", at), rows, finals, style)
            best = rows[rows["chosen"]]
            [rings] = ax.plot(best["at"], best["mean"], ls="", marker="o", ms=8, mfc="none", color=style.color)
            mark(rings, arm)
    _ticks(axes[0][0], places, logarithmic=logarithmic)
    return finals.finish(figure, axes[0][0], every, label)


def _spans_a_factor_of_ten(values: Sequence[Any]) -> bool:
    """Return whether these values, in their order, are positive numbers that do."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and 0 < 10 * values[0] <= values[-1]


def _ticks(ax: Axes, places: Mapping[Hashable, float], *, logarithmic: bool) -> None:
    if logarithmic:
        ax.set_xscale("log")
    if not logarithmic or len(places) <= _TICKS:
        ax.set_xticks(list(places.values()), labels=[value_text(value) for value in places])
    ax.xaxis.set_minor_locator(NullLocator())
