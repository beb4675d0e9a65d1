from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from normlab.report import figures
from normlab.report.analysis.metrics import ACCURACY, Metric
from normlab.report.analysis.tables import build_tables
from normlab.report.study.load import load


@pytest.fixture
def drawn(study: Path) -> Callable[..., dict[str, Figure]]:
    """Every figure of the study on disk, by name."""

    def draw(metric: Metric = ACCURACY) -> dict[str, Figure]:
        found = load(study)
        [main, *_] = build_tables(found, metric, None, (), 0.95)
        return {drawn.name: drawn.figure for drawn in figures.draw(found, main, metric, 0.95)}

    return draw
