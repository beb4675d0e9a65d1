"""The claims tested on a study's runs: supported, contradicted, equal or inconclusive. docs/statistics.md explains it.

A study has one verdict per claim, data set and network. For every comparison of a claim, `pairing` selects the runs;
their contrast, averaged over cells, is one number per seed; Student's t-test decides. Holm's correction is over all
comparisons of the study, and once more over all tests of equality beside them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from normlab.common.errors import count
from normlab.report.analysis.cells import p_text
from normlab.report.analysis.metrics import LEARNED, Metric
from normlab.report.analysis.statistics import (
    ENOUGH,
    TOO_FEW,
    Interval,
    contrast_bounds,
    effect_size,
    holm,
    spread,
    t_interval,
    tails,
)
from normlab.report.claims.claims import Claim, Comparison, Side, claims
from normlab.report.claims.pairing import FinishedRun, Selection, finished_runs, select, with_rates
from normlab.report.study.load import Study

SUPPORTED, CONTRADICTED, EQUAL, INCONCLUSIVE, NOT_RUN = "supported", "contradicted", "equal", "inconclusive", "not run"
VERDICTS = (SUPPORTED, CONTRADICTED, EQUAL, INCONCLUSIVE)  # in the order in which they are counted
_NO_INTERVAL = Interval(math.nan, math.nan, math.nan, 0)


@dataclass
class ComparisonResult:
    """The result of one comparison of a claim.

    Attributes:
        comparison: with numbers in place of the ends of a study's range, where it was run.
        alpha: the level that `p_holm` has to keep to for a verdict.
        contrasts: by seed, on the scale of the measure (a logarithm for factors).
        interval: their mean and t-interval.
        p: p-value of the test, nan where none is made.
        p_holm: the same with Holm's correction over all comparisons of a study.
        favors: whether the runs rather speak for the claim.
        p_equal: p-value of lying within the smallest difference of interest (TOST), nan where that is not tested.
        p_equal_holm: the same with Holm's correction over all such tests of a study.
        remarks: sentences about the runs and the test.
        runs: names of the runs.
    """

    comparison: Comparison
    alpha: float
    contrasts: Mapping[int, float] = dataclasses.field(default_factory=dict)
    interval: Interval = _NO_INTERVAL
    p: float = math.nan
    favors: bool = False
    remarks: tuple[str, ...] = ()
    runs: frozenset[str] = frozenset()
    p_holm: float = math.nan
    p_equal: float = math.nan
    p_equal_holm: float = math.nan

    @property
    def d_z(self) -> float:
        """Return Cohen's d_z of the contrasts against the reference."""
        return effect_size(list(self.contrasts.values()), self.comparison.reference)

    @property
    def verdict(self) -> str:
        """Return the verdict on this comparison alone."""
        if not self.contrasts and not self.remarks:
            return NOT_RUN
        if self.p_holm <= self.alpha:
            return SUPPORTED if self.favors else CONTRADICTED
        return EQUAL if self.p_equal_holm <= self.alpha else INCONCLUSIVE

    @property
    def label(self) -> str:
        """Return the contrast in words, e.g. "bn - none"."""
        return _contrast_text(self.comparison)


@dataclass(frozen=True)
class Judgement:
    """The results of a claim in a study on one data set with one network.

    Attributes:
        tuned: how many settings each arm was given, where the runs are those at its best.
    """

    claim: Claim
    study: str
    dataset: str
    model: str
    budget: str
    results: tuple[ComparisonResult, ...]
    tuned: str = ""

    @property
    def verdict(self) -> str:
        """Return the verdict: all comparisons have to hold, and one that does not contradicts; with `any`, the reverse.

        Equal sides do not hold. Where all are equal, so is the verdict.
        """
        verdicts = {result.verdict for result in self.results}
        if len(verdicts) == 1:
            return verdicts.pop() if NOT_RUN not in verdicts else INCONCLUSIVE
        if self.claim.any:
            denied = CONTRADICTED if verdicts <= {CONTRADICTED, EQUAL} else INCONCLUSIVE
            return SUPPORTED if SUPPORTED in verdicts else denied
        return CONTRADICTED if verdicts & {CONTRADICTED, EQUAL} else INCONCLUSIVE

    @property
    def place(self) -> str:
        """Return the data set, network and budget in words."""
        warning = " (answers nothing)" if self.budget == "smoke" else ""
        tuned = f"; {self.tuned}" if self.tuned else ""
        return f"{self.dataset}, {self.model}, budget {self.budget}{warning}{tuned}"


