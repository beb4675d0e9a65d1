"""One run in this process: what `python train.py` without -m does, and Hydra's own launchers per run."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from normlab import config as schema
from normlab import preflight, runs
from normlab.cli import settings_of, stop
from normlab.errors import UserError
from normlab.progress import Display, outcome
from normlab.training.interrupt import StopRequest


def carry_out(composed: DictConfig) -> float | None:
    """Train a run, or say that it is finished; returns its final test accuracy (loss where there is none).

    Raises:
        UserError: for a mistake in the configuration, before the run starts; for a run that fails.
    """
    try:
        return _carry_out(schema.parse(settings_of(composed)))
    except (UserError, OmegaConfBaseException) as error:
        if HydraConfig.get().mode == RunMode.RUN:
            stop(error)  # past Hydra, which would add a line of its own
        raise


def _carry_out(config: schema.RunConfig) -> float | None:
    run = runs.Run(config.as_dict())
    if run.state in runs.FINISHED:
        status = runs.read_status(run.folder) or {}
        print(f"{run.name} is finished: {outcome(status)}. Nothing to do.", flush=True)
    else:
        preflight.check(config)
        status = _train(config, run)
    print(f"Its record is in {run.folder}; tables and figures: python report.py study={config.study}")
    value = status.get("test_accuracy", status.get("test_loss"))
    return None if value is None else float(value)


def _train(config: schema.RunConfig, run: runs.Run) -> dict[str, Any]:
    with StopRequest() as stop, Display({run.name: 1.0}) as display:
        display.say(f"{run.name}: starting. Ctrl-C stops after a checkpoint.")
        from normlab.training.run import carry_out  # torch takes seconds to import

        status = carry_out(config, stop=stop, watch=display.news)
        display.ended(run.name, outcome(status))
    return status
