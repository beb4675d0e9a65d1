"""What a study says, in sentences: which arm is ahead where, by how much, whether that is more than chance."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from normlab.common.errors import count, listed, per_cent
from normlab.report.analysis.cells import p_text, with_interval
from normlab.report.analysis.frames import named_rows
from normlab.report.analysis.leaders import Leader, Out, Rival
from normlab.report.analysis.metrics import Metric
from normlab.report.analysis.statistics import ENOUGH, Interval
from normlab.report.claims.judge import VERDICTS, Judgement
from normlab.report.study.arms import in_order, natural, without_norm_batch
from normlab.report.study.load import Study
from normlab.runs.states import State

REAL, PARTLY, OPEN = "real", "real among those compared", "not decided"
_NAMED = 4  # arms in a sentence
_FEW = 3  # conditions that a sentence names
_ENDED_BADLY = {State.DIVERGED, State.FAILED, State.LOST, State.UNREADABLE}
_HOPEFUL = {State.DONE, State.RUNNING}
_UNDER_WAY = {State.RUNNING, State.INTERRUPTED, State.MISSING}  # of runs that have a folder


class Answer(NamedTuple):
    """Who is ahead under one condition.

    Attributes:
        where: "batch 8", "resnet18, batch 8".
        verdict: `REAL` where its lead over every rival is more than chance, `PARTLY` where other arms are left out
            because runs went wrong, else `OPEN`.
        arm: the best one.
        value: its mean with its interval.
        lead: over the next arm, with interval, p-value and seeds.
        reasons: further sentences: arms that may be as good, arms that are behind.
        others: sentences about the arms that it is not compared with.
        cell: setting, arm and batch size of its runs.
        level: arms whose mean is the same.
        among: " of the arms compared" where others are left out because runs went wrong, else "".
    """

    where: str
    verdict: str
    arm: str
    value: str
    lead: str
    reasons: tuple[str, ...]
    others: tuple[str, ...]
    cell: tuple[str, str, int]
    level: tuple[str, ...] = ()
    among: str = ""


class Answers(NamedTuple):
    """The sentences above everything else of a report: what came out, and one answer per condition with a contest."""

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
        found: the leader under each condition, also where it has no rival.
        judgements: the verdicts on claims.
        metric: that the leaders are compared by.
        levels: the confidence of the intervals, and the level that a p-value has to keep to.
    """
    best = f"{'highest' if metric.higher_is_better else 'lowest'} {metric.full_label}"
    places = list(zip(found, _conditions(found), strict=True))
    each = tuple(_answer(leader, where, metric, levels) for leader, where in places if leader.rivals)
    said = [*_headline(each, best), *_beside(places, metric, study), *_lost(study)]
    return Answers((*(said or ["No run has finished yet."]), *_claims(judgements)), _state(study), each, best)


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
    }
    told = [
        f"{words}: {listed([_name(arm, leader) for arm in arms], _NAMED)}."
        for words, arms in sentences.items()
        if arms and len(leader.rivals) > 1
    ]
    left_out, lacking = _left_out(leader, metric), _lacking(leader)
    if any(len(rival.seeds) < ENOUGH for rival in level):
        told.insert(0, f"Fewer than {ENOUGH} seeds cannot tell a difference from chance.")
    return Answer(
        where=where,
        verdict=OPEN if level else PARTLY if left_out else REAL,
        arm=_name(leader.arm, leader),
        value=_value(leader.mean, metric),
        lead=_lead(nearest, _name(nearest.arm, leader), metric, levels[0]),
        reasons=tuple(told),
        others=(
            *([f"Not compared: {listed(left_out, _NAMED)}."] if left_out else []),
            *(f"{_who(arms)} no {what}." for what, arms in lacking.items()),
        ),
        cell=(leader.setting, leader.arm, leader.batch),
        level=tuple(_name(rival.arm, leader) for rival in leader.rivals if _level(rival)),
        among=" of the arms compared" if left_out else "",
    )


def _value(mean: Interval, metric: Metric) -> str:
    return with_interval(mean, metric.decimals) + (f" {metric.unit}" if metric.unit else "")


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


def _headline(each: Sequence[Answer], best: str) -> Iterator[str]:
    """Yield one or two sentences on who is ahead."""
    real = [answer for answer in each if answer.verdict != OPEN]
    ahead = Counter((answer.arm, answer.among) for answer in real)
    for (arm, among), number in ahead.most_common(_NAMED):
        where = "; ".join(answer.where for answer in real if (answer.arm, answer.among) == (arm, among))
        yield f"{arm} has the {best}{among} at {where if number <= _FEW else f'{number} of {len(each)} conditions'}."
    if (more := len({arm for arm, _ in ahead} - {arm for (arm, _), _ in ahead.most_common(_NAMED)})) > 0:
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


def _ahead(answer: Answer) -> str:
    if not answer.level:
        return f"{answer.arm} ahead{answer.among}"
    *others, last = answer.arm, *answer.level[: _NAMED - 1]
    more = len(answer.level) - _NAMED + 1
    return f"{', '.join(others)} and {last} level" if more < 1 else f"{count(len(answer.level) + 1, 'arm')} level"