def judge(study: Study, confidence: float = 0.95, alpha: float = 0.05) -> list[Judgement]:
    """Return every verdict that the study's finished runs allow, in the order of places and claims."""
    judgements = []
    found = finished_runs(study)
    rates, tuned = with_rates(found, study), study.tuning.sentence if study.tuning else ""
    for (dataset, model), here in found.items():
        named = (study.configs[run.name].get("budget") for run in here)  # `next` adds runs that name none
        budgets = list(dict.fromkeys(str(budget) for budget in named if budget)) or ["n/a"]
        for claim in claims():
            compared = rates[dataset, model] if claim.tuning else here
            results = tuple(
                _compare(comparison, claim.free, compared, confidence, alpha) for comparison in claim.comparisons
            )
            if any(result.verdict != NOT_RUN for result in results):
                judgements.append(Judgement(claim, study.name, dataset, model, " or ".join(budgets), results, tuned))
    every = [result for judgement in judgements for result in judgement.results]
    for result, adjusted in zip(every, holm([result.p for result in every]), strict=True):
        result.p_holm = adjusted
    for result, adjusted in zip(every, holm([result.p_equal for result in every]), strict=True):
        result.p_equal_holm = adjusted
    for result in every:
        if result.verdict == EQUAL:
            result.remarks += (f"{_within(result.comparison)}, p {p_text(result.p_equal_holm, '= ')} (TOST)",)
        result.remarks += tuple(_outlying_seeds(result, every))
    return judgements


def _outlying_seeds(result: ComparisonResult, every: Sequence[ComparisonResult]) -> Iterator[str]:
    """Yield a sentence if the verdict would be another one without the seed that is farthest from the others.

    Args:
        result: the comparison.
        every: all comparisons that Holm's correction is over, this one among them.
    """
    contrasts = result.contrasts
    finite = [value for value in contrasts.values() if math.isfinite(value)]
    if math.isnan(result.p) or len(contrasts) <= ENOUGH or not finite:
        return
    distances = {seed: abs(value - median(finite)) for seed, value in contrasts.items()}
    for seed in (seed for seed, distance in distances.items() if distance == max(distances.values()) > 0):
        rest = {other: value for other, value in contrasts.items() if other != seed}
        p, favors = _test(result.comparison, list(rest.values()))
        adjusted = holm([p, *(other.p for other in every if other is not result)])[0]
        p_equal = math.nan
        if not math.isnan(result.p_equal):
            p_equal, _ = _within_and_outside(result.comparison, list(rest.values()))
        equal = holm([p_equal, *(other.p_equal for other in every if other is not result)])[0]
        without = dataclasses.replace(result, contrasts=rest, favors=favors, p_holm=adjusted, p_equal_holm=equal)
        if without.verdict != result.verdict:
            yield f"rests on seed {seed}: without it {without.verdict}"


