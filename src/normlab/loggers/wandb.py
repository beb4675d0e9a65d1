"""Log a run to Weights & Biases: by default offline, in the run's folder, from where `wandb sync` uploads it."""

import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("WANDB_SILENT", "true")  # nothing on the terminal, and no question about a login
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of wandb's own errors to its makers
import wandb

from normlab import runs
from normlab.config.schema import WandbLogger
from normlab.loggers import Row, finite_values

SERVER_SECONDS = 20.0  # for a server to answer; the end of the process waits for it, too
_starting = threading.Lock()


class WeightsAndBiases:
    """A run in Weights & Biases."""

    def __init__(self, run: runs.Run, settings: WandbLogger) -> None:
        # Its id is all that W&B knows a run by, and another study may have this run, too.
        identity = f"{run.run_id}-{hashlib.sha256(run.config['study'].encode()).hexdigest()[:8]}"
        before = list(run.folder.glob(f"wandb/offline-run-*-{identity}"))
        with _starting:
            hooks = sys.exit, sys.excepthook
            try:
                self._run = wandb.init(
                    project=settings.project,
                    entity=settings.entity,
                    mode=settings.mode,
                    dir=run.folder,
                    id=identity,
                    name=run.name,
                    group=run.config["study"],
                    tags=[run.config[key] for key in ("experiment", "budget") if run.config[key]],
                    config=run.config,
                    resume="allow",
                    reinit="create_new",  # other runs of this process go on
                    settings=wandb.Settings(
                        console="off",
                        disable_git=True,
                        finish_timeout=SERVER_SECONDS,
                        init_timeout=SERVER_SECONDS,
                        save_code=False,
                        silent=True,
                        symlink=False,
                        x_disable_stats=True,
                    ),
                )
            finally:
                sys.exit, sys.excepthook = hooks  # each run would wrap them once more
        for folder in before:  # a run that goes on logs all of it again, to a new folder
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, row: Row) -> None:
        """Log an evaluation."""
        if row["step"] >= self._run.step:  # else a server has it
            self._run.log(finite_values(row), step=row["step"], commit=True)

    def end(self, facts: Mapping[str, Any]) -> None:
        """Put the facts into the summary and finish the run."""
        self._run.summary.update(facts)
        self._run.finish(exit_code=0 if facts["state"] in runs.FINISHED else 1)
