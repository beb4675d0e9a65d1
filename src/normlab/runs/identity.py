"""What makes a run the run it is: the part of its configuration that can change its result."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# Where and how a run is carried out; everything else is part of its identity.
CARRIED_OUT = frozenset(
    {
        *("study", "experiment", "budget"),
        *(
            "device",
            "engine",
            "memory_format",
            "threads",
            "checkpoint_seconds",
            "save_weights",
            "quiet",
            "output_dir",
            "data_dir",
            "logger",
        ),
    }
)
DATASET_CARRIED_OUT = frozenset({"path", "workers"})
# Settings that came later, each with the value at which they change nothing: with it they are no part of
# the identity, so that runs recorded before stay the runs they are. Never remove one, never change a value.
LATER: dict[str, Any] = {
    "calibration_images": 256,
    "dataset.crop_size": None,
    "dataset.image_size": None,
    "eval_stats": "running",
    "model.dropout": 0.0,
    "model.width": 1.0,
    "norm.scale_init": 1.0,
    "norm.scale_lr_divisor": 1.0,
    "optimizer.agc": None,
    "optimizer.precondition": None,
    "precise_batches": 200,
    "probe": {},
    "sampler": {"name": "iid"},
    "sync_stats": False,
    "weight_average": None,
}


# Which groups some of them came to later: to others they never did, or they have always had them.
CAME_TO: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "dataset.crop_size": lambda dataset: "flip" in dataset,
    "dataset.image_size": lambda dataset: dataset.get("kind") in ("digits", "cifar10", "cifar100"),
    "model.dropout": lambda model: model.get("kind") == "resnet",
    "model.width": lambda model: model.get("kind") == "vgg",
    "norm.scale_init": lambda norm: "scale_init" in norm,  # an option of some norms
    "norm.scale_lr_divisor": lambda norm: "scale_lr_divisor" in norm,
}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested part of a run's configuration that can change its result."""
    kept = {key: value for key, value in config.items() if key not in CARRIED_OUT}
    kept["dataset"] = {k: v for k, v in config["dataset"].items() if k not in DATASET_CARRIED_OUT}
    for path, unchanged in LATER.items():
        group, _, key = path.rpartition(".")
        if group and _came(path, kept.get(group)) and kept[group].get(key, ...) == unchanged:
            kept[group] = {k: v for k, v in kept[group].items() if k != key}
        elif not group and key in kept and kept[key] == unchanged:
            del kept[key]
    return kept


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it would be recorded today: with the settings that came after it was written."""
    carried_out = {"experiment": None, "budget": None, "engine": "auto", "memory_format": "auto", "quiet": False}
    full = {**carried_out, "logger": {"name": "none"}, **config}
    for path, unchanged in LATER.items():
        group, _, key = path.rpartition(".")
        if not group:
            full.setdefault(key, unchanged)
        elif _came(path, full.get(group)):
            full[group] = {key: unchanged, **full[group]}
    return full


def _came(path: str, group: Any) -> bool:
    return isinstance(group, Mapping) and CAME_TO.get(path, lambda _: True)(group)


def run_id(config: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits, equal for two configurations exactly if they describe the same run."""
    canonical = json.dumps(identity(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def run_name(config: Mapping[str, Any]) -> str:
    """The name of a run's folder: readable settings, then the `run_id`. Names of any text make one folder's name."""
    groups = f"-g{config['norm_batch']}" if config["norm_batch"] else ""
    model, dataset, norm = (re.sub(r"[^A-Za-z0-9_.+-]+", "_", config[g]["name"]) for g in ("model", "dataset", "norm"))
    return (
        f"{model.lstrip('.')}{config['depth'] or ''}-{dataset}-{norm}"
        f"-b{config['batch']}{groups}-s{config['seed']}-{run_id(config)}"
    )
