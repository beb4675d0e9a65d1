"""A study in words, for all formats: its question, the runs that it has, their protocol and hardware."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from normlab import runs
from normlab.common.errors import count, listed
from normlab.common.installation import CONF
from normlab.report.study.arms import in_order, natural
from normlab.report.study.load import Study

_HARDWARE = {  # by path in a run's provenance
    "device": "Device",
    "cores": "Cores",
    "threads": "Threads of a run",
    "instructions": "Instructions",
    "versions.normlab": "normlab",
    "versions.python": "Python",
    "versions.torch": "torch",
    "versions.torchvision": "torchvision",
    "versions.timm": "timm",
    "git.commit": "Commit",
    "data.left_out.images": "Images left out, which cannot be read",
}


FOLDER = "image_folder"  # kind of a data set that may be any
_NO_SIZES = ("seed", "dataset.path", "dataset.name")


def question(study: Study) -> str:
    """Return the question of the study: the words of its experiment, else the arms that it compares."""
    return _question_of_experiment(experiment_of(study)) or _question_of_arms(study)


def experiment_of(study: Study) -> str:
    """Return the experiment that the runs name; "" where none does, or they name several.

    Runs that name none are left aside: the commands of `next` train such, into the study of an experiment.
    """
    names = {str(config.get("experiment") or "") for config in study.configs.values()} - {""}
    return names.pop() if len(names) == 1 else ""


def _question_of_experiment(name: str) -> str:
    """Return the first paragraph of comments in an experiment's file; "" if there is no such file."""
    path = _file(name)
    if path is None:
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first is Hydra's
    return " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("# "), lines))


def _file(experiment: str) -> Path | None:
    """Return the file of an experiment; None for one that is not among ours."""
    return {path.stem: path for path in (CONF / "experiment").glob("*.yaml")}.get(experiment)


def _question_of_arms(study: Study) -> str:
    placed = study.placed
    arms, batches = in_order(placed["arm"]), sorted(placed["batch"].unique())
    settings = sorted(placed["setting"].unique(), key=natural)
    sizes = f" at batch size {listed(batches, 8)}" if batches else ""
    where = settings[0] if len(settings) == 1 else f"{len(settings)} settings, from {settings[0]} to {settings[-1]}"
    if len(arms) == 1:
        return f"How well does {arms[0]} do{sizes}? On {where}."
    return f"Which arm does best{sizes}: {listed(arms, 8)}? On {where}."


def run_counts(study: Study, *, zeros: bool = False) -> str:
    """Return the number of runs in each state, as a sentence."""
    return f"{count(len(study.every), 'run')}: {study.counted(zeros=zeros)}."


def departures(study: Study) -> list[str]:
    """Return the settings in which a study is not of the size that its experiment's file has for its budget."""
    budgets = {str(config["budget"]) for config in study.configs.values() if config.get("budget")}
    path = _file(experiment_of(study))
    if path is None or len(budgets) != 1:
        return []
    sizes = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"].get("sizes", {})
    found = []
    for key, value in sizes.get(budgets.pop(), {}).items():
        there = yaml.safe_load(value) if isinstance(value, str) else value
        if key in _NO_SIZES or (isinstance(there, str) and re.search(r"[,(]", there)):
            continue  # swept over
        here = [_comparable(_at(key, config)) for config in study.configs.values()]
        unlike = [each for each in here if each not in (_comparable(there), FOLDER)]
        if unlike:
            found.append(f"{key}={_either(unlike)} (there {_either([there])})")
    return found


def _comparable(value: Any) -> Any:
    """Return a setting as it is compared: of a group its kind or name, of a path its last part."""
    if isinstance(value, Mapping):
        value = value.get("kind") or value.get("name")
    return "null" if value is None else value


def facts(study: Study) -> list[str]:
    """Return a sentence per setting with its arms and seeds, then one for each part of the protocol and hardware."""
    other = departures(study)
    size = [f"Not of the size that its experiment's file has now: {'; '.join(other)}"] if other else []
    tuned = [f"Tuned: {study.tuning.sentence}"] if study.tuning else []
    return [*_arms_and_seeds(study), *size, *tuned, *_protocol(study), *_hardware(study)]


def _arms_and_seeds(study: Study) -> Iterator[str]:
    by_setting = {str(setting): group for setting, group in study.runs.groupby("setting")}
    for setting in sorted(by_setting, key=natural):
        group = by_setting[setting]
        seeds = ", ".join(str(seed) for seed in sorted(group["seed"].unique()))
        remark = study.remarks.get(setting, "")
        yield f"{setting}: arms {', '.join(in_order(group['arm']))}; seeds {seeds}. {remark}".rstrip()


def _protocol(study: Study) -> Iterator[str]:
    configs = [study.configs[run] for run in study.runs["run"] if run in study.configs]
    tuned = study.tuning.settings if study.tuning else ()
    parts: dict[str, list[object]] = {
        "Epochs": [config.get("epochs") for config in configs],
        "Training images": [config["dataset"].get("train_size") or "all" for config in configs],
        "Test images": [_test_images(config["dataset"]) for config in configs],
        "Optimizer": [_group(config, "optimizer", tuned) for config in configs],
        "Schedule": [_group(config, "schedule", tuned) for config in configs],
        "Precision": [config.get("precision") for config in configs],
    }
    for name, values in parts.items():
        yield f"{name}: {_either(values)}"


def _test_images(dataset: Mapping[str, Any]) -> str:
    chosen, fraction = dataset.get("test_size") or "all", dataset.get("test_fraction")
    return f"{chosen} of {fraction} of each class (split_seed={dataset.get('split_seed')})" if fraction else str(chosen)


def _group(config: Mapping[str, Any], name: str, tuned: Sequence[str]) -> str:
    """Return a group of settings in words; the values of tuned ones are in the tables."""
    group = runs.identity(config).get(name)
    if not isinstance(group, Mapping):
        return "n/a" if group is None else str(group)
    values = {key: "tuned" if f"{name}.{key}" in tuned else value for key, value in group.items() if key != "name"}
    options = ", ".join(f"{key}={value}" for key, value in values.items())
    return f"{group.get('name')} ({options})" if options else str(group.get("name"))


def _hardware(study: Study) -> Iterator[str]:
    for path, name in _HARDWARE.items():
        values = [_at(path, provenance) for provenance in study.provenance.values()]
        known = [value for value in values if value is not None]
        if known:
            yield f"{name}: {_either(known)}"


def _at(path: str, nested: Any) -> Any:
    for key in path.split("."):
        nested = nested.get(key) if isinstance(nested, Mapping) else None
    return nested


def _either(values: Iterable[object]) -> str:
    return " or ".join(dict.fromkeys(str(value) for value in values))
