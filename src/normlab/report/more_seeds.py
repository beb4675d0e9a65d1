"""What it would take to settle what is inconclusive: how many more seeds, how long they train, and the command.

docs/statistics.md explains the plan. New seeds are judged by themselves, at a part of `alpha`, so that neither the
first look nor the number that it asked for makes false verdicts likelier.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from normlab.common.errors import UserError, as_typed, count, exact, listed, per_cent
from normlab.common.installation import command_name, study_words
from normlab.common.progress import span
from normlab.config import schema
from normlab.report.adding import as_text, commands
from normlab.report.analysis import frames
from normlab.report.analysis.cells import NOTHING, Row, Table, TableCell
from normlab.report.analysis.metrics import RATES, Metric
from normlab.report.analysis.power import MOST, POWER, seeds_needed
from normlab.report.analysis.statistics import ENOUGH, paired, spread, t_interval
from normlab.report.analysis.tuning import RATE, along_setting
from normlab.report.claims.claims import MARGIN, MARGIN_FACTOR, Comparison, Side
from normlab.report.claims.judge import INCONCLUSIVE, NOT_RUN, ComparisonResult, Judgement
from normlab.report.options import TABLE_OPTIONS, Options
from normlab.report.options import options as menu_options
from normlab.report.reruns import foreign
from normlab.report.study.arms import cell_key, flat_cells, in_order
from normlab.report.study.load import Study
from normlab.report.study.select import select
from normlab.report.study.tuned import Choice
from normlab.runs.states import State

LOOKS = 2  # at a study, by default: the one that found it inconclusive, and one at the new seeds
COMMANDS = 3  # comparisons whose commands stand below the table
MORE, WITH_RATES = "_more", "_rates"  # ends of the names of studies of new runs
_TOGETHER = (
    " Comparisons with the same command behind `then:` are judged together, when all of their new runs are there."
)
_UNFINISHED = "no run has finished there"
_DIVERGED = "more seeds do not settle it: all runs diverged there"
_CAPTION = (
    "What is inconclusive, fewest seeds times their time first. Observed: mean over n seeds, standard deviation (sd)."
    " New seeds: so many that they alone find the observed effect with a chance of {power} % (noncentral t), at most"
    " {most}; at margin: the same for the claim's margin (where it has none: {margin}, which are ours). From few seeds"
    " these numbers are rough. New seeds are to be judged by themselves, each comparison at its share of alpha={alpha},"
    " half of this report's, over all that are inconclusive here in the table of differences, or of verdicts. Time:"
    " training of the new seeds, one run after the other, as finished runs took. All commands: {command}."
)


@dataclass(frozen=True)
class Need:
    """An inconclusive comparison, and what would settle it.

    Attributes:
        place: setting of the table of differences, or place of the verdict.
        what: the comparison in words.
        claim: the claim's sentence; "" for a difference to the baseline.
        comparison: what is tested, as of a claim.
        differences: one number per seed, on the scale of the measure.
        interval: low and high of their mean.
        level: of the test of the new seeds, both sides together, with Holm's correction.
        family: level of the report that judges it among others, whose own correction shares it out.
        seeds: new seeds for `POWER` at the observed effect; None: more than `MOST`, or none help.
        judged: new seeds of the report that judges it among others: the most that one of them needs.
        margin: smallest difference of interest, nan where none is known.
        at_margin: new seeds for it; None: more than `MOST`.
        note: why there is no such number, or what it means.
        settles: whether new seeds can settle it, or begin to.
        configs: one of each cell that has to be trained.
        runs: names of the runs of these cells.
        seconds: training of one seed of all these cells, by finished runs; nan where none says.
        tuned: settings that the study is tuned by, which runs of the new seeds alone do not tell.
        selection: arms=, batches= and settings= that leave this comparison alone in the table of differences; none
            where it is judged among others.
        apart: ends the name of the study that new runs go to, where the old seeds are not; "": to the same study.
        advice: what to do before that, "" for nothing.
    """

    place: str
    what: str
    claim: str
    comparison: Comparison
    differences: tuple[float, ...]
    interval: tuple[float, float]
    level: float
    configs: tuple[Mapping[str, Any], ...]
    runs: tuple[str, ...]
    seconds: float
    tuned: tuple[str, ...] = ()
    selection: Mapping[str, Any] = field(default_factory=dict)
    family: float = math.nan
    apart: str = ""
    advice: str = ""
    seeds: int | None = None
    judged: int | None = None
    margin: float = math.nan
    at_margin: int | None = None
    note: str = ""
    settles: bool = False

    @property
    def mean(self) -> float:
        """Return the mean of the differences; nan where there are none, or infinities of both signs."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.mean(self.differences)) if self.differences else math.nan

    @property
    def cost(self) -> float:
        """Return the seconds of all new seeds; infinity where they are not known."""
        total = self.seconds * self.seeds if self.seeds else math.inf
        return math.inf if math.isnan(total) else total

    @property
    def first_look(self) -> bool:
        """Return whether there are too few seeds for a test, so that nothing was looked at yet."""
        return len(self.differences) < ENOUGH

    @property
    def remarks(self) -> str:
        """Return the note, and what to do first."""
        return "; ".join(filter(None, [self.note, self.advice]))


