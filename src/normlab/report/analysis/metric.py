"""What the runs of a study are compared by: an accuracy or a loss, of its last or of its best epoch."""

from typing import NamedTuple

import pandas as pd

from normlab.common.errors import UserError, nearest

FINAL, BEST = "final", "best"
_IMAGES = {"test": "test", "val": "validation", "train": "training"}


class Measure(NamedTuple):
    """What the runs of a study are compared by."""

    column: str  # of the evaluations
    label: str
    unit: str
    points: str  # unit of a difference
    scale: float  # from what is recorded to the unit
    higher_is_better: bool
    decimals: int | None  # None: as many as show three or four digits
    value: str = FINAL  # of the last epoch, or BEST: of the best one

    @property
    def images(self) -> str:
        """Those that it is measured on: test, validation or training."""
        return _IMAGES[self.column.partition("_")[0]]

    @property
    def train_column(self) -> str:
        """The same of the training images, as recorded while training: the column itself if it is that."""
        return f"train_{self.column.partition('_')[2]}"

    @property
    def chooser(self) -> str:
        """The column that tells the best epoch in runs that have it; others have the measure itself to go by."""
        return f"val_{self.column.partition('_')[2]}"

    @property
    def with_unit(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def compared(self) -> str:
        """`final test accuracy`, `best test accuracy`."""
        return f"{self.value} {self.label}"


def _accuracy(images: str) -> Measure:
    return Measure(f"{images}_accuracy", f"{_IMAGES[images]} accuracy", "%", "percentage points", 100.0, True, 1)


def _loss(images: str) -> Measure:
    return Measure(f"{images}_loss", f"{_IMAGES[images]} loss", "", "", 1.0, False, None)


METRICS = {measure.column: measure for images in _IMAGES for measure in (_accuracy(images), _loss(images))}
ACCURACY, LOSS = METRICS["test_accuracy"], METRICS["test_loss"]


def measure_of(evaluations: pd.DataFrame, metric: str | None = None, value: str = FINAL) -> Measure:
    """The metric; without one the accuracy on the test images where the runs record one, else the loss.

    Raises:
        UserError: if no run has recorded the metric.
    """
    recorded = [column for column in METRICS if column in evaluations and evaluations[column].notna().any()]
    chosen = metric or (ACCURACY.column if ACCURACY.column in recorded else LOSS.column)
    if metric and metric not in recorded:
        close = nearest(metric, recorded)
        raise UserError(
            f"metric={metric} is not recorded by this study.\nRecorded: {', '.join(recorded) or 'nothing'}."
            + (f"\nDid you mean metric={close}?" if close else "")
        )
    return METRICS[chosen]._replace(value=value)
