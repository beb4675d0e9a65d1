"""The claims judged against a study's runs: supported, contradicted, inconclusive. docs/statistics.md explains it.

A study has one verdict per claim, data set and network. Every comparison of a claim comes to one number per seed (its
contrast, averaged over the cells that can be compared), which Student's t-test judges; Holm's correction is
over all comparisons of the study.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from normlab import runs
from normlab.report.analysis.measures import Measure, chance
from normlab.report.analysis.statistics import ENOUGH, TOO_FEW, Interval, effect_size, holm, spread, t_interval, tails
from normlab.report.claims.claims import HIGHEST, LOWEST, ORDINARY, ORDINARY_OPTIONS, Claim, Comparison, Side, claims
from normlab.report.study.arms import OF_THE_ARM, but_for_the_seed, flatten, natural
from normlab.report.study.load import Study
from normlab.runs.identity import CARRIED_OUT, DATASET_CARRIED_OUT
from normlab.runs.states import FINISHED

LEARNED = 5.0  # [A] points above chance, from which an arm counts as one that has learned
SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RUN = "supported", "contradicted", "inconclusive", "not run"


@dataclass(frozen=True)
class Finding:
    """One comparison of a claim.

    Attributes:
        label: the contrast in words, e.g. "bn - none".
        contrasts: per seed, in the measure's own terms (a logarithm for factors).
        interval: their mean and t-interval.
        p: of the test, nan where none is made; `p_holm` with Holm's correction.
        favours: whether the runs rather speak for the claim.
        remarks: sentences about what went into it.
        alpha: the level that `p_holm` has to keep to for a verdict.
        runs: names of those that it is about.
    """

    comparison: Comparison
    label: str
    contrasts: Mapping[int, float]
    interval: Interval
    p: float
    favours: bool
    remarks: tuple[str, ...]
    alpha: float
    runs: frozenset[str] = frozenset()
    p_holm: float = math.nan

    @property
    def d_z(self) -> float:
        return effect_size(list(self.contrasts.values()), self.comparison.reference)

    @property
    def verdict(self) -> str:
        if not self.contrasts and not self.remarks:
            return NOT_RUN
        if not self.p_holm <= self.alpha:
            return INCONCLUSIVE
        return SUPPORTED if self.favours else CONTRADICTED


@dataclass(frozen=True)
class Judgement:
    """What a study says about a claim on one data set with one network."""

    claim: Claim
    study: str
    dataset: str
    model: str
    budget: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """All comparisons have to hold, and one contradicts; with `any`, the other way round."""
        found = [finding.verdict for finding in self.findings]
        decisive, unanimous = (SUPPORTED, CONTRADICTED) if self.claim.any else (CONTRADICTED, SUPPORTED)
        if decisive in found:
            return decisive
        return unanimous if set(found) == {unanimous} else INCONCLUSIVE

    @property
    def place(self) -> str:
        warning = " (answers nothing)" if self.budget == "smoke" else ""
        return f"{self.dataset}, {self.model}, budget {self.budget}{warning}"


def judge(study: Study, confidence: float = 0.95, alpha: float = 0.05) -> list[Judgement]:
    """Every verdict that the study's finished runs allow, in the order of places and claims."""
    judgements = []
    for (dataset, model), here in _places(study).items():
        budgets = dict.fromkeys(str(study.configs[run.name].get("budget") or "n/a") for run in here)
        for claim in claims():
            findings = tuple(_find(comparison, claim.free, here, confidence, alpha) for comparison in claim.comparisons)
            if any(finding.verdict != NOT_RUN for finding in findings):
                judgements.append(Judgement(claim, study.name, dataset, model, " or ".join(budgets), findings))
    return _corrected(judgements)


def _corrected(judgements: Sequence[Judgement]) -> list[Judgement]:
    adjusted = iter(holm([finding.p for judgement in judgements for finding in judgement.findings]))
    return [
        dataclasses.replace(
            judgement,
            findings=tuple(dataclasses.replace(finding, p_holm=next(adjusted)) for finding in judgement.findings),
        )
        for judgement in judgements
    ]


# ---- the runs


@dataclass(frozen=True)
class _Run:
    name: str
    settings: Mapping[str, Hashable]  # without the seed: the runs of a cell share one object
    seed: int
    diverged: bool
    probes: frozenset[str]  # that it was to have
    chance: float  # the accuracy of guessing, in per cent
    rows: "_Rows"

    def value(self, measure: Measure) -> float:
        """nan if it was not measured."""
        if not self.diverged:
            return self.rows.value(self.name, measure)
        if measure.probe and self.rows.of(self.name, measure.probe) is None:
            return math.nan
        counts = {"chance": self.chance, "worst": math.inf, "missing": math.nan}
        return counts[measure.diverged] if isinstance(measure.diverged, str) else measure.diverged

    def is_missing(self, measure: Measure) -> bool:
        """Whether it has no value though it should: it diverged before, or its measurement came to nothing."""
        return measure.probe in self.probes and math.isnan(self.value(measure))


