"""A small study on disk, written as the runner writes it."""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from recorded import NOW, adder


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def add_run(tmp_path: Path) -> Callable[..., Path]:
    """Write one run of the study `outputs/study`: `recorded.adder`."""
    return adder(tmp_path / "outputs")


@pytest.fixture
def add_losses(add_run: Callable[..., Path]) -> Callable[..., Path]:
    """`add_losses("bn", (300.0, 20.0))`: a run of a regression, which records a test and a training loss only."""

    def add(norm: str, losses: tuple[float, ...], **settings: Any) -> Path:
        settings = {"dataset__name": "linear_regression", "model__name": "deep_linear"} | settings
        folder = add_run(norm, epochs=len(losses), **settings)
        rows = [
            {"epoch": epoch, "step": epoch, "train_loss": 0.9 * loss, "test_loss": loss}
            for epoch, loss in enumerate(losses, start=1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return add


@pytest.fixture
def add_probe() -> Callable[..., None]:
    """`add_probe(run, "ics", rows)`: measurements of a probe beside those that a run folder has."""

    def add(run: Path, probe: str, rows: Iterable[dict[str, Any]]) -> None:
        (run / "probes").mkdir(exist_ok=True)
        with (run / "probes" / f"{probe}.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    return add


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "study"
