"""What claims are judged by: one number per run, from its evaluations or from a probe's rows.

Every reading here that a paper does not fix is ours, [A]; docs/statistics.md lists them for a reader.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}  # by kind, or the name in imported runs


def chance(config: Mapping[str, Any], classes: float = math.nan) -> float:
    """The accuracy of guessing, in per cent: what a diverged run's counts as. 0 if the number of classes is unknown.

    Args:
        config: a run's configuration.
        classes: as the run recorded them, nan if it did not.
    """
    dataset = config["dataset"]
    classes = classes if classes > 0 else CLASSES.get(dataset.get("kind", dataset.get("name")), math.nan)
    return 0.0 if math.isnan(classes) else 100.0 / classes


class Measure(NamedTuple):
    """One number per run.

    Attributes:
        probe: whose rows it is taken from; None: the run's evaluations.
        value: of one run's rows, in their order. nan: not measured.
        unit: of the number; "factor" means that the number is a natural logarithm and differences are told as factors.
        diverged: what a run that diverged counts as. "chance": the accuracy of guessing; "worst": infinitely large;
            "missing": it has no such number.
    """

    label: str
    probe: str | None
    value: Callable[[pd.DataFrame], float]
    unit: Literal["points", "factor", ""]
    diverged: Literal["chance", "worst", "missing"] | float


def _last(column: str, scale: float = 100.0) -> Callable[[pd.DataFrame], float]:
    return lambda rows: scale * _column(rows, column)[-1]


def _gap(rows: pd.DataFrame) -> float:
    return 100.0 * float(_column(rows, "train_accuracy")[-1] - _column(rows, "test_accuracy")[-1])


def _speed(rows: pd.DataFrame) -> float:
    return 100.0 * float(_column(rows, "train_accuracy").mean())


def _setbacks(rows: pd.DataFrame) -> float:
    return 100.0 * float(np.maximum(-np.diff(_column(rows, "train_accuracy")), 0.0).sum())


def _log_last_loss(rows: pd.DataFrame) -> float:
    return _log(_column(rows, "train_loss")[-1])


def _mean_log(column: str) -> Callable[[pd.DataFrame], float]:
    """Mean over steps and layers of the logarithm of what is above 0 (no layer is below the first: its ICS is 0)."""

    def value(rows: pd.DataFrame) -> float:
        values = _column(rows, column)
        return _mean(np.log(values[values > 0]))

    return value


def _cosine(rows: pd.DataFrame) -> float:
    return _mean(_column(rows, "cosine")[_column(rows, "l2") > 0])


def _median_log(width: Callable[[pd.DataFrame], Any]) -> Callable[[pd.DataFrame], float]:
    """Median over steps of the logarithm; what is not finite (a loss that overflowed) counts as infinite."""

    def value(rows: pd.DataFrame) -> float:
        widths = np.asarray(width(rows), dtype=float)
        found = np.median(np.where(np.isnan(widths), math.inf, widths)) if len(widths) else math.nan
        return _log(found)

    return value


def _band(quantity: str) -> Callable[[pd.DataFrame], Any]:
    return lambda rows: _column(rows, f"{quantity}_high") - _column(rows, f"{quantity}_low")


def _scale_drift(rows: pd.DataFrame) -> float:
    last = _of_last_step(rows)
    start = _column(last, "scale_start")
    return _mean(_column(last, "scale_drift")[start > 0] / start[start > 0])


def _shift_drift(rows: pd.DataFrame) -> float:
    return _mean(_column(_of_last_step(rows), "shift_drift"))


def _large_share(rows: pd.DataFrame) -> float:
    return 100.0 * _mean(_column(rows, "large_normalised"))


def step_to_step(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of the activations' mean and variance from a measured step to the one after it.

    Args:
        rows: of the probe `activations`, of one run or of several.

    Returns:
        the rows whose next step was measured too, with the columns mean_change and variance_change (absolute).
    """
    keys = [key for key in ("run", "layer", "step") if key in rows]
    after = rows[[*keys, "mean", "variance"]].assign(step=rows["step"] - 1)
    pairs = rows.merge(after, on=keys, suffixes=("", "_after"))
    for moment in ("mean", "variance"):
        pairs[f"{moment}_change"] = (pairs.pop(f"{moment}_after") - pairs[moment]).abs()
    return pairs


def _mean_change(rows: pd.DataFrame) -> float:
    if not {"layer", "mean", "variance"} <= set(rows):
        return math.nan
    return _mean_log("mean_change")(step_to_step(rows))


def _log_sharpness(rows: pd.DataFrame) -> float:
    """nan unless the iteration converged."""
    last = _of_last_step(rows)
    found = _column(last, "eigenvalue")[_column(last, "converged") == 1]
    return _log(found[-1]) if len(found) else math.nan


def _of_last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Nothing if the only one is the start: nothing has moved yet, and no minimum is found."""
    return rows[(rows["step"] == rows["step"].max()) & (rows["step"] > 0)]


def _column(rows: pd.DataFrame, name: str) -> Any:
    """A column as float64; nan where it was not measured. Rows are at least one."""
    if name not in rows:
        return np.full(len(rows), math.nan)
    return rows[name].to_numpy(dtype=float)


def _mean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


MEASURES = {
    "test_accuracy": Measure("final test accuracy", None, _last("test_accuracy"), "points", "chance"),
    "train_accuracy": Measure("final training accuracy", None, _last("train_accuracy"), "points", "chance"),
    "train_test_gap": Measure("training minus test accuracy at the end", None, _gap, "points", 0.0),
    "training_speed": Measure("training accuracy, mean over the evaluations", None, _speed, "points", "chance"),
    "setbacks": Measure("training accuracy lost between evaluations, in all", None, _setbacks, "points", 100.0),
    "train_loss": Measure("final training loss", None, _log_last_loss, "factor", "worst"),
    "ics": Measure("internal covariate shift, L2", "ics", _mean_log("l2"), "factor", "missing"),
    "ics_cosine": Measure("internal covariate shift, cosine", "ics", _cosine, "", "missing"),
    "loss_band": Measure(
        "width of the loss band along the gradient", "landscape", _median_log(_band("loss")), "factor", "worst"
    ),
    "gradient_band": Measure(
        "width of the band of gradient differences",
        "landscape",
        _median_log(_band("predictiveness")),
        "factor",
        "worst",
    ),
    "beta": Measure(
        "effective beta-smoothness", "landscape", _median_log(lambda rows: _column(rows, "beta")), "factor", "worst"
    ),
    "scale_drift": Measure("drift of gamma relative to its start", "affine", _scale_drift, "", "missing"),
    "shift_drift": Measure("drift of beta", "affine", _shift_drift, "", "missing"),
    "large_share": Measure("normalised values beyond 3", "activations", _large_share, "points", "missing"),
    "mean_change": Measure(
        "change of the activations' mean from step to step", "activations", _mean_change, "factor", "missing"
    ),
    "sharpness": Measure("largest Hessian eigenvalue at the end", "sharpness", _log_sharpness, "factor", "missing"),
}
