"""What a run, given by its configuration or its folder, has left on disk, without what depends on the machine."""

from pathlib import Path
from typing import Any

from normlab import runs
from normlab.config.schema import RunConfig
from normlab.runs.correct import Correct

SPEED = ("wall_seconds", "images_per_second")


def folder(run: RunConfig | Path) -> Path:
    return run if isinstance(run, Path) else runs.Run(run.as_dict()).folder


def status(run: RunConfig | Path) -> dict[str, Any]:
    return runs.read_status(folder(run)) or {}


def weights(run: RunConfig | Path) -> str:
    """The digest of the weights at the end."""
    digest: str = status(run)["weights_sha256"]
    return digest


def rows(run: RunConfig | Path) -> list[dict[str, Any]]:
    """What was measured at each evaluation, all of it readable."""
    read, torn = runs.read_metrics(folder(run))
    assert not torn
    return [{key: value for key, value in row.items() if key not in SPEED} for row in read]


def probed(run: RunConfig | Path) -> dict[str, list[dict[str, Any]]]:
    """What its probes measured, all of it readable."""
    read, torn = runs.read_probes(folder(run))
    assert not torn
    return read


def correct(run: RunConfig | Path) -> Correct | None:
    """Which test images it got right at the end."""
    return runs.read_record(folder(run)).correct


def outcome(run: RunConfig | Path) -> tuple[Any, ...]:
    """All that must not depend on how a run was carried out."""
    return status(run)["state"], weights(run), rows(run), probed(run), correct(run)