class _Rows:
    """What each run measured, looked at only when asked for."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.split: dict[str | None, dict[str, pd.DataFrame]] = {}
        self.values: dict[tuple[str, str], float] = {}

    def of(self, run: str, probe: str | None) -> pd.DataFrame | None:
        if probe not in self.split:
            rows = self.study.probes.get(probe) if probe else self.study.evaluations
            self.split[probe] = {} if rows is None else {str(name): group for name, group in rows.groupby("run")}
        return self.split[probe].get(run)

    def value(self, run: str, measure: Measure) -> float:
        if (run, measure.label) not in self.values:
            rows = self.of(run, measure.probe)
            self.values[run, measure.label] = math.nan if rows is None else float(measure.value(rows))
        return self.values[run, measure.label]


def _places(study: Study) -> dict[tuple[str, str], list[_Run]]:
    """The finished runs per data set and network."""
    rows = _Rows(study)
    settings_of: dict[Hashable, dict[str, Hashable]] = {}
    found: dict[tuple[str, str], list[_Run]] = defaultdict(list)
    for run in study.runs[study.runs["state"].isin(FINISHED)].to_dict("records"):
        config = study.configs[run["run"]]
        if config["norm"].get("imported"):  # hearsay, and not paired with ours
            continue
        cell = but_for_the_seed(config)
        if cell not in settings_of:
            settings_of[cell] = _settings(config)
        settings = settings_of[cell]
        guessing = chance(config, run["classes"])
        probes = frozenset(config.get("probe") or {})
        made = _Run(run["run"], settings, run["seed"], run["state"] == "diverged", probes, guessing, rows)
        found[str(settings["dataset.name"]), str(settings["model.name"])].append(made)
    return {place: found[place] for place in sorted(found, key=lambda place: [natural(part) for part in place])}


def _settings(config: Mapping[str, Any]) -> dict[str, Hashable]:
    """The settings that runs are selected and compared by."""
    found = {key: value for key, value in flatten(runs.completed(config)).items() if not _changes_nothing(key)}
    if found.get("norm_batch") == found["batch"]:
        found["norm_batch"] = None
    return found


def _changes_nothing(key: str) -> bool:
    """Whether a setting has no part in a run's result, or is the seed."""
    group, _, name = key.partition(".")
    return group in (*CARRIED_OUT, "probe", "seed") or (group == "dataset" and name in DATASET_CARRIED_OUT)


# ---- which of them are compared


def _selects(where: Mapping[str, Any], named: frozenset[str], settings: Mapping[str, Hashable]) -> bool:
    """Whether a run is meant; `named` are the settings in which ordinary values are not expected."""
    if not all(_is(settings, key, value) for key, value in where.items()):
        return False
    usual = ORDINARY | ORDINARY_OPTIONS.get(str(settings["norm.name"]), {})
    return all(_is(settings, key, usual[key]) for key in usual if key in settings and key not in named)


def _is(settings: Mapping[str, Hashable], key: str, wanted: Any) -> bool:
    found = settings.get(key)
    if key == "norm_batch" and wanted is not None:
        found = found or settings["batch"]
    return found in wanted if isinstance(wanted, list) else found == wanted


def _resolved(side: Side, named: frozenset[str], here: Sequence[_Run]) -> Side | None:
    """The side with `lowest` and `highest` as the numbers that they are in this study."""
    end = side.where.get("norm_batch")
    if end not in (LOWEST, HIGHEST):
        return side
    rest = {key: value for key, value in side.where.items() if key != "norm_batch"}
    cells = {id(run.settings): run.settings for run in here}.values()
    sizes = {settings["norm_batch"] or settings["batch"] for settings in cells if _selects(rest, named, settings)}
    if len(sizes) < 2:
        return None
    return Side(side.weight, {**rest, "norm_batch": (min if end == LOWEST else max)(sizes)})  # type: ignore[type-var]


class _Selection(NamedTuple):
    sides: tuple[Side, ...]
    cells: list[tuple[Mapping[int, _Run], ...]]  # per cell, per side: the runs by seed that have a value
    missing: list[list[_Run]]  # per side: those that should have one
    repeated: frozenset[str]  # runs that are another one of their side and seed, but for its probes