def _compare(
    comparison: Comparison, free: frozenset[str], here: Sequence[FinishedRun], confidence: float, alpha: float
) -> ComparisonResult:
    """Select the runs of a comparison, pair them, and test their contrasts."""
    selection = select(comparison, free, here)
    if selection is None or _is_never_measured(selection, here):
        return ComparisonResult(comparison, alpha)
    contrasts = {seed: _mean(_contrasts(selection, seed)) for seed in selection.seeds}
    values, weights = list(contrasts.values()), [side.weight for side in comparison.sides]
    p, favors, p_equal, remark = math.nan, False, math.nan, _obstacle(selection)
    if not remark:
        p, favors = _test(comparison, values)
        if _may_be_equal(selection) and all(map(math.isfinite, values)):
            p_equal, _ = _within_and_outside(comparison, values)
        if any(values) and not spread(values) > 0:
            above = sum(value > comparison.reference for value in values)
            remark = f"sign test: higher in {above} of {len(values)} seeds"
    return ComparisonResult(
        selection.comparison,
        alpha,
        contrasts,
        t_interval(values, confidence, contrast_bounds(weights, comparison.measure.bounds)),
        p,
        favors,
        p_equal=p_equal,
        remarks=(*_remarks(selection), *filter(None, [remark])),
        runs=frozenset(run.name for run in selection.runs),
    )


def _is_never_measured(selection: Selection, here: Sequence[FinishedRun]) -> bool:
    """Return whether all runs diverged and none on this data set and network shows that there is such a value."""
    measure = selection.comparison.measure
    if not selection.runs or any(not run.diverged for run in selection.runs):
        return False
    return all(run.diverged or math.isnan(run.value(measure)) for run in here)


def _obstacle(selection: Selection) -> str:
    """Return the reason why no test can be made; "" if one can."""
    comparison, seeds = selection.comparison, selection.seeds
    if not seeds:
        return "no seed has all of its runs"
    if len(seeds) < ENOUGH:
        return f"n = {len(seeds)}: {TOO_FEW}"
    if all(run.diverged for run in selection.runs):
        return "nothing to compare"
    if selection.survivors:
        return "no test: it would be of the runs that survived alone"
    if comparison.tolerates_equality and comparison.measure.diverged == "chance" and not _any_side_learned(selection):
        return "no arm learned"
    return ""


def _may_be_equal(selection: Selection) -> bool:
    """Return whether alikeness can be told from runs: of such a comparison, if none diverged and any side learned."""
    comparison = selection.comparison
    if not comparison.denies_equality or any(run.diverged for run in selection.runs):
        return False
    return comparison.in_factors or _any_side_learned(selection)


def _any_side_learned(selection: Selection) -> bool:
    """Return whether the runs of any side are clearly better than guessing, in the mean."""
    measure = selection.comparison.measure
    above_chance = [
        [by_seed[seed].value(measure) - by_seed[seed].chance for by_seed in side for seed in selection.seeds]
        for side in zip(*selection.cells, strict=True)
    ]
    return any(sum(values) / len(values) >= LEARNED for values in above_chance)


def _contrasts(selection: Selection, seed: int) -> list[float]:
    """Return the weighted sum of the sides' values in each cell. Two infinite sides are a tie."""
    weights = [side.weight for side in selection.comparison.sides]
    sums = [
        sum(weight * value for weight, value in zip(weights, values, strict=True)) for values in selection.values(seed)
    ]
    return [0.0 if math.isnan(total) else total for total in sums]


def _mean(values: Sequence[float]) -> float:
    """Return the mean, 0 if both infinities are among the values."""
    mean = sum(values) / len(values)
    return 0.0 if math.isnan(mean) else mean


def _test(comparison: Comparison, values: Sequence[float]) -> tuple[float, bool]:
    """Return the p-value of the conclusion that the values rather speak for, and whether that is the claim.

    greater, less: the test against the reference. equal: two one-sided tests (TOST) against the ends of the margin;
    or, where that is the smaller, the test of lying outside. Only one of the two conclusions can be wrong but on the
    margin itself. All are two-sided: a verdict at 5 % is where the 95 % interval lies.
    """
    if comparison.expect == "equal":
        inside, outside = _within_and_outside(comparison, values)
        return min(inside, outside), inside <= outside
    tested = tails(values, comparison.reference, comparison.exact)
    return tested.two_sided, (tested.above < tested.below) == (comparison.expect == "greater")


