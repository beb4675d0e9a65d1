"""Which runs may stand beside each other: the arm of each run, and the setting that its table is about.

Runs that differ only in their seed are a cell. `batch` is a table's column and the arm its row. Every
other setting that varies makes tables of its own, so that no cell ever mixes two of them.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from normlab import runs

FAMILIES = {  # the known arms in the order of tables, grouped for figures that cannot show all of them at once
    "BN and its parts": ("bn", "affine", "bnminus", "none", "bn_scaled", "noisy_bn", "noisy_none"),
    "statistics of the batch": ("renorm", "lp1", "lp2", "lpinf", "mabn", "powernorm", "mimicnorm"),
    "statistics of a sample": ("gn", "ln", "in", "frn", "evonorm_s0", "evonorm_b0"),
    "weights, starts and gradients": ("wn", "wn_mean", "wn_trelu", "normprop", "nf", "fixup", "bnp"),
}
KNOWN_ARMS = tuple(itertools.chain(*FAMILIES.values()))
OF_THE_ARM = ("norm.", "optimizer.agc", "optimizer.precondition")  # norm=nf and norm=bnp set the last two
IMPORTED = "norm.imported"  # only the arms of imported runs have it: their options are not what ours are
_ALWAYS_SPLIT = ("depth", "model.", "dataset.")  # never regarded as following the batch size


class Place(NamedTuple):
    """Where a run belongs in the tables."""

    setting: str  # e.g. "cifar10, resnet18, optimizer.lr=0.1"
    arm: str  # e.g. "bn", or "bn (eps=0.001)" where a study has several
    batch: int
    seed: int


def places(configs: Sequence[Mapping[str, Any]]) -> tuple[list[Place], dict[str, str]]:
    """The place of each run among the others, and per setting a remark about what follows its batch size.

    A setting other than depth, network and data set that has one value per batch size (a learning rate
    scaled with the batch, say) does not split the table: its values are told in the remark.
    """
    of_cell = [but_for_the_seed(config) for config in configs]
    cells = dict(zip(of_cell, configs, strict=True))  # each is looked at once: a study has far fewer of them than runs
    flat = _beside_trained([flatten(runs.completed(runs.identity(config))) for config in cells.values()])
    arms = _arm_labels(flat)
    # A probe changes nothing of a run: runs with and without it are of one cell.
    elsewhere = (*OF_THE_ARM, "norm_batch", "batch", "seed", "probe")
    splitting = [key for key in varying(flat) if not key.startswith(elsewhere)]
    splitting.sort(key="eval_batch".__eq__)  # at the end: the eval_stats that it goes with says more
    fixed = [key for key in splitting if key.startswith(_ALWAYS_SPLIT)]
    following = [
        key
        for key in splitting
        if key not in fixed and _determines([(*_values(row, fixed), row.get("batch")) for row in flat], flat, key)
    ]
    settings = _setting_titles(flat, [key for key in splitting if key not in following])
    found = {
        cell: Place(setting, arm, config["batch"], config["seed"])
        for (cell, config), setting, arm in zip(cells.items(), settings, arms, strict=True)
    }
    remarks = _remarks(list(found.values()), flat, following)
    return [found[cell]._replace(seed=config["seed"]) for cell, config in zip(of_cell, configs, strict=True)], remarks


def _beside_trained(flat: Sequence[Mapping[str, Hashable]]) -> list[Mapping[str, Hashable]]:
    """Complete imported runs, to place them only, by what all trained runs have that are most like them.

    A setting that an imported run does not state then makes no table of its own.
    """
    trained = [row for row in flat if IMPORTED not in row]
    return [{**_in_common(row, trained), **row} if IMPORTED in row else row for row in flat]


def _in_common(row: Mapping[str, Hashable], trained: Sequence[Mapping[str, Hashable]]) -> dict[str, Hashable]:
    network = ("dataset.name", "model.name", "depth")
    alike = [other for other in trained if _values(other, network) == _values(row, network)]
    of_the_arm = (*OF_THE_ARM, "norm_batch", "seed", "probe")
    for key in row:
        if not key.startswith(of_the_arm):
            alike = [other for other in alike if other.get(key, "") == row[key]] or alike
    varied = varying(alike)
    return (
        {key: alike[0][key] for key in alike[0] if key not in varied and not key.startswith(of_the_arm)}
        if alike
        else {}
    )


def but_for_the_seed(config: Mapping[str, Any]) -> Hashable:
    """Equal only for configurations that differ in nothing but their seed, which share what they hold when read."""
    held = {**config, "seed": None}
    return (*held, *map(id, held.values()))


def in_order(arms: Iterable[str]) -> list[str]:
    """The known arms first, in their own order, then the others by name."""
    found = arms.unique() if hasattr(arms, "unique") else set(arms)  # a column of millions of rows has few
    return sorted(found, key=lambda arm: (_rank(arm.split(" (")[0]), natural(arm)))


def natural(text: str) -> list[str | float]:
    """A sorting key that takes numbers by their value: resnet18 before resnet101, 0.05 before 0.1."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _rank(name: str) -> int:
    return KNOWN_ARMS.index(name) if name in KNOWN_ARMS else len(KNOWN_ARMS)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Hashable]:
    flat: dict[str, Hashable] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, Hashable) else json.dumps(value)
    return flat


