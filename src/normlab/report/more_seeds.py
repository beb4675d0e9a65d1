"""What it would take to settle what is inconclusive: how many more seeds, how long they train, and the command.

docs/statistics.md explains the plan. New seeds are judged by themselves, at a part of `alpha`, so that neither the
first look nor the number that it asked for makes false verdicts likelier.
"""

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from normlab.common.errors import UserError, count, exact, listed, per_cent
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
from normlab.report.claims.claims import Comparison, Side
from normlab.report.claims.judge import INCONCLUSIVE, ComparisonResult, Judgement
from normlab.report.options import TABLE_OPTIONS, Options
from normlab.report.options import options as menu_options
from normlab.report.reruns import foreign
from normlab.report.study.arms import cell_key, flat_cells
from normlab.report.study.load import Study
from normlab.report.study.select import select
from normlab.report.study.tuned import Choice

LOOKS = 2  # at a study, by default: the one that found it inconclusive, and one at the new seeds
MARGIN, MARGIN_FACTOR = 1.0, 1.5  # [A] the smallest differences of interest where a claim names none: points, a factor
COMMANDS = 3  # comparisons whose commands stand below the table
_UNFINISHED = "no run has finished there"
_CAPTION = (
    "What is inconclusive, fewest seeds times their time first. Observed: mean over n seeds, standard deviation (sd)."
    " New seeds: so many that they alone find the observed effect with a chance of {power} % (noncentral t), at most"
    " {most}; at margin: the same for the claim's margin (where it has none: {margin}, which are ours). From few seeds"
    " these numbers are rough. New seeds are to be judged by themselves, each comparison at its share of alpha={alpha},"
    " half of this report's, over all that are inconclusive here in the table of differences, or of verdicts. Time:"
    " training of the new seeds, one run after the other, as finished runs took. All commands: {command}"
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
        seeds: new seeds for `POWER` at the observed effect; None: more than `MOST`, or none help.
        margin: smallest difference of interest, nan where none is known.
        at_margin: new seeds for it; None: more than `MOST`.
        note: why there is no such number, or what it means.
        settles: whether new seeds can settle it, or begin to.
        configs: one of each cell that has to be trained.
        runs: names of the runs of these cells.
        seconds: training of one seed of all these cells, by finished runs; nan where none says.
        tuned: settings that the study is tuned by, which runs of the new seeds alone do not tell.
        selection: arms=, batches= and settings= that leave this comparison alone in the table of differences.
        apart: whether new runs go to a study of their own, where the old seeds are not.
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
    apart: bool = False
    advice: str = ""
    seeds: int | None = None
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
    found = [*_of_verdicts(study, options, judgements, looks), *_of_differences(study, metric, options, looks)]
    return sorted(found, key=lambda need: (not need.settles, need.first_look, need.cost))


def _of_verdicts(study: Study, options: Options, judgements: Sequence[Judgement], looks: int) -> Iterator[Need]:
    results = [result for judgement in judgements for result in judgement.results]
    open_ones = sum(result.verdict == INCONCLUSIVE for result in results)
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
                    level=_level(options, looks, open_ones),
                ),
                _obstacle(result) or _unfinished(study, result),
            )


def _level(options: Options, looks: int, comparisons: int) -> float:
    """Return the level of one of these comparisons, in two digits, rounded down: a command has to name it."""
    level = max(options.alpha / looks / comparisons, 1e-50)
    unit = 10.0 ** (math.floor(math.log10(level)) - 1)
    return float(f"{math.floor(level / unit * (1 + 1e-12)) * unit:.2g}")


def _obstacle(result: ComparisonResult) -> str:
    """Return why there is no test of a comparison though it has seeds enough; "" where there is one."""
    return result.remarks[-1] if math.isnan(result.p) and len(result.contrasts) >= ENOUGH and result.remarks else ""


def _unfinished(study: Study, result: ComparisonResult) -> str:
    """Return that a comparison without any contrast has a cell of which no run is done; "" where it has none."""
    done = _done(study)
    cells = _cells(study, result.runs).values()
    lacking = not any(done.intersection(names) for names in cells) or (
        not result.contrasts and not all(done.intersection(names) for names in cells)
    )
    return _UNFINISHED if lacking and len(result.contrasts) < ENOUGH else ""


def _done(study: Study) -> set[str]:
    return set(study.runs[study.runs["state"] == "done"]["run"])


def _of_differences(study: Study, metric: Metric, options: Options, looks: int) -> Iterator[Need]:
    baseline, values = options.baseline, frames.outcomes(study, metric)
    if baseline not in set(study.runs["arm"]):
        return
    assert baseline is not None
    tidy = frames.differences(study.runs, values, metric.epoch, baseline, options.confidence)
    rows = [row for row in frames.named_rows(tidy) if not row.p_holm <= options.alpha]
    plain = replace(metric, log=False)  # differences of losses are no factors
    comparison = Comparison((Side(1.0, {}), Side(-1.0, {})), plain, "greater", 0.0, 0.0)
    several, done = study.placed["setting"].nunique() > 1, _done(study)
    for row in rows:
        cells = values[(values["setting"] == row.setting) & (values["batch"] == row.batch)]
        by_seed = {arm: dict(zip(here["seed"], here[metric.epoch], strict=True)) for arm, here in cells.groupby("arm")}
        minus = paired(by_seed.get(row.arm, {}), by_seed.get(baseline, {}))
        placed = study.placed
        place = (placed["setting"] == row.setting) & (placed["batch"] == row.batch)
        here = placed[place & placed["arm"].isin([row.arm, baseline]) & (placed["run"] != "")]
        runs = here["run"]
        finished = set(here[here["run"].isin(done)]["arm"]) == {row.arm, baseline}
        why = "some pairs diverged, and more seeds do not undo that" if row.diverged else ""
        selection = {"arms": [row.arm, baseline], "batches": [int(row.batch)]}
        selection |= {"settings": [row.setting]} if several else {}
        need = _need(study, options, comparison, minus, list(runs))
        what = f"{row.arm} - {baseline}, batch {row.batch}, {metric.full_label}"
        level = _level(options, looks, len(rows))
        need = replace(need, place=row.setting, what=what, level=level, selection=selection)
        yield _planned(need, why if finished else _UNFINISHED)


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
    edges = [f"{edge.removeprefix('edge: ')} ({choice.arm})" for choice in choices for edge in choice.edges]
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
        apart=study.packed,
        advice=f"first widen the grid: {listed(edges, 3)}" if edges else "",
    )


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


