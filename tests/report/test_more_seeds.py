"""What it would take to settle a comparison, where the answer is known."""

import dataclasses
import math
import shlex

import numpy as np
import pytest
from planted import Planted, planted
from scipy import stats

from normlab import report
from normlab.report.analysis.metrics import ACCURACY, RATES
from normlab.report.analysis.tuning import tune
from normlab.report.claims.judge import judge
from normlab.report.more_seeds import (
    Need,
    _of_verdicts,
    lines,
    needs,
    new_seeds,
    nothing_asked,
    report_command,
    seeds_table,
)
from normlab.report.tables import chosen_runs

BN = (50.0, 50.6, 49.1, 50.2, 51.0)


@pytest.fixture
def study(add_run, tmp_path):
    """Write arms minus bn, per seed, at one batch size, and read them; `states` of the first arm's runs."""

    def write(differences, states=(), **arms):
        for seed, value in enumerate(BN):
            add_run("bn", seed=seed, accuracies=(0.1, 0.99, value / 100))
        for arm, minus in {"none": differences, **arms}.items():
            for seed, difference in enumerate(minus):
                state = states[seed] if arm == "none" and states else "done"
                add_run(arm, seed=seed, accuracies=(0.1, 0.99, (BN[seed] + difference) / 100), state=state)
        return report.load("study", tmp_path / "outputs")

    return write


def found(study, looks=2) -> list[Need]:
    return needs(study, ACCURACY, report.options(), [], looks)


def least(effects, level):
    """The least number of seeds by another way: scipy's distribution, one number after the other."""
    for n in range(3, 101):
        bound = stats.t.ppf(1 - level / 2, n - 1)
        if sum(stats.nct.cdf(bound, n - 1, effect * math.sqrt(n)) for effect in effects) <= 0.2:
            return n
    return None


@pytest.mark.parametrize("looks", [1, 2, 5])
def test_the_number_is_that_of_the_observed_effect_at_the_level_of_holm_and_of_the_looks(study, looks) -> None:
    one, two = [2.0, -1.0, 3.0, 0.5, 1.0], [0.4, -1.0, 2.0, 1.0, 0.1]
    for need, minus in zip(found(study(one, ln=two), looks=looks), (one, two), strict=True):
        level = 0.05 / looks / 2
        assert level * 0.9 < need.level <= level  # two digits of it
        effect = np.mean(minus) / np.std(minus, ddof=1)
        assert need.seeds == least([effect], need.level)
        assert need.at_margin == least([1 / np.std(minus, ddof=1)], need.level)


def test_settled_comparisons_need_nothing_and_take_no_part_in_the_level(study) -> None:
    [need] = found(study([9.0, 9.5, 9.2, 9.9, 9.1], ln=[2.0, -1.0, 3.0, 0.5, 1.0]))
    assert need.what.startswith("ln - bn, batch 8")
    assert need.level == 0.025


def test_arms_that_are_alike_are_said_to_be_and_come_last(study) -> None:
    near = [0.3, -0.3, 0.31, -0.31, 0.01]
    first, last = found(study(near, ln=[2.0, -1.0, 3.0, 0.5, 1.0]))
    assert first.what.startswith("ln")
    half = stats.t.ppf(0.975, 4) * stats.sem(near)
    assert last.note == f"more than 100 seeds: these arms are alike to within {np.mean(near) + half:.2g} points"
    assert not last.settles
    assert last.at_margin == least([1 / np.std(near, ddof=1)], last.level)


@pytest.mark.parametrize("seeds", [1, 2])
def test_of_fewer_than_three_seeds_the_first_look_is_asked_for(study, seeds) -> None:
    rest = found(study([2.0, -1.0, 3.0][:seeds], ln=[2.0, -1.0, 3.0, 0.5, 1.0]))
    assert (rest[-1].seeds, rest[-1].note) == (3 - seeds, f"n = {seeds}: the first test needs 3 seeds")


