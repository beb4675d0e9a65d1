"""Train one run in this process: `python train.py` without -m, and each run of Hydra's own launchers.

Started several times by torchrun or srun, as the processes of one run: all do the same, and the first one prints.
"""

import functools
import os
import signal
import sys
from contextlib import nullcontext
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from normlab import runs
from normlab.common import git
from normlab.common.errors import InterruptedRunError, UserError
from normlab.common.installation import command_name, study_words
from normlab.common.progress import Display, outcome
from normlab.common.terminal import say
from normlab.config import schema
from normlab.config.hydra import exit_interrupted, exit_with_error, refuse_folders, settings_of
from normlab.launchers import preflight
from normlab.launchers.pool import check_elsewhere
from normlab.launchers.sweep import Job
from normlab.launchers.unchanged import Unchanged
from normlab.launchers.weights import add_weights, lacks_weights
from normlab.runs import State
from normlab.runs.shorter import find_shorter
from normlab.training.distributed.processes import Processes, find
from normlab.training.interrupt import StopRequest


def run(composed: DictConfig) -> float | None:
    """Train the run that Hydra composed, unless it is finished; return its result, as `train_config` does.

    Raises:
        UserError: for a mistake in the configuration, before the run starts; for a run that fails.
        InterruptedRunError: after a request to stop.
    """
    processes, mode = Processes(), HydraConfig.get().mode
    try:
        refuse_folders(HydraConfig.get())
        if mode == RunMode.RUN and composed.budget is not None:
            raise UserError(
                f"budget={composed.budget} is the size of an experiment's sweep, and this is one run.\n"
                "With an experiment leave out hydra.mode=RUN, without one budget."
            )
        processes = find()
        if processes.world > 1:
            # torchrun sends it to those that are left once a process has ended: each ends with a status of its own.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if mode == RunMode.MULTIRUN:
                raise UserError(
                    f"A sweep (-m) under {processes.world} processes: torchrun and srun start the processes of one"
                    " run.\nStart the sweep with python: its launchers give every run a device. Or leave out -m."
                )
        return train_config(schema.parse(settings_of(composed)), processes)
    except (InterruptedRunError, KeyboardInterrupt):
        if processes.rank:
            sys.exit(130)
        if mode == RunMode.RUN or processes.world > 1:
            exit_interrupted()
        raise
    except Exception as error:
        if processes.rank and isinstance(error, UserError | OmegaConfBaseException):
            sys.exit(1)
        if mode == RunMode.RUN or processes.world > 1 or isinstance(error, BrokenPipeError):
            exit_with_error(error)  # here and not in Hydra, which would add a line of its own
        raise


def train_config(config: schema.RunConfig, processes: Processes | None = None, title: str = "") -> float | None:
    """Train a run in this process and the others of `processes`, unless it is finished.

    Args:
        title: what it is called in its sweep.

    Returns:
        Its final test accuracy; its test loss where there is none.

    Raises:
        UserError: for a run that fails.
        InterruptedRunError: after a request to stop.
    """
    processes = processes or find()
    run = runs.Run(config.as_dict(), title)
    finished = run.over
    if finished and processes.world == 1:
        Unchanged().check(run, config)
        status = runs.read_status(run.folder) or {}
    else:  # the first process decides for all whether the run is finished: a file server may show it to others later
        status = _train(config, run, processes, finished)
    lacking = finished and lacks_weights(run, config)
    if processes.rank == 0 and finished and not config.quiet:
        say(f"{run.title} is finished: {outcome(status)}.{'' if lacking else ' Nothing to do.'}", flush=True)
    if processes.rank == 0 and lacking:
        add_weights([run], say if not config.quiet else lambda text: None)
    if processes.rank == 0 and not config.quiet:
        words = study_words(config.study, config.output_dir)
        say(f"Its record is in {run.folder}; tables and figures: {command_name('report')} {words}")
    value = status.get("test_accuracy", status.get("test_loss"))
    return None if value is None else float(value)


def _train(config: schema.RunConfig, run: runs.Run, processes: Processes, finished: bool) -> dict[str, Any]:
    if processes.world == 1:  # several processes find out together, in the run
        check_elsewhere([Job(config, run, preflight.check(config))])
    else:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that has gone is reported in a sentence
    shown = processes.rank == 0 and not finished
    with (
        StopRequest() as stop,
        Display({run.name: run.title}, quiet=config.quiet) if shown else nullcontext() as display,
    ):
        if display:
            if git.problem():
                display.say(git.problem())
            shorter = find_shorter(run) if run.state in (State.PLANNED, State.FAILED) else None
            if shorter:
                display.say(f"{run.title} {shorter}.")
            display.say(f"{run.title}: starting. Ctrl-C stops after a checkpoint.")
            display.news(run.name, {})
        from normlab.training.distributed import process_group  # torch takes seconds to import
        from normlab.training.run import Resources, train_run

        with process_group.join(processes, config.device) as joined:
            if processes.world > 1 and not finished:
                preflight.check(config)  # together, so that all know of the error of one machine
            elif processes.world > 1 and processes.rank == 0:
                Unchanged().check(run, config)
            on_status = functools.partial(display.news, run.name) if display else lambda status: None
            say_here = display.say if display else lambda sentence: None
            resources = Resources(joined.device, title=run.title, say=say_here)
            status = train_run(config, stop=stop, resources=resources, on_status=on_status, group=joined)
        if display:
            display.ended(run.name, status)
    return status
