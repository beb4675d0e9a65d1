"""A study whose runs are those at each cell's chosen value of some settings, with what was tried.

`analysis.tuning` chooses; here are the runs by the cells that they are tried in, and the study of the chosen ones.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from normlab.common.errors import UserError, as_typed, did_you_mean, exact, listed
from normlab.report.study.arms import Place, cell_key, flat_cells, natural, places
from normlab.report.study.load import Study, gaps
from normlab.runs.states import State

MOST_SETTINGS = 5  # that can be tuned at once
_NOT_TUNED = ("seed", "batch", "depth", "norm.imported")
# Those that make another thing of one.
_NOT_TUNED_OF_GROUPS = ("name", "kind", "target", "_target_", "stem", "width", "weights")
_NOT_TUNED_OF_DATA = ("train_size", "test_size", "val_size", "split_seed", "test_fraction")

Values = tuple[Hashable, ...]  # one per tuned setting


@dataclass(frozen=True)
class Tried:
    """The runs of one cell at one value of each tuned setting.

    Attributes:
        runs: names of all of them by seed, those under way among them.
        scores: the validation accuracy of the finished ones in per cent, by seed; chance where a run diverged.
        states: of all of them, by seed.
    """

    values: Values
    runs: Mapping[int, str]
    scores: Mapping[int, float]
    states: Mapping[int, str]

    @property
    def diverged(self) -> int:
        """Return how many diverged."""
        return list(self.states.values()).count(State.DIVERGED)

    @property
    def text(self) -> str:
        """Return the values for a reader: `0.1`, of several settings `0.1, 0.0001`."""
        return ", ".join(map(value_text, self.values))


@dataclass(frozen=True)
class Choice:
    """What was tried in a cell, in the order of the values, and what was chosen.

    Attributes:
        chosen: None while nothing has finished, and where no two values can be compared.
        none: why nothing is chosen though runs have finished, in words.
        ties: other values whose scores cannot be told from those of the chosen one, in words.
        edges: the tuned settings whose chosen value is the first or the last of those tried, in words.
        fewer: of values or seeds than other cells, and values or seeds that had no part in the choice, in words.
        losses: the values at which runs diverged, in words.
        seeds: those that the choice is made on.
    """

    setting: str
    arm: str
    batch: int
    tried: Sequence[Tried]
    chosen: Tried | None
    ties: Sequence[str] = ()
    edges: Sequence[str] = ()
    fewer: Sequence[str] = ()
    losses: Sequence[str] = ()
    none: Sequence[str] = ()
    seeds: Sequence[int] = ()

    @property
    def marks(self) -> list[str]:
        """Return all that is to be known of the choice, in words."""
        return [*self.none, *self.edges, *self.ties, *self.fewer, *self.losses]

    @property
    def name(self) -> str:
        """Return the cell in words."""
        return f"{self.arm}, batch {self.batch} ({self.setting})"


@dataclass(frozen=True)
class Tuning:
    """What was chosen in each cell.

    Attributes:
        settings: the tuned ones.
        choices: one per cell.
        study: all runs that were tried, in the places that they have by themselves.
    """

    settings: Sequence[str]
    choices: Sequence[Choice]
    study: Study

    @property
    def chooses(self) -> bool:
        """Return whether any cell has more than one value."""
        return any(len(choice.tried) > 1 for choice in self.choices)

    @cached_property
    def sentence(self) -> str:
        """Return how many values each arm was given, which no number of a tuned study is shown without."""
        names = " and ".join(self.settings)
        if not self.chooses:
            return f"each arm at the one value of {names} that it has, so that nothing was chosen"
        sizes = {choice.arm: set[int]() for choice in self.choices}
        for choice in self.choices:
            sizes[choice.arm].add(len(choice.tried))
        every = sorted(set().union(*sizes.values()))
        number = f"{every[0]} to {every[-1]}" if len(every) > 1 else str(every[0])
        of_what = "combinations" if len(self.settings) > 1 else "values"
        each = ""
        if len(every) > 1 and all(len(of_arm) == 1 for of_arm in sizes.values()):
            each = f" ({listed([f'{arm}: {of_arm.pop()}' for arm, of_arm in sizes.items()], 12)})"
        return f"each arm at its best of {number} {of_what} of {names}{each}, chosen on validation images"

    def selection(self) -> dict[str, Any]:
        """Return everything that was tried and chosen, as plain values for a file."""
        cells = [
            {
                "setting": choice.setting,
                "arm": choice.arm,
                "batch": choice.batch,
                "chosen": None if choice.chosen is None else list(choice.chosen.values),
                "marks": choice.marks,
                "tried": [
                    {
                        "values": list(tried.values),
                        "validation_accuracy": {str(seed): score for seed, score in tried.scores.items()},
                        "diverged": tried.diverged,
                        "runs": list(tried.runs.values()),
                    }
                    for tried in choice.tried
                ],
            }
            for choice in self.choices
        ]
        chosen_on = "validation images" if self.chooses else None
        return {"settings": list(self.settings), "chosen_on": chosen_on, "cells": cells}


def value_text(value: Hashable) -> str:
    """Return a value as labels have it."""
    return exact(value) if isinstance(value, float) else str(as_typed(value))


def value_order(values: Values) -> list[Any]:
    """Return a key that sorts numbers by their value, behind them texts in natural order."""
    return [(0, value, []) if _is_number(value) else (1, 0.0, natural(str(value))) for value in values]


def _is_number(value: Hashable) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tuned_settings(study: Study, given: str | Sequence[str] | None) -> list[str]:
    """Return the settings to tune: those of the option, or, where it is None, those that the runs name themselves.

    Raises:
        UserError: for one that the runs do not have, or that makes other arms, networks, images or pairs.
    """
    named = [config.get("tuned") for config in study.configs.values()] if given is None else []
    if not (given or any(named)):
        return []
    known = {key for row in flat_cells(study.configs.values()).values() for key in row}
    possible = sorted(filter(_can_be_tuned, known))
    if given is None:  # a configuration may name anything, and a strange one costs no other run its report
        own = [name for names in named if isinstance(names, list) for name in names[:MOST_SETTINGS]]
        return [name for name in possible if name in own][:MOST_SETTINGS]
    wanted = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    if len(wanted) > MOST_SETTINGS:
        raise UserError(f"tuned=[...] names {len(wanted)} settings.\nExpected at most {MOST_SETTINGS}.")
    for name in wanted:
        if name in known and not _can_be_tuned(name):
            raise UserError(
                f"tuned={name}: runs of another {name} are of another arm or network, of other images, or another"
                " sample, and their validation accuracies do not choose between them.\nExample: tuned=optimizer.lr"
            )
        if name not in known and study.configs:
            same = [each for each in possible if each.rpartition(".")[2] == name]
            hint = did_you_mean(min(same, key=len) if same else name, possible, "tuned=")
            raise UserError(f"tuned={name}: no run of this study has such a setting.{hint}")
    return wanted


def _can_be_tuned(name: str) -> bool:
    group, _, key = name.partition(".")
    return not (
        name in _NOT_TUNED
        or group == "probe"
        or key in _NOT_TUNED_OF_GROUPS
        or (group == "dataset" and key in _NOT_TUNED_OF_DATA)
    )


def tried_runs(study: Study, whole: Study, settings: Sequence[str]) -> pd.DataFrame:
    """Return the runs of a study with their places where the tuned settings are left out of account, and `values`.

    Args:
        study: the runs to choose among.
        whole: the study that they were selected from, among whose runs arms and settings have their names.
        settings: the tuned ones.
    """
    in_tables, _ = places(list(whole.configs.values()), settings)
    where = dict(zip(whole.configs, in_tables, strict=True))
    flat = flat_cells(whole.configs.values())
    table = study.placed[study.placed["run"] != ""].reset_index(drop=True)
    of_runs = [where[run] for run in table["run"]]
    cells = [flat[cell_key(whole.configs[run])] for run in table["run"]]
    values = pd.Series([tuple(cell.get(name) for name in settings) for cell in cells], dtype=object)
    return table.assign(
        setting=[place.setting for place in of_runs], arm=[place.arm for place in of_runs], values=values
    )


def chosen_study(tuning: Tuning, tried: pd.DataFrame, runs: Collection[str], whole: Study) -> Study:
    """Return the study of these runs of those that were tried, with the gaps of their grid.

    A cell of which nothing can be chosen is a gap.
    """
    study = tuning.study
    kept = tried[tried["run"].isin(runs)]
    rows = [kept[list(study.runs)], study.runs[study.runs["arm"].isna()]]
    without = {(choice.setting, choice.arm, choice.batch) for choice in tuning.choices if choice.none}
    unchosen = {place for place in _places_of(tried) if place[:3] in without}
    lacking = [*gaps([*_places_of(kept), *unchosen]), *sorted(unchosen)]
    missing = [{**gap._asdict(), "run": "", "state": State.MISSING, "note": ""} for gap in lacking]
    rows.append(pd.DataFrame(missing, columns=list(study.runs)))
    table = pd.concat([each for each in rows if len(each)] or rows[:1], ignore_index=True).astype(study.runs.dtypes)
    _, remarks = places(list(whole.configs.values()), tuning.settings)
    names = dict(zip(kept["run"], zip(kept["setting"], kept["arm"], strict=True), strict=True))

    def of_chosen(measured: pd.DataFrame) -> pd.DataFrame:
        here = measured[measured["run"].isin(names)].reset_index(drop=True)
        return here.assign(setting=[names[run][0] for run in here["run"]], arm=[names[run][1] for run in here["run"]])

    return replace(replace(study, remarks=remarks).reduced(table, of_chosen), tuning=tuning)


def _places_of(tried: pd.DataFrame) -> list[Place]:
    return [Place(*place) for place in zip(*(tried[key] for key in Place._fields), strict=True)]


def by_cell(tried: pd.DataFrame) -> Iterator[tuple[tuple[str, str, int], dict[Values, pd.DataFrame]]]:
    """Yield setting, arm and batch size of each cell with its runs by value, in the values' order."""
    cells: dict[tuple[str, str, int], dict[Values, list[int]]] = {}
    keys = zip(tried["setting"], tried["arm"], tried["batch"], tried["values"], strict=True)
    for position, (setting, arm, batch, values) in enumerate(keys):
        cells.setdefault((setting, arm, int(batch)), {}).setdefault(values, []).append(position)
    for cell, positions in cells.items():
        yield cell, {values: tried.iloc[positions[values]] for values in sorted(positions, key=value_order)}
