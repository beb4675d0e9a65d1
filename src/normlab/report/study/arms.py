"""The places of runs in tables: the arm of each run, and the setting that its table is about.

Runs that differ only in their seed are a cell. `batch` is a table's column and the arm its row. Every other
setting that varies makes tables of its own, so that no cell ever mixes two of them.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from normlab import runs
from normlab.common.errors import as_typed, exact
from normlab.common.registry import declarations

_NORMS = declarations("norms").values()  # in the order of tables
FAMILIES = {  # grouped for figures that cannot show all of them at once
    family: tuple(norm.name for norm in _NORMS if norm.family == family)
    for family in dict.fromkeys(norm.family for norm in _NORMS)
}
KNOWN_ARMS = tuple(itertools.chain(*FAMILIES.values()))
OF_THE_ARM = (
    "norm.",
    "optimizer.agc",
    "optimizer.precondition",
    "schedule.divide_final_lr",
)  # norm=nf and norm=bnp set the last two
_NEUTRAL = {"norm.scale_init": 1.0, "norm.scale_lr_divisor": 1.0}  # the plain norm: an arm's label leaves them out
IMPORTED = "norm.imported"  # only the arms of imported runs have it: their options are not what ours are
_ABSENT = ...  # in place of the value of a setting that a run does not have
_ALWAYS_SPLIT = ("depth", "model.", "dataset.")  # never regarded as following the batch size


class Place(NamedTuple):
    """The place of a run in the tables."""

    setting: str  # e.g. "cifar10, resnet18, optimizer.lr=0.1"
    arm: str  # e.g. "bn", or "bn (eps=0.001)" where a study has several
    batch: int
    seed: int


def places(configs: Sequence[Mapping[str, Any]], without: Collection[str] = ()) -> tuple[list[Place], dict[str, str]]:
    """Return the place of each run among the others, and per setting a remark about what follows its batch size.

    A setting other than depth, network and data set that has one value per batch size (a learning rate scaled with the
    batch, say) does not split the table: its values are in the remark.

    Args:
        configs: of the runs.
        without: settings that are left out of account, as those that are tuned.
    """
    cells = flat_cells(configs)
    regarded = [{key: value for key, value in row.items() if key not in without} for row in cells.values()]
    flat = _beside_trained(regarded)
    # A probe changes nothing of a run: runs with and without it are of one cell.
    elsewhere = (*OF_THE_ARM, "norm_batch", "batch", "seed", "probe")
    splitting = [key for key in varying(flat) if not key.startswith(elsewhere)]
    splitting.sort(key="eval_batch".__eq__)  # at the end: the eval_stats that it goes with explains more
    fixed = [key for key in splitting if key.startswith(_ALWAYS_SPLIT)]
    by_batch = [(*(_text(row.get(key, _ABSENT)) for key in fixed), row.get("batch")) for row in flat]
    following = [key for key in splitting if key not in fixed and _determines(by_batch, flat, key)]
    settings = [*map(_on_a_line, _setting_titles(flat, [key for key in splitting if key not in following]))]
    arms = map(_on_a_line, _arm_labels(flat))
    of_cell = dict(zip(cells, zip(settings, arms, strict=True), strict=True))
    in_tables = [Place(*of_cell[cell_key(config)], config["batch"], config["seed"]) for config in configs]
    return in_tables, _remarks(settings, flat, following)


def cell_key(config: Mapping[str, Any]) -> Hashable:
    """Return a key that is equal for configurations as read whose only difference is the seed: they share their parts.

    Configurations that do not share their parts have different keys, whatever they hold.
    """
    parts = {**config, "seed": None}
    return (*parts, *map(id, parts.values()))


def flat_cells(configs: Iterable[Mapping[str, Any]]) -> dict[Hashable, dict[str, Hashable]]:
    """Return the flat settings that can change a result by `cell_key`: a study has far fewer cells than runs."""
    cells = {cell_key(config): config for config in configs}
    return {cell: runs.compared(runs.identity(config)) for cell, config in cells.items()}


def _beside_trained(flat: Sequence[Mapping[str, Hashable]]) -> list[Mapping[str, Hashable]]:
    """Complete imported runs, to place them only, by what all trained runs have that are most like them.

    A setting that an imported run does not state then makes no table of its own.
    """
    trained = [row for row in flat if IMPORTED not in row]
    return [{**_in_common(row, trained), **row} if IMPORTED in row else row for row in flat]


def _in_common(row: Mapping[str, Hashable], trained: Sequence[Mapping[str, Hashable]]) -> dict[str, Hashable]:
    """Return the settings that all trained runs of the same network and data set share that are most like `row`."""
    network = ("dataset.name", "model.name", "depth")
    alike = [other for other in trained if all(other.get(key) == row.get(key) for key in network)]
    of_the_arm = (*OF_THE_ARM, "norm_batch", "seed", "probe")
    for key in row:
        if not key.startswith(of_the_arm):
            alike = [other for other in alike if other.get(key, "") == row[key]] or alike
    if not alike:
        return {}
    varied = varying(alike)
    return {key: value for key, value in alike[0].items() if key not in varied and not key.startswith(of_the_arm)}


def in_order(arms: Iterable[str]) -> list[str]:
    """Return the known arms, each once, in their own order, then the others by name."""
    names = arms.unique() if hasattr(arms, "unique") else set(arms)  # a column of millions of rows has few
    return sorted(names, key=lambda arm: (_rank(arm.split(" (")[0]), natural(arm)))


def natural(text: str) -> list[float | str]:
    """Return a key that sorts numbers by their value: resnet18 before resnet101, 0.05 before 0.1."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _rank(name: str) -> int:
    return KNOWN_ARMS.index(name) if name in KNOWN_ARMS else len(KNOWN_ARMS)


