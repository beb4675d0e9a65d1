"""The runs of a comparison: selected by the settings of its sides, then paired so that all other settings are equal."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import pandas as pd

from normlab import runs
from normlab.report.analysis.metrics import Metric, chance
from normlab.report.analysis.tuning import rate_curves
from normlab.report.claims.claims import HIGHEST, LOWEST, ORDINARY, ORDINARY_OPTIONS, Comparison, Side
from normlab.report.study.arms import OF_THE_ARM, cell_key, natural
from normlab.report.study.load import Study
from normlab.runs.identity import CARRIED_OUT, DATASET_CARRIED_OUT

# Settings that change no result, the seed, by which runs are paired, and what only one side of slow parameters has.
_NOT_COMPARED = (
    CARRIED_OUT | {"probe", "seed", "schedule.divide_final_lr"} | {f"dataset.{name}" for name in DATASET_CARRIED_OUT}
)


@dataclass(frozen=True, eq=False)
class Cell:
    """The settings of runs that differ in nothing but their seed."""

    settings: Mapping[str, Hashable]

    @property
    def norm_batch(self) -> int:
        """Return the number of images that share statistics."""
        size = self.settings.get("norm_batch") or self.settings["batch"]
        assert isinstance(size, int)
        return size

    def has(self, key: str, wanted: Any) -> bool:
        """Return whether a setting has the wanted value, or one of a list of them."""
        value = self.norm_batch if key == "norm_batch" and wanted is not None else self.settings.get(key)
        return value in wanted if isinstance(wanted, list) else bool(value == wanted)


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done or that diverged.

    Attributes:
        probes: names of the probes in its configuration.
        chance: the accuracy of guessing, in per cent.
        rows_of: returns by run the rows that a probe measured; the evaluations for None.
    """

    name: str
    cell: Cell
    seed: int
    diverged: bool
    probes: frozenset[str]
    chance: float
    rows_of: Callable[[str | None], Mapping[str, pd.DataFrame]]
    _values: dict[tuple[str, float], float] = field(default_factory=dict)

    def value(self, measure: Metric, until: float = math.inf) -> float:
        """Return its number by a measure, by the rows up to a step; nan if it was not measured."""
        if (measure.name, until) not in self._values:
            self._values[measure.name, until] = self._read(measure, until)
        return self._values[measure.name, until]

    def _read(self, measure: Metric, until: float) -> float:
        rows = self.rows_of(measure.probe).get(self.name)
        if rows is None and not (self.diverged and (measure.probe is None or measure.probe in self.probes)):
            return math.nan
        if rows is not None and (not self.diverged or measure.diverged == "before"):
            rows = rows[rows["step"] <= until] if until < math.inf else rows
            return float(measure.read(rows)) if len(rows) else math.nan
        substitutes = {"chance": self.chance, "worst": math.inf, "before": math.nan, "missing": math.nan}
        return substitutes[measure.diverged] if isinstance(measure.diverged, str) else measure.diverged

    def last_step(self, measure: Metric) -> float:
        """Return the last step that was measured, infinity if none was."""
        rows = self.rows_of(measure.probe).get(self.name)
        return math.inf if rows is None else float(rows["step"].max())

    def is_missing(self, measure: Metric, until: float = math.inf) -> bool:
        """Return whether a probe of its configuration measured nothing, e.g. because it diverged before."""
        return measure.probe in self.probes and math.isnan(self.value(measure, until))


def finished_runs(study: Study) -> dict[tuple[str, str], list[FinishedRun]]:
    """Return the finished runs by data set and network, without imported ones, whose seeds pair with no other run."""

    @cache
    def rows_of(probe: str | None) -> dict[str, pd.DataFrame]:
        rows = study.probes.get(probe) if probe else study.evaluations
        return {} if rows is None else {str(run): group for run, group in rows.groupby("run")}

    cells: dict[Hashable, Cell] = {}
    found: dict[tuple[str, str], list[FinishedRun]] = defaultdict(list)
    for row in study.finished.to_dict("records"):
        config = study.configs[row["run"]]
        if config["norm"].get("imported"):
            continue
        key = cell_key(config)
        if key not in cells:
            cells[key] = Cell(_settings(config, study.tuning.settings if study.tuning else ()))
        run = FinishedRun(
            name=row["run"],
            cell=cells[key],
            seed=row["seed"],
            diverged=row["state"] == "diverged",
            probes=frozenset(config.get("probe") or {}),
            chance=chance(config, row["classes"]),
            rows_of=rows_of,
        )
        found[str(config["dataset"]["name"]), str(config["model"]["name"])].append(run)
    return {place: found[place] for place in sorted(found, key=lambda place: [natural(part) for part in place])}


