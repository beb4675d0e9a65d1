"""Identify a run by the part of its configuration that can change its result."""

import hashlib
import json
import re
from collections.abc import Hashable, Iterator, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, get_args

from normlab.common.registry import declarations
from normlab.config import weights

if TYPE_CHECKING:
    from pydantic import BaseModel

FORMAT = 4  # of records; a setting that comes later is marked with the format that it comes with (config.schema.Since)

# Where and how a run is carried out; everything else is part of its identity.
CARRIED_OUT = frozenset(
    {
        *("study", "experiment", "budget", "output_dir", "data_dir", "logger", "quiet"),
        *("device", "engine", "memory_format", "threads", "checkpoint_seconds"),
        *("save_weights", "keep_checkpoint"),
    }
)
DATASET_CARRIED_OUT = frozenset({"path", "workers"})


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested part of a run's configuration that can change its result."""
    kept = {key: value for key, value in config.items() if key not in CARRIED_OUT}
    kept["dataset"] = {key: value for key, value in config["dataset"].items() if key not in DATASET_CARRIED_OUT}
    kept["model"] = _with_label(config["model"])
    for group, key, neutral in _later_settings(config):
        section = kept.get(group) if group else kept
        if isinstance(section, Mapping) and key in section and section[key] == neutral:
            rest = {name: value for name, value in section.items() if name != key}
            kept = kept | {group: rest} if group else rest
    return kept


def _with_label(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section `model` with the label of weights that are a file in the place of its path."""
    return {**model, "weights": weights.label(model["weights"])} if "weights" in model else model


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the settings that records of its format did not have yet."""
    full = dict(config)
    for group, key, neutral in _later_settings(config):
        if not group:
            full.setdefault(key, neutral)
        else:
            full[group] = {key: neutral, **full[group]}
    return full


def _later_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield group ("" for none), name and neutral value of each setting that came after format 1."""
    for key, neutral in _marked(_schema()).items():
        yield "", key, neutral
    for group, values in config.items():
        if group == "norm":
            for key, neutral in _later_options(_short(values.get("_target_")), _short(values.get("name"))).items():
                yield group, key, neutral
        if isinstance(values, Mapping):
            section = _section(_schema(), *map(_short, (group, values.get("kind"), values.get("name"))))
            for key, neutral in (_marked(section) if section else {}).items():
                yield group, key, neutral


def _short(value: object) -> str:
    """Return a text that tells the schema's names apart and takes little memory where results are kept by it."""
    return str(value)[:200]


@lru_cache(maxsize=1024)
def _later_options(target: str, name: str) -> dict[str, Any]:
    """Return the neutral value of each option of a norm of normlab that came after runs had been recorded."""
    norms = declarations("norms").values() if target.startswith("normlab.norms.") else ()
    of_class = {norm.name: norm for norm in norms if norm.class_name == target.rpartition(".")[2]}
    declared = of_class.get(name) or next(iter(of_class.values()), None)
    options = declared.options if declared else {}
    return {key: option.neutral for key, option in options.items() if option.neutral is not None}


def _schema() -> "type[BaseModel]":
    from normlab.config.schema import RunConfig

    return RunConfig


@cache
def _marked(section: "type[BaseModel]") -> dict[str, Any]:
    """Return the neutral value of each setting of a section that came after format 1."""
    from normlab.config.schema import Since

    marks = ((name, mark) for name, field in section.model_fields.items() for mark in field.metadata)
    return {name: mark.neutral for name, mark in marks if isinstance(mark, Since)}


@lru_cache(maxsize=1024)
def _section(model: "type[BaseModel]", group: str, kind: str, name: str) -> "type[BaseModel] | None":
    """Return the class of a group's settings: of several, the one that is made for this `kind` or `name`."""
    from pydantic import BaseModel

    field = model.model_fields.get(group)
    if field is None:
        return None
    tag = field.discriminator
    for section in get_args(field.annotation) or (field.annotation,):
        if isinstance(section, type) and issubclass(section, BaseModel):
            if not isinstance(tag, str):
                return section
            if (kind if tag == "kind" else name) in get_args(section.model_fields[tag].annotation):
                return section
    return None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Hashable]:
    """Return nested settings by their names on the command line: optimizer.lr; lists as JSON."""
    flat: dict[str, Hashable] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, Hashable) else json.dumps(value)
    return flat


def compared(config: Mapping[str, Any]) -> dict[str, Hashable]:
    """Return the flat settings by which runs are compared, those that its format did not have yet included.

    schedule.divide_final_lr belongs to arms that divide the rate of some parameters: others, and those that have its
    default, are without it.
    """
    full = completed(config)
    flat = flatten(full | {"model": _with_label(full["model"])})
    divides = any(key.startswith("norm.") and key.endswith("lr_divisor") and flat[key] != 1 for key in flat)
    if not (divides and flat.get("schedule.divide_final_lr")):
        flat.pop("schedule.divide_final_lr", None)
    return flat


def run_id(config: Mapping[str, Any]) -> str:
    """Return ten hexadecimal digits, equal for two configurations exactly if they describe the same run."""
    return digest(canonical(config))


def canonical(config: Mapping[str, Any]) -> str:
    """Return the text that is equal for two configurations exactly if they describe the same run."""
    return json.dumps(_unsigned(identity(config)), sort_keys=True, allow_nan=False)


def digest(text: str) -> str:
    """Return the `run_id` of a `canonical` text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _unsigned(value: Any) -> Any:
    """Return settings with 0.0 in place of -0.0, which is the same number."""
    if isinstance(value, Mapping):
        return {key: _unsigned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_unsigned(each) for each in value]
    return value + 0.0 if isinstance(value, float) else value  # -0.0 + 0.0 is 0.0, and any other number stays


def run_name(config: Mapping[str, Any]) -> str:
    """Return the name of a run's folder: readable settings, made safe for a file's name, then the `run_id`."""
    groups = f"-g{config['norm_batch']}" if config["norm_batch"] else ""
    model, dataset, norm = (re.sub(r"[^A-Za-z0-9_.+-]+", "_", config[g]["name"]) for g in ("model", "dataset", "norm"))
    return (
        f"{model.lstrip('.')}{config['depth'] or ''}-{dataset}-{norm}"
        f"-b{config['batch']}{groups}-s{config['seed']}-{run_id(config)}"
    )
