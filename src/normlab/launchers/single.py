"""One run in this process: what `python train.py` without -m does, and Hydra's own launchers per run.

Started several times by torchrun or srun, as the processes of one run: all do the same, and the first one speaks.
"""

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
from normlab.common.errors import InterruptedRunError, UserError
from normlab.common.installation import command_name
from normlab.common.progress import Display, outcome
from normlab.config import schema
from normlab.config.hydra import settings_of, stop, stop_interrupted
from normlab.launchers import preflight
from normlab.training.distributed.processes import Processes, find
from normlab.training.interrupt import StopRequest


def carry_out(composed: DictConfig) -> float | None:
    """Train a run, or say that it is finished; returns its final test accuracy (loss where there is none).

    Raises:
        UserError: for a mistake in the configuration, before the run starts; for a run that fails.
    """
    processes = Processes()
    try:
        processes = find()
        if processes.world > 1:
            # torchrun sends it to those that are left once a process has ended: each ends with a status of its own.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if processes.world > 1 and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise UserError(
                f"A sweep (-m) under {processes.world} processes: torchrun and srun start the processes of one run.\n"
                "Start the sweep with python: its launchers give every run a device. Or leave out -m."
            )
        return train(schema.parse(settings_of(composed)), processes)
    except (UserError, OmegaConfBaseException) as error:
        if processes.rank:
            sys.exit(1)
        if HydraConfig.get().mode == RunMode.RUN or processes.world > 1:
            stop(error)  # past Hydra, which would add a line of its own
        raise
    except (InterruptedRunError, KeyboardInterrupt):
        if processes.rank:
            sys.exit(130)
        if HydraConfig.get().mode == RunMode.RUN or processes.world > 1:
            stop_interrupted()  # past Hydra as well
        raise


def train(config: schema.RunConfig, processes: Processes | None = None) -> float | None:
    """Train a run in this process and the others of `processes`, or say that it is finished; returns its result.

    Raises:
        UserError: for a run that fails.
        InterruptedRunError: when asked to stop.
    """
    processes = processes or find()
    run = runs.Run(config.as_dict())
    finished = run.over
    if finished and processes.world == 1:
        status = runs.read_status(run.folder) or {}
    else:  # of several processes the first one says whether the run is finished: a file server's news travel slowly
        status = _train(config, run, processes, finished)
    if processes.rank == 0 and not config.quiet:
        if finished:
            print(f"{run.name} is finished: {outcome(status)}. Nothing to do.", flush=True)
        print(f"Its record is in {run.folder}; tables and figures: {command_name('report')} study={config.study}")
    value = status.get("test_accuracy", status.get("test_loss"))
    return None if value is None else float(value)


def _train(config: schema.RunConfig, run: runs.Run, processes: Processes, finished: bool) -> dict[str, Any]:
    if processes.world == 1:
        preflight.check(config)
    else:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that has gone is told of in a sentence
    speaks = processes.rank == 0 and not finished
    with StopRequest() as stop, Display({run.name: 1.0}, quiet=config.quiet) if speaks else nullcontext() as display:
        if display:
            display.say(f"{run.name}: starting. Ctrl-C stops after a checkpoint.")
            display.news({"name": run.name})
        from normlab.training.distributed import group  # torch takes seconds to import
        from normlab.training.run import Resources, train_run

        with group.join(processes, config.device) as joined:
            if processes.world > 1 and not finished:
                preflight.check(config)  # together, so that what one machine lacks is known to all
            watch = display.news if display else lambda status: None
            resources = Resources(joined.device)
            status = train_run(config, stop=stop, resources=resources, on_status=watch, group=joined)
        if display:
            display.ended(run.name, status)
    return status
