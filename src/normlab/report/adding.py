"""The command line that trains given runs with other seeds: as few settings as compose to exactly these runs.

The menu is read as Hydra composes it, without Hydra: the defaults, the chosen files in their order, then values. What
the settings come to is checked by the name of the run; a test compares it with Hydra's own.
"""

import copy
import json
import os
import re
import shlex
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any

from normlab import runs
from normlab.common.errors import UserError
from normlab.common.installation import CONF, command_name
from normlab.config import schema
from normlab.runs import reading

SEVERAL = 5  # seeds that are listed; more are a range
_OF_MACHINE = ("dataset.path", "data_dir")  # settings that make no other run, without which one cannot start
_KEPT = (*_OF_MACHINE, "norm", "batch")  # settings that a command always gives, the first two where they differ
_PLAIN = re.compile(r"[A-Za-z_/][\w/.+-]*", re.ASCII)  # text that is read as it is
_KEY = re.compile(r"[+~]?[a-z_][\w-]*(\.[a-z_][\w-]*)*", re.ASCII | re.IGNORECASE)  # the keys that Hydra's grammar has
_WORDS = ("null", "true", "false", "nan", "inf")

Words = dict[str, Any]  # values, and choices of groups, by setting; "+norm.x" is added, "~norm.x" taken out


def commands(
    configs: Sequence[Mapping[str, Any]], seeds: Sequence[int], study: str, output_dir: str, *, here: bool = True
) -> list[str]:
    """Return the command lines, each a sweep, that train the runs of these configurations with these seeds.

    Args:
        configs: one of each cell; its own seed does not matter.
        seeds: whole numbers without a gap.
        study: the study that the runs go to.
        output_dir: the folder of the study's folder.
        here: whether the folder of the data is one of this machine.

    Returns:
        none if a run was made elsewhere (imported), or has settings that no command line of this version gives.
    """
    cells: list[dict[str, list[str]]] = []
    for config in configs:
        given = settings(config, here=here)
        if given is None:
            return []
        cell = {key: [as_text(value)] for key, value in given.items()}
        if cell not in cells:
            cells.append(cell)
    seed = ",".join(map(str, seeds)) if len(seeds) <= SEVERAL else f"range({seeds[0]},{seeds[-1] + 1})"
    place = {"study": study} | ({} if output_dir == "outputs" else {"output_dir": output_dir})
    lines = []
    for cell in _merged(cells):
        words = [f"{key}={as_text(value)}" for key, value in place.items()]
        words += [key if key.startswith("~") else f"{key}={','.join(values)}" for key, values in cell.items()]
        lines.append(" ".join([command_name("train"), "-m", *map(shlex.quote, [*words, f"seed={seed}"])]))
    # Not what a terminal would obey, nor what Hydra would look up.
    return lines if all(line.isprintable() and "${" not in line for line in lines) else []


def settings(config: Mapping[str, Any], *, here: bool = True) -> Words | None:
    """Return the fewest settings that compose to the run of a configuration, its seed apart; None if none do."""
    try:
        if config["norm"].get("imported"):
            return None
        wanted = runs.completed(config)
        words = _choices(wanted)
        of_machine = _OF_MACHINE if here else _OF_MACHINE[:1]
        words |= _differences(_parsed(compose(words)), {**wanted, "seed": 0}, of_machine)
        name = runs.run_id({**wanted, "seed": 0})
        if _identity(words) != name:
            return None
        for key in [key for key in words if key not in _KEPT and key not in _menu()[0]]:
            rest = {other: value for other, value in words.items() if other != key}
            if _identity(rest) == name:
                words = rest
        if not all(_KEY.fullmatch(key) and as_text(value) for key, value in words.items()):
            return None
    except (UserError, AttributeError, KeyError, TypeError, ValueError, RecursionError):  # of settings that are none
        return None
    return words


