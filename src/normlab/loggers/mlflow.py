"""A run of MLflow: in a database below output_dir, or wherever tracking_uri says.

By the client, which is told which run is meant; MLflow's own functions have one run per process or thread in mind.
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
from normlab.loggers import Row, numbers, started

STATUSES = {"done": "FINISHED", "diverged": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LOCK_SECONDS = 120
logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it would tell the terminal of its tables


class Tool:
    def __init__(self, run: runs.Run, settings: MLflowLogger) -> None:
        self._started = started(run)
        folder = Path(run.config["output_dir"]).absolute()
        # MLflow makes the tables of a new database without a thought to other processes that do.
        with FileLock(folder / "mlflow.lock", timeout=LOCK_SECONDS):
            usual = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
            self._client = MlflowClient(settings.tracking_uri or usual)
            name = settings.experiment or run.config["study"]
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
        # One that is finished there and not here is of a record that was deleted: let it be.
        query = f"tags.`normlab.run_id` = '{run.run_id}' and tags.`normlab.study` = '{run.config['study']}'"
        query += " and attributes.status != 'FINISHED'"
        before = self._client.search_runs([experiment], query, max_results=1)
        self._logged = 0  # the last step that MLflow has
        if before:
            self._id = before[0].info.run_id
            self._logged = max((m.step for m in self._client.get_metric_history(self._id, "epoch")), default=0)
            self._client.update_run(self._id, "RUNNING")
            return
        tags = {f"normlab.{key}": run.config[key] for key in ("study", "experiment", "budget") if run.config[key]}
        tags["normlab.run_id"] = run.run_id
        created = self._client.create_run(experiment, int(1000 * self._started), tags, run.name)
        self._id = created.info.run_id
        params = [Param(key, str(value)) for key, value in _flat(run.config).items()]
        for first in range(0, len(params), 100):  # at most so many at a time
            self._client.log_batch(self._id, params=params[first : first + 100])

    def log(self, row: Row) -> None:
        if row["step"] <= self._logged:
            return
        time = int(1000 * (self._started + row["wall_seconds"]))
        self._client.log_batch(self._id, [Metric(k, v, time, row["step"]) for k, v in numbers(row).items()])

    def end(self, facts: Mapping[str, Any]) -> None:
        for name, fact in facts.items():
            self._client.set_tag(self._id, f"normlab.{name}", fact)
        self._client.set_terminated(self._id, STATUSES[facts["state"]])


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
