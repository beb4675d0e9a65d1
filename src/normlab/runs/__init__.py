"""A run on disk: identity, folder, status, metrics. No torch, no Hydra."""

from normlab.runs.folder import (
    LOG,
    METRICS_FILE,
    PROBES_FOLDER,
    PROVENANCE,
    Run,
    find,
    now,
    probe_files,
    read_config,
    read_metrics,
    read_probes,
    read_provenance,
    read_rows,
    read_status,
)
from normlab.runs.identity import compared, completed, flatten, identity, run_id, run_name
from normlab.runs.states import FINISHED, State

__all__ = [
    "FINISHED",
    "LOG",
    "METRICS_FILE",
    "PROBES_FOLDER",
    "PROVENANCE",
    "Run",
    "State",
    "compared",
    "completed",
    "find",
    "flatten",
    "identity",
    "now",
    "probe_files",
    "read_config",
    "read_metrics",
    "read_probes",
    "read_provenance",
    "read_rows",
    "read_status",
    "run_id",
    "run_name",
]
