"""The places of runs in tables: the arm of each run, and the setting that its table is about.

Runs that differ only in their seed are a cell. `batch` is a table's column and the arm its row. Every other
setting that varies makes tables of its own, so that no cell ever mixes two of them.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from normlab.common.registry import declarations
from normlab.runs.naming import (
    ABSENT,
    IMPORTED,
    OF_THE_ARM,
    arm_labels,
    cell_key,
    determines,
    flat_cells,
    on_a_line,
    text_of,
    values_of,
    varying,
)

__all__ = [
    "FAMILIES",
    "KNOWN_ARMS",
    "OF_THE_ARM",
    "Place",
    "cell_key",
    "flat_cells",
    "in_order",
    "is_reconstruction",
    "natural",
    "places",
    "varying",
    "without_norm_batch",
]

_NORMS = declarations("norms").values()  # in the order of tables
FAMILIES = {  # grouped for figures that cannot show all of them at once
    family: tuple(norm.name for norm in _NORMS if norm.family == family)
    for family in dict.fromkeys(norm.family for norm in _NORMS)
}
_RECONSTRUCTIONS = {(f"normlab.norms.{norm.class_name}", norm.needs) for norm in _NORMS if norm.reconstruction}
KNOWN_ARMS = tuple(itertools.chain(*FAMILIES.values()))
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
    by_batch = [(*(text_of(row.get(key, ABSENT)) for key in fixed), row.get("batch")) for row in flat]
    following = [key for key in splitting if key not in fixed and determines(by_batch, flat, key)]
    settings = [*map(on_a_line, _setting_titles(flat, [key for key in splitting if key not in following]))]
    arms = map(on_a_line, arm_labels(flat))
    of_cell = dict(zip(cells, zip(settings, arms, strict=True), strict=True))
    in_tables = [Place(*of_cell[cell_key(config)], config["batch"], config["seed"]) for config in configs]
    return in_tables, _remarks(settings, flat, following)


def is_reconstruction(config: Mapping[str, Any]) -> bool:
    """Return whether the paper of a run's norm leaves open what it does, by the class, whatever the arm is called."""
    target = (config.get("norm") or {}).get("_target_")
    return any(target == known and (not needs or _has(config, needs)) for known, needs in _RECONSTRUCTIONS)


def _has(config: Mapping[str, Any], needs: str) -> bool:
    path, _, value = needs.partition("=")
    group, _, name = path.partition(".")
    return (config.get(group) or {}).get(name) == value


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


def without_norm_batch(arm: str) -> str:
    """Return an arm's label without its norm_batch, which some places tell beside it."""
    return re.sub(r"(?:, |(\())norm_batch=\d+", r"\1", arm).replace(" ()", "")


def _rank(name: str) -> int:
    return KNOWN_ARMS.index(name) if name in KNOWN_ARMS else len(KNOWN_ARMS)


def _setting_titles(flat: Sequence[Mapping[str, Hashable]], splitting: Sequence[str]) -> list[str]:
    """Return data set and network, then each setting that separates runs which those before it do not."""
    titles = [f"{row.get('dataset.name')}, {row.get('model.name')}{row.get('depth') or ''}" for row in flat]
    for key in splitting:
        if not determines(titles, flat, key):
            values = values_of(flat, key)
            titles = [f"{title}, {key}={text_of(value)}" for title, value in zip(titles, values, strict=True)]
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
            listed = ", ".join(f"{text_of(value)} at {batch}" for batch, value in sorted(values.items()))
            sentences[setting].append(f"{key} follows the batch size: {listed}.")
    return {setting: " ".join(listed) for setting, listed in sentences.items()}