def with_rates(
    here: Mapping[tuple[str, str], Sequence[FinishedRun]], study: Study
) -> dict[tuple[str, str], list[FinishedRun]]:
    """Return the runs at a seed's chosen learning rate, with all rates tried in its cell in the place of a probe."""
    curves = rate_curves(study)
    return {
        place: [
            replace(run, diverged=False, rows_of=lambda _: curves, _values={})  # a divergence is in the curve
            for run in runs
            if run.name in curves
        ]
        for place, runs in here.items()
    }


def _settings(config: Mapping[str, Any], without: Collection[str]) -> dict[str, Hashable]:
    """Return the settings that can change a result, but for the seed; norm_batch only where it is not the batch.

    Those that are tuned (`without`) may differ between the runs of a cell.
    """
    settings = {
        key: value
        for key, value in runs.compared(config).items()
        if key not in without and key not in _NOT_COMPARED and key.partition(".")[0] not in _NOT_COMPARED
    }
    if settings.get("norm_batch") == settings["batch"]:
        settings["norm_batch"] = None
    return settings


@dataclass(frozen=True)
class Selection:
    """The runs of a comparison.

    Attributes:
        comparison: the comparison, with numbers in place of `LOWEST` and `HIGHEST`.
        cells: per cell, per side: the runs that have a value, by seed.
        missing: per side: the runs that lack a value that they were to have.
        survivors: whether seeds are left out because a run of theirs diverged.
        repeated: number of runs left out, as another one has the same cell, arm and seed.
    """

    comparison: Comparison
    cells: Sequence[Sequence[Mapping[int, FinishedRun]]]
    missing: Sequence[Sequence[FinishedRun]]
    survivors: bool
    repeated: int

    @property
    def runs(self) -> list[FinishedRun]:
        """Return all runs that have a value."""
        return [run for cell in self.cells for side in cell for run in side.values()]

    def values(self, seed: int) -> list[list[float]]:
        """Return per cell the values of its sides. Where a run diverged, the others count up to its last step."""
        measure = self.comparison.measure
        return [
            [side[seed].value(measure, _last_step_of_all(cell, seed, measure)) for side in cell] for cell in self.cells
        ]

    @cached_property
    def seeds(self) -> list[int]:
        """Return the seeds that every side of every cell has, in order."""
        each = [set(side) for cell in self.cells for side in cell]
        return sorted(set.intersection(*each)) if each else []

    @property
    def incomplete_seeds(self) -> list[int]:
        """Return the seeds that only some of the sides and cells have, in order."""
        return sorted({seed for cell in self.cells for side in cell for seed in side} - set(self.seeds))


class _Arm(NamedTuple):
    norm: Hashable
    options: frozenset[tuple[str, Hashable]]
    free: frozenset[tuple[str, Hashable]]  # settings that may differ between the sides, though none names them


_Equal = frozenset[tuple[str, Hashable]]  # the settings in which the sides of a contrast are equal
_Side = Mapping[_Equal, Mapping[_Arm, Mapping[int, FinishedRun]]]  # its runs by seed


def select(comparison: Comparison, free: frozenset[str], here: Sequence[FinishedRun]) -> Selection | None:
    """Select the runs of each side and pair them in cells that have all sides.

    Args:
        comparison: its sides name settings; all others are equal between the sides, the options of a norm apart.
        free: settings that may differ between the sides although no side names them.
        here: the runs of one data set and network.

    Returns:
        None if no cell has all sides.
    """
    named = frozenset(key for side in comparison.sides for key in side.where)
    resolved = _with_numbers(comparison, named, here)
    if resolved is None:
        return None
    measure = comparison.measure
    sides, repeated = zip(*(_runs_of_side(side, measure, named, free, here) for side in resolved.sides), strict=True)
    paired = list(_pair(sides))
    if not paired:
        return None
    missing: list[dict[str, FinishedRun]] = [{} for _ in sides]
    lost: set[tuple[int, int]] = set()  # cells and seeds
    for number, cell in enumerate(paired):
        for lacking, side in zip(missing, cell, strict=True):
            for seed, run in side.items():
                if run.is_missing(measure, _last_step_of_all(cell, seed, measure)):
                    lacking[run.name] = run
                    lost.add((number, seed))
    valued = [
        [
            {seed: run for seed, run in side.items() if run.name not in lacking}
            for lacking, side in zip(missing, cell, strict=True)
        ]
        for cell in paired
    ]
    return Selection(
        resolved,
        cells=[cell for cell in valued if all(cell)],
        missing=[list(lacking.values()) for lacking in missing],
        survivors=any(side[seed].diverged for number, seed in lost for side in paired[number] if seed in side),
        repeated=len(set().union(*repeated)),
    )