def _beside(places: Sequence[tuple[Leader, str]], metric: Metric, study: Study) -> Iterator[str]:
    """Yield sentences on what no answer compares: arms that are left out, arms without runs, conditions of one arm."""
    compared = [(leader, where) for leader, where in places if leader.rivals]
    left_out = {where: told for leader, where in compared if (told := _left_out(leader, metric))}
    if left_out:
        shown = [f"at {where}: {listed(told, _NAMED)}" for where, told in itertools.islice(left_out.items(), _FEW)]
        if more := len(left_out) - len(shown):
            shown.append(f"arms at {count(more, 'more condition')}")
        yield f"Not compared {'; '.join(shown)}."
    lacking: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for leader, where in compared:
        for what, arms in _lacking(leader).items():
            lacking[what, arms].append(where)
    if len(compared) <= _FEW:
        yield from (f"{_who(arms)} no {what} at {'; '.join(wheres)}." for (what, arms), wheres in lacking.items())
    elif lacking:
        some = in_order(arm for _, arms in lacking for arm in arms)
        yield f"{_who(some)} no finished run at some of these conditions."
    if not compared and study.placed["arm"].nunique() == 1:
        yield from _of_one_arm(places, metric)
    else:
        yield from _alone([(leader, where) for leader, where in places if not leader.rivals], metric, study)


def _of_one_arm(places: Sequence[tuple[Leader, str]], metric: Metric) -> Iterator[str]:
    """Yield a sentence on what the only arm reached."""
    told = []
    for leader, where in places:
        if leader.arm:
            told.append(f"{_value(leader.mean, metric)} at {where}")
        told += [f"{_value(out.mean, metric)} at {where} ({_wrong(out)})" for out in leader.out if out.mean.n]
    if told:
        [arm] = dict.fromkeys(leader.arm or leader.out[0].arm for leader, _ in places)
        label = metric.full_label
        yield f"{label[0].upper()}{label[1:]} of {arm}: {listed(told, _NAMED, '; ')}."


def _alone(places: Sequence[tuple[Leader, str]], metric: Metric, study: Study) -> Iterator[str]:
    """Yield sentences on the conditions under which fewer than two arms compete, but for those that `_lost` names."""
    told = []
    for leader, where in places:
        states = sum((Counter(out.states) for out in leader.out), Counter[str]())
        left_out = _left_out(leader, metric)
        if not leader.arm and (_is_lost(states) or not left_out):
            continue
        reached = [f"{_name(leader.arm, leader)} reached {_value(leader.mean, metric)}"] if leader.arm else []
        others = [f"{_who(arms)} no {what}" for what, arms in _lacking(leader).items()]
        told.append(f"{where}: {'; '.join([*reached, *left_out[:_NAMED], *others])}")
    yet = " yet" if set(study.runs["state"][study.runs["run"] != ""]) & _UNDER_WAY else ""
    if (more := len(told) - _FEW) > 0:
        told[_FEW:] = [count(more, "more condition")]
    yield from (f"No two arms can be compared{yet} at {each}." for each in told)


def _left_out(leader: Leader, metric: Metric) -> list[str]:
    """Return the arms that do not compete because runs went wrong, each with why, and with what its others reached."""
    told = []
    for out in leader.out:
        if wrong := _wrong(out):
            whose = "the one that is done" if out.mean.n == 1 else f"the {out.mean.n} that are done"
            reached = f"; {whose} reached {_value(out.mean, metric)}" if out.mean.n else ""
            told.append(f"{_name(out.arm, leader)} ({wrong}{reached})")
    return told


def _wrong(out: Out) -> str:
    """Return what is wrong with an arm's runs: `1 of 5 runs diverged`; "" if none is done yet, and nothing is."""
    number = sum(out.states.values())
    wrong = [(str(state), here) for state, here in out.states.items() if state in _ENDED_BADLY]
    if lacking := out.states.get(State.DONE, 0) - out.mean.n:
        wrong.append(("without a value", lacking))
    if not wrong:
        return ""
    (state, first), *others = wrong
    whose = f"{first} of {number} runs" if first < number else f"all {number} runs" if number > 1 else "its run"
    return ", ".join([f"{whose} {state}", *(f"{here} {state}" for state, here in others)])


def _lacking(leader: Leader) -> dict[str, tuple[str, ...]]:
    """Return the arms that have no run under a condition, and those of which none is done and nothing went wrong."""
    unfinished = tuple(_name(out.arm, leader) for out in leader.out if not _wrong(out))
    return {what: arms for what, arms in (("run", leader.absent), ("finished run", unfinished)) if arms}


def _who(arms: Sequence[str]) -> str:
    """Return `gn has`, `bn and gn have`."""
    if len(arms) > _NAMED:
        return f"{listed(arms, _NAMED - 1)} have"
    *first, last = arms
    return f"{', '.join(first)} and {last} have" if first else f"{last} has"


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
        words = [f"{tally[verdict]} {verdict}" for verdict in VERDICTS if tally[verdict]]
        yield f"Papers' claims: {', '.join(words)}."


def _state(study: Study) -> str:
    """Return how many runs there are, to be read after how many are in which state, and of what."""
    placed = study.placed
    arms, seeds = in_order(placed["arm"]), sorted({int(seed) for seed in placed["seed"]})
    batches = sorted({int(batch) for batch in placed["batch"]})
    settings = sorted(placed["setting"].unique(), key=natural)
    parts = [count(len(arms), "arm"), f"batch {listed(batches, 6)}", _seeds(seeds)]
    parts += [settings[0] if len(settings) == 1 else count(len(settings), "setting")] if settings else []
    parts += [study.tuning.sentence] if study.tuning else []
    return f"{count(sum(study.states().values()), 'run')}: {'; '.join(parts)}."
