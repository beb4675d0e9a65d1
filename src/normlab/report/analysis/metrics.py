"""The metrics of a report: one number per run each, from its evaluations or from a probe's rows.

`METRICS` declares all of them. Those of `EVALUATED` are what a study can be compared by; those with a heading are
columns of their probe's table, or that of tasks; claims.yaml names any of them. Every reading here that a paper does
not fix is ours, [A]; docs/statistics.md lists them for a reader.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from normlab.common.errors import UserError, did_you_mean
from normlab.report.analysis.statistics import UNBOUNDED, Bounds, contrast_bounds
from normlab.report.study.columns import as_numbers

FINAL, BEST = "final", "best"
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}  # by kind, or the name in imported runs
LEARNED = 5.0  # [A] points above chance, from which an arm counts as one that has learned
NEAR_BEST = 5.0  # [A] points of accuracy below its best at which an arm still tolerates a learning rate
RATES = "rates"  # not a probe: what `tuning.rate_curves` gives of a cell and seed
TASK_ACCURACY = re.compile(r"task_\d+_accuracy")
SHARE: Bounds = (0.0, 100.0)  # of an accuracy, in per cent
_IMAGES = {"test": "test", "val": "validation", "train": "training"}

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One number of a run: how it is read and how it is shown.

    Attributes:
        name: as `metric=` and claims.yaml have it; of a metric of `EVALUATED` its column, too.
        label: the name in words, for captions, axes and verdicts.
        column: column of the rows, or a function from the rows to values.
        reduce: reduces the values, in the order of the rows, to one number; nan where there is none.
        probe: the probe whose rows it is read from; None: the run's evaluations.
        heading: heading of its column in the table of the probe; "" if it is not shown there.
        rows: selects from them the rows that the values are of.
        unit: "%" of what is recorded as a fraction of 1, else "".
        log: whether the number is a natural logarithm, so that means are geometric and differences are factors.
        higher_is_better: None where no direction is better.
        bounds: the lowest and the highest value that it can have, in its unit; intervals are cut there.
        decimals: decimals in tables; None: as many as show three or four digits.
        diverged: the number of a run that diverged. "chance": the accuracy of guessing; "worst": infinitely large;
            "before": that of the steps until then, with which other runs' numbers of the same steps compare;
            "missing": none, as it is about an end that the run did not reach.
        epoch: the epoch that a study is compared at, `FINAL` or `BEST`; "" for metrics that are not of `EVALUATED`.
    """

    name: str
    label: str
    column: str | Callable[[pd.DataFrame], Values]
    reduce: Callable[[Values], float]
    probe: str | None = None
    heading: str = ""
    rows: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows
    unit: Literal["%", ""] = ""
    log: bool = False
    higher_is_better: bool | None = None
    bounds: Bounds = UNBOUNDED
    decimals: int | None = None
    diverged: Literal["chance", "worst", "before", "missing"] | float = "missing"
    epoch: str = ""

    def read(self, rows: pd.DataFrame) -> float:
        """Return the number for the rows of one run, at least one, in their order; nan if it was not measured."""
        chosen = self.rows(rows)
        values = _column(chosen, self.column) if isinstance(self.column, str) else self.column(chosen)
        return self.scale * float(self.reduce(values))

    @property
    def scale(self) -> float:
        """Return the factor from what is recorded to the unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def difference_bounds(self) -> Bounds:
        """Return the bounds of a difference."""
        return contrast_bounds((1, -1), self.bounds)

    @property
    def points(self) -> str:
        """Return the unit of a difference."""
        return "percentage points" if self.unit == "%" else ""

    @property
    def images(self) -> str:
        """Return the images that a metric of `EVALUATED` is measured on: test, validation or training."""
        return _IMAGES[self.name.partition("_")[0]]

    @property
    def train_column(self) -> str:
        """Return the column of the same metric on the training images, as recorded while training."""
        return f"train_{self.name.partition('_')[2]}"

    @property
    def validation_column(self) -> str:
        """Return the column that chooses the best epoch in runs that have it."""
        return f"val_{self.name.partition('_')[2]}"

    @property
    def axis_label(self) -> str:
        """Return the label of an axis: `test accuracy (%)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def full_label(self) -> str:
        """Return the label with its epoch: `final test accuracy`, `best test accuracy`."""
        return f"{self.epoch} {self.label}".strip()


def chance(config: Mapping[str, Any], classes: float = math.nan) -> float:
    """Return the accuracy of guessing in per cent, 0 if the number of classes is unknown.

    Args:
        config: a run's configuration.
        classes: number of classes as the run recorded it, nan if it did not.
    """
    dataset = config["dataset"]
    classes = classes if classes > 0 else CLASSES.get(str(dataset.get("kind", dataset.get("name"))), math.nan)
    return 0.0 if math.isnan(classes) else 100.0 / classes


def step_to_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the change of the activations' mean and variance from a measured step to the one after it.

    Args:
        rows: of the probe `activations`, of one run or of several.

    Returns:
        the rows whose next step was measured too, with the columns mean_change and variance_change (absolute); no row
        where layer, mean or variance was not measured.
    """
    if not {"layer", "mean", "variance"} <= set(rows):
        return rows.iloc[:0]
    keys = [key for key in ("run", "layer", "step") if key in rows]
    after = rows[[*keys, "mean", "variance"]].assign(step=rows["step"] - 1)
    pairs = rows.merge(after, on=keys, suffixes=("", "_after"))
    for moment in ("mean", "variance"):
        pairs[f"{moment}_change"] = (pairs.pop(f"{moment}_after") - pairs[moment]).abs()
    return pairs


def rates_near_the_best(rows: pd.DataFrame) -> Values:
    """Return the learning rates without a gap around the best whose accuracy is within `NEAR_BEST` points of it."""
    if not {"lr", "accuracy"} <= set(rows) or rows.empty:
        return np.empty(0)
    accuracy, best = _column(rows, "accuracy"), int(_column(rows, "accuracy").argmax())
    far = np.flatnonzero(accuracy < accuracy[best] - NEAR_BEST)
    low, high = max(far[far < best], default=-1) + 1, min(far[far > best], default=len(rows))
    return _column(rows, "lr")[low:high]


# ---- which rows


def ends_of_tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last evaluation of each task of one run or several, in their order; no row of other runs.

    Args:
        rows: evaluations, with the column run if they are of several.
    """
    if "task" not in rows:
        return rows.iloc[:0]
    keys = [key for key in ("run", "task") if key in rows]
    return rows.dropna(subset=["task"]).drop_duplicates(keys, keep="last")


def _last_step(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"].eq(rows["step"].max())]


def _last_step_by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    return _last_step(rows).sort_values("position") if "position" in rows else rows.iloc[:0]


def _trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last step, but nothing if that is the start: nothing has moved yet, and no minimum is reached."""
    last = _last_step(rows)
    return last[last["step"] > 0]


# ---- which values of them


def _column(rows: pd.DataFrame, name: str) -> Values:
    """Return a column as float64; nan where it was not measured."""
    return np.asarray(as_numbers(rows[name]) if name in rows else np.full(len(rows), math.nan), dtype=float)


def _ratio(column: str, to: str) -> Callable[[pd.DataFrame], Values]:
    def ratio(rows: pd.DataFrame) -> Values:
        with np.errstate(divide="ignore", invalid="ignore"):  # over 0: infinite, or nan
            return _column(rows, column) / _column(rows, to)

    return ratio


def _band(quantity: str) -> Callable[[pd.DataFrame], Values]:
    return lambda rows: _column(rows, f"{quantity}_high") - _column(rows, f"{quantity}_low")


def _gap(rows: pd.DataFrame) -> Values:
    return _column(rows, "train_accuracy") - _column(rows, "test_accuracy")


def _forgetting(rows: pd.DataFrame) -> Values:
    """Return by how much each task but the last fell from its best end to the last one (Chaudhry et al. 2018).

    Their f is the highest accuracy on a task at the ends of it and of later ones but the last, minus that at the last
    one's; accuracies are among all classes seen (theirs: of a single head, too).
    """
    columns = [_column(rows, f"task_{number}_accuracy") for number in range(1, len(rows))]
    return np.array([column[own:-1].max() - column[-1] for own, column in enumerate(columns)])


def _shifted_cosine(rows: pd.DataFrame) -> Values:
    """Return the cosines where there is a shift: the first layer has none."""
    return _column(rows, "cosine")[_column(rows, "l2") > 0]


def _relative_drift(rows: pd.DataFrame) -> Values:
    """Return the drifts of the gammas that do not start at 0."""
    start = _column(rows, "scale_start")
    return _column(rows, "scale_drift")[start > 0] / start[start > 0]


def _converged_eigenvalue(rows: pd.DataFrame) -> Values:
    return _column(rows, "eigenvalue")[_column(rows, "converged") > 0]


# ---- values


def _last(values: Values) -> float:
    return float(values[-1]) if len(values) else math.nan


def _log_last(values: Values) -> float:
    return _log(_last(values))


def _mean(values: Values) -> float:
    known = values[~np.isnan(values)]
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the largest: infinite
        return float(known.mean()) if len(known) else math.nan


def _mean_log(values: Values) -> float:
    """Return the mean of the logarithms of the values above 0: a first layer's covariate shift is 0."""
    return _mean(np.log(values[values > 0]))


def _median_log(values: Values) -> float:
    """Return the logarithm of the median; what is not a number (a loss that overflowed) counts as infinite."""
    with np.errstate(over="ignore"):
        return _log(float(np.median(np.where(np.isnan(values), math.inf, values)))) if len(values) else math.nan


def _log_growth(values: Values) -> float:
    """Return the logarithm of the last value over the first."""
    if not len(values) or not values[0] > 0 or not values[-1] > 0:
        return math.nan
    return _log(float(values[-1]) / float(values[0]))


def _drops(values: Values) -> float:
    """Return the sum of all that is lost from one value to the next."""
    return float(np.maximum(-np.diff(values), 0.0).sum())


def _decades(values: Values) -> float:
    """Return the decades from the first to the last, both above 0."""
    return math.log10(values[-1] / values[0]) if len(values) and values[0] > 0 else math.nan


def _average(values: Values) -> float:
    """Return the mean, nan if any value is missing."""
    return float(values.mean()) if len(values) else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


# ---- the table


def task_metrics(rows: pd.DataFrame) -> list[Metric]:
    """Return the metrics of runs whose classes come task after task, with each task's accuracy at the end."""
    numbers = sorted(int(name.split("_")[1]) for name in map(str, rows) if TASK_ACCURACY.fullmatch(name))
    names = [f"task_{number}_accuracy" for number in numbers]
    of_each = [
        Metric(
            name,
            f"final test accuracy on the classes of task {number}",
            name,
            _last,
            heading=f"task {number}",
            unit="%",
            decimals=1,
            bounds=SHARE,
        )
        for number, name in zip(numbers, names, strict=True)
    ]
    return [*(METRICS[name] for name in OF_TASKS), *of_each]


def _evaluated(images: str, kind: str) -> Metric:
    """Return the accuracy or the loss on some images."""
    name, label = f"{images}_{kind}", f"{_IMAGES[images]} {kind}"
    if kind == "loss":
        return Metric(name, label, name, _log_last, log=True, higher_is_better=False, diverged="worst", epoch=FINAL)
    metric = Metric(name, label, name, _last, unit="%", higher_is_better=True, decimals=1, diverged="chance")
    return replace(metric, epoch=FINAL, bounds=SHARE)


# fmt: off
_TABLE = [
    *[_evaluated(images, kind) for images in _IMAGES for kind in ("accuracy", "loss")],
    # name, label, column, reduce, probe, heading, rows
    Metric("train_test_gap", "training minus test accuracy at the end", _gap, _last, unit="%", diverged=0.0,
           bounds=(-100.0, 100.0)),
    Metric("training_speed", "training accuracy, mean over the evaluations", "train_accuracy", _average,
           unit="%", diverged="chance", bounds=SHARE),
    Metric("setbacks", "training accuracy lost between evaluations, in all", "train_accuracy", _drops,
           unit="%", diverged=100.0),
    Metric("incremental_accuracy", "average incremental accuracy", "test_accuracy", _average, None,
           "average incremental", ends_of_tasks, unit="%", higher_is_better=True, decimals=1, diverged="chance",
           bounds=SHARE),
    Metric("forgetting", "forgetting", _forgetting, _average, None, "forgetting", ends_of_tasks, unit="%", decimals=1,
           higher_is_better=False, bounds=(-100.0, 100.0)),
    Metric("ics", "internal covariate shift, L2", "l2", _mean_log, "ics", "‖G - G'‖", log=True, diverged="before"),
    Metric("relative_ics", "relative internal covariate shift", _ratio("l2", "gradient_norm"), _mean_log,
           "ics", "‖G - G'‖ / ‖G‖", log=True, diverged="before"),
    Metric("ics_cosine", "internal covariate shift, cosine", _shifted_cosine, _mean, "ics", "cosine of G and G'",
           diverged="before"),
    Metric("loss_band", "width of the loss band along the gradient", _band("loss"), _median_log,
           "landscape", "band of the loss", log=True, diverged="worst"),
    Metric("gradient_band", "width of the band of gradient differences", _band("predictiveness"), _median_log,
           "landscape", "band of the gradient's change", log=True, diverged="worst"),
    Metric("beta", "effective beta-smoothness", "beta", _median_log, "landscape", "beta", log=True, diverged="worst"),
    Metric("mean_change", "change of the activations' mean from step to step", "mean_change", _mean_log,
           "activations", "change of mean", step_to_step, log=True, diverged="before"),
    Metric("variance_change", "change of the activations' variance from step to step", "variance_change", _mean_log,
           "activations", "change of variance", step_to_step, log=True, diverged="before"),
    Metric("skewness", "skewness of the activations", "skewness", _mean, "activations", "skewness", diverged="before"),
    Metric("large", "activations beyond 3", "large", _mean, "activations", "beyond 3 (%)", unit="%", diverged="before",
           bounds=SHARE),
    Metric("large_share", "normalized values beyond 3", "large_normalised", _mean,
           "activations", "beyond 3 std (%)", unit="%", diverged="before", bounds=SHARE),
    Metric("sample_cosine", "cosine between samples", "sample_cosine", _mean, "activations", "cosine of samples",
           diverged="before", bounds=(-1.0, 1.0)),
    Metric("stable_rank", "stable rank of the activations", "stable_rank", _mean_log, "activations", "stable rank",
           log=True, diverged="before"),
    Metric("output_growth", "growth of the outputs over the layers", "output_norm", _log_growth,
           "activations", "growth", _last_step_by_layer, log=True),
    Metric("scale_mean", "mean of gamma", "scale_mean", _mean, "affine", "gamma", _last_step),
    Metric("scale_drift", "drift of gamma relative to its start", _relative_drift, _mean,
           "affine", "drift of gamma / start", _trained),
    Metric("shift_mean", "mean of beta", "shift_mean", _mean, "affine", "beta", _last_step),
    Metric("shift_drift", "drift of beta", "shift_drift", _mean, "affine", "drift of beta", _trained),
    Metric("gradient_norm", "norm of the gradients", "norm", _mean_log, "gradients", "‖gradient‖", log=True,
           diverged="before"),
    Metric("relative_gradient", "norm of the gradients relative to the weights", _ratio("norm", "weight_norm"),
           _mean_log, "gradients", "‖gradient‖ / ‖weight‖", log=True, diverged="before"),
    Metric("gradient_growth", "growth of the gradients over the layers", "norm", _log_growth,
           "gradients", "last / first layer", _last_step_by_layer, log=True),
    Metric("sharpness", "largest Hessian eigenvalue at the end", _converged_eigenvalue, _log_last,
           "sharpness", "largest eigenvalue", _trained, log=True),
    Metric("weight_norm", "norm of all weights at the end", "weight_norm", _mean, "sharpness", "‖weights‖", _last_step),
    Metric("lr_width", f"decades of learning rates within {NEAR_BEST:g} points of the best", rates_near_the_best,
           _decades, RATES, "decades", decimals=2),
    Metric("lr_highest", f"largest learning rate within {NEAR_BEST:g} points of the best", rates_near_the_best,
           _log_last, RATES, "largest", log=True),
    Metric("converged", "share of converged measurements", "converged", _mean, "sharpness", "converged",
           bounds=(0.0, 1.0)),
]
# fmt: on
METRICS = {metric.name: metric for metric in _TABLE}
EVALUATED = tuple(metric.name for metric in _TABLE if metric.epoch)
OF_TASKS = ("incremental_accuracy", "forgetting")  # of runs whose classes come task after task
ACCURACY, LOSS = METRICS["test_accuracy"], METRICS["test_loss"]


def metric_of(evaluations: pd.DataFrame, name: str | None = None, epoch: str = FINAL) -> Metric:
    """Return the metric that a study is compared by.

    Args:
        evaluations: those of the study.
        name: one of `EVALUATED`; None: the accuracy on the test images where the runs record one, else the loss.
        epoch: `FINAL` or `BEST`.

    Raises:
        UserError: if no run has recorded the metric.
    """
    recorded = [column for column in EVALUATED if column in evaluations and evaluations[column].notna().any()]
    if name and name not in recorded:
        raise UserError(
            f"metric={name} is not recorded by this study.\nRecorded: {', '.join(recorded) or 'nothing'}."
            + did_you_mean(name, recorded, "metric=")
        )
    default = ACCURACY if ACCURACY.name in recorded else LOSS
    return replace(METRICS[name] if name else default, epoch=epoch)