def needs(
    study: Study, metric: Metric, options: Options, judgements: Sequence[Judgement], looks: int = LOOKS
) -> list[Need]:
    """Return what the inconclusive verdicts and differences of a report need: fewest seeds times time first.

    Comparisons that cannot be planned for yet follow, then those that more seeds do not settle.
    """
    found = _judged_together(_of_verdicts(study, options, judgements, looks))
    found += _judged_together(_of_differences(study, metric, options, looks))
    return sorted(found, key=lambda need: (not need.settles, need.first_look, need.cost))


def _judged_together(needs: Iterable[Need]) -> list[Need]:
    """Return comparisons of one table with the seeds of their report: those that share one need Holm's over all."""
    found, most = list(needs), dict[str, int]()

    def seeds(need: Need) -> int | None:
        return None if need.first_look or need.selection else need.seeds

    for need in found:
        most[need.apart] = max(most.get(need.apart, 0), seeds(need) or 0)
    return [replace(need, judged=most[need.apart]) if seeds(need) else need for need in found]


def _of_verdicts(study: Study, options: Options, judgements: Sequence[Judgement], looks: int) -> Iterator[Need]:
    results = [result for judgement in judgements for result in judgement.results]
    open_ones = Counter(_apart(study, result.comparison) for result in results if result.verdict == INCONCLUSIVE)
    reports = looks * len(open_ones)  # each look is shared by the reports of the studies that new runs go to
    for judgement in judgements:
        for result in judgement.results if judgement.verdict == INCONCLUSIVE else ():
            if result.verdict != INCONCLUSIVE or not result.runs:
                continue
            measure = result.comparison.measure.full_label
            need = _need(study, options, result.comparison, list(result.contrasts.values()), sorted(result.runs))
            yield _planned(
                replace(
                    need,
                    place=judgement.place,
                    what=f"{result.label}, {measure}",
                    claim=judgement.claim.sentence,
                    level=_level(options, reports, open_ones[need.apart]),
                    family=_level(options, reports),
                ),
                _not_run(study, judgement, result) or _obstacle(result) or _unfinished(study, result),
                equality=not math.isnan(result.p_equal),
            )


def _level(options: Options, looks: int, comparisons: int = 1) -> float:
    """Return the level of one of these comparisons, in two digits, rounded down: a command has to name it."""
    level = max(options.alpha / looks / comparisons, 1e-50)
    unit = 10.0 ** (math.floor(math.log10(level)) - 1)
    return float(f"{math.floor(level / unit * (1 + 1e-12)) * unit:.2g}")


def _obstacle(result: ComparisonResult) -> str:
    """Return why there is no test of a comparison though it has seeds enough; "" where there is one."""
    return result.remarks[-1] if math.isnan(result.p) and len(result.contrasts) >= ENOUGH and result.remarks else ""


def _not_run(study: Study, judgement: Judgement, result: ComparisonResult) -> str:
    """Return what the claim needs beside this comparison and no run has; "" where this one alone is a verdict."""
    missing = [each for each in judgement.results if each.verdict == NOT_RUN]
    alone = not math.isnan(result.p) and result.favors == judgement.claim.any
    if not missing or alone:
        return ""
    norms = {str(config["norm"]["name"]) for config in study.configs.values()}
    named = dict.fromkeys(side.norm for each in missing for side in each.comparison.sides)
    lacking = [name for name in named if name not in norms]
    of_arms = f" (the study has no {listed(lacking, 3)})" if lacking else ""
    needed = listed([f"{each.label}, {each.comparison.measure.full_label}" for each in missing], 2, "; ")
    return f"the claim needs what was not run, too: {needed}{of_arms}"


