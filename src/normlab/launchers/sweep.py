"""The runs of a sweep before any of them starts: composed, checked, and which of them are left to train."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig

from normlab import runs
from normlab.common import cpu, git
from normlab.common.errors import UserError, as_typed, listed
from normlab.common.progress import Display, span
from normlab.common.terminal import say
from normlab.config import schema
from normlab.data.inventory import Inventory
from normlab.launchers import preflight
from normlab.launchers.composing import compose
from normlab.launchers.unchanged import Unchanged
from normlab.launchers.weights import add_weights, lacks_weights
from normlab.runs import State
from normlab.runs.lock import holder
from normlab.runs.shorter import Shorter, find_shorter

_LEADS_TO_RUNS = ("output_dir", "study")  # of runs in one folder, two spellings of its path
_FOLDERS = ("data_dir", "dataset.path")


def run_cost(config: schema.RunConfig, data: Inventory) -> float:
    """Return the estimated cost of a run, in arbitrary units.

    A part of each step is the same for any batch, so that an image of a small batch costs more. A processor that has
    instructions for bf16 takes less time by them.
    """
    cost = config.epochs * data.train_images * (1 + 16 / config.batch) * (config.depth or 18)
    is_large = data.image_size is None or data.image_size >= cpu.BF16_FROM
    fast = config.precision == "bf16" and is_large and cpu.bf16_instructions()
    return cost / cpu.BF16_SPEED if fast else cost


@dataclass(frozen=True)
class Job:
    """A run that is left to train.

    Attributes:
        config: its settings.
        run: its folder.
        data: the size of its data.
        state: planned, failed, interrupted, running (elsewhere) or lost, when the sweep was read.
        shorter: the finished run of fewer epochs that a run without a checkpoint extends, None if there is none.
    """

    config: schema.RunConfig
    run: runs.Run
    data: Inventory
    state: State = State.PLANNED
    shorter: Shorter | None = None

    @property
    def share_left(self) -> float:
        """The share of its steps that are left to train."""
        if self.shorter and not self.shorter.hindrance:
            return 1 - self.shorter.epochs / self.config.epochs
        status = self.status() if self.state != State.FAILED else {}  # which begins anew
        return float(1 - status.get("step", 0) / (status.get("steps") or 1))

    @property
    def key(self) -> str:
        """The run's folder as text: a sweep over studies has runs of equal names."""
        return str(self.run.folder)

    @property
    def cost(self) -> float:
        """Estimated cost of the run, in arbitrary units."""
        return run_cost(self.config, self.data)

    def status(self) -> dict[str, Any]:
        """Return the status that the run's folder has now, empty if there is none that can be read."""
        with contextlib.suppress(UserError):
            return runs.read_status(self.run.folder) or {}
        return {}


@dataclass(frozen=True)
class Sweep:
    """The runs of one command with -m.

    Attributes:
        folders: of the runs in the order of the command, perhaps repeated.
        names: what to call each run, by its folder.
        finished: status of each finished run, by its folder.
        jobs: the other runs, each once.
        without_weights: finished runs that are to have their weights (save_weights=true) and have not.
        quiet: the setting.
    """

    folders: list[Path] = field(default_factory=list)
    names: dict[Path, str] = field(default_factory=dict)
    finished: dict[Path, dict[str, Any]] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    without_weights: list[runs.Run] = field(default_factory=list)
    quiet: bool = False

    def __len__(self) -> int:
        """Number of different runs."""
        return len(self.finished) + len(self.jobs)

    def results(self) -> list[float | None]:
        """Return each run's final test accuracy (test loss where there is none) as far as there is one, for Hydra."""
        ended = self.finished | {job.run.folder: job.status() for job in self.jobs}
        return [ended[folder].get("test_accuracy", ended[folder].get("test_loss")) for folder in self.folders]

    def report_known(self) -> None:
        """Print how many runs are finished, and what becomes of those that extend finished ones of fewer epochs.

        Finished runs that are to have their weights get them, where a kept checkpoint has them.
        """
        if self.finished:
            self.report(f"{len(self.finished)} of {len(self)} runs are finished and skipped.")
        add_weights(self.without_weights, self.report)
        self.report_extensions()

    def report_extensions(self) -> None:
        """Print how many runs go on from finished ones of fewer epochs, and how many could and start anew."""
        alike: dict[str, list[str]] = defaultdict(list)
        for job in self.jobs:
            if job.shorter:
                alike[job.shorter.kind].append(f"{job.run.title} {job.shorter}")
        for sentences in alike.values():
            more = f" The same holds for {len(sentences) - 1} more of {len(self)} runs." if len(sentences) > 1 else ""
            self.report(f"{sentences[0]}.{more}")

    def report(self, text: str) -> None:
        """Print a line, unless `quiet`."""
        if not self.quiet:
            say(text, flush=True)