def _last_step_of_all(cell: Sequence[Mapping[int, FinishedRun]], seed: int, measure: Metric) -> float:
    """Return the step up to which the runs of a seed compare: the last that those have measured which diverged."""
    if measure.diverged != "before":
        return math.inf
    diverged = [side[seed] for side in cell if seed in side and side[seed].diverged]
    return min((run.last_step(measure) for run in diverged), default=math.inf)


def _with_numbers(comparison: Comparison, named: frozenset[str], here: Sequence[FinishedRun]) -> Comparison | None:
    """Return the comparison with `LOWEST` and `HIGHEST` as numbers; None if the runs of a side have only one."""
    sides = []
    for side in comparison.sides:
        where, end = dict(side.where), side.where.get("norm_batch")
        if end in (LOWEST, HIGHEST):
            del where["norm_batch"]
            sizes = {cell.norm_batch for cell in {run.cell for run in here} if _selects(where, named, cell)}
            if len(sizes) < 2:
                return None
            where["norm_batch"] = min(sizes) if end == LOWEST else max(sizes)
        sides.append(Side(side.weight, where))
    return replace(comparison, sides=tuple(sides))


def _selects(where: Mapping[str, Any], named: frozenset[str], cell: Cell) -> bool:
    """Return whether a cell has the settings of a side, and ordinary values of those that no side names."""
    ordinary = ORDINARY | ORDINARY_OPTIONS.get(str(cell.settings["norm.name"]), {})
    expected = {key: value for key, value in ordinary.items() if key in cell.settings and key not in named}
    return all(cell.has(key, value) for key, value in (*where.items(), *expected.items()))


def _runs_of_side(
    side: Side, measure: Metric, named: frozenset[str], free: frozenset[str], here: Sequence[FinishedRun]
) -> tuple[_Side, set[str]]:
    """Return the runs that have, or should have, a value, and the names of those that repeat another of them."""
    lists = {key for key, value in side.where.items() if isinstance(value, list)}
    groups = {
        cell: _equal_settings_and_arm(cell.settings, (named - lists) | free, free - named)
        for cell in {run.cell for run in here}
        if _selects(side.where, named, cell)
    }
    found: dict[_Equal, dict[_Arm, dict[int, FinishedRun]]] = defaultdict(lambda: defaultdict(dict))
    repeated = set()
    for run in here:
        if run.cell in groups and (run.is_missing(measure) or not math.isnan(run.value(measure))):
            equal, arm = groups[run.cell]
            if found[equal][arm].setdefault(run.seed, run) is not run:
                repeated.add(run.name)
    return found, repeated


def _equal_settings_and_arm(
    settings: Mapping[str, Hashable], apart: frozenset[str], free: frozenset[str]
) -> tuple[_Equal, _Arm]:
    rest = frozenset((key, value) for key, value in settings.items() if key not in apart)
    options = frozenset(item for item in rest if item[0].startswith(OF_THE_ARM))
    own = frozenset((key, settings[key]) for key in free if key in settings)
    return rest - options, _Arm(settings["norm.name"], options, own)


def _pair(sides: Sequence[_Side]) -> Iterator[list[Mapping[int, FinishedRun]]]:
    """Yield per cell the runs of each side by seed; sides of the same norm have the same options."""
    common = set.intersection(*map(set, sides))
    for equal in sorted(common, key=lambda settings: sorted(map(str, settings))):
        for arms in itertools.product(*(side[equal].items() for side in sides)):
            if len({(arm.norm, arm.options) for arm, _ in arms}) == len({arm.norm for arm, _ in arms}):
                yield [by_seed for _, by_seed in arms]