def _select(comparison: Comparison, free: frozenset[str], here: Sequence[_Run]) -> _Selection | None:
    """The cells that have all sides. Whatever no side names is equal between them, options of a norm apart."""
    named = frozenset(key for side in comparison.sides for key in side.where)
    listed = {key for side in comparison.sides for key, value in side.where.items() if isinstance(value, list)}
    apart = (named - listed) | free
    sides, found, repeated = [], [], set()
    for side in comparison.sides:
        resolved = _resolved(side, named, here)
        if resolved is None:
            return None
        where = {id(run.settings): run.settings for run in here}
        places = {
            key: _cell_and_arm(settings, apart, free - named)
            for key, settings in where.items()
            if _selects(resolved.where, named, settings)
        }
        cells: Any = defaultdict(lambda: defaultdict(dict))
        for run in here:
            place = places.get(id(run.settings))
            if place is None or (math.isnan(run.value(comparison.measure)) and not run.is_missing(comparison.measure)):
                continue
            cell, arm = place
            if cells[cell][arm].setdefault(run.seed, run) is not run:
                repeated.add(run.name)
        if not cells:
            return None
        sides.append(resolved)
        found.append(cells)
    common = set.intersection(*(set(cells) for cells in found))
    chosen = []
    for cell in sorted(common, key=lambda cell: sorted(map(str, cell))):
        for arms in itertools.product(*(cells[cell].items() for cells in found)):
            options_of = {norm: options for (norm, options, _), _ in arms}
            if all(options_of[norm] == options for (norm, options, _), _ in arms):  # one norm has the same options
                chosen.append(tuple(by_seed for _, by_seed in arms))
    if not chosen:
        return None
    measure = comparison.measure
    valued = [tuple({s: run for s, run in side.items() if not run.is_missing(measure)} for side in c) for c in chosen]
    missing = [
        list({run.name: run for side in sides_of for run in side.values() if run.is_missing(measure)}.values())
        for sides_of in zip(*chosen, strict=True)
    ]
    return _Selection(tuple(sides), [cell for cell in valued if all(cell)], missing, frozenset(repeated))


def _cell_and_arm(settings: Mapping[str, Hashable], apart: frozenset[str], free: frozenset[str]) -> tuple[Any, Any]:
    """What is equal for all sides of a contrast; and the norm, its options, and what is free to differ."""
    rest = {key: value for key, value in settings.items() if key not in apart}
    options = frozenset(item for item in rest.items() if item[0].startswith(OF_THE_ARM))
    own = frozenset((key, settings[key]) for key in free if key in settings)
    return frozenset(rest.items()) - options, (settings["norm.name"], options, own)


# ---- what they say


def _find(
    comparison: Comparison, free: frozenset[str], here: Sequence[_Run], confidence: float, alpha: float
) -> Finding:
    selection = _select(comparison, free, here)
    measure = comparison.measure
    used = [run for cell in (selection.cells if selection else ()) for side in cell for run in side.values()]
    nowhere = bool(used) and all(run.diverged for run in used) and not _measured(measure, here)
    if selection is None or nowhere:
        nothing = Interval(math.nan, math.nan, math.nan, 0)
        return Finding(comparison, _label(comparison, comparison.sides), {}, nothing, math.nan, False, (), alpha)
    label = _label(comparison, selection.sides)
    by_side = [[set(side) for side in cell] for cell in selection.cells]
    seeds = set.intersection(*(seeds for cell in by_side for seeds in cell)) if by_side else set()
    every = set.union(set(), *(seeds for cell in by_side for seeds in cell))
    contrasts = {seed: _mean(_contrasts(selection, measure, seed)) for seed in sorted(seeds)}
    values = list(contrasts.values())
    remarks = list(_remarks(selection, measure, seeds, every))
    p, favours = math.nan, False
    if len(values) < ENOUGH:
        remarks.append(f"n = {len(values)}: {TOO_FEW}" if values else "no seed has all of its runs")
    elif all(run.diverged for run in used):
        remarks.append("nothing to compare")
    elif comparison.lenient and measure.diverged == "chance" and not _learned(selection, measure, seeds):
        remarks.append("no arm learned")
    else:
        p, favours = _test(comparison, values)
        if any(values) and not spread(values) > 0:
            above = sum(value > comparison.reference for value in values)
            remarks.append(f"sign test: higher in {above} of {len(values)} seeds")
    interval, names = t_interval(values, confidence), frozenset(run.name for run in used)
    return Finding(comparison, label, contrasts, interval, p, favours, tuple(remarks), alpha, names)


