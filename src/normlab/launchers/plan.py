"""`hydra/launcher=plan`: list what a sweep would train, and estimate its cost. Trains nothing, leaves no run folder."""

import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from normlab import runs
from normlab.common import cpu
from normlab.common.console import Console
from normlab.common.errors import UserError, count
from normlab.common.progress import span
from normlab.config import schema
from normlab.data import inventory
from normlab.data.inventory import Inventory
from normlab.launchers.pool import Worker, at_a_time, check_elsewhere, check_in_worker, print_once, workers_for
from normlab.launchers.sweep import Job, Sweep, run_cost
from normlab.runs import State

READ = 200  # finished runs that are read, at most
WIDE = 160  # columns, where no terminal has fewer
LISTED = 200  # runs that are listed one by one
PLANS = {  # how a sweep will treat a run in each state, and the color of that
    State.PLANNED: ("new", "default"),
    State.INTERRUPTED: ("to resume", "yellow"),
    State.LOST: ("to resume", "yellow"),
    State.FAILED: ("failed before", "red"),
    State.RUNNING: ("running elsewhere", "cyan"),
    State.DONE: ("done", "green"),
}


@dataclass(frozen=True)
class _Cost:
    """Estimated seconds and peak memory (bytes) of a run, and where the estimate comes from."""

    seconds: float
    memory: float
    source: str


def show(sweep: Sweep, slots: int | None, per_gpu: int | None, pack: int | None, calibrate_seconds: float) -> None:
    """Print every run of a sweep with its state and estimated cost, and what all of it comes to.

    Args:
        sweep: the runs.
        slots, per_gpu, pack: as of the pool.
        calibrate_seconds: time for trying a few steps of runs that no finished run of the study is like; 0: none, and
            networks are not built.

    Raises:
        UserError: if a network does not take its batches, or a value is out of range.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    workers = workers_for(sweep.jobs, slots, per_gpu, pack) if sweep.jobs else []
    if sweep.jobs and calibrate_seconds > 0:
        print_once(sweep.jobs, check_in_worker(sweep.jobs, check_elsewhere) or ())
    costs = _costs(sweep, workers, calibrate_seconds, console)
    states = {job.run.folder: job.state for job in sweep.jobs} | dict.fromkeys(sweep.finished, State.DONE)
    _list(console, [(name, states[run], costs.get(str(run))) for run, name in sweep.names.items()])
    counts = Counter(PLANS[state][0] for state in states.values())
    for remark in dict.fromkeys(remark for job in sweep.jobs for remark in job.data.remarks):
        console.print(remark)
    words = dict.fromkeys(word for word, _ in PLANS.values())
    console.print(f"\n{count(len(sweep), 'run')}: " + ", ".join(f"{counts[word]} {word}" for word in words))
    sweep.report_extensions()
    if not sweep.jobs:
        console.print("Nothing is left to do.")
    elif len(costs) < len(sweep.jobs):
        console.print(
            "Time and memory: no finished run of the study to go by. hydra.launcher.calibrate_seconds=60 tries some."
        )
    else:
        number, together = at_a_time(sweep.jobs, workers)
        seconds = [cost.seconds for cost in costs.values()]
        most = sorted((cost.memory for cost in costs.values()), reverse=True)[:number]
        devices = {worker.device for worker in workers}
        alone = ", if each is as fast as by itself" if len(devices - {"cpu"}) not in (0, number) else ""
        console.print(
            f"Left to do: about {span(sum(seconds))} of training, about"
            f" {span(max(sum(seconds) / number, *seconds))} with {together}{alone}.\n"
            f"Memory: {_gigabytes(most[0])} for the largest run, {_gigabytes(sum(most))} for the largest {number}."
        )
    if sweep.jobs and workers[0].device == "cpu" and (note := _on_bf16({job.config.precision for job in sweep.jobs})):
        console.print(note)


def _on_bf16(precisions: set[str]) -> str:
    """Return a sentence about bf16 on this processor to who might train in another precision; "" if none is due."""
    instructions = cpu.bf16_instructions()
    if instructions and "fp32" in precisions:
        return (
            f"This processor has {instructions}: with precision=bf16, which makes other runs, images of {cpu.BF16_FROM}"
            f" pixels and more train about {cpu.BF16_SPEED:g} times as fast."
        )
    if not instructions and "bf16" in precisions:
        return "This processor has no instructions for bf16: with precision=fp32 runs are likely faster."
    return ""


def _list(console: Console, plans: Sequence[tuple[str, State, _Cost | None]]) -> None:
    """Print a table of runs with their states and estimated costs."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("state", "time", "memory"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    table.add_column("estimated from", no_wrap=True)
    for name, state, cost in plans[:LISTED]:
        word, color = PLANS[state]
        estimate = (span(cost.seconds), _gigabytes(cost.memory), cost.source) if cost else ()
        table.add_row(name, Text(word, color), *estimate)
    console.print(table)
    if len(plans) > LISTED:
        console.print(f"and {len(plans) - LISTED} more")


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number else "n/a"