def varying(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Return the settings that differ between configurations, or that some of them lack."""
    keys = dict.fromkeys(key for row in flat for key in row)
    return [key for key in keys if len(set(_distinct(flat, key))) > 1]


def _values(flat: Sequence[Mapping[str, Hashable]], key: str) -> list[Hashable]:
    return [row.get(key, _ABSENT) for row in flat]


def _distinct(flat: Sequence[Mapping[str, Hashable]], key: str) -> list[Hashable]:
    """Return the values as they differ: true is not 1."""
    return [(isinstance(value, bool), value) for value in _values(flat, key)]


def _determines(groups: Sequence[Hashable], flat: Sequence[Mapping[str, Hashable]], key: str) -> bool:
    """Return whether all runs of one group have one value of `key`."""
    return len(set(zip(groups, _distinct(flat, key), strict=True))) == len(set(groups))


def _arm_labels(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    by_name: dict[tuple[Hashable, bool], list[Mapping[str, Hashable]]] = defaultdict(list)
    for row in flat:
        by_name[row["norm.name"], IMPORTED in row].append(row)
    # Arms differ in their options by nature; a label needs only what varies within one norm.
    options = {
        name: [key for key in varying(rows) if key.startswith("norm.") or key in _varying_where_it_is(rows)]
        for name, rows in by_name.items()
    }
    several_norm_batches = len(set(_values(flat, "norm_batch"))) > 1
    plain = {  # left out of labels where all arms of the name have it
        (name, key) for name, rows in by_name.items() for key in _NEUTRAL if all(key in row for row in rows)
    }
    labels = []
    for row in flat:
        name, imported = row["norm.name"], IMPORTED in row
        words = ["imported"] if imported and (name, False) in by_name else []
        own = [key for key in options[name, imported] if key in row]
        own = [key for key in own if ((name, imported), key) not in plain or row[key] != _NEUTRAL[key]]
        words += [f"{key.removeprefix('norm.')}={_text(row[key])}" for key in own]
        if several_norm_batches and row.get("norm_batch") is not None:
            words.append(f"norm_batch={row['norm_batch']}")
        labels.append(f"{name} ({', '.join(words)})" if words else str(name))
    return _told_apart(labels, flat)


def _varying_where_it_is(rows: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Return options of an arm beside the norm's own that differ between the runs that have them."""
    keys = {key for row in rows for key in row if key.startswith(OF_THE_ARM)}
    return [key for key in keys if len({row[key] for row in rows if key in row}) > 1]


def _told_apart(labels: Sequence[str], flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Mark arms of imported runs whose names are the labels of other arms, e.g. "bn (eps=0.001)"."""
    names: dict[tuple[str, Hashable, bool], str] = {}
    keys = [(label, row["norm.name"], IMPORTED in row) for label, row in zip(labels, flat, strict=True)]
    for key in sorted(dict.fromkeys(keys), key=lambda key: key[2]):  # trained ones keep theirs
        name = key[0]
        while name in names.values():
            name += " (imported)"
        names[key] = name
    return [names[key] for key in keys]


def _setting_titles(flat: Sequence[Mapping[str, Hashable]], splitting: Sequence[str]) -> list[str]:
    """Return data set and network, then each setting that separates runs which those before it do not."""
    titles = [f"{row.get('dataset.name')}, {row.get('model.name')}{row.get('depth') or ''}" for row in flat]
    for key in splitting:
        if not _determines(titles, flat, key):
            values = _values(flat, key)
            titles = [f"{title}, {key}={_text(value)}" for title, value in zip(titles, values, strict=True)]
    return titles


def _remarks(
    settings: Sequence[str], flat: Sequence[Mapping[str, Hashable]], following: Sequence[str]
) -> dict[str, str]:
    sentences: dict[str, list[str]] = defaultdict(list)
    for key in following:
        by_batch: dict[str, dict[Any, Hashable]] = defaultdict(dict)
        for setting, row in zip(settings, flat, strict=True):
            by_batch[setting][row["batch"]] = row.get(key)
        for setting, values in by_batch.items():
            listed = ", ".join(f"{_text(value)} at {batch}" for batch, value in sorted(values.items()))
            sentences[setting].append(f"{key} follows the batch size: {listed}.")
    return {setting: " ".join(listed) for setting, listed in sentences.items()}


def _on_a_line(label: str) -> str:
    """Return a label that could be mistaken for several lines, or for another one, with its odd characters named."""
    return label if label.isprintable() else label.encode("unicode_escape").decode()


def _text(value: object) -> str:
    """Return a value as a label has it: different values have different texts."""
    if value is _ABSENT:
        return ""
    return exact(value) if isinstance(value, float) else str(as_typed(value)) or "''"
