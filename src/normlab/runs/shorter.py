"""Find the finished run of fewer epochs that a run can go on from: all their other settings are equal."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from normlab.common.errors import UserError
from normlab.runs import lock
from normlab.runs.folder import Run
from normlab.runs.identity import run_id
from normlab.runs.record import find, read_config, read_status
from normlab.runs.states import FINISHED, State, recorded_state

KEPT = "checkpoint.final.pt"  # of a run that is done: network, optimizer and probes after its last step


@dataclass(frozen=True)
class Shorter:
    """The longest finished run that differs from another one in nothing but fewer epochs.

    Attributes:
        hindrance: why the longer run cannot go on from it; "" if it can, as far as the records tell.
    """

    folder: Path
    run_id: str
    epochs: int
    hindrance: str = ""

    @property
    def kind(self) -> str:
        """What is told together of several runs: the sentence without the names of runs."""
        return self.hindrance.replace(self.folder.name, "") if self.hindrance else "goes on"

    def __str__(self) -> str:
        """Say what the longer run does about it."""
        if self.hindrance:
            return f"starts anew: {self.hindrance}"
        return f"goes on from epoch {self.epochs} of {self.folder.name}"


def spread_over_epochs(config: Mapping[str, Any]) -> str:
    """Return what of a run's settings depends on the number of its epochs, as the subject and verb of a sentence.

    Returns:
        "" if its first epochs are those of a longer run, as far as the settings tell.
    """
    schedule, norm = config["schedule"]["name"], config["norm"]
    if config["sampler"]["name"] == "class_incremental":
        return "sampler=class_incremental spreads its tasks over all epochs"
    if schedule != "constant":
        return f"schedule={schedule} spreads over all epochs"
    for option in ("unit", "ramp_unit"):
        if norm.get(option) == "fraction":
            return f"norm={norm['name']} changes with the share of all epochs that is done (norm.{option}=fraction)"
    if config["model"].get("binarize_at", 0) not in (0, 1):
        return "model=binary_resnet has binary weights after a share of all epochs (model.binarize_at)"
    for name, probe in config["probe"].items():
        if probe["times"] is not None and probe["times"] > 1:
            return f"probe={name} measures {probe['times']} times, evenly over all epochs (probe.{name}.steps does not)"
    return ""


def find_shorter(run: Run, *, fresh: bool = True) -> Shorter | None:
    """Return the finished run that `run` extends, None if there is none.

    Runs that another process trains, and damaged ones, are not looked at.

    Args:
        fresh: whether to list the study's folder again; False: as it was at the last look.
    """
    if fresh:
        _listed.cache_clear()
    found = [one for folder in _listed(run.folder.parent).get(_stem(run.name), ()) if (one := _shorter(run, folder))]
    return max(found, key=lambda one: one.epochs, default=None)


def _stem(name: str) -> str:
    """Return the part of a run's name that does not depend on its epochs."""
    return name.rpartition("-")[0]


@lru_cache(maxsize=4)
def _listed(study_folder: Path) -> dict[str, list[Path]]:
    """Return the folders in a study by the part of their names that does not depend on epochs."""
    by_stem: dict[str, list[Path]] = {}
    try:
        for path in find(study_folder):
            by_stem.setdefault(_stem(path.name), []).append(path)
    except OSError:
        return {}
    return by_stem


def _shorter(run: Run, folder: Path) -> Shorter | None:
    epochs = run.config["epochs"]
    try:
        config = read_config(folder)
        fewer = config["epochs"]
        if not (isinstance(fewer, int) and fewer < epochs and run_id({**config, "epochs": epochs}) == run.run_id):
            return None
        state, own = recorded_state(read_status(folder)), run_id(config)
    except (UserError, KeyError, AttributeError, TypeError, ValueError):  # a record that is none
        return None
    if state not in FINISHED or (folder / lock.CLAIM).exists():
        return None
    if reason := spread_over_epochs(run.config):
        hindrance = f"{reason}, so its epochs differ from those of {folder.name}"
    elif state != State.DONE:
        hindrance = f"{folder.name} diverged, which leaves nothing to go on from"
    elif not (folder / KEPT).exists():
        hindrance = f"{folder.name} has kept no checkpoint (keep_checkpoint)"
    else:
        hindrance = ""
    return Shorter(folder, own, fewer, hindrance)
