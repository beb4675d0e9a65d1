"""Call runs by what distinguishes them from the others of their sweep or study: `bn b=32 lr=0.1 seed=2`.

The labels of arms, which begin these names, are those of the report's tables.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from normlab.common.errors import as_typed, cut, exact
from normlab.runs.identity import compared, flatten, identity, run_id

OF_THE_ARM = (
    "norm.",
    "optimizer.agc",
    "optimizer.precondition",
    "schedule.divide_final_lr",
)  # norm=nf and norm=bnp set the last two
IMPORTED = "norm.imported"  # only the arms of imported runs have it: their options are not what ours are
ABSENT = ...  # in place of the value of a setting that a run does not have
_NEUTRAL = {"norm.scale_init": 1.0, "norm.scale_lr_divisor": 1.0}  # the plain norm: an arm's label leaves them out
_NETWORK = "network"  # in place of model.name and depth
_FIRST = (_NETWORK, "dataset.name", "batch")
_BARE = (_NETWORK, "dataset.name")  # shown by their values alone
_SHORT = {"batch": "b", "optimizer.lr": "lr"}
_MOST_OF_ARM, _MOST_OF_VALUE, _MOST = 60, 24, 120  # characters
_MOST_TRIED = 10  # settings that may tell runs of equal names apart


def run_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what to call each run among these: its arm, the settings that tell runs apart, and its seed.

    A setting that follows from those before it (a learning rate that is scaled with the batch) is left out. Names are
    different, printable and of at most about 150 characters, whatever the settings hold. They do not depend on the
    order of the runs, unless runs are equal. Runs that would have one name get a setting that tells them apart, such as
    the study; if there is none, the id.
    """
    keys = [cell_key(config) for config in configs]
    cells = sorted(flat_cells(configs).items(), key=lambda cell: repr(sorted(cell[1].items())))
    bodies = dict(zip((key for key, _ in cells), _bodies([row for _, row in cells]), strict=True))
    names = [f"{bodies[key]} seed={config['seed']}" for key, config in zip(keys, configs, strict=True)]
    alike: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        alike[name].append(index)
    for shared in alike.values():
        if len(shared) > 1:
            for index, more in zip(shared, _distinct_rests([configs[index] for index in shared]), strict=True):
                names[index] += more
    taken: set[str] = set()
    for index, name in enumerate(names):  # of equal runs, or odd values that read like what tells others apart
        numbered = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        names[index] = next(each for each in numbered if each not in taken)
        taken.add(names[index])
    return names


