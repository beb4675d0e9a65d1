"""The table of each probe: what its measurements in a run come to, per arm."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from normlab.report.analysis.cells import Table, lists, with_interval
from normlab.report.analysis.measures import MEASURES, step_to_step
from normlab.report.analysis.tables import CELL, summarise
from normlab.report.study.load import Study


class Quantity(NamedTuple):
    """A number that the measurements of a probe in one run come to; `log`: its natural logarithm, so that means
    over seeds are geometric.
    """

    name: str
    heading: str
    of: Callable[[pd.DataFrame], float]
    log: bool = False

    def text(self, row: Any) -> str:
        """Of a tidy row: `1.2 ± 0.3`, or for a logarithm `1.2 [0.9, 1.6]`; no interval for one seed."""
        if not self.log or not row.n:
            return with_interval(row, None)
        return f"{row.mean:.3g}" + (f" [{row.low:.3g}, {row.high:.3g}]" if row.n > 1 else "")


def _judged(measure: str, heading: str) -> Quantity:
    """What claims are judged by as well."""
    return Quantity(measure, heading, MEASURES[measure].value, MEASURES[measure].unit == "factor")


def _mean(column: str, scale: float = 1.0) -> Callable[[pd.DataFrame], float]:
    return lambda rows: scale * float(rows[column].mean())


def _at_the_end(column: str) -> Callable[[pd.DataFrame], float]:
    return lambda rows: float(rows[rows["step"] == rows["step"].max()][column].mean())


def _change(column: str) -> Callable[[pd.DataFrame], float]:
    return lambda rows: _log_mean(step_to_step(rows)[column])


def _ratio(column: str, to: str) -> Callable[[pd.DataFrame], float]:
    return lambda rows: _log_mean(rows[column] / rows[to])


def _log_mean(values: pd.Series) -> float:
    return float(np.log(values[values > 0]).mean())


def _last_over_first_layer(column: str) -> Callable[[pd.DataFrame], float]:
    """The logarithm of the ratio at the last measured step."""

    def growth(rows: pd.DataFrame) -> float:
        layers = rows[rows["step"] == rows["step"].max()].sort_values("position")[column]
        first, last = layers.iloc[0], layers.iloc[-1]
        return math.log(last / first) if first > 0 and last > 0 else math.nan

    return growth


_TABLES: dict[str, tuple[str, str, tuple[Quantity, ...]]] = {  # probe: title, caption, columns
    "ics": (
        "Internal covariate shift",
        "A layer's gradient G, and G' after the layers before it took their step (Santurkar et al. 2018, definition"
        " 2.1): means over measured steps and layers where there is a shift (a first layer has none).",
        (
            _judged("ics", "‖G - G'‖"),
            Quantity("relative_ics", "‖G - G'‖ / ‖G‖", _ratio("l2", "gradient_norm"), log=True),
            _judged("ics_cosine", "cosine of G and G'"),
        ),
    ),
    "landscape": (
        "Loss landscape",
        "Along the gradient, over the probed step lengths (Santurkar et al. 2018, section 3.1): width of the bands of"
        " the loss and of the gradient's change, and effective beta-smoothness; medians over measured steps.",
        (
            _judged("loss_band", "band of the loss"),
            _judged("gradient_band", "band of the gradient's change"),
            _judged("beta", "beta"),
        ),
    ),
    "activations": (
        "Activations",
        "Outputs of the norms: change of their mean and variance from one step to the next, skewness, share beyond 3 in"
        " absolute value; share of the norms' inputs beyond 3 standard deviations of their channel: means over measured"
        " steps and layers. Growth: root mean square of the convolutions' outputs, last site over first, at the last"
        " measured step.",
        (
            _judged("mean_change", "change of mean"),
            Quantity("variance_change", "change of variance", _change("variance_change"), log=True),
            Quantity("skewness", "skewness", _mean("skewness")),
            Quantity("large", "beyond 3 (%)", _mean("large", 100.0)),
            _judged("large_share", "beyond 3 std (%)"),
            Quantity("output_growth", "growth", _last_over_first_layer("output_norm"), log=True),
        ),
    ),
    "affine": (
        "Drift of gamma and beta",
        "At the last measured step, means over layers: gamma and beta themselves, and their drift, the root mean square"
        " over channels of the distance from the start, gamma's in units of its start.",
        (
            Quantity("scale_mean", "gamma", _at_the_end("scale_mean")),
            _judged("scale_drift", "drift of gamma / start"),
            Quantity("shift_mean", "beta", _at_the_end("shift_mean")),
            _judged("shift_drift", "drift of beta"),
        ),
    ),
    "gradients": (
        "Gradients",
        "Gradients of the convolutions' and linear layers' weights: means over measured steps and layers; last over"
        " first layer: at the last measured step.",
        (
            Quantity("gradient_norm", "‖gradient‖", lambda rows: _log_mean(rows["norm"]), log=True),
            Quantity("relative_gradient", "‖gradient‖ / ‖weight‖", _ratio("norm", "weight_norm"), log=True),
            Quantity("gradient_growth", "last / first layer", _last_over_first_layer("norm"), log=True),
        ),
    ),
    "sharpness": (
        "Sharpness",
        "Largest eigenvalue of the loss's Hessian on the step's batch at the last measured step, if its iteration"
        " converged, and the norm of all weights there; converged: share of all measurements whose iteration did.",
        (
            _judged("sharpness", "largest eigenvalue"),
            Quantity("weight_norm", "‖weights‖", _at_the_end("weight_norm")),
            Quantity("converged", "converged", _mean("converged")),
        ),
    ),
}


def probe_tables(study: Study, confidence: float) -> list[Table]:
    """One table per probe that a done run has measurements of."""
    found = []
    for probe, (title, caption, quantities) in _TABLES.items():
        values = _outcomes(study.probes.get(probe), quantities)
        if values.empty:
            continue
        names = [quantity.name for quantity in quantities]
        here = study.runs.merge(values[CELL].drop_duplicates(), on=CELL)
        # Of a cell's runs some may have had the probe: a done one without it is no gap.
        measured = here[(here["state"] != "done") | here["run"].isin(values["run"])]
        tidy = summarise(measured, values, names, confidence)
        logs = tidy["quantity"].isin([quantity.name for quantity in quantities if quantity.log])
        tidy.loc[logs, ["mean", "low", "high"]] = np.exp(tidy.loc[logs, ["mean", "low", "high"]])
        columns: dict[str, tuple[str, Callable[[Any], str]]] = {
            quantity.name: (quantity.heading, quantity.text) for quantity in quantities
        }
        found.append(
            Table(
                name=f"probe_{probe}",
                title=title,
                caption=f"{caption} Then the mean over the seeds whose run is done, ± half of the"
                f" {100 * confidence:g} % t-interval; geometric, with the interval in brackets, for positive"
                " quantities of any size. No interval where n = 1.",
                tidy=tidy,
                rows=lists(tidy, columns),
                runs=list(measured["run"]),
            )
        )
    return found


def _outcomes(rows: pd.DataFrame | None, quantities: Sequence[Quantity]) -> pd.DataFrame:
    """One row per done run: run, setting, arm, batch, seed and the quantities (nan where they were not measured)."""
    names = [quantity.name for quantity in quantities]
    found = []
    if rows is not None:
        for _, of_run in rows[rows["state"] == "done"].groupby("run"):
            place = {key: of_run[key].iloc[0] for key in ("run", *CELL, "seed")}
            found.append(place | {quantity.name: quantity.of(of_run) for quantity in quantities})
    return pd.DataFrame(found, columns=["run", *CELL, "seed", *names]).astype(dict.fromkeys(names, float))
