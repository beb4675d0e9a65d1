"""What makes a run the run it is: the part of its configuration that can change its result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Where and how a run is carried out; everything else is part of its identity.
CARRIED_OUT = frozenset({"study", "device", "threads", "checkpoint_seconds", "save_weights", "output_dir", "data_dir"})
DATASET_CARRIED_OUT = frozenset({"path", "workers"})


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested part of a run's configuration that can change its result."""
    kept = {key: value for key, value in config.items() if key not in CARRIED_OUT}
    kept["dataset"] = {k: v for k, v in config["dataset"].items() if k not in DATASET_CARRIED_OUT}
    return kept


def run_id(config: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits, equal for two configurations exactly if they describe the same run."""
    canonical = json.dumps(identity(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def run_name(config: Mapping[str, Any]) -> str:
    """The name of a run's folder: readable settings, then the `run_id`."""
    groups = f"-g{config['norm_batch']}" if config["norm_batch"] else ""
    return (
        f"{config['model']['name']}{config['depth'] or ''}-{config['dataset']['name']}-{config['norm']['name']}"
        f"-b{config['batch']}{groups}-s{config['seed']}-{run_id(config)}"
    )