def test_what_more_seeds_cannot_settle(study) -> None:
    [need] = found(study([2.0, -1.0, 3.0, 0.5, 1.0], states=["diverged", *["done"] * 4]))
    assert (need.seeds, need.settles, need.note) == (None, False, "more seeds do not settle it: some pairs diverged")


def test_differences_of_zero_are_not_planned_for(study) -> None:
    [need] = found(study([0.0] * 5))
    assert (need.seeds, need.settles) == (None, False)


def test_differences_that_are_all_the_same_are_planned_for_by_the_sign_test(study) -> None:
    [need] = found(study([0.5] * 5))
    assert need.seeds == 7  # 2 / 2^7 = 0.016 is the first below 0.025
    assert 2 / 2**need.seeds <= need.level < 2 / 2 ** (need.seeds - 1)


def test_verdicts_are_planned_for_by_the_margins_of_their_claims() -> None:
    minus = [1.5, -2.6, 1.9, -0.4, -1.1]
    runs = [
        Planted({"norm.name": arm}, seed, {"test_accuracy": BN[seed] + difference})
        for arm, minus in (("bn", [0.0] * 5), *((arm, minus) for arm in ("renorm", "lp1", "lp2", "lpinf")))
        for seed, difference in enumerate(minus)
    ]
    judgements = judge(planted(runs))
    wanted = list(_of_verdicts(planted(runs), report.options(), judgements, 2))
    assert {need.comparison.expect for need in wanted} == {"greater", "equal"}
    for need in wanted:
        comparison, deviation, mean = need.comparison, np.std(minus, ddof=1), float(np.mean(need.differences))
        if comparison.expect == "equal":
            off = abs(mean - comparison.reference)
            assert need.at_margin == least([comparison.margin / deviation] * 2, need.level)
            assert need.seeds == least([(comparison.margin + sign * off) / deviation for sign in (-1, 1)], need.level)
        elif comparison.tolerates_equality:
            assert need.at_margin == least([abs(comparison.reference) / deviation], need.level)
            assert need.seeds == least([abs(mean - comparison.reference) / deviation], need.level)


def test_arms_of_a_claim_that_are_nearly_alike_are_planned_to_be_called_equal_where_that_takes_fewer_seeds() -> None:
    minus = [0.75, -0.9, 1.05, -0.6, 0.15]
    runs = [
        Planted({"norm.name": arm}, seed, {"test_accuracy": BN[seed] + difference})
        for arm, minus in (("bn", [0.0] * 5), ("none", minus))
        for seed, difference in enumerate(minus)
    ]
    judgements = judge(planted(runs))
    [need] = _of_verdicts(planted(runs), report.options(), judgements, 2)
    deviation, mean = np.std(minus, ddof=1), abs(np.mean(minus))
    assert need.seeds == least([(1 - mean) / deviation, (1 + mean) / deviation], need.level)
    assert need.note == "to call them equal, within 1 point"


def test_arms_that_have_learned_nothing_are_not_planned_to_be_called_equal() -> None:
    """As no number of seeds lets a report call them so."""
    at_chance = {"bn": [10.0, 10.2, 9.9, 10.1, 10.0], "none": [10.1, 10.1, 10.0, 10.0, 9.9]}
    runs = [
        Planted({"norm.name": arm}, seed, {"test_accuracy": value})
        for arm, values in at_chance.items()
        for seed, value in enumerate(values)
    ]
    [need] = _of_verdicts(planted(runs), report.options(), judge(planted(runs)), 2)
    assert "equal" not in need.note


def test_new_seeds_are_new_and_what_cannot_be_trained_has_no_command(study) -> None:
    here = study([2.0, -1.0, 3.0, 0.5, 1.0])
    [need] = found(here)
    assert new_seeds(here, need) == list(range(5, 5 + need.seeds))
    text = "\n".join(lines(here, [need], report.options(), 2))
    assert "No command" in text  # its settings are not all there
    table = seeds_table(here, [need], report.options())
    assert table.tidy["new_seeds"].tolist() == [need.seeds]
    assert seeds_table(here, [], report.options()) is None