def _measured(measure: Measure, here: Sequence[_Run]) -> bool:
    return any(not run.diverged and not math.isnan(run.value(measure)) for run in here)


def _learned(selection: _Selection, measure: Measure, seeds: set[int]) -> bool:
    """Whether the runs of any side are clearly better than guessing, in the mean."""
    above = [
        [by_seed[seed].value(measure) - by_seed[seed].chance for by_seed in side for seed in seeds]
        for side in zip(*selection.cells, strict=True)
    ]
    return any(sum(values) / len(values) >= LEARNED for values in above)


def _contrasts(selection: _Selection, measure: Measure, seed: int) -> list[float]:
    """Per cell the weighted sum of the sides' values. Two infinite sides are a tie."""
    sums = [
        sum(side.weight * by_seed[seed].value(measure) for side, by_seed in zip(selection.sides, cell, strict=True))
        for cell in selection.cells
    ]
    return [0.0 if math.isnan(total) else total for total in sums]


def _mean(values: Sequence[float]) -> float:
    """0 if both infinities are among them."""
    mean = sum(values) / len(values)
    return 0.0 if math.isnan(mean) else mean


def _test(comparison: Comparison, values: Sequence[float]) -> tuple[float, bool]:
    """The p-value of what the runs rather speak for, and whether that is the claim.

    greater, less: the test against the reference. equal: two one-sided tests (TOST) against the ends of the margin;
    or, where that is the smaller, the test of lying outside. Only one of the two conclusions can be wrong, so that
    choosing between them inflates no error. All are two-sided: a verdict at 5 % is where the 95 % interval lies.
    """
    ends = (comparison.reference - comparison.margin, comparison.reference + comparison.margin)
    low, high = (tails(values, end, comparison.exact) for end in ends)
    if comparison.expect == "equal":
        inside, outside = max(low.above, high.below), min(low.below, high.above)
        return min(1.0, 2 * min(inside, outside)), inside <= outside
    return low.two_sided, (low.above < low.below) == (comparison.expect == "greater")


def _remarks(selection: _Selection, measure: Measure, seeds: set[int], every: set[int]) -> Iterator[str]:
    if len(selection.cells) > 1:
        yield f"mean over {len(selection.cells)} cells"
    if len(selection.cells) > 1 and seeds:
        by_cell = [_mean(found) for found in zip(*(_contrasts(selection, measure, s) for s in seeds), strict=True)]
        factors = measure.unit == "factor"
        told = [f"{math.exp(min(x, 700)):.3g}" if factors else f"{x:+.3g}" for x in (min(by_cell), max(by_cell))]
        yield f"cells from {' to '.join(told)}"
    if selection.repeated:
        yield f"{len(selection.repeated)} runs that repeat another one are left out"
    if seeds and every - seeds:
        yield f"seeds {', '.join(map(str, sorted(every - seeds)))} are not in all cells and are left out"
    for position, side in enumerate(selection.sides):
        if not side.weight:
            continue
        used = {cell[position][seed].name: cell[position][seed] for cell in selection.cells for seed in seeds}
        diverged = [run for run in used.values() if run.diverged]
        if diverged:
            counted = "infinitely large" if measure.diverged == "worst" else f"{diverged[0].value(measure):g} %"
            yield f"{len(diverged)} of {len(used)} runs of {_arm(side, ())} diverged and count as {counted}"
        missing = selection.missing[position]
        lost = sum(run.diverged for run in missing)
        if lost:
            yield f"{lost} runs of {_arm(side, ())} diverged and have no such value"
        if len(missing) > lost:
            yield f"{len(missing) - lost} runs of {_arm(side, ())} have no such value"


# ---- in words


def _label(comparison: Comparison, sides: Sequence[Side]) -> str:
    told = [key for key in dict.fromkeys(key for side in sides for key in side.where) if key != "norm.name"]
    told = [key for key in told if len({str(side.where.get(key)) for side in sides}) > 1]
    ratio = comparison.measure.unit == "factor" and len(sides) > 1
    text = ""
    for position, side in enumerate(side for side in sides if side.weight):
        sign = " / " if ratio else (" + " if side.weight > 0 else " - ")
        size = "" if abs(side.weight) == 1 else f"{abs(side.weight):g} "
        text += (sign if position else "") + size + _arm(side, told)
    return text


def _arm(side: Side, told: Sequence[str]) -> str:
    options = [
        f"{key.removeprefix('norm.').removesuffix('.name')}={side.where[key]}" for key in told if key in side.where
    ]
    name = str(side.where["norm.name"])
    return f"{name} ({', '.join(options)})" if options else name
