"""`hydra/launcher=plan`: what a sweep would do, and what that would cost. Trains nothing, leaves no run folder."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from normlab import runs
from normlab.common.errors import UserError
from normlab.common.progress import span
from normlab.config import schema
from normlab.data import inventory
from normlab.data.inventory import Inventory
from normlab.launchers.pool import Slot, begin, slots_for
from normlab.launchers.sweep import DONE, FAILED, RUNNING, STATES, TO_RESUME, Job, Sweep, weight

SAMPLE = 200  # other finished runs of the study that are looked at
WIDE = 160  # columns, where no terminal has fewer
LISTED = 200  # runs that are listed one by one
STYLES = {DONE: "green", FAILED: "red", TO_RESUME: "yellow", RUNNING: "cyan"}


@dataclass(frozen=True)
class Cost:
    """Of one run: `seconds` by itself, `memory` in bytes of its device at most, and where the two are known from."""

    seconds: float
    memory: float
    source: str


def show(sweep: Sweep, slots: int | None, per_gpu: int, calibrate_seconds: float) -> None:
    """Print every run of a sweep with its state and estimated cost, and what all of it comes to.

    Args:
        calibrate_seconds: time for trying a few steps of runs that no finished run of the study is like; 0: none.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    places = slots_for(sweep.jobs, slots, per_gpu) if sweep.jobs else []
    number = len(places)
    costs = _costs(sweep, places, calibrate_seconds, console)
    states = {job.run.name: job.state for job in sweep.jobs} | dict.fromkeys(sweep.finished, DONE)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("state", "time", "memory"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    table.add_column("estimated from", no_wrap=True)
    names = list(dict.fromkeys(sweep.names))
    for name in names[:LISTED]:
        cost = costs.get(name)
        told = (span(cost.seconds), _gigabytes(cost.memory), cost.source) if cost else ("", "", "")
        table.add_row(name, f"[{STYLES.get(states[name], 'default')}]{states[name]}[/]", *told)
    console.print(table)
    if len(names) > LISTED:
        console.print(f"and {len(names) - LISTED} more")
    counts = Counter(states.values())
    console.print(f"\n{sweep.number} runs: " + ", ".join(f"{counts[state]} {state}" for state in STATES))
    if not sweep.jobs:
        console.print("Nothing is left to do.")
    elif len(costs) < len(sweep.jobs):
        console.print(
            "Time and memory: no finished run of the study to go by. hydra.launcher.calibrate_seconds=60 tries some."
        )
    else:
        total = sum(costs[job.run.name].seconds for job in sweep.jobs)
        longest = max(costs[job.run.name].seconds for job in sweep.jobs)
        most = sorted((costs[job.run.name].memory for job in sweep.jobs), reverse=True)[:number]
        console.print(
            f"Left to do: about {span(total)} of training, about {span(max(total / number, longest))} with"
            f" {number} at a time.\n"
            f"Memory: {_gigabytes(most[0])} for the largest run, {_gigabytes(sum(most))} for the largest {number}."
        )


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number else "n/a"


def _like(config: schema.RunConfig) -> tuple[Hashable, Hashable]:
    """What decides the cost of an image: in detail, and without the norm."""
    network = (config.model.name, config.depth, config.dataset.name, config.batch)
    detail = (config.norm.name, config.norm_batch, config.precision, config.eval_stats, tuple(config.probe))
    return (*network, *detail), network


class _Seen:
    """Seconds per image and epoch, and memory, of runs that were timed; by what decides them."""

    def __init__(self) -> None:
        self.rates: dict[Hashable, list[float]] = defaultdict(list)
        self.memory: dict[Hashable, list[float]] = defaultdict(list)
        self.tried: set[Hashable] = set()

    def add(self, config: schema.RunConfig, rate: float, memory: float) -> None:
        for key in _like(config):
            self.rates[key].append(rate)
            self.memory[key].append(memory)
        self.rates[None].append(rate / weight(config))  # for runs that none of these is like
        self.memory[None].append(memory)

    def cost(self, job: Job) -> Cost:
        detail, network = _like(job.config)
        key = next(key for key in (detail, network, None) if key in self.rates)
        rate = statistics.median(self.rates[key]) * (weight(job.config) if key is None else 1.0)
        left = 1.0
        with contextlib.suppress(UserError):
            status = runs.read_status(job.run.folder) or {}
            if job.state != FAILED and status.get("steps"):
                left = 1 - status.get("step", 0) / status["steps"]
        number = len(self.rates[key])
        source = "scaled from other runs" if key is None else "runs with another norm"
        if key == detail:
            source = "a few steps" if key in self.tried else f"{number} run{'s' * (number > 1)} like it"
        return Cost(rate * job.config.epochs * job.data.train_images * left, max(self.memory[key]), source)


def _costs(sweep: Sweep, places: Sequence[Slot], calibrate_seconds: float, console: Console) -> dict[str, Cost]:
    """By name of each run that is left; empty if there is nothing to go by."""
    seen = _Seen()
    for config, data, status in _done(sweep):
        seen.add(config, status["wall_seconds"] / config.epochs / data.train_images, status["peak_memory_bytes"])
    unknown: dict[Hashable, list[Job]] = defaultdict(list)
    for job in sweep.jobs:
        if _like(job.config)[0] not in seen.rates:
            unknown[_like(job.config)[0]].append(job)
    if unknown and calibrate_seconds > 0:
        examples = [jobs[0] for jobs in sorted(unknown.values(), key=len, reverse=True)]
        kinds = f"{len(examples)} kinds of runs" if len(examples) > 1 else "one kind of run"
        console.print(f"Trying a few steps of {kinds}, for {span(calibrate_seconds)} at most ...")
        for job, seconds, memory in _calibrate(examples, places[0], calibrate_seconds):
            seen.add(job.config, seconds / job.data.train_images, memory)
            seen.tried.add(_like(job.config)[0])
    return {job.run.name: seen.cost(job) for job in sweep.jobs} if seen.rates else {}


def _done(sweep: Sweep) -> Iterator[tuple[schema.RunConfig, Inventory, dict[str, Any]]]:
    """Finished runs to go by: of this sweep first, then of its study."""
    if not sweep.jobs:
        return
    study = sweep.jobs[0].run.folder.parent
    found = (folder for folder in runs.find(study) if folder.name not in sweep.finished)
    for folder in itertools.islice(itertools.chain((study / name for name in sweep.finished), found), SAMPLE):
        with contextlib.suppress(UserError):  # damaged, or its data is not here any more
            status = runs.read_status(folder) or {}
            if status.get("state") == "done" and status.get("wall_seconds") and status.get("peak_memory_bytes"):
                config = schema.parse(runs.read_config(folder))
                yield config, inventory.check(config.dataset, Path(config.data_dir)), status


def _calibrate(jobs: Sequence[Job], slot: Slot, limit_seconds: float) -> Iterator[tuple[Job, float, float]]:
    """Each job with the seconds of one epoch and its memory, for as many as fit into the time."""
    begun = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=begin, initargs=(slot.threads,)) as executor:
        for job in jobs:
            left = limit_seconds - (time.monotonic() - begun)
            if left <= 0:
                break
            settings = dataclasses.asdict(job.data)
            future = executor.submit(_try, job.config.as_dict(), settings, slot.device, slot.threads, left)
            try:
                seconds, memory = future.result()
            except BrokenProcessPool:  # out of memory, say
                return
            except (UserError, RuntimeError):
                continue  # the run itself will say why
            yield job, seconds, memory


def _try(settings: dict[str, Any], data: dict[str, Any], device: str, threads: int, limit: float) -> tuple[float, int]:
    """In a worker: seconds of an epoch with its evaluation, and peak memory in bytes, from a few training steps."""
    from normlab.training.calibration import calibrate

    return calibrate(schema.parse(settings), Inventory(**data), device, threads, limit)
