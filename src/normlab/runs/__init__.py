"""A run on disk: identity, folder, status, metrics. No torch, no Hydra."""

from normlab.runs.folder import (
    FINISHED,
    PROVENANCE,
    Run,
    find,
    now,
    read_config,
    read_metrics,
    read_probes,
    read_status,
)
from normlab.runs.identity import completed, identity, run_id, run_name

__all__ = [
    "FINISHED",
    "PROVENANCE",
    "Run",
    "completed",
    "find",
    "identity",
    "now",
    "read_config",
    "read_metrics",
    "read_probes",
    "read_status",
    "run_id",
    "run_name",
]