def _unfinished(study: Study, result: ComparisonResult) -> str:
    """Return that a comparison without any contrast has a cell of which no run is done; "" where it has none."""
    done = _in_state(study, State.DONE)
    cells = _cells(study, result.runs).values()
    without = [names for names in cells if not done.intersection(names)]
    lacking = len(without) == len(cells) or (not result.contrasts and without)
    return _undone(study, without) if lacking and len(result.contrasts) < ENOUGH else ""


def _undone(study: Study, cells: Iterable[Iterable[str]]) -> str:
    """Return why there is no test where no run of these cells is done."""
    diverged = _in_state(study, State.DIVERGED)
    return _DIVERGED if any(names and diverged.issuperset(names) for names in map(list, cells)) else _UNFINISHED


def _in_state(study: Study, state: State) -> set[str]:
    return set(study.runs[study.runs["state"] == state]["run"])


def _of_differences(study: Study, metric: Metric, options: Options, looks: int) -> Iterator[Need]:
    baseline, values = options.baseline, frames.outcomes(study, metric)
    if baseline not in set(study.runs["arm"]):
        return
    assert baseline is not None
    tidy = frames.differences(study.runs, values, metric.epoch, baseline, options.confidence)
    rows = [row for row in frames.named_rows(tidy) if not row.p_holm <= options.alpha]
    plain = replace(metric, log=False)  # differences of losses are no factors
    comparison = Comparison((Side(1.0, {}), Side(-1.0, {})), plain, "greater", 0.0, 0.0)
    several, done = study.placed["setting"].nunique() > 1, _in_state(study, State.DONE)
    # In a study of their own arms and settings may have other names, so that there all are judged together.
    named = not _apart(study, comparison) or not (several or any(" (" in arm for arm in study.placed["arm"]))
    for row in rows:
        cells = values[(values["setting"] == row.setting) & (values["batch"] == row.batch)]
        by_seed = {arm: dict(zip(here["seed"], here[metric.epoch], strict=True)) for arm, here in cells.groupby("arm")}
        minus = paired(by_seed.get(row.arm, {}), by_seed.get(baseline, {}))
        placed = study.placed
        place = (placed["setting"] == row.setting) & (placed["batch"] == row.batch)
        here = placed[place & placed["arm"].isin([row.arm, baseline]) & (placed["run"] != "")]
        runs = here["run"]
        without = [list(of_arm["run"]) for _, of_arm in here.groupby("arm") if done.isdisjoint(of_arm["run"])]
        unfinished = bool(without) or here["arm"].nunique() < 2
        why = _undone(study, without) if unfinished else "some pairs diverged" if row.diverged else ""
        selection: dict[str, Any] = {"arms": [row.arm, baseline], "batches": [int(row.batch)]} if named else {}
        selection |= {"settings": [row.setting]} if named and several else {}
        need = _need(study, options, comparison, minus, list(runs))
        what = f"{row.arm} - {baseline}, batch {row.batch}, {metric.full_label}"
        level = _level(options, looks, len(rows))
        need = replace(need, place=row.setting, what=what, level=level, selection=selection)
        yield _planned(replace(need, family=_level(options, looks)), why)


def _need(
    study: Study, options: Options, comparison: Comparison, differences: Sequence[float], runs: Sequence[str]
) -> Need:
    """Return the comparison with the cells that one more seed of it has to train, and what they take."""
    tuning, choices = study.tuning, _choices(study, runs)
    every = tuning.study if tuning else study
    trained = _grid(study, choices) if comparison.measure.probe == RATES else runs
    cells = _cells(every, trained)
    known = every.runs[every.runs["run"] != ""]
    seconds = dict(zip(known["run"], frames.column_of(known, "wall_seconds"), strict=True))
    each = [t_interval(seconds[name] for name in names).mean for names in cells.values()]
    interval = t_interval(differences, options.confidence)
    edges = [
        f"{edge.removeprefix('edge: ')} ({choice.arm}, batch {choice.batch})"
        for choice in choices
        for edge in choice.edges
    ]
    return Need(
        place="",
        what="",
        claim="",
        comparison=comparison,
        differences=tuple(differences),
        interval=(interval.low, interval.high),
        level=math.nan,
        configs=tuple(every.configs[names[0]] for names in cells.values()),
        runs=tuple(trained),
        seconds=sum(each) if each else math.nan,
        tuned=tuple(tuning.settings) if tuning else (),
        apart=_apart(study, comparison),
        advice=f"first widen the grid: {listed(list(dict.fromkeys(edges)), 3)}" if edges else "",
    )


