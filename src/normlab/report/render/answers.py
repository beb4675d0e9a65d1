"""What a study says, in sentences: which arm is ahead where, by how much, whether that is more than chance."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from normlab.common.errors import count, listed, per_cent
from normlab.report.analysis.cells import p_text, with_interval
from normlab.report.analysis.frames import named_rows
from normlab.report.analysis.leaders import Leader, Rival
from normlab.report.analysis.metrics import Metric
from normlab.report.analysis.statistics import ENOUGH
from normlab.report.claims.judge import CONTRADICTED, INCONCLUSIVE, SUPPORTED, Judgement
from normlab.report.study.arms import in_order, natural, without_norm_batch
from normlab.report.study.load import Study
from normlab.runs.states import State

REAL, OPEN = "real", "not decided"
_NAMED = 4  # arms in a sentence
_FEW = 3  # conditions that a sentence names
_ENDED_BADLY = {State.DIVERGED, State.FAILED, State.LOST, State.UNREADABLE}
_HOPEFUL = {State.DONE, State.RUNNING}


class Answer(NamedTuple):
    """Who is ahead under one condition.

    Attributes:
        where: "batch 8", "resnet18, batch 8".
        verdict: `REAL` where its lead over every rival is more than chance, else `OPEN`.
        arm: the best one.
        value: its mean with its interval.
        lead: over the next arm, with interval, p-value and seeds.
        reasons: further sentences: arms that may be as good, arms that are behind, arms that diverged.
        cell: setting, arm and batch size of its runs.
        level: arms whose mean is the same.
    """

    where: str
    verdict: str
    arm: str
    value: str
    lead: str
    reasons: tuple[str, ...]
    cell: tuple[str, str, int]
    level: tuple[str, ...] = ()


class Answers(NamedTuple):
    """The sentences above everything else of a report: what came out, and one answer per condition."""

    headline: tuple[str, ...]
    state: str
    answers: tuple[Answer, ...]
    best: str


def answers(
    study: Study, found: Sequence[Leader], judgements: Sequence[Judgement], metric: Metric, levels: tuple[float, float]
) -> Answers:
    """Return the sentences of a study.

    Args:
        study: the study.
        found: the leader under each condition.
        judgements: the verdicts on claims.
        metric: that the leaders are compared by.
        levels: the confidence of the intervals, and the level that a p-value has to keep to.
    """
    best = f"{'highest' if metric.higher_is_better else 'lowest'} {metric.full_label}"
    each = tuple(
        _answer(leader, where, metric, levels) for leader, where in zip(found, _conditions(found), strict=True)
    )
    return Answers((*_headline(each, best, study), *_claims(judgements)), _state(study), each, best)


def _conditions(found: Sequence[Leader]) -> Iterator[str]:
    """Yield each leader's condition: the parts of its setting that differ, the batch size, the images of statistics."""
    parts = [leader.setting.split(", ") for leader in found]
    batches = {leader.batch for leader in found}
    for leader, own in zip(found, parts, strict=True):
        words = [part for part in own if not all(part in other for other in parts)]
        words += [f"batch {leader.batch}"] if len(batches) > 1 or (leader.norm_batch is None and not words) else []
        words += [f"statistics over {count(leader.norm_batch, 'image')}"] if leader.norm_batch is not None else []
        yield ", ".join(words)


def _answer(leader: Leader, where: str, metric: Metric, levels: tuple[float, float]) -> Answer:
    alpha = levels[1]
    nearest = leader.rivals[0]
    behind = [rival for rival in leader.rivals if rival.p_holm <= alpha and rival.lead.mean > 0 and not _level(rival)]
    level = [rival for rival in leader.rivals if rival not in behind]
    sentences = {
        "May be as good, as far as these seeds tell": [rival.arm for rival in level],
        "Behind by more than chance": [rival.arm for rival in behind],
        "Not compared, because runs diverged or lack a value": leader.out,
    }
    told = [
        f"{words}: {listed([_name(arm, leader) for arm in arms], _NAMED)}."
        for words, arms in sentences.items()
        if arms and (arms is leader.out or len(leader.rivals) > 1)
    ]
    if any(len(rival.seeds) < ENOUGH for rival in level):
        told.insert(0, f"Fewer than {ENOUGH} seeds cannot tell a difference from chance.")
    return Answer(
        where=where,
        verdict=OPEN if level else REAL,
        arm=_name(leader.arm, leader),
        value=with_interval(leader.mean, metric.decimals) + (f" {metric.unit}" if metric.unit else ""),
        lead=_lead(nearest, _name(nearest.arm, leader), metric, levels[0]),
        reasons=tuple(told),
        cell=(leader.setting, leader.arm, leader.batch),
        level=tuple(_name(rival.arm, leader) for rival in leader.rivals if _level(rival)),
    )


def _level(rival: Rival) -> bool:
    """Return whether nothing but rounding is between an arm and the leader, on the seeds that both have."""
    return abs(rival.lead.mean) < 1e-9


def _name(arm: str, leader: Leader) -> str:
    """Return the arm without the number of images that the condition names."""
    return arm if leader.norm_batch is None else without_norm_batch(arm)


