"""A run on disk: identity, folder, status, metrics. No torch, no Hydra."""

from normlab.runs.folder import LOG, Run, now
from normlab.runs.identity import compared, completed, flatten, identity, run_id, run_name
from normlab.runs.naming import run_names
from normlab.runs.record import (
    PROBES_FOLDER,
    PROVENANCE,
    Record,
    check,
    find,
    probe_files,
    read_config,
    read_metrics,
    read_probes,
    read_provenance,
    read_record,
    read_status,
    scan,
)
from normlab.runs.rows import METRICS_FILE, read_rows
from normlab.runs.states import FINISHED, State

__all__ = [
    "FINISHED",
    "LOG",
    "METRICS_FILE",
    "PROBES_FOLDER",
    "PROVENANCE",
    "Record",
    "Run",
    "State",
    "check",
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
    "read_record",
    "read_rows",
    "read_status",
    "run_id",
    "run_name",
    "run_names",
    "scan",
]