def _values(row: Mapping[str, Hashable], keys: Iterable[str]) -> tuple[Hashable, ...]:
    return tuple(row.get(key, "") for key in keys)


def varying(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """The settings that differ between configurations, or that some of them lack."""
    keys = dict.fromkeys(key for row in flat for key in row)
    return [key for key in keys if len(set(_values_of(flat, key))) > 1]


def _values_of(flat: Sequence[Mapping[str, Hashable]], key: str) -> list[Hashable]:
    return [row.get(key, "") for row in flat]


def _determines(groups: Sequence[Hashable], flat: Sequence[Mapping[str, Hashable]], key: str) -> bool:
    """Whether all runs of one group have one value of `key`."""
    pairs = set(zip(groups, _values_of(flat, key), strict=True))
    return len(pairs) == len(set(groups))


def _arm_labels(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    by_name: dict[Hashable, list[Mapping[str, Hashable]]] = defaultdict(list)
    for row in flat:
        by_name[row["norm.name"], IMPORTED in row].append(row)
    # Arms differ in their options by nature; only what varies within one norm has to be told apart.
    options = {name: [key for key in varying(rows) if key.startswith(OF_THE_ARM)] for name, rows in by_name.items()}
    several_norm_batches = len(set(_values_of(flat, "norm_batch"))) > 1
    labels = []
    for row in flat:
        name = row["norm.name"]
        told = ["imported"] if IMPORTED in row and (name, False) in by_name else []
        own = options[name, IMPORTED in row]
        told += [f"{key.removeprefix('norm.')}={_text(row[key])}" for key in own if key in row]
        if several_norm_batches and row.get("norm_batch") is not None:
            told.append(f"norm_batch={row['norm_batch']}")
        labels.append(f"{name} ({', '.join(told)})" if told else str(name))
    return labels


def _setting_titles(flat: Sequence[Mapping[str, Hashable]], splitting: Sequence[str]) -> list[str]:
    """Data set and network, then each setting that tells apart what those before it do not."""
    titles = [f"{row.get('dataset.name')}, {row.get('model.name')}{row.get('depth') or ''}" for row in flat]
    for key in splitting:
        if not _determines(titles, flat, key):
            values = _values_of(flat, key)
            titles = [f"{title}, {key}={_text(value)}" for title, value in zip(titles, values, strict=True)]
    return titles


def _remarks(
    found: Sequence[Place], flat: Sequence[Mapping[str, Hashable]], following: Sequence[str]
) -> dict[str, str]:
    remarks: dict[str, list[str]] = defaultdict(list)
    for key in following:
        for setting in dict.fromkeys(place.setting for place in found):
            here = [
                (place.batch, row.get(key)) for place, row in zip(found, flat, strict=True) if place.setting == setting
            ]
            values = dict(sorted(here, key=lambda pair: pair[0]))
            told = ", ".join(f"{_text(value)} at {batch}" for batch, value in values.items())
            remarks[setting].append(f"{key} follows the batch size: {told}.")
    return {setting: " ".join(sentences) for setting, sentences in remarks.items()}


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