def _apart(study: Study, comparison: Comparison) -> str:
    """Return what ends the name of the study that new runs go to: in a tuned one they would change what is chosen."""
    if comparison.measure.probe == RATES:
        return WITH_RATES
    return MORE if study.packed or (study.tuning and study.tuning.chooses) else ""


def _cells(study: Study, runs: Iterable[str]) -> dict[Any, list[str]]:
    """Return runs by what identifies them but for the seed: not by where and how they were carried out."""
    flat = flat_cells(study.configs[run] for run in runs)
    keys = {
        cell: frozenset((name, repr(value)) for name, value in row.items() if name != "seed")
        for cell, row in flat.items()
    }
    cells: dict[Any, list[str]] = {}
    for run in runs:
        cells.setdefault(keys[cell_key(study.configs[run])], []).append(run)
    return cells


def _choices(study: Study, runs: Sequence[str]) -> list[Choice]:
    """Return what was tried in the cells of these runs of a tuned study."""
    wanted = set(runs)
    every = study.tuning.choices if study.tuning else ()
    return [choice for choice in every if any(wanted.intersection(tried.runs.values()) for tried in choice.tried)]


def _grid(study: Study, choices: Sequence[Choice]) -> list[str]:
    """Return the runs at all learning rates that were tried in these cells: what their range is read from."""
    assert study.tuning is not None  # others have no such measure
    position = list(study.tuning.settings).index(RATE)
    along = [tried for choice in choices for tried in along_setting(choice, position)]
    return [run for tried in along for run in tried.runs.values()]


# ---- the plan


def _planned(need: Need, obstacle: str, *, equality: bool = False) -> Need:
    """Return the comparison with the number of new seeds that it needs, or with a note on why there is none.

    Args:
        need: what is inconclusive.
        obstacle: why new seeds do not help, "" if they may.
        equality: whether the arms can be called equal, too.
    """
    values, comparison, n = need.differences, need.comparison, len(need.differences)
    if obstacle in (_UNFINISHED, _DIVERGED):
        return replace(need, note=obstacle)
    if obstacle:
        return replace(need, note=f"more seeds do not settle it: {obstacle}")
    if need.first_look:
        alone = ", the new ones by themselves" if need.apart else ""
        note = f"n = {n}: the first test needs {ENOUGH} seeds{alone}"
        return replace(need, seeds=ENOUGH if need.apart else ENOUGH - n, settles=True, note=note)
    deviation = spread(values)
    if not deviation > 0:
        return _by_signs(need)
    distance = need.mean - comparison.reference
    margin = comparison.smallest
    if comparison.expect == "equal":
        off = abs(distance)
        inside = [comparison.margin - off, comparison.margin + off]
        observed, planned = inside if inside[0] > 0 else [-inside[0]], [comparison.margin] * 2
    else:
        observed, planned = [abs(distance)], [margin]
    seeds = seeds_needed([each / deviation for each in observed], need.level)
    at_margin = None if math.isnan(margin) else seeds_needed([each / deviation for each in planned], need.level)
    note = "" if seeds else f"more than {MOST} seeds: {_alike(need)}"
    if equality and observed[0] < margin:
        equal = seeds_needed([(margin - observed[0]) / deviation, (margin + observed[0]) / deviation], need.level)
        if equal and (seeds is None or equal < seeds):
            seeds, note = equal, f"to call them equal, within {_amount(margin, comparison)}"
    return replace(need, seeds=seeds, at_margin=at_margin, margin=margin, note=note, settles=seeds is not None)


def _by_signs(need: Need) -> Need:
    """Return the plan for the sign test, which takes the t-test's place where the differences have no spread."""
    sides = {float(np.sign(value - need.comparison.reference)) for value in need.differences}
    if len(sides) != 1 or 0.0 in sides or need.comparison.expect == "equal":
        return replace(need, note="more seeds do not settle it: differences without a spread, on no one side")
    seeds = math.ceil(math.log2(2 / need.level))
    if seeds > MOST:
        return replace(need, note=f"more than {MOST} seeds, by the sign test")
    return replace(need, seeds=seeds, settles=True, note="by the sign test, if all agree")