def compose(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the menu gives with these words in place of its own."""
    defaults, base = _menu()
    composed = copy.deepcopy(base)
    for group, choice in _chosen(words).items():
        for name in choice if isinstance(choice, list) else [choice]:
            _merge(composed, _file(group, name)[0])
    for path, value in words.items():
        if path not in defaults:
            _put(composed, path, value)
    return composed


def _identity(words: Mapping[str, Any]) -> str:
    """Return the `run_id` of these words; "" if they are not valid."""
    try:
        return runs.run_id(schema.parse(compose(words)).as_dict())
    except UserError:
        return ""


def _parsed(composed: dict[str, Any]) -> dict[str, Any]:
    """Return settings as the schema has them, with what is idle at one value; as they are if they are not valid."""
    try:
        return schema.parse(composed).as_dict()
    except UserError:
        return composed


# ---- the menu


@cache
def _menu() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the choice of each group by default, in the order of merging, and the values of the first level."""
    base = reading.read_yaml(CONF / "config.yaml")
    listed = {
        group: choice for entry in base.pop("defaults") if isinstance(entry, dict) for group, choice in entry.items()
    }
    del base["hydra"]
    base["data_dir"] = os.environ.get("NORMLAB_DATA", "data")
    other = ("budget", "experiment", "cluster", "logger")  # that make no other run
    groups = {group: choice for group, choice in listed.items() if (CONF / group).is_dir() and group not in other}
    base["logger"] = {"name": "none"}
    return groups, base


@cache
def _file(group: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a choice's settings from the first level on, and the choices of other groups that it makes."""
    path = CONF / group / f"{name}.yaml"
    if path not in (CONF / group).glob("*.yaml"):  # a record may name anything
        raise UserError(f"{group}={name}: there is no such choice.")
    values = _numbers(reading.read_yaml(path))
    is_global = path.read_text(encoding="utf-8").startswith("# @package _global_")
    found: dict[str, Any] = {}
    others: dict[str, str] = {}
    for entry in values.pop("defaults", []):
        if isinstance(entry, dict):
            others |= {key.removeprefix("override /"): choice for key, choice in entry.items()}
        elif entry != "_self_":
            _merge(found, _file(group, entry)[0])
    _merge(found, values if is_global else {group: values})
    return found, others


def _numbers(value: Any) -> Any:
    """Return values with 1e-4, which YAML 1.1 takes for text and Hydra does not, as the number."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e[+-]?\d+", value) else value


def _chosen(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choice of each group: a word's, else one that a chosen file makes, else the menu's."""
    defaults, _ = _menu()
    given = {group: words.get(group, choice) for group, choice in defaults.items()}
    files = [_file(group, choice)[1] for group, choice in given.items() if isinstance(choice, str)]
    others = {group: choice for each in files for group, choice in each.items()}
    return {group: words.get(group, others.get(group, choice)) for group, choice in defaults.items()}


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _put(composed: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.lstrip("+~").split(".")
    node = composed
    for parent in parents:
        node = node.setdefault(parent, {})
    if path.startswith("~"):
        del node[key]
    else:
        node[key] = copy.deepcopy(value)


# ---- a run's settings as words


def _choices(config: Mapping[str, Any]) -> Words:
    """Return for each group the file that is most like a run's section, the menu's own where several are."""
    defaults, _ = _menu()
    words: Words = {}
    for group, default in defaults.items():
        section = config[group]
        if isinstance(default, list):
            words[group] = sorted(section)
            continue
        names = sorted((path.stem for path in (CONF / group).glob("*.yaml")), key=lambda name: (name != default, name))
        words[group] = min(names, key=lambda name: _distance(_file(group, name)[0][group], section))
    for group in [group for group in words if group not in _KEPT]:
        rest = {other: choice for other, choice in words.items() if other != group}
        if _chosen(rest)[group] == words[group]:
            words = rest
    return words | {"batch": config["batch"]}


def _distance(section: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    one, two = runs.flatten(section), runs.flatten(other)
    unlike = [key for key in one | two if one.get(key, ...) not in (two.get(key, ...), "???")]  # that leave it open
    return sum(1 + (key in ("kind", "_target_", "name")) for key in unlike)


def _differences(composed: Mapping[str, Any], wanted: Mapping[str, Any], of_machine: Sequence[str]) -> Words:
    """Return the values that make the wanted settings of the composed ones."""
    path = composed["dataset"].get("path")
    if isinstance(path, str):
        composed = {
            **composed,
            "dataset": {**composed["dataset"], "path": path.replace("${data_dir}", composed["data_dir"])},
        }
    words: Words = {}
    kept = runs.identity(dict(wanted)).keys() | {"dataset", "data_dir"}

    def walk(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str) -> None:
        for key in [*two, *(key for key in one if key not in two)]:
            name = f"{prefix}{key}"
            if not prefix and key not in kept:
                continue
            if name in _OF_MACHINE and (name not in of_machine or one.get(key) == two.get(key)):
                continue
            if key not in two:
                words[f"~{name}"] = None
            elif isinstance(two[key], Mapping) and isinstance(one.get(key), Mapping):
                walk(one[key], two[key], f"{name}.")
            elif key not in one:
                words[f"+{name}"] = two[key]
            elif one[key] != two[key] or isinstance(one[key], bool) != isinstance(two[key], bool):
                words[name] = two[key]

    walk(composed, wanted, "")
    return words


# ---- words as text


def as_text(value: Any) -> str:
    """Return a value as Hydra's command line reads it.

    Raises:
        ValueError: for a mapping with a key that it would read as something else, or not at all.
    """
    if isinstance(value, Mapping):
        if any(as_text(key) != key for key in value):
            raise ValueError("Hydra's grammar knows no quoted keys")
        return f"{{{','.join(f'{as_text(key)}:{as_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, float):
        return repr(value)  # JSON's Infinity is a text there
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (found[2] and "\\'"), value)
    return f"'{escaped}'"


def _merged(cells: Sequence[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    """Return as few products of lists as make up these cells, by joining those that differ in one setting's values."""
    left, before = list(cells), 0
    while len(left) != before:
        before = len(left)
        for key in dict.fromkeys(key for cell in left for key in cell):
            joined: dict[Hashable, dict[str, list[str]]] = {}
            for cell in left:
                alike = key in cell, frozenset((other, tuple(cell[other])) for other in cell if other != key)
                found = joined.get(alike)
                joined[alike] = found | {key: [*found[key], *cell[key]]} if found else cell  # no two cells are equal
            left = list(joined.values())
    return left
