"""Choose, for each cell, the value of some settings with the best mean validation accuracy over seeds.

Test images have no part in it. What a reader must know of a choice is marked: the edge of a grid, ties within noise,
fewer values or seeds than other cells, divergence.
"""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from normlab.common.errors import UserError, count, listed
from normlab.common.installation import command_name
from normlab.report.analysis import statistics
from normlab.report.analysis.metrics import BEST, LEARNED, chance
from normlab.report.study.load import Study
from normlab.report.study.tuned import (
    Choice,
    Tried,
    Tuning,
    by_cell,
    chosen_study,
    tried_runs,
    tuned_settings,
    value_order,
    value_text,
)  # fmt: skip

VALIDATION = "val_accuracy"
_SENTENCES = {  # by the attribute of a choice that has the marks
    "edges": "the best value is at the edge of those that were tried, and a better one may lie beyond it",
    "ties": "other values are as good within the noise between seeds, so that little hangs on the choice",
    "fewer": "values or seeds had no part in a choice, or are fewer than in other cells",
    "losses": "runs diverged at some values",
    "none": "nothing is chosen, and no run is shown",
}
Value = TypeVar("Value", bound=Hashable)


class Best(NamedTuple):
    """The position of the best value, and of others that cannot be told from it.

    Attributes:
        chosen: position of the best value.
        ties: positions of the others that cannot be told from it.
        seeds: those that the choice is made on.
        compared: positions of the values that have all of these seeds.
    """

    chosen: int
    ties: list[int]
    seeds: list[int]
    compared: list[int]


