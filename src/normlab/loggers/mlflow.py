"""Log a run to MLflow: into a database in output_dir, or to the address tracking_uri.

Through the client, which takes the run as an argument; MLflow's own functions assume one run per process or thread.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # here, and not at its first use, which holds a lock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from normlab import runs
from normlab.config.schema import MLflowLogger
from normlab.loggers import Row, finite_values, start_time

STATUSES = {"done": "FINISHED", "diverged": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LOCK_SECONDS = 120
logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it would report its tables on the terminal


class MLflow:
    """A run in MLflow."""

    def __init__(self, run: runs.Run, settings: MLflowLogger) -> None:
        self._started = start_time(run)
        folder = Path(run.config["output_dir"]).absolute()
        # MLflow makes the tables of a new database without regard to other processes that do.
        with FileLock(folder / "mlflow.lock", timeout=LOCK_SECONDS):
            default = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
            self._client = MlflowClient(settings.tracking_uri or default)
            name = settings.experiment or run.config["study"]
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
        # A run that is finished there and not here is of a record that was deleted: it stays as it is.
        query = f"tags.`normlab.run_id` = '{run.run_id}' and tags.`normlab.study` = '{run.config['study']}'"
        query += " and attributes.status != 'FINISHED'"
        earlier = self._client.search_runs([experiment], query, max_results=1)
        self._logged = 0  # the last step that MLflow has
        if earlier:
            self._id = earlier[0].info.run_id
            self._logged = max((m.step for m in self._client.get_metric_history(self._id, "epoch")), default=0)
            self._client.update_run(self._id, "RUNNING")
        else:
            self._id = self._create(run, experiment)

    def _create(self, run: runs.Run, experiment: str) -> str:
        tags = {f"normlab.{key}": run.config[key] for key in ("study", "experiment", "budget") if run.config[key]}
        tags["normlab.run_id"] = run.run_id
        created = self._client.create_run(experiment, int(1000 * self._started), tags, run.name)
        params = [Param(key, str(value)) for key, value in _flat(run.config).items()]
        for first in range(0, len(params), 100):  # at most so many at a time
            self._client.log_batch(created.info.run_id, params=params[first : first + 100])
        return str(created.info.run_id)

    def log(self, row: Row) -> None:
        """Log an evaluation that MLflow has not."""
        if row["step"] <= self._logged:
            return
        time = int(1000 * (self._started + row["wall_seconds"]))
        self._client.log_batch(self._id, [Metric(k, v, time, row["step"]) for k, v in finite_values(row).items()])

    def end(self, facts: Mapping[str, Any]) -> None:
        """Log the facts as tags and end the run."""
        for name, fact in facts.items():
            self._client.set_tag(self._id, f"normlab.{name}", fact)
        self._client.set_terminated(self._id, STATUSES[facts["state"]])


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