def judged_by(study, need, **options):
    words = shlex.split(report_command(study, need, report.options(**options)))
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_a_difference_is_judged_alone_and_its_new_seeds_by_themselves(study) -> None:
    here = study([2.0, -1.0, 3.0, 0.5, 1.0], ln=[0.4, -1.0, 2.0, 1.0, 0.1])
    need = found(here)[0]
    words = judged_by(here, need)
    assert (words["arms"], words["batches"], words["alpha"]) == (f"[{need.what.split()[0]},bn]", "[8]", "0.012")
    assert words["seeds"] == f"[{','.join(map(str, new_seeds(here, need)))}]"


@pytest.mark.parametrize("selected", [None, [0, 1]])
def test_a_first_look_is_at_all_seeds_that_were_selected_and_the_new_ones(study, selected) -> None:
    whole = study([2.0, -1.0], ln=[1.0, 2.0])
    options = report.options(seeds=selected)
    first, second = needs(chosen_runs(whole, options), ACCURACY, options, [])
    words = judged_by(whole, first, seeds=selected)
    assert (first.seeds, words.get("seeds")) == (1, "[0,1,5]" if selected else None)
    assert "arms" not in words  # all are looked at, with one correction
    assert second.first_look


def test_new_runs_of_a_packed_study_are_judged_without_the_old_ones(study, tmp_path) -> None:
    here = study([2.0, -1.0])
    packed = dataclasses.replace(here, folder=tmp_path / "study.normlab.zip")
    [need] = needs(packed, ACCURACY, report.options(), [])
    assert (need.seeds, new_seeds(packed, need)) == (3, [5, 6, 7])
    words = judged_by(packed, need)
    assert (words["study"], words["seeds"]) == ("study_more", "[5,6,7]")


def test_a_cell_of_which_no_run_is_done_gets_no_command(study) -> None:
    [need] = found(study([2.0, -1.0], states=["failed", "failed"]))
    assert (need.settles, need.note) == (False, "no run has finished there")


def test_an_arm_all_of_whose_runs_diverged_is_said_to_have(study) -> None:
    [need] = found(study([2.0, -1.0], states=["diverged", "diverged"]))
    assert (need.settles, need.note) == (False, "more seeds do not settle it: all runs diverged there")


def test_a_claim_of_which_a_comparison_is_not_run_is_not_worth_seeds_that_would_not_settle_it() -> None:
    ours = "wu2018-bn-falls"
    needed = {}
    for sign in (1, -1):
        minus = [1.5, -0.6, 1.9, 0.4, 1.1]
        runs = [
            Planted({"norm.name": "bn", "norm_batch": size}, seed, {"test_accuracy": BN[seed] + more})
            for size, added in ((2, [0.0] * 5), (16, minus))
            for seed, more in enumerate(sign * value for value in added)
        ]
        judgements = [each for each in judge(planted(runs)) if each.claim.id == ours]
        [needed[sign]] = _of_verdicts(planted(runs), report.options(), judgements, 2)
    assert not needed[1].settles
    assert needed[1].note.startswith("more seeds do not settle it: the claim needs what was not run, too: bn (")
    assert needed[1].note.endswith("(the study has no gn)")
    assert needed[-1].settles  # they can contradict it


def test_runs_that_were_carried_out_elsewhere_are_no_more_to_train(study, add_run) -> None:
    add_run("none", seed=5, tuned=[], device="cuda")
    add_run("bn", seed=5, tuned=["norm.eps"], threads=2)
    [need] = found(study([2.0, -1.0, 3.0, 0.5, 1.0]))
    assert [config["norm"]["name"] for config in need.configs] == ["bn", "none"]