def _lead(rival: Rival, name: str, metric: Metric, confidence: float) -> str:
    """Return what is between the leader and an arm, which may be ahead of it where it has other seeds, too."""
    mean, low, high, n = rival.lead
    if not n:
        return f"{name} is next, and has no seed in common with it"
    place = f"ahead of {name}"
    if mean < 0:
        mean, low, high = -mean, -high, -low
        place = f"behind {name} on the seeds that both have"
    size = max(abs(mean), 0 if math.isnan(low) else high - mean)
    shown = f".{metric.decimals + 1}f" if metric.decimals is not None else ".2f" if 1 <= size < 100 else ".3g"
    unit = " points" if metric.unit == "%" else ""
    text = f"{mean:{shown}}{unit} {place}" if not _level(rival) else f"level with {name}"
    if math.isnan(low):
        return f"{text} ({_seeds(rival.seeds)})"
    tested = "" if math.isnan(rival.p_holm) else f", p {p_text(rival.p_holm, '= ')}"
    return f"{text} ({per_cent(confidence)} % interval {low:{shown}} to {high:{shown}}{tested}; {_seeds(rival.seeds)})"


def _seeds(seeds: Sequence[int]) -> str:
    """Return `seed 0`, `seeds 0, 1, 2` or `seeds 0 to 9`."""
    if not seeds:
        return "no seed"
    if len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {listed(list(seeds), 8)}"


def _headline(each: Sequence[Answer], best: str, study: Study) -> Iterator[str]:
    """Yield one or two sentences on who is ahead."""
    if not each:
        lost = tuple(_lost(study))
        if not lost or (study.runs["state"] == State.DONE).any():
            finished = not study.finished.empty
            yield "No two arms have finished at the same batch size yet." if finished else "No run has finished yet."
        yield from lost
        return
    real = [answer for answer in each if answer.verdict == REAL]
    ahead = Counter(answer.arm for answer in real)
    for arm, number in ahead.most_common(_NAMED):
        where = "; ".join(answer.where for answer in real if answer.arm == arm)
        yield f"{arm} has the {best} at {where if number <= _FEW else f'{number} of {len(each)} conditions'}."
    if (more := len(ahead) - _NAMED) > 0:
        yield f"{count(more, 'more arm')} lead{'s' * (more == 1)} elsewhere."
    undecided = [answer for answer in each if answer.verdict == OPEN]
    if len(undecided) > _FEW:
        best_means = Counter(answer.arm for answer in undecided if not answer.level).most_common()
        numbers = [f"{arm} at {number}{'' if i else ' of them'}" for i, (arm, number) in enumerate(best_means)]
        level = sum(bool(answer.level) for answer in undecided)
        parts = [f"ahead: {listed(numbers, _NAMED)}"] if numbers else []
        told = "; ".join([*parts, *([f"level: the best arms at {level}"] if level else [])])
        which = f"At {len(undecided)} of {len(each)} conditions these seeds do not decide it"
        if not real:
            which = f"At none of {len(each)} conditions do these seeds decide which arm has the {best}"
        yield f"{which} ({told})."
    elif undecided:
        told = "; ".join(f"{answer.where} ({_ahead(answer)})" for answer in undecided)
        yield f"Not decided by these seeds: {told}."
    yield from _lost(study)


def _ahead(answer: Answer) -> str:
    if not answer.level:
        return f"{answer.arm} ahead"
    *others, last = answer.arm, *answer.level[: _NAMED - 1]
    more = len(answer.level) - _NAMED + 1
    return f"{', '.join(others)} and {last} level" if more < 1 else f"{count(len(answer.level) + 1, 'arm')} level"


def _lost(study: Study) -> Iterator[str]:
    """Yield a sentence on the conditions of which no run is done, and none is under way, because runs went wrong."""
    by_place: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for run in named_rows(study.placed):
        by_place[run.setting, int(run.batch)][str(run.state)] += 1
    partly = {place[0] for place, states in by_place.items() if not _is_lost(states)}
    lost: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for (setting, batch), states in by_place.items():
        if _is_lost(states):
            lost[(setting, f"batch {batch}") if setting in partly else (setting,)].update(states)
    settings = [setting.split(", ") for setting in dict.fromkeys(setting for setting, _ in by_place)]
    told = []
    for (setting, *batch_of), states in itertools.islice(lost.items(), _NAMED):
        parts = [part for part in setting.split(", ") if not all(part in other for other in settings)]
        where = ", ".join([*parts, *batch_of])
        told.append(f"{where and f' at {where}'}: {_went_wrong(states)}")
    more = [f" and {count(len(lost) - _NAMED, 'more condition')}"] if len(lost) > _NAMED else []
    if told:
        yield f"No run is done{';'.join([*told, *more])}."


def _is_lost(states: Counter[str]) -> bool:
    return bool(states.keys() & _ENDED_BADLY) and not states.keys() & _HOPEFUL


def _went_wrong(states: Counter[str]) -> str:
    if len(states) == 1:
        [(state, number)] = states.items()
        return f"all {number} {state}" if number > 1 else state
    return ", ".join(f"{number} {state}" for state, number in states.most_common())


def _claims(judgements: Sequence[Judgement]) -> Iterator[str]:
    tally = Counter(judgement.verdict for judgement in judgements)
    if judgements:
        words = [f"{tally[verdict]} {verdict}" for verdict in (SUPPORTED, CONTRADICTED, INCONCLUSIVE) if tally[verdict]]
        yield f"Papers' claims: {', '.join(words)}."


def _state(study: Study) -> str:
    """Return how many runs have finished, and of what: arms, batch sizes, seeds."""
    placed = study.placed
    arms, seeds = in_order(placed["arm"]), sorted({int(seed) for seed in placed["seed"]})
    batches = sorted({int(batch) for batch in placed["batch"]})
    settings = sorted(placed["setting"].unique(), key=natural)
    parts = [count(len(arms), "arm"), f"batch {listed(batches, 6)}", _seeds(seeds)]
    parts += [settings[0] if len(settings) == 1 else count(len(settings), "setting")] if settings else []
    parts += [study.tuning.sentence] if study.tuning else []
    return f"{len(study.finished)} of {count(len(study.runs), 'run')} finished: {'; '.join(parts)}."
