"""From a checkpoint to the state of a run that goes on."""

import logging
from collections.abc import Mapping
from typing import Any

from normlab import runs
from normlab.common.errors import UserError, first_line
from normlab.config.schema import RunConfig
from normlab.data.recorded import image_files
from normlab.training import checkpoint
from normlab.training.optimizers import restore_optimizer
from normlab.training.state import TrainingState


def load_checkpoint(config: RunConfig, run: runs.Run, log: logging.Logger) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, if the record has every evaluation of the epochs before it, unchanged."""
    saved = checkpoint.load(run.folder, run.run_id, log.warning)
    if saved:
        if changed := runs.check(run.folder):
            log.warning("%s The run starts again.", changed)
            return None
        evaluated = {row["epoch"] for row in runs.read_metrics(run.folder)[0]}
        if not evaluated.issuperset(range(config.eval_every, saved["position"]["epoch"] + 1, config.eval_every)):
            log.warning("%s lacks evaluations from before the last checkpoint. The run starts again.", run.name)
            return None
    return saved


def restore(state: TrainingState, saved: Mapping[str, Any], run: runs.Run) -> None:
    """Bring a state that was set up to where its checkpoint was written.

    Raises:
        UserError: if images or network have changed since.
    """
    images = image_files(state.config)
    change = images.change(runs.read_provenance(run.folder).get("data")) if images else ""
    if change or saved["data_fingerprint"] != state.data.fingerprint:
        raise UserError(
            f"The images of dataset={state.config.dataset.name} have changed since {run.name} was interrupted"
            f"{f' ({change})' if change else ''}.\n"
            f"Bring the old ones back, or delete {run.folder} to start it anew, or give the new ones"
            " another dataset.name."
        )
    step = state.step
    try:
        step.network.load_state_dict(saved["network"])
        if step.averaged:
            step.averaged.load_state_dict(saved["averaged"])
        restore_optimizer(step.optimizer, saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The network has changed since {run.name} was interrupted: {first_line(error)}\n"
            f"Bring the old one back, or delete {run.folder} to start it anew."
        ) from error
    if state.probes:
        state.probes.load_state_dict(saved["probes"])
    step.scaler.load_state_dict(saved["scaler"])
    state.position.load_state_dict(saved["position"])
    state.peak_memory_before = saved["peak_memory_bytes"]