def test_new_seeds_of_a_tuned_study_are_judged_as_tuned(add_run, tmp_path) -> None:
    for arm, rate in (("bn", 0.1), ("none", 0.01)):
        for seed, minus in enumerate([0.02, -0.01, 0.03, 0.005]):
            accuracies = (0.1, 0.99, 0.5 + minus * (arm == "none"))
            add_run(arm, seed=seed, accuracies=accuracies, optimizer__lr=rate, tuned=["optimizer.lr"])
    whole = report.load("study", tmp_path / "outputs")
    [need] = found(chosen_runs(whole, report.options()))
    words = judged_by(whole, need)
    assert (words["tuned"], words["arms"]) == ("[optimizer.lr]", "[none,bn]")
    assert words["study"] == "study"  # nothing is chosen that new runs could change


def in_full(study):
    """A planted study with the columns of one that was loaded, and its test accuracy on validation images, too."""
    places = study.runs[["run", "setting", "arm", "batch", "seed", "state"]]
    unknown = dict.fromkeys(("wall_seconds", "peak_memory_bytes", "parameters"), math.nan)
    rows = study.evaluations.merge(places, on="run").assign(val_accuracy=study.evaluations["test_accuracy"])
    return dataclasses.replace(study, runs=study.runs.assign(**unknown), evaluations=rows)


def tuned_study(differs):
    """A study of two arms at three learning rates, of which 0.01 is best, with none behind bn by `differs`."""
    runs = [
        Planted({"norm.name": arm, "optimizer.lr": rate}, seed, {"test_accuracy": 90.0 - lost - minus})
        for arm in ("bn", "none")
        for rate, lost in ((0.001, 20.0), (0.01, 0.0), (0.1, 2.0))
        for seed, minus in enumerate(differs if arm == "none" else [0.0] * len(differs))
    ]
    tried = in_full(planted(runs))
    return tried, tune(tried, tried, "optimizer.lr")


def test_new_seeds_of_a_study_with_a_choice_go_to_one_of_their_own_where_nothing_is_chosen_anew() -> None:
    tried, best = tuned_study([2.0, -1.0, 3.0, 0.5])
    wanted = needs(best, ACCURACY, report.options(), judge(best))
    difference = next(need for need in wanted if not need.claim)
    words = judged_by(tried, difference)
    assert words["study"] == "planted_more"
    assert (words["arms"], words["batches"], words["alpha"]) == ("[none,bn]", "[32]", "0.025")
    assert {config["optimizer"]["lr"] for config in difference.configs} == {0.01}
    for claimed in (need for need in wanted if need.claim and need.settles):
        of_rates = claimed.comparison.measure.probe == RATES
        words = judged_by(tried, claimed)
        assert words["study"] == ("planted_rates" if of_rates else "planted_more")
        assert (words["tuned"], "arms" in words) == ("[optimizer.lr]", False)


def test_verdicts_are_judged_together_and_corrected_once() -> None:
    minus = {"none": [2.0, -1.0, 3.0, 0.5, 1.0], "affine": [1.0, -2.0, 3.5, 0.5, 1.0]}
    runs = [
        Planted({"norm.name": arm}, seed, {"test_accuracy": BN[seed] - each})
        for arm, values in ({"bn": [0.0] * 5} | minus).items()
        for seed, each in enumerate(values)
    ]
    here = in_full(planted(runs))
    claimed = [need for need in needs(here, ACCURACY, report.options(), judge(here)) if need.claim and need.settles]
    assert len(claimed) > 1
    assert len({need.seeds for need in claimed}) > 1
    most = max(need.seeds for need in claimed)
    for need in claimed:
        assert need.level == pytest.approx(0.025 / len(claimed), rel=0.1)
        words = judged_by(here, need)
        assert (words["alpha"], words["seeds"]) == ("0.025", f"[{','.join(map(str, range(5, 5 + most)))}]")
    assert "are judged together" in next(lines(here, claimed, report.options(), 2))
    assert "are judged together" not in next(lines(here, claimed[:1], report.options(), 2))