def _alike(need: Need) -> str:
    """Return in words how near to what the comparison is tested against the mean lies, at most."""
    comparison, mean = need.comparison, need.mean
    bound = comparison.reference
    if comparison.expect == "equal":
        bound += math.copysign(comparison.margin, mean - bound)
    far = max(abs(end - bound) for end in need.interval)
    if len(comparison.sides) > 1 and bound == 0:
        return f"these arms are alike to within {_amount(far, comparison)}"
    return f"what was measured lies within {_amount(far, comparison)} of {_value(bound, comparison)}"


def _amount(size: float, comparison: Comparison) -> str:
    if comparison.in_factors:
        return f"a factor of {math.exp(min(size, 700)):.3g}"
    points = " point" if f"{size:.2g}" == "1" else " points"
    return f"{size:.2g}{points if comparison.in_points else ''}"


def _value(value: float, comparison: Comparison) -> str:
    if comparison.in_factors:
        return f"a factor of {math.exp(value):.3g}"
    return f"{value:g}{(' points' if len(comparison.sides) > 1 else ' %') if comparison.in_points else ''}"


# ---- as a table


def seeds_table(study: Study, found: Sequence[Need], options: Options) -> Table | None:
    """Return the table of what is inconclusive; None where nothing is."""
    if not found:
        return None
    rows: dict[str, list[Row]] = {}
    for need in found:
        rows.setdefault(f"Verdicts: {need.place}" if need.claim else need.place, []).append(_row(need))
    words = study_words(*((str(study.folder), "outputs") if study.packed else _place(study)))
    words = " ".join([words, *_words(_changed(options))])
    caption = _CAPTION.format(
        alpha=exact(options.alpha / LOOKS),
        power=per_cent(POWER),
        most=MOST,
        margin=f"{MARGIN:g} point, or a factor of {MARGIN_FACTOR:g}",
        command=f"{command_name('report')} next {words}",
    )
    names = sorted({run for need in found for run in need.runs})
    first = [] if options.seeds is not None else _first_commands(study, found)
    return Table(
        name="seeds",
        title="What it would take",
        caption=caption,
        tidy=pd.DataFrame([_tidy_row(need) for need in found]),
        rows=rows,
        prose=("claim", "remarks"),
        runs=names,
        commands=first,
    )


def _first_commands(study: Study, found: Sequence[Need]) -> list[str]:
    titles: dict[str, list[str]] = {}
    for need in [need for need in found if need.settles][:COMMANDS]:
        for line in train_commands(study, need):
            titles.setdefault(line, []).append(_title(need))
    return [f"{'; '.join(named)}\n{line}" for line, named in titles.items()]


def _title(need: Need) -> str:
    return f"{need.what} ({need.place}): {count(need.seeds or 0, 'new seed')}"


def _observed(need: Need) -> str:
    if not need.differences:
        return NOTHING
    mean, deviation, comparison = need.mean, spread(need.differences), need.comparison
    if comparison.in_factors:
        shown = f"factor {math.exp(min(mean, 700)):.3g}"
        return f"{shown}, sd factor {math.exp(min(deviation, 700)):.3g}" if deviation > 0 else shown
    sign = "+" if len(comparison.sides) > 1 else ""
    form = ".2f" if comparison.in_points else ".3g"
    return f"{mean:{sign}{form}}" + (f", sd {deviation:{form}}" if deviation > 0 else "")


def _row(need: Need) -> Row:
    most = f"> {MOST}"
    at_margin = (
        NOTHING if math.isnan(need.margin) else f"{need.at_margin or most} ({_amount(need.margin, need.comparison)})"
    )
    known = need.seeds is not None
    seeds = str(need.seeds) if known else most if need.note.startswith("more than") else NOTHING
    return {
        "comparison": TableCell(need.what),
        "observed": TableCell(_observed(need)),
        "n": TableCell(str(len(need.differences)), len(need.differences)),
        "new seeds": TableCell(seeds, need.seeds if need.seeds is not None else math.nan),
        "at margin": TableCell(at_margin),
        "time": TableCell(span(need.cost) if math.isfinite(need.cost) else NOTHING, need.cost if known else math.nan),
        "claim": TableCell(need.claim),
        "remarks": TableCell(need.remarks),
    }