def _within_and_outside(comparison: Comparison, values: Sequence[float]) -> tuple[float, float]:
    """Return the p-values of lying within the smallest difference of interest (TOST), and of lying outside of it."""
    reference, margin = comparison.reference, comparison.smallest
    low, high = (tails(values, end, comparison.exact) for end in (reference - margin, reference + margin))
    return min(1.0, 2 * max(low.above, high.below)), min(1.0, 2 * min(low.below, high.above))


def _within(comparison: Comparison) -> str:
    """Return the smallest difference of interest in words."""
    size = comparison.smallest
    return (
        f"within a factor of {math.exp(size):g}"
        if comparison.in_factors
        else f"within {size:g} point{'s' * (size != 1)}"
    )


def _remarks(selection: Selection) -> Iterator[str]:
    comparison, seeds = selection.comparison, selection.seeds
    if len(selection.cells) > 1:
        yield f"mean over {len(selection.cells)} cells"
        if seeds:
            by_cell = [_mean(values) for values in zip(*(_contrasts(selection, seed) for seed in seeds), strict=True)]
            ends = [f"{math.exp(min(x, 700)):.3g}" if comparison.in_factors else f"{x:+.3g}" for x in sorted(by_cell)]
            yield f"cells from {ends[0]} to {ends[-1]}"
    if selection.repeated:
        yield f"left out: {count(selection.repeated, 'run')} repeating another"
    if seeds and selection.incomplete_seeds:
        yield f"seeds {', '.join(map(str, selection.incomplete_seeds))} are not in all cells and are left out"
    for position, side in enumerate(comparison.sides):
        if side.weight:
            yield from _remarks_on_side(selection, position)


def _remarks_on_side(selection: Selection, position: int) -> Iterator[str]:
    measure, arm = selection.comparison.measure, _arm_text(selection.comparison.sides[position])
    used = {cell[position][seed].name: cell[position][seed] for cell in selection.cells for seed in selection.seeds}
    diverged = [run for run in used.values() if run.diverged]
    if diverged:
        yield f"{len(diverged)} of {len(used)} runs of {arm} diverged and count {_as_what(diverged[0], measure)}"
    missing = selection.missing[position]
    lost = sum(run.diverged for run in missing)
    if lost:
        yield f"{count(lost, 'run')} of {arm} diverged, without such a value"
    if len(missing) > lost:
        yield f"{count(len(missing) - lost, 'run')} of {arm} without such a value"


def _as_what(diverged: FinishedRun, measure: Metric) -> str:
    """Return what a diverged run counts as."""
    if measure.diverged == "before":
        return "up to their last measured step, as do the runs that they are compared with"
    return "as infinitely large" if measure.diverged == "worst" else f"as {diverged.value(measure):g} %"


def _contrast_text(comparison: Comparison) -> str:
    """Return a contrast in words, with the settings in which its arms differ."""
    sides = comparison.sides
    keys = dict.fromkeys(key for side in sides for key in side.where if key not in ("norm.name", "norm._target_"))
    differing = [key for key in keys if len({str(side.where.get(key)) for side in sides}) > 1]
    ratio = comparison.in_factors and len(sides) > 1
    text = ""
    for side in sides:
        if not side.weight:
            continue
        if text:
            text += " / " if ratio else " + " if side.weight > 0 else " - "
        size = "" if abs(side.weight) == 1 else f"{abs(side.weight):g} "
        text += size + _arm_text(side, differing)
    return text


def _arm_text(side: Side, keys: Sequence[str] = ()) -> str:
    options = [
        f"{key.removeprefix('norm.').removesuffix('.name')}={side.where[key]}" for key in keys if key in side.where
    ]
    return f"{side.norm} ({', '.join(options)})" if options else side.norm