def best_of(scores: Sequence[Mapping[int, float]], confidence: float = 0.95, lost: Collection[int] = ()) -> Best | None:
    """Choose the value with the best mean score over the same seeds: those that more than half of the values have.

    Runs that are added to one value do not change the choice. Values that lack one of these seeds are left out. Where
    that leaves no two values to compare, the seeds choose that most values share; of those that are shared by as many
    values, most seeds. Of equal means the middle one is chosen. A value is a tie where the interval of its paired
    differences to the chosen one holds 0, or where fewer than two pairs leave no interval.

    Args:
        scores: per value, in the order of the values, its score by seed.
        confidence: of the intervals.
        lost: positions of values at which all runs diverged, chosen only where there is no other.

    Returns:
        None where no value has a score, where no two share a seed, and where that leaves open which are compared.
    """
    seeds, compared = _on_common_seeds(scores)
    if not compared:
        return None
    scores = [{seed: each[seed] for seed in seeds} if i in compared else {} for i, each in enumerate(scores)]
    means = {i: math.fsum(scores[i].values()) / len(seeds) for i in compared}
    candidates = {i: mean for i, mean in means.items() if i not in lost} or means
    highest = max(candidates.values())
    equal = [i for i, mean in candidates.items() if math.isclose(mean, highest, rel_tol=1e-12)]
    chosen = equal[(len(equal) - 1) // 2]
    ties = []
    for i in means:
        interval = statistics.t_interval(statistics.paired(scores[chosen], scores[i]), confidence)
        if i != chosen and not interval.low > 0:
            ties.append(i)
    return Best(chosen, ties, seeds, compared)


def _on_common_seeds(scores: Sequence[Mapping[int, float]]) -> tuple[list[int], list[int]]:
    """Return the seeds that a choice is made on, and the positions of the values that have all of them."""
    tried = [i for i, each in enumerate(scores) if each]
    having = {seed: tuple(i for i in tried if seed in scores[i]) for seed in sorted(set().union(*scores))}
    seeds = [seed for seed, values in having.items() if len(values) > len(tried) / 2]
    compared = [i for i in tried if seeds and scores[i].keys() >= set(seeds)]
    if len(compared) > 1 or len(tried) < 2:
        return seeds, compared
    shared = Counter(values for values in having.values() if len(values) > 1)
    sizes = {values: (len(values), number) for values, number in shared.items()}
    best = [values for values, size in sizes.items() if size == max(sizes.values())]
    if len(best) != 1:
        return [], []
    return [seed for seed, values in having.items() if values == best[0]], list(best[0])


def tune(
    study: Study, whole: Study, given: str | Sequence[str] | None, value: str = "final", confidence: float = 0.95
) -> Study:
    """Return the study of the runs at each cell's best value; the same study where nothing is to be tuned.

    Args:
        study: the runs to choose among.
        whole: the study that they were selected from.
        given: the settings; None: those that the runs themselves name.
        value: `final`: by the validation accuracy after the last epoch; `best`: by the highest.
        confidence: of the intervals that tell ties.

    Raises:
        UserError: for settings that cannot be tuned, for a choice without validation images, and where in no cell two
            values share the seeds that a choice needs.
    """
    settings = tuned_settings(study, given)
    if not settings:
        return study
    tried = tried_runs(study, whole, settings)
    scores = _scores(study, tried, value)
    _require_validation(tried, scores, settings, whole.name)
    choices, kept, evaluated = [], set[str](), set(study.evaluations["run"])
    for cell, of_values in by_cell(tried):
        choice = _choice(cell, [_tried(values, rows, scores) for values, rows in of_values.items()], confidence)
        choices.append(choice)
        if not choice.none:
            kept |= set((choice.chosen or _furthest(choice, evaluated)).runs.values())
    if choices and not kept:
        first = choices[0]
        raise UserError(
            f"tuned={_as_option(settings)}: nothing can be chosen in {whole.name}. {first.name}: {first.none[0]}.\n"
            "Train the values with the same seeds.\nTo report the runs as they are: tuned=[]"
        )
    marked = list(_marked(choices, settings))
    return chosen_study(Tuning(settings, marked, study), tried, kept, whole)


def _choice(cell: tuple[str, str, int], every: Sequence[Tried], confidence: float) -> Choice:
    """Return what is chosen in a cell, with the marks that it has by itself."""
    lost = [i for i, each in enumerate(every) if each.diverged == len(each.runs)]
    found = best_of([each.scores for each in every], confidence, lost)
    if found is None:
        finished = any(each.scores for each in every)
        none = [f"no seeds say which values to compare ({_seeds_of(every)})"] if finished else []
        return Choice(*cell, every, every[0] if len(every) == 1 else None, none=none)
    ties = [every[i].text for i in found.ties]
    tied = [f"not told from {listed(ties, 4)}"] if ties else []
    return Choice(*cell, every, every[found.chosen], tied, fewer=list(_left_out(every, found)), seeds=found.seeds)


def _furthest(choice: Choice, evaluated: set[str]) -> Tried:
    """Return the value that is shown while none has finished: the first with an evaluation, else the first of all."""
    return next((each for each in choice.tried if not evaluated.isdisjoint(each.runs.values())), choice.tried[0])


def _seeds_of(every: Sequence[Tried]) -> str:
    having = [f"{each.text}: {listed(list(each.scores), 3)}" for each in every if each.scores]
    return listed(having, 3, "; ")


def _left_out(every: Sequence[Tried], found: Best) -> Iterator[str]:
    """Yield which values and which seeds had no part in a choice, in words."""
    untried, unfinished = list[str](), list[str]()
    for each in (each for i, each in enumerate(every) if i not in found.compared):
        lacking = Counter(each.states[seed] for seed in found.seeds if seed in each.states.keys() - each.scores.keys())
        if lacking:
            states = ", ".join(f"{number} {state}" for state, number in lacking.items())
            unfinished.append(f"{each.text} ({states})")
        else:
            untried.append(each.text)
    if untried:
        yield f"not tried with these seeds, and not chosen from: {listed(untried, 4)}"
    if unfinished:
        yield f"not finished with these seeds, and not chosen from: {listed(unfinished, 4)}"
    if any(every[i].scores.keys() - set(found.seeds) for i in found.compared):
        number = len(found.compared)
        which = "all values have" if number == len(every) else f"{number} of {len(every)} values have"
        yield f"chosen on the seeds {listed(found.seeds, 6)}, which {which}"


def _tried(values: Any, rows: pd.DataFrame, scores: Mapping[str, float]) -> Tried:
    runs = {int(seed): str(run) for seed, run in zip(rows["seed"], rows["run"], strict=True)}
    found = {seed: scores[run] for seed, run in sorted(runs.items()) if run in scores}
    return Tried(values, runs, found, dict(zip(runs, map(str, rows["state"]), strict=True)))


def _scores(study: Study, tried: pd.DataFrame, value: str) -> dict[str, float]:
    """Return the validation accuracy in per cent of each finished run that has one: chance if it diverged."""
    scores = {}
    if VALIDATION in study.evaluations:
        of_runs = study.evaluations.groupby("run", sort=False)[VALIDATION]
        read = (of_runs.max() if value == BEST else of_runs.last(skipna=False)).dropna()
        scores = {str(run): 100 * float(score) for run, score in read.items()}
    states = dict(zip(tried["run"], tried["state"], strict=True))
    lost = tried[tried["state"] == "diverged"]
    return {run: score for run, score in scores.items() if states.get(run) == "done"} | _guesses(study, lost)


def _guesses(study: Study, lost: pd.DataFrame) -> dict[str, float]:
    """Return the accuracy of guessing in per cent, by run."""
    return {str(row["run"]): chance(study.configs[row["run"]], row["classes"]) for row in lost.to_dict("records")}


def _require_validation(tried: pd.DataFrame, scores: Mapping[str, float], settings: Sequence[str], name: str) -> None:
    """Refuse to choose between runs without validation images."""
    several = tried.groupby(["setting", "arm", "batch"])["values"].transform("nunique") > 1
    lacking = [run for run in tried[several & tried["state"].eq("done")]["run"] if run not in scores]
    if lacking:
        raise UserError(
            f"tuned={_as_option(settings)} is chosen on validation images, and {count(len(lacking), 'run')} of {name}"
            f" have none ({listed(lacking, 1)}): test images must not choose what is compared on them.\n"
            f"Train with some: {command_name('train')} -m +tuning=lr ..., or dataset.val_size=300 ...\n"
            "To report the runs as they are: tuned=[]"
        )


def _as_option(settings: Sequence[str]) -> str:
    return settings[0] if len(settings) == 1 else f"[{','.join(settings)}]"


# ---- what is to be known of a choice


def _marked(choices: Sequence[Choice], settings: Sequence[str]) -> Iterator[Choice]:
    most_values = max((len(choice.tried) for choice in choices), default=0)
    most_seeds = max((len(choice.seeds) for choice in choices), default=0)
    for choice in choices:
        fewer = [f"{len(choice.tried)} of {most_values} values"] if len(choice.tried) < most_values else []
        if choice.seeds and len(choice.seeds) < most_seeds:
            fewer.append(f"{len(choice.seeds)} of {most_seeds} seeds")
        lost = [f"{each.text} ({each.diverged} of {len(each.runs)})" for each in choice.tried if each.diverged]
        yield replace(
            choice,
            edges=list(_edges(choice, settings)),
            fewer=[*fewer, *choice.fewer],
            losses=[f"diverged at {listed(lost, 4)}"] if lost else [],
        )


def _edges(choice: Choice, settings: Sequence[str]) -> Iterator[str]:
    """Yield the settings whose chosen value is the least or the largest number tried; 0 has nothing below it."""
    for position, name in enumerate(settings):
        values = {each.values[position] for each in choice.tried}
        numbers = sorted(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
        if choice.chosen is None or len(numbers) < 2 or len(numbers) < len(values):
            continue
        own = choice.chosen.values[position]
        if own == numbers[-1] or (own == numbers[0] and own != 0):
            end = "largest" if own == numbers[-1] else "smallest"
            yield f"edge: {value_text(own)} is the {end} {name} tried"


def tuning_warnings(study: Study) -> Iterator[str]:
    """Yield how the runs were chosen, and a sentence for each kind of mark with the cells that have it."""
    tuning = study.tuning
    if tuning is None:
        return
    if tuning.chooses:
        shown, tried = (len(set(each.placed["run"]) - {""}) for each in (study, tuning.study))
        yield f"Tuned: {tuning.sentence}, and never on test images; {shown} of {count(tried, 'run')} are shown."
    else:
        yield f"No cell has more than one value of {' and '.join(tuning.settings)}, so nothing was chosen."
    for kind, sentence in _SENTENCES.items():
        having = [choice for choice in tuning.choices if getattr(choice, kind)]
        if having:
            first = having[0]
            others = f" and {count(len(having) - 1, 'more cell')}" if len(having) > 1 else ""
            yield f"Tuned settings: {sentence}: {first.name}: {'; '.join(getattr(first, kind))}{others}."


# ---- the range of learning rates

RATE = "optimizer.lr"
FEWEST_RATES = 3


def rate_curves(study: Study) -> dict[str, pd.DataFrame]:
    """Return the test accuracy against the learning rate of each seed of each cell whose rates were tried.

    By the name of the chosen run of that seed: rows in the order of the rates, with the columns lr and accuracy (per
    cent, chance where a run diverged). Other tuned settings have their chosen value. Left out are seeds that lack a
    rate, seeds that learned at none (`LEARNED`), and cells with fewer than `FEWEST_RATES` rates.
    """
    tuning = study.tuning
    if tuning is None or RATE not in tuning.settings or "test_accuracy" not in tuning.study.evaluations:
        return {}
    accuracies = final_values(tuning.study, "test_accuracy")
    guesses = _guesses(tuning.study, tuning.study.runs[tuning.study.runs["run"].isin(accuracies)])
    position, curves = list(tuning.settings).index(RATE), {}
    for choice in tuning.choices:
        along = along_setting(choice, position)
        if choice.chosen is None or len(along) < FEWEST_RATES:
            continue
        for seed, name in choice.chosen.runs.items():
            points = [(each.values[position], accuracies.get(each.runs.get(seed, ""), math.nan)) for each in along]
            known = not any(math.isnan(accuracy) for _, accuracy in points)
            if known and max(accuracy for _, accuracy in points) >= guesses[name] + LEARNED:
                curves[name] = pd.DataFrame(points, columns=["lr", "accuracy"]).astype(float)
    return curves


def along_setting(choice: Choice, position: int) -> list[Tried]:
    """Return what was tried of one tuned setting at the chosen values of the others."""
    if choice.chosen is None:
        return list(choice.tried)
    own = choice.chosen.values

    def others(values: Any) -> Any:
        return (*values[:position], *values[position + 1 :])

    along = [each for each in choice.tried if others(each.values) == others(own)]
    return sorted(along, key=lambda each: value_order((each.values[position],)))


def final_values(study: Study, column: str) -> dict[str, float]:
    """Return the last value of each finished run in per cent; chance for one that diverged."""
    states = dict(zip(study.runs["run"], study.runs["state"], strict=True))
    last = study.evaluations.groupby("run", sort=False)[column].last(skipna=False)
    values = {str(run): 100 * float(value) for run, value in last.items() if states.get(run) == "done"}
    return values | _guesses(study, study.runs[study.runs["state"] == "diverged"])