def _tidy_row(need: Need) -> dict[str, object]:
    values, comparison = need.differences, need.comparison
    return {
        "place": need.place,
        "claim": need.claim,
        "comparison": need.what,
        "expected": comparison.expect if need.claim else "different",
        "reference": comparison.reference,
        "mean": need.mean,
        "deviation": spread(values),
        "n": len(values),
        "level": need.level,
        "new_seeds": math.nan if need.seeds is None else need.seeds,
        "margin": need.margin,
        "new_seeds_at_margin": math.nan if need.at_margin is None else need.at_margin,
        "seconds": need.cost if math.isfinite(need.cost) else math.nan,
        "remarks": need.remarks,
    }


# ---- as commands


def new_seeds(study: Study, need: Need) -> list[int]:
    """Return the seeds that are to be added: those after the last that the study has."""
    return _seeds_after_the_last(study, need.seeds or 0)


def _seeds_after_the_last(study: Study, number: int) -> list[int]:
    every = study.tuning.study if study.tuning else study
    known = [int(config["seed"]) for config in every.configs.values()]
    first = max(known, default=-1) + 1
    return list(range(first, first + number))


def train_commands(study: Study, need: Need) -> list[str]:
    """Return the command lines that add the seeds; none where no command gives such runs."""
    name, output_dir = _place(study)
    return commands(need.configs, new_seeds(study, need), name + need.apart, output_dir, here=not study.packed)


def _place(study: Study) -> tuple[str, str]:
    """Return study= and output_dir= of the folder of a study, or of what is to lie beside it where it is packed."""
    name, folder = study.name, study.folder
    depth = len(name.split("/"))
    if study.packed:
        return name.rpartition("/")[2], str(folder.parent)
    if tuple(name.split("/")) != folder.parts[-depth:]:
        name, depth = folder.name, 1
    if len(folder.parts) < depth:
        return name, str(folder.parent)
    return name, str(folder.parents[depth - 1])


def report_command(study: Study, need: Need, options: Options) -> str:
    """Return the command line that judges the new seeds by themselves; for a first look, with those that are there."""
    name, output_dir = _place(study)
    changed = _changed(options)
    if need.tuned:
        changed["tuned"] = list(need.tuned)
    if need.apart:  # nothing else is there, and arms and settings may have shorter names
        changed = {key: value for key, value in changed.items() if key not in ("arms", "batches", "settings")}
    seeds = _seeds_after_the_last(study, need.judged or need.seeds or 0)
    if need.apart or not need.first_look:
        changed["seeds"] = seeds
    elif options.seeds is not None:
        changed["seeds"] = [*options.seeds, *seeds]
    if not need.first_look:
        changed |= {"alpha": need.level if need.selection else need.family} | _selection(study, need)
    place = {"study": name + need.apart} | ({} if output_dir == "outputs" else {"output_dir": output_dir})
    return " ".join([command_name("report"), *_words(place | changed)])


def _changed(options: Options) -> dict[str, Any]:
    """Return the options of tables that are not the menu's."""
    menu = menu_options()
    return {key: getattr(options, key) for key in TABLE_OPTIONS if getattr(options, key) != getattr(menu, key)}


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [shlex.quote(f"{key}={as_text(value)}") for key, value in settings.items()]


def _selection(study: Study, need: Need) -> dict[str, Any]:
    """Return what of arms=, batches= and settings= means the comparison in the study of the new runs."""
    if need.apart:
        return dict(need.selection)
    for left_out in ((), ("settings",), ("settings", "arms")):  # a tuned study has other names before it is tuned
        words = {key: value for key, value in need.selection.items() if key not in left_out}
        try:
            if set(select(study, **words).configs).issuperset(need.runs):
                return words
        except UserError:
            continue
    return {}


def all_commands(study: Study, found: Sequence[Need]) -> list[str]:
    """Return the command lines of all that new seeds can settle, each once."""
    every = [line for need in found if need.settles for line in train_commands(study, need)]
    return list(dict.fromkeys(every))