def _kind(config: schema.RunConfig) -> tuple[Hashable, Hashable]:
    """Return the settings that decide the cost of a run, in detail and without the norm."""
    width = getattr(config.model, "width", 1.0)
    network = (config.model.name, config.depth, width, config.dataset.name, config.batch)
    detail = (config.norm.name, config.norm_batch, config.precision, config.eval_stats, tuple(config.probe))
    return (*network, *detail), network


@dataclass(frozen=True)
class _Sample:
    """A run that was timed: seconds per unit of `run_cost`, and peak memory in bytes."""

    config: schema.RunConfig
    rate: float
    memory: float
    tried: bool = False  # for a few steps only


def _estimate(job: Job, samples: Mapping[Hashable, Sequence[_Sample]]) -> _Cost:
    """Return the cost of what is left of a run, from the samples that are most like it."""
    detail, network = _kind(job.config)
    key = next(key for key in (detail, network, None) if key in samples)
    alike = samples[key]
    source = f"{len(alike)} run{'s' * (len(alike) > 1)} like it" if not alike[0].tried else "a few steps"
    if key != detail:
        source = "runs with another norm" if key else "scaled from other runs"
    seconds = statistics.median(sample.rate for sample in alike) * job.cost * job.share_left
    return _Cost(seconds, max(sample.memory for sample in alike), source)


def _costs(sweep: Sweep, workers: Sequence[Worker], calibrate_seconds: float, console: Console) -> dict[str, _Cost]:
    """Return the cost of each run that is left, by its folder; nothing if no run is known."""
    samples: dict[Hashable, list[_Sample]] = defaultdict(list)

    def add(sample: _Sample) -> None:
        for key in (*_kind(sample.config), None):
            samples[key].append(sample)

    for sample in _finished(sweep):
        add(sample)
    unknown: dict[Hashable, list[Job]] = defaultdict(list)
    for job in sweep.jobs:
        if _kind(job.config)[0] not in samples:
            unknown[_kind(job.config)[0]].append(job)
    if unknown and calibrate_seconds > 0:
        examples = [jobs[0] for jobs in sorted(unknown.values(), key=len, reverse=True)]
        kinds = f"{len(examples)} kinds of runs" if len(examples) > 1 else "one kind of run"
        console.print(f"Trying a few steps of {kinds}, for {span(calibrate_seconds)} at most ...")
        for sample in _try_each(examples, workers[0], calibrate_seconds):
            add(sample)
    return {job.key: _estimate(job, samples) for job in sweep.jobs} if samples else {}


def _finished(sweep: Sweep) -> Iterator[_Sample]:
    """Yield finished runs: of this sweep first, then of its studies."""
    studies = dict.fromkeys(job.run.folder.parent for job in sweep.jobs)
    others = itertools.chain.from_iterable(map(runs.find, studies))
    for folder in itertools.islice(dict.fromkeys(itertools.chain(sweep.finished, others)), READ):
        with contextlib.suppress(UserError):  # damaged, or its data is not here any more
            status = runs.read_status(folder) or {}
            if status.get("state") == State.DONE and status.get("wall_seconds") and status.get("peak_memory_bytes"):
                config = schema.parse(runs.read_config(folder))
                cost = run_cost(config, inventory.check(config.dataset, Path(config.data_dir)))
                yield _Sample(config, status["wall_seconds"] / cost, status["peak_memory_bytes"])


def _try_each(jobs: Sequence[Job], worker: Worker, limit_seconds: float) -> Iterator[_Sample]:
    """Train a few steps of each job, of as many as fit into the time."""
    deadline = time.monotonic() + limit_seconds
    try:
        for job in jobs:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                future = worker.submit(_try, job.config, job.data, worker.device, worker.threads, left)
                seconds, memory = future.result()
            except BrokenProcessPool:  # out of memory, say
                return
            except Exception:
                continue  # the run itself will report it
            yield _Sample(job.config, seconds * job.config.epochs / job.cost, memory, tried=True)
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        worker.close()


def _try(config: schema.RunConfig, data: Inventory, device: str, threads: int, limit: float) -> tuple[float, int]:
    """Return seconds of an epoch with its evaluation, and peak memory in bytes, from a few steps; in a worker."""
    from normlab.training.calibration import calibrate  # imports torch

    return calibrate(config, data, device, threads, limit)
