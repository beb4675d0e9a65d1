"""The runs of a sweep before any of them starts: composed, checked, and what is left to do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig

from normlab import runs
from normlab.config import schema
from normlab.data.inventory import Inventory
from normlab.launchers import preflight
from normlab.launchers.composing import compose
from normlab.runs.lock import holder

NEW, DONE, TO_RESUME, RUNNING, FAILED = "new", "done", "to resume", "running elsewhere", "failed before"
STATES = (NEW, TO_RESUME, FAILED, RUNNING, DONE)


def weight(config: schema.RunConfig) -> float:
    """Estimated cost of a trained image, in arbitrary units: it has a part in each step that no batch size saves."""
    return (1 + 16 / config.batch) * (config.depth or 18)


@dataclass(frozen=True)
class Job:
    """A run that is left to do. `state`: one of `STATES` but `DONE`, as it was when the sweep was read."""

    config: schema.RunConfig
    run: runs.Run
    data: Inventory
    state: str

    @property
    def work(self) -> float:
        """Estimated cost of the run, in arbitrary units."""
        return self.config.epochs * self.data.train_images * weight(self.config)


@dataclass(frozen=True)
class Sweep:
    """`names`: of the runs as they were asked for, in order and perhaps repeated. `finished`: the status of each run
    that is over; `jobs`: the others, each once. `quiet`: as the setting.
    """

    names: list[str]
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    quiet: bool = False

    @property
    def number(self) -> int:
        """Different runs."""
        return len(self.finished) + len(self.jobs)

    def results(self) -> list[float | None]:
        """Each run's final test accuracy (test loss where there is none) as far as there is one, for Hydra."""
        folders = {job.run.name: job.run.folder for job in self.jobs}
        ended = self.finished | {name: runs.read_status(folder) or {} for name, folder in folders.items()}
        return [ended[name].get("test_accuracy", ended[name].get("test_loss")) for name in self.names]

    def say_what_is_skipped(self) -> None:
        if self.finished:
            self.say(f"{len(self.finished)} of {self.number} runs are finished and skipped.")

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


def read(context: HydraContext, config: DictConfig, overrides: Sequence[Sequence[str]], *, here: bool = True) -> Sweep:
    """What a launcher is asked to carry out: `overrides` of each run, in a sweep whose configuration is `config`.

    Args:
        here: whether the runs will be on this machine.

    Raises:
        UserError: if a run is misconfigured, or cannot start on this machine.
    """
    sweep = Sweep([], quiet=config.get("quiet") is True)
    known = set()
    for settings in compose(context.config_loader, config, overrides):
        parsed = schema.parse(settings)
        run = runs.Run(parsed.as_dict())
        sweep.names.append(run.name)
        if run.name in known:
            continue
        known.add(run.name)
        state, status = _state(run)
        if state == DONE:
            sweep.finished[run.name] = status
        else:
            sweep.jobs.append(Job(parsed, run, preflight.check(parsed, here=here), state))
    return sweep


def _state(run: runs.Run) -> tuple[str, dict[str, Any]]:
    if run.over:
        return DONE, runs.read_status(run.folder) or {}
    state = run.state
    if state in (runs.State.RUNNING, *runs.FINISHED):
        trainer = holder(run.folder)
        return (RUNNING if trainer and not trainer.gone else TO_RESUME), {}
    return {runs.State.PLANNED: NEW, runs.State.INTERRUPTED: TO_RESUME}.get(state, FAILED), {}