def _planned(need: Need, obstacle: str) -> Need:
    """Return the comparison with the number of new seeds that it needs, or with a note on why there is none."""
    values, comparison, n = need.differences, need.comparison, len(need.differences)
    if obstacle == _UNFINISHED:
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
    margin = _margin(comparison)
    if comparison.expect == "equal":
        off = abs(distance)
        inside = [comparison.margin - off, comparison.margin + off]
        observed, planned = inside if inside[0] > 0 else [-inside[0]], [comparison.margin] * 2
    else:
        observed, planned = [abs(distance)], [margin]
    seeds = seeds_needed([each / deviation for each in observed], need.level)
    at_margin = None if math.isnan(margin) else seeds_needed([each / deviation for each in planned], need.level)
    note = "" if seeds else f"more than {MOST} seeds: {_alike(need)}"
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


def _margin(comparison: Comparison) -> float:
    """Return the smallest difference of interest: the claim's, else ours, on the scale of the measure."""
    if comparison.expect == "equal":
        return comparison.margin
    if comparison.tolerates_equality:  # "not more than a point behind": what arms that are alike are away from
        return abs(comparison.reference)
    return MARGIN if comparison.in_points else math.log(MARGIN_FACTOR) if comparison.in_factors else math.nan


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
    words = f"study={study.folder}" if study.packed else study_words(*_place(study))
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
    every = study.tuning.study if study.tuning else study
    known = [int(config["seed"]) for config in every.configs.values()]
    first = max(known, default=-1) + 1
    return list(range(first, first + (need.seeds or 0)))


def train_commands(study: Study, need: Need) -> list[str]:
    """Return the command lines that add the seeds; none where no command gives such runs."""
    name, output_dir = _place(study)
    return commands(need.configs, new_seeds(study, need), name, output_dir, here=not study.packed)


def _place(study: Study) -> tuple[str, str]:
    """Return study= and output_dir= of the folder that new runs go to, those of a packed study to one of their own."""
    name, folder = study.name, study.folder
    depth = len(name.split("/"))
    if study.packed:
        name = f"{name.rpartition('/')[2]}_more"
        return name, str(folder.parent)
    if tuple(name.split("/")) != folder.parts[-depth:]:
        name, depth = folder.name, 1
    if len(folder.parts) < depth:
        return name, str(folder.parent)
    return name, str(folder.parents[depth - 1])


def report_command(study: Study, need: Need, options: Options) -> str:
    """Return the command line that judges the new seeds by themselves; for a first look, with those that are there."""
    name, output_dir = _place(study)
    menu = menu_options()
    changed = {key: getattr(options, key) for key in TABLE_OPTIONS if getattr(options, key) != getattr(menu, key)}
    if need.tuned:
        changed["tuned"] = list(need.tuned)
    if need.apart:  # nothing else is there, and arms and settings may have shorter names
        changed = {key: value for key, value in changed.items() if key not in ("arms", "batches", "settings")}
    seeds = new_seeds(study, need)
    if need.apart or not need.first_look:
        changed["seeds"] = seeds
    elif options.seeds is not None:
        changed["seeds"] = [*options.seeds, *seeds]
    if not need.first_look:
        changed |= {"alpha": need.level} | _selection(study, need)
    words = {"study": name} | ({} if output_dir == "outputs" else {"output_dir": output_dir}) | changed
    return " ".join([command_name("report"), *(shlex.quote(f"{key}={as_text(value)}") for key, value in words.items())])


def _selection(study: Study, need: Need) -> dict[str, Any]:
    """Return what of arms=, batches= and settings= means the comparison in the study of the new runs."""
    if need.apart:
        bare = not any(" (" in arm for arm in need.selection.get("arms", ()))
        return {key: value for key, value in need.selection.items() if key == "batches" or (key == "arms" and bare)}
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


def lines(study: Study, found: Sequence[Need], options: Options, looks: int) -> Iterator[str]:
    """Yield what `report.py next` prints."""
    if not found:
        yield f"Study {study.name}: nothing is inconclusive, so nothing asks for more seeds."
        return
    alpha = exact(options.alpha / looks)
    yield (
        f"Study {study.name}: {count(len(found), 'inconclusive comparison')}. New seeds are to be judged by themselves,"
        f" each comparison at its share of {alpha} (alpha={exact(options.alpha)} over {count(looks, 'look')}): whatever"
        f" their number, and whatever was seen before, they make a false verdict in at most"
        f" {per_cent(options.alpha / looks)} % of studies in the table of differences, and in at most as many in that"
        f" of verdicts. Together with the old ones they would not (docs/statistics.md). Their chance to settle a"
        f" comparison is {per_cent(POWER)} %, if effect and standard deviation (sd) are as observed."
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