def _bodies(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Return arm and settings of each cell, of the settings only those that tell cells apart."""
    rows = [_condensed(row) for row in flat]
    words: list[tuple[str, ...]] = [(cut(on_a_line(arm), _MOST_OF_ARM),) for arm in arm_labels(flat)]
    settings = sorted(varying(rows), key=_rank)
    endings = Counter(map(_ending, settings))
    for key in settings:
        if not determines(words, rows, key):
            short = _SHORT.get(key) or (_ending(key) if endings[_ending(key)] == 1 else key)
            words = [(*each, *_word(key, short, row)) for each, row in zip(words, rows, strict=True)]
    return [cut(" ".join(each), _MOST) for each in words]


def _condensed(row: Mapping[str, Hashable]) -> dict[str, Hashable]:
    """Return settings with one for the network, and one for all probes, of which options are rarely of interest."""
    apart = ("model.name", "depth", "seed", "probe")
    kept = {key: value for key, value in row.items() if key not in apart and not key.startswith("probe.")}
    probes = dict.fromkeys(key.split(".")[1] for key in row if key.startswith("probe."))
    network = f"{row.get('model.name')}{row.get('depth') or ''}"
    return {**kept, _NETWORK: network} | ({"probe": ",".join(probes)} if probes else {})


def _rank(key: str) -> tuple[bool, int, bool, bool, str]:
    """Return the order of settings: the network, the data, the batch, kinds before their options."""
    place = _FIRST.index(key) if key in _FIRST else len(_FIRST)
    last = key in ("eval_batch", "probe")  # the eval_stats that the first goes with explains more
    return last, place, not key.endswith(".name"), key != "optimizer.lr", key


def _ending(key: str) -> str:
    return key.removesuffix(".name").rpartition(".")[2]


def _word(key: str, short: str, row: Mapping[str, Hashable]) -> tuple[str, ...]:
    """Return a setting as one word, none for a run that does not have it."""
    if key not in row:
        return ()
    value = cut(on_a_line(text_of(row[key])), _MOST_OF_VALUE)
    return (value if key in _BARE else f"{on_a_line(short)}={value}",)


def _distinct_rests(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what to add to the names of runs of equal ones: a setting that tells them apart, else their ids."""
    flat = [_condensed(flatten(config)) for config in configs]
    for key in sorted(varying(flat), key=_rank)[:_MOST_TRIED]:
        rests = [" ".join(("", *_word(key, key, row))) for row in flat]
        if len(set(rests)) == len(rests):
            return rests
    return [f" {run_id(config)}" for config in configs]


def on_a_line(label: str) -> str:
    """Return a label that could be mistaken for several lines, or for another one, with its odd characters named."""
    return label if label.isprintable() else label.encode("unicode_escape").decode()


def text_of(value: object) -> str:
    """Return a value as a label has it: different values have different texts."""
    if value is ABSENT:
        return ""
    return exact(value) if isinstance(value, float) else str(as_typed(value)) or "''"


# ---- cells


def cell_key(config: Mapping[str, Any]) -> Hashable:
    """Return a key that is equal for configurations as read whose only difference is the seed: they share their parts.

    Configurations that do not share their parts have different keys, whatever they hold.
    """
    parts = {**config, "seed": None}
    return (*parts, *map(id, parts.values()))


def flat_cells(configs: Iterable[Mapping[str, Any]]) -> dict[Hashable, dict[str, Hashable]]:
    """Return the flat settings that can change a result by `cell_key`: a study has far fewer cells than runs."""
    cells = {cell_key(config): config for config in configs}
    return {cell: compared(identity(config)) for cell, config in cells.items()}


def varying(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Return the settings that differ between configurations, or that some of them lack."""
    keys = dict.fromkeys(key for row in flat for key in row)
    return [key for key in keys if len(set(_distinct(flat, key))) > 1]


def values_of(flat: Sequence[Mapping[str, Hashable]], key: str) -> list[Hashable]:
    """Return the values of a setting, `ABSENT` of those that lack it."""
    return [row.get(key, ABSENT) for row in flat]


def _distinct(flat: Sequence[Mapping[str, Hashable]], key: str) -> list[Hashable]:
    """Return the values as they differ: true is not 1."""
    return [(isinstance(value, bool), value) for value in values_of(flat, key)]


def determines(groups: Sequence[Hashable], flat: Sequence[Mapping[str, Hashable]], key: str) -> bool:
    """Return whether all runs of one group have one value of `key`."""
    return len(set(zip(groups, _distinct(flat, key), strict=True))) == len(set(groups))


# ---- arms


def arm_labels(flat: Sequence[Mapping[str, Hashable]]) -> list[str]:
    """Return the label of each configuration's arm, as tables have it: the norm, and those of its options that vary."""
    by_name: dict[tuple[Hashable, bool], list[Mapping[str, Hashable]]] = defaultdict(list)
    for row in flat:
        by_name[row["norm.name"], IMPORTED in row].append(row)
    # Arms differ in their options by nature; a label needs only what varies within one norm.
    options = {
        name: [key for key in varying(rows) if key.startswith("norm.") or key in _varying_where_it_is(rows)]
        for name, rows in by_name.items()
    }
    several_norm_batches = len(set(values_of(flat, "norm_batch"))) > 1
    plain = {  # left out of labels where all arms of the name have it
        (name, key) for name, rows in by_name.items() for key in _NEUTRAL if all(key in row for row in rows)
    }
    labels = []
    for row in flat:
        name, imported = row["norm.name"], IMPORTED in row
        words = ["imported"] if imported and (name, False) in by_name else []
        own = [key for key in options[name, imported] if key in row]
        own = [key for key in own if ((name, imported), key) not in plain or row[key] != _NEUTRAL[key]]
        words += [f"{key.removeprefix('norm.')}={text_of(row[key])}" for key in own]
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