def test_where_nothing_was_compared_it_is_said_and_why(study) -> None:
    whole = study([2.0, -1.0, 3.0, 0.5, 1.0])
    alone = report.options(arms=["bn"])
    said = nothing_asked(chosen_runs(whole, alone), alone, [])
    assert said.startswith("Study study: nothing of arms=[bn] was compared, as only bn is there")
    without = report.options(baseline=None)
    assert "baseline=null is none of the arms (bn, none)" in nothing_asked(whole, without, [])
    assert "nothing is inconclusive" in nothing_asked(whole, report.options(), [])


def test_the_caption_names_the_command_with_the_options_of_the_report(study) -> None:
    whole = study([2.0, -1.0, 3.0, 0.5, 1.0])
    options = report.options(seeds=[0, 1, 2], alpha=0.1)
    chosen = chosen_runs(whole, options)
    table = seeds_table(chosen, needs(chosen, ACCURACY, options, []), options)
    assert table.caption.endswith(" 'seeds=[0,1,2]' alpha=0.1.")


def test_a_range_of_rates_is_trained_at_all_rates_and_a_grid_that_ends_at_its_best_is_to_be_widened() -> None:
    rates, width = (0.001, 0.01, 0.1), [90.0, 91.0, 92.0]
    runs = [
        Planted({"norm.name": arm, "optimizer.lr": rate}, seed, {"test_accuracy": value - lost})
        for arm in ("bn", "none")
        for rate, value in zip(rates, width, strict=True)
        for seed in range(4)
        for lost in [30.0 * (rate == 0.001 and seed == (arm == "bn"))]
    ]
    tried = in_full(planted(runs))
    best = tune(tried, tried, "optimizer.lr")
    judgements = [each for each in judge(best) if each.claim.id == "santurkar2018-rates-width"]
    [need] = _of_verdicts(best, report.options(), judgements, 2)
    cells = sorted((config["norm"]["name"], config["optimizer"]["lr"]) for config in need.configs)
    assert cells == [(arm, rate) for arm in ("bn", "none") for rate in rates]
    assert "widen the grid: 0.1 is the largest optimizer.lr tried (bn, batch 32)" in need.advice


def test_a_command_of_several_comparisons_is_printed_once(study, monkeypatch) -> None:
    here = study([2.0, -1.0], ln=[1.0, 2.0])
    monkeypatch.setattr("normlab.report.more_seeds.commands", lambda *_, **__: ["python train.py"])
    text = "\n".join(lines(here, found(here), report.options(), 2))
    assert text.count("python train.py") == 1
    assert "The commands are those of 1." in text


@pytest.mark.slow
def test_the_commands_of_next_are_carried_out_and_settle_the_first_look(tmp_path, command) -> None:
    small = ("model=cifar_resnet", "dataset.train_size=20", "dataset.test_size=20", "batch=20", "epochs=1")
    sweep = ("-m", "norm=bn,none", "seed=0,1", *small, "device=cpu", "threads=1", "study=s", "quiet=true")
    assert command("train.py", *sweep)[0] == 0
    status, out, error = command("report.py", "next", "study=s", "quiet=true")
    assert (status, error) == (0, "")
    [line] = set(out.splitlines())
    assert shlex.split(line)[:2] == ["python", "train.py"]
    status, _, error = command("train.py", *shlex.split(line)[2:], "device=cpu", "threads=1", "quiet=true")
    assert (status, error) == (0, "")
    status, out, error = command("report.py", "next", "study=s", "looks=3")
    assert (status, error) == (0, "")
    assert "the first test needs" not in out
    assert "over 3 looks" in out or "nothing is inconclusive" in out
    read = report.load("s", tmp_path / "outputs")
    assert sorted(zip(read.runs["arm"], read.runs["seed"], strict=True)) == [
        (a, s) for a in ("bn", "none") for s in range(3)
    ]


@pytest.mark.parametrize("looks", ["0", "true", "many", "1.5"])
def test_looks_that_are_no_number(command, looks) -> None:
    status, _, error = command("report.py", "next", "study=s", f"looks={looks}")
    assert status == 1
    assert error.startswith(f"looks={looks} is not valid")