def read(context: HydraContext, config: DictConfig, overrides: Sequence[Sequence[str]], *, here: bool = True) -> Sweep:
    """Compose and check every run of a sweep.

    Args:
        context: of Hydra.
        config: the sweep's own configuration.
        overrides: of each run.
        here: whether the runs will be on this machine.

    Raises:
        UserError: if a run is misconfigured, or cannot start on this machine; if two runs have one folder.
    """
    sweep = Sweep(quiet=config.get("quiet") is True)
    unchanged = Unchanged()
    given = compose_runs(context, config, overrides)
    sweep.folders.extend(run.folder for _, run in given)
    sweep.names.update((run.folder, run.title) for _, run in given)
    for parsed, run in dict(zip(sweep.folders, given, strict=True)).values():
        if run.over:
            unchanged.check(run, parsed)
            sweep.finished[run.folder] = runs.read_status(run.folder) or {}
            sweep.without_weights.extend([run] if lacks_weights(run, parsed) else [])
        else:
            state = _state(run)
            shorter = find_shorter(run, fresh=not sweep.jobs) if state in (State.PLANNED, State.FAILED) else None
            sweep.jobs.append(Job(parsed, run, preflight.check(parsed, here=here), state, shorter))
    if sweep.jobs and git.problem():
        sweep.report(git.problem())
    return sweep


def compose_runs(
    context: HydraContext, config: DictConfig, overrides: Sequence[Sequence[str]]
) -> list[tuple[schema.RunConfig, runs.Run]]:
    """Compose the runs of a sweep; one that is given again is the first one again, and that is printed.

    Args:
        context: of Hydra.
        config: the sweep's own configuration.
        overrides: of each run.

    Raises:
        UserError: if a run is misconfigured; if two runs have one folder.
    """
    known: dict[Path, tuple[schema.RunConfig, runs.Run]] = {}
    given, spellings = [], list[str]()
    for settings in compose(context.config_loader, config, overrides):
        parsed = schema.parse(settings)
        run = runs.Run(parsed.as_dict())
        first = known.setdefault(run.folder.resolve(), (parsed, run))
        if first[1] is not run:
            spellings += _require_same(run, first[1])
        given.append(first)
    different = [run for _, run in known.values()]
    for run, name in zip(different, runs.run_names([run.config for run in different]), strict=True):
        run.title = name
    if len(known) < len(given) and config.get("quiet") is not True:
        why = f": {listed(list(dict.fromkeys(spellings)), 3, '; ')}" if spellings else ""
        number = f"{len(known)} {'is' if len(known) == 1 else 'are'} different"
        say(f"The command gives {len(given)} runs, of which {number}: each is carried out once{why}.", flush=True)
    return given


def _require_same(run: runs.Run, other: runs.Run) -> list[str]:
    """Check that two runs of one folder are one run, given twice; return how their folders are spelled otherwise.

    Raises:
        UserError: if they differ in settings that are no part of a run's identity, so that one would be lost.
    """
    first, second = runs.flatten(other.config), runs.flatten(run.config)
    spellings = []
    for name in dict.fromkeys([*first, *second]):
        before, after = first.get(name), second.get(name)
        if before == after:
            continue
        if name in _LEADS_TO_RUNS or (name in _FOLDERS and _real(before) == _real(after)):
            spellings.append(f"{name}={before} and {name}={after} are one folder")
        else:
            raise UserError(
                f"Two runs of this sweep have one folder, {run.folder}:"
                f" {name}={as_typed(before)} and {name}={as_typed(after)}.\n"
                "That setting does not make another run of it, so only one of them would be carried out.\n"
                "Leave one out, or give each a study of its own: a command with study=..., and another one."
            )
    return spellings


def _real(path: object) -> Path:
    return Path(str(path)).expanduser().resolve()


def list_failures(display: Display, jobs: Sequence[Job], heading: str, failed: Sequence[tuple[Job, str]]) -> None:
    """Print how many of `jobs` are finished, and below `heading` those that failed, with logs and reasons."""
    finished = sum(job.run.state in runs.FINISHED for job in jobs)
    display.say(f"{finished} of {len(jobs)} runs finished in {span(display.elapsed)}.")
    logs = [f", {_log(job.run.folder)}" if str(job.run.folder) not in why else "" for job, why in failed]
    lines = [f"  {job.run.title}{log}: {why}" for log, (job, why) in zip(logs, failed, strict=True)]
    for line in [heading, *lines] if failed else ():
        display.warn(line)


def _log(folder: Path) -> Path:
    """Return the log of a run; its folder, where there is none: it was deleted, say."""
    return folder / runs.LOG if (folder / runs.LOG).exists() else folder


def _state(run: runs.Run) -> State:
    """Return the state of a run that is not over."""
    if run.state not in (State.RUNNING, *runs.FINISHED):
        return run.state
    trainer = holder(run.folder)
    return State.RUNNING if trainer and not trainer.gone else State.LOST