def nothing_asked(study: Study, options: Options, judgements: Sequence[Judgement]) -> str:
    """Return why nothing asks for more seeds where no comparison is inconclusive."""
    arms, baseline = in_order(study.placed["arm"]), options.baseline
    beside = [set(here) for _, here in study.placed.groupby(["setting", "batch"])["arm"]]
    if judgements or any(baseline in each and len(each) > 1 for each in beside):
        return f"Study {study.name}: nothing is inconclusive, so nothing asks for more seeds."
    if len(arms) < 2:
        why = f"only {arms[0]} is there" if arms else "no run is there"
    elif baseline not in arms:
        why = f"baseline={as_typed(baseline)} is none of the arms ({listed(arms, 8)})"
    else:
        why = f"no other arm has a setting and batch size of the baseline, {baseline}"
    left_out = f" of {options.selection_in_short}" if options.selection else ""
    return (
        f"Study {study.name}: nothing{left_out} was compared, as {why}, and no claim is about these runs. So nothing"
        " asks for more seeds."
    )


def lines(study: Study, found: Sequence[Need], options: Options, looks: int) -> Iterator[str]:
    """Yield what `report.py next` prints of what is inconclusive."""
    alpha = exact(options.alpha / looks)
    yield (
        f"Study {study.name}: {count(len(found), 'inconclusive comparison')}. New seeds are to be judged by themselves,"
        f" each comparison at its share of {alpha} (alpha={exact(options.alpha)} over {count(looks, 'look')}): whatever"
        f" their number, and whatever was seen before, they make a false verdict in at most"
        f" {per_cent(options.alpha / looks)} % of studies in the table of differences, and in at most as many in that"
        f" of verdicts; in at most as many they call arms equal that are not. Together with the old ones they would not"
        f" (docs/statistics.md). Their chance to settle a comparison is {per_cent(POWER)} %, if effect and standard"
        f" deviation (sd) are as observed."
        f"{_TOGETHER if _are_judged_together(found) else ''}"
    )
    printed: dict[tuple[str, ...], int] = {}
    for number, need in enumerate((need for need in found if need.settles), start=1):
        yield ""
        yield from _advice(study, need, options, number, printed)
    hopeless = [need for need in found if not need.settles]
    if hopeless:
        yield ""
        yield "Not worth more seeds:"
    for need in hopeless:
        yield f"   {need.what} ({need.place}): {need.remarks}.{_for_margin(need)}"


def _are_judged_together(found: Sequence[Need]) -> bool:
    """Return whether one report, with one correction, is to judge more than one of these comparisons."""
    reports = Counter((bool(need.claim), need.apart) for need in found if need.judged)
    return any(number > 1 for number in reports.values())


def _advice(
    study: Study, need: Need, options: Options, number: int, printed: dict[tuple[str, ...], int]
) -> Iterator[str]:
    """Yield a comparison with its commands, but for those that were `printed` with an earlier one."""
    yield f"{number}. {need.what} ({need.place}): {_observed(need)}, n = {len(need.differences)}"
    if need.claim:
        yield f"   claim: {need.claim}"
    runs = len(need.configs) * (need.seeds or 0)
    took = (
        f"about {span(need.cost)} of training, one run after the other" if math.isfinite(need.cost) else "time unknown"
    )
    note = f" ({need.remarks})" if need.remarks else ""
    yield f"   {count(need.seeds or 0, 'new seed')}{note}, {count(runs, 'run')}, {took}.{_for_margin(need)}"
    train = train_commands(study, need)
    if not train:
        yield "   No command: its runs were made elsewhere, or have settings that this version does not give."
        return
    shown = (*train, f"then: {report_command(study, need, options)}")
    first = printed.setdefault(shown, number)
    if first != number:
        yield f"   The commands are those of {first}."
        return
    for named in _foreign(need):
        yield f"   {named}"
    yield from (f"   {line}" for line in shown)


def _for_margin(need: Need) -> str:
    """Return a sentence on the seeds for the smallest difference of interest."""
    if math.isnan(need.margin):
        return ""
    seeds = count(need.at_margin, "new seed") if need.at_margin else f"More than {MOST} new seeds"
    if need.comparison.expect == "equal" or need.comparison.tolerates_equality:
        return f" {seeds} would settle it if the arms are alike."
    return f" {seeds} would find a difference of {_amount(need.margin, need.comparison)}."


def _foreign(need: Need) -> Iterator[str]:
    """Yield a caveat where the runs carry out code, or read files, that are not normlab's."""
    named = list(dict.fromkeys(name for config in need.configs for name in _named(config)))
    if named:
        yield f"It carries out or reads {listed(named, 3)}: only if you have that and trust it, from its folder."


def _named(config: Mapping[str, Any]) -> list[str]:
    try:
        return foreign(schema.parse(config))
    except UserError:
        return []
