import dataclasses
import importlib
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from planted import Planted, planted, simulate, study_for
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from normlab.report.analysis.metrics import METRICS
from normlab.report.analysis.statistics import TOO_FEW
from normlab.report.claims.claims import claims, parse
from normlab.report.claims.judge import CONTRADICTED, EQUAL, INCONCLUSIVE, SUPPORTED, ComparisonResult, judge
from normlab.report.claims.texts import claims_page, format_effect, format_expectation, verdict_table

EXPERIMENTS = Path(__file__).parents[3] / "conf" / "experiment"
CLAIMS = {claim.id: claim for claim in claims()}
BEATS = "peerthum2023-bn-none"
NEAR = [60.0, 61.0, 62.0]


def verdict(study, claim=BEATS):
    [found] = [judgement for judgement in judge(study) if judgement.claim.id == claim]
    return found


def accuracies(**arms):
    """Runs of the final test accuracies of each arm, seed by seed; None: diverged."""
    return [
        Planted({"norm.name": arm}, seed, {"test_accuracy": math.nan if value is None else value}, state_of(value))
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]


def state_of(value):
    return "diverged" if value is None else "done"


# ---- the data


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_every_claim_names_its_experiments_and_marks_what_is_ours(claim):
    for experiment in claim.experiments:
        assert (EXPERIMENTS / f"{experiment}.yaml").exists()
    margins = any(c.margin or c.reference for c in claim.comparisons)
    assert not margins or "[A]" in claim.notes
    tuning = f" +tuning={claim.tuning}" if claim.tuning else ""
    assert claim.command == f"python train.py -m experiment={claim.experiments[0]} budget=laptop{tuning}"


def test_no_key_of_the_file_is_overlooked():
    comparison = {"sides", "expect", "than", "to", "within", "measure", "exact"}
    keys = {
        "tuning",
        "id",
        "sentence",
        "paper",
        "place",
        "number",
        "experiments",
        "measure",
        "where",
        "free",
        "any",
        "notes",
    }
    entries = yaml.safe_load((EXPERIMENTS.parents[1] / "src/normlab/report/claims/claims.yaml").read_text())
    for entry in entries:
        assert set(entry) <= keys | {"comparisons"}
        for compared in entry["comparisons"]:
            assert set(compared) <= comparison
            assert compared["expect"] in ("greater", "less", "equal")
            assert ("within" in compared) == (compared["expect"] == "equal")
            assert not {"to", "than"} & set(compared) - {"to" if compared["expect"] == "equal" else "than"}
            assert all({"norm.name", "norm._target_"} & {*entry.get("where", {}), *side} for side in compared["sides"])
    assert len({entry["id"] for entry in entries}) == len(entries)


def test_every_metric_is_used_by_a_claim_or_a_table():
    judged = {c.measure.name for claim in claims() for c in claim.comparisons}
    assert {name for name, metric in METRICS.items() if not metric.heading and not metric.epoch} <= judged


@pytest.mark.parametrize("claim", [each for each in CLAIMS.values() if not each.tuning], ids=lambda claim: claim.id)
@pytest.mark.parametrize(("speaks", "expectation"), [("for", SUPPORTED), ("against", CONTRADICTED)])
def test_a_study_that_speaks_for_a_claim_supports_it_and_the_opposite_contradicts_it(claim, speaks, expectation):
    found = verdict(study_for(claim, speaks), claim.id)
    assert found.verdict == expectation
    assert {result.verdict for result in found.results} == {expectation}
    assert all(result.interval.n == 5 for result in found.results)


def test_the_share_beyond_3_is_that_of_a_normal_distribution():
    [comparison] = CLAIMS["davis2021-large-values"].comparisons
    assert comparison.reference == pytest.approx(200 * stats.norm.sf(3), abs=0.005)


# ---- error rates, through all of the code that judges


@pytest.fixture
def judged(monkeypatch):
    """Judge simulated studies, which differ in values alone, by the claims that the first of them speaks to."""

    def verdicts(arms, repeats, seeds=5):
        studies = simulate(arms, seeds, repeats)
        spoken_to = [judgement.claim for judgement in judge(next(studies))]
        monkeypatch.setattr(importlib.import_module("normlab.report.claims.judge"), "claims", lambda: spoken_to)
        return [{judgement.verdict for judgement in judge(study)} for study in studies]

    return verdicts


def normal(mean, sd):
    return lambda generator: generator.normal(mean, sd)


@pytest.mark.slow
def test_without_an_effect_at_most_5_per_cent_of_studies_support_any_claim(judged):
    found = judged(dict.fromkeys(("bn", "affine", "bnminus", "none"), normal(60, 2)), 1001)
    assert sum(SUPPORTED in verdicts for verdicts in found) <= 50
    assert 0 < sum(bool({SUPPORTED, CONTRADICTED} & verdicts) for verdicts in found) <= 70


@pytest.mark.slow
def test_a_difference_of_2_standard_deviations_of_the_paired_differences_is_found_9_times_in_10_with_5_seeds(judged):
    sd = 1.5  # of each arm; that of their differences is larger by the square root of 2
    found = judged({"bn": normal(60 + 2 * sd * math.sqrt(2), sd), "none": normal(60, sd)}, 1001)
    assert found.count({SUPPORTED}) >= 900
    assert found.count({CONTRADICTED}) == 0


@pytest.mark.slow
@pytest.mark.parametrize("difference", [-1.0, 1.0, 2.0])
def test_arms_that_differ_by_the_margin_or_more_are_called_equal_in_at_most_5_per_cent(difference, judged):
    found = judged({"bn": normal(60, 0.1), "renorm": normal(60 + difference, 0.1)}, 501)
    assert found.count({SUPPORTED}) <= 25
    if abs(difference) == 1:
        assert found.count({SUPPORTED}) > 0
        assert 0 < found.count({CONTRADICTED}) <= 25  # on the margin it is as equal as not


@pytest.mark.slow
def test_equality_makes_no_difference_more_likely_to_be_found(judged):
    """Of many comparisons, most of which are equal: Holm's correction of the others must not be spent on these."""
    found = judged(dict.fromkeys(("bn", "affine", "bnminus", "none", "bn_scaled"), normal(60, 0.6)), 601, seeds=15)
    assert sum(EQUAL in verdicts for verdicts in found) >= 300
    assert sum(bool({SUPPORTED, CONTRADICTED} & verdicts) for verdicts in found) <= 42


@pytest.mark.slow
@pytest.mark.parametrize("difference", [0.0, 0.5, 1.0])
def test_where_a_difference_is_claimed_a_wrong_verdict_is_as_rare(difference, judged):
    """At 0 "supported" and "contradicted" are wrong, at the margin "equal" and "contradicted", between only that."""
    found = judged({"bn": normal(60 + difference, 0.3), "none": normal(60, 0.3)}, 1001)
    wrong = {0.0: (SUPPORTED, CONTRADICTED), 0.5: (CONTRADICTED,), 1.0: (EQUAL, CONTRADICTED)}[difference]
    assert sum(found.count({each}) for each in wrong) <= 66  # 99 of 100 times at 5 per cent
    assert found.count({SUPPORTED if difference else EQUAL}) >= {0.0: 700, 0.5: 100, 1.0: 700}[difference]


@pytest.mark.slow
def test_equal_arms_are_called_equal(judged):
    assert judged(dict.fromkeys(("bn", "renorm"), normal(60, 0.2)), 201).count({SUPPORTED}) >= 180


# ---- the tests behind a verdict


def test_p_and_interval_are_those_of_scipys_paired_t_test():
    bn, none = [61.0, 63.0, 60.5, 62.0], [60.0, 60.5, 60.0, 58.0]
    [result] = verdict(planted(accuracies(bn=bn, none=none))).results
    expectation = stats.ttest_rel(bn, none)
    assert result.p == result.p_holm == pytest.approx(expectation.pvalue)
    assert result.interval[1:3] == pytest.approx(expectation.confidence_interval())
    assert result.d_z == pytest.approx(expectation.statistic / 2)  # t / sqrt(n)


def test_p_of_an_equality_is_twice_that_of_statsmodels_two_one_sided_tests():
    bn, renorm = [60.0, 60.5, 61.0, 60.2], [60.3, 60.4, 61.5, 60.1]
    [result] = verdict(planted(accuracies(bn=bn, renorm=renorm)), "ioffe2017-equal-at-32").results
    assert result.p == pytest.approx(2 * ttost_paired(np.array(renorm), np.array(bn), -1, 1)[0])
    assert result.remarks == ()  # no sign test
    assert result.favors


@pytest.mark.parametrize("claim", [BEATS, "gitman2017-generalization"])
def test_where_a_difference_is_claimed_p_of_less_than_a_point_is_that_of_statsmodels_two_one_sided_tests(claim):
    one, other = [60.0, 60.5, 61.0, 60.2, 60.9], [60.1, 60.4, 61.1, 60.25, 60.8]
    arms = {"wn": one, "bn": other} if claim != BEATS else {"bn": one, "none": other}
    runs = [run._replace(settings={**run.settings, "model.stem": "imagenet"}) for run in accuracies(**arms)]
    found = verdict(planted(runs), claim)
    [result] = found.results
    assert found.verdict == result.verdict == EQUAL
    assert result.p == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert result.p_equal == pytest.approx(2 * ttost_paired(np.array(one), np.array(other), -1, 1)[0])
    assert result.remarks[0].startswith("within 1 point, p ")


def test_a_value_that_overflowed_in_one_seed_leaves_no_arms_equal():
    runs = [
        Planted({"norm.name": norm}, seed, {"beta": math.inf if (norm, seed) == ("bn", 0) else 1.0})
        for norm in ("bn", "none")
        for seed in range(12)
    ]
    assert verdict(planted(runs), "santurkar2018-smoothness").verdict == INCONCLUSIVE


def test_ranges_of_rates_are_never_called_equal():
    """The grid is coarser than the smallest factor of interest."""
    for claim in CLAIMS.values():
        if claim.tuning:
            assert not any(comparison.denies_equality for comparison in claim.comparisons)


@pytest.mark.parametrize(("factor", "expectation"), [(1.01, EQUAL), (1.4, CONTRADICTED), (1.6, CONTRADICTED)])
def test_factors_of_less_than_one_and_a_half_are_equal_where_no_difference_is_found(factor, expectation):
    generator = np.random.default_rng(1)
    runs = [
        Planted({"norm.name": norm}, seed, {"beta": math.log(size) + 0.02 * generator.normal()})
        for norm, size in (("bn", factor), ("none", 1.0))
        for seed in range(5)
    ]
    assert verdict(planted(runs), "santurkar2018-smoothness").verdict == expectation


def test_a_bound_that_is_claimed_is_not_missed_by_being_near_to_it():
    """At most 2 points behind: there is no difference that could be too small to matter."""
    behind = verdict(
        planted(accuracies(bn=NEAR, lp1=[x - 2 for x in NEAR], lp2=NEAR, lpinf=[*NEAR[1:], NEAR[0]])),
        "santurkar2018-lp",
    )
    assert all(math.isnan(result.p_equal) for result in behind.results)


def test_only_a_difference_of_two_arms_has_a_smallest_one_of_interest():
    """Above the middle between two arms, or a gap that is smaller than another: a point is not the same thing there."""
    starts = {("bn", "default"): 60.9, ("none", "default"): 60.0, ("none", "bn_folded"): 60.9}
    found = verdict(
        planted(
            Planted({"norm.name": norm, "init.name": init}, s, {"test_accuracy": x + 0.05 * ((3 * s + i) % 4)})
            for i, ((norm, init), x) in enumerate(starts.items())
            for s in range(5)
        ),
        "peerthum2023-initialization",
    )
    assert found.verdict == SUPPORTED
    assert math.isnan(found.results[1].p_equal)


def test_a_run_that_diverged_is_like_no_other():
    """Also where both arms did, and where one is infinite among many that are alike."""
    both = {"bn": [None] * 8 + [60.0, 61.0], "none": [None] * 8 + [60.1, 61.0]}
    assert verdict(planted(accuracies(**both))).verdict == INCONCLUSIVE
    betas = [
        Planted({"norm.name": norm}, s, {"beta": 0.01 * (s % 3)}, "diverged" if (norm, s) == ("bn", 0) else "done")
        for norm in ("bn", "none")
        for s in range(12)
    ]
    assert verdict(planted(betas), "santurkar2018-smoothness").verdict == INCONCLUSIVE


def test_alikeness_is_of_accuracies_and_factors():
    drops = [
        Planted({"norm.name": norm, "model.name": "gitman_cifar"}, s, {"setbacks": 0.1 * (s % 3)})
        for norm in ("wn", "bn")
        for s in range(9)
    ]
    assert verdict(planted(drops), "gitman2017-stability").verdict == INCONCLUSIVE


def test_arms_that_have_learned_nothing_are_not_equal():
    guessing = {"bn": [10.0, 10.2, 9.9, 10.1, 10.0], "none": [10.1, 10.1, 10.0, 10.0, 9.9]}
    found = verdict(planted(accuracies(**guessing)))
    assert found.verdict == INCONCLUSIVE
    assert math.isnan(found.results[0].p_equal)


def test_holm_is_over_all_comparisons_of_the_study():
    generator = np.random.default_rng(3)
    arms = {arm: list(generator.normal(60 - 2 * i, 1, 5)) for i, arm in enumerate(("bn", "affine", "bnminus", "none"))}
    other = [run._replace(settings={**run.settings, "dataset.name": "mine"}) for run in accuracies(**arms)]
    results = [f for judgement in judge(planted(accuracies(**arms) + other)) for f in judgement.results]
    assert len(results) == 6
    assert [f.p_holm for f in results] == pytest.approx(multipletests([f.p for f in results], method="holm")[1])


@pytest.mark.parametrize(
    ("claim", "arms", "p", "remark"),
    [
        (BEATS, {"bn": [90.0, 90.1], "none": [10.0, 10.1]}, math.nan, f"n = 2: {TOO_FEW}"),
        (BEATS, {"bn": [61.0, 62.0, 63.0], "none": NEAR}, 0.25, "sign test: higher in 3 of 3 seeds"),
        ("ioffe2017-equal-at-32", {"bn": NEAR, "renorm": NEAR}, 0.25, None),  # differences of 0
    ],
)
def test_few_seeds_and_equal_differences_prove_nothing(claim, arms, p, remark):
    found = verdict(planted(accuracies(**arms)), claim)
    assert found.verdict == INCONCLUSIVE
    assert found.results[0].p == pytest.approx(p, nan_ok=True)
    assert remark is None or remark in found.results[0].remarks


def ends(accuracy):
    return planted(
        Planted({"norm.name": "gn", "norm_batch": size}, seed, {"test_accuracy": accuracy + seed})
        for size in (1, 32)
        for seed in range(3)
    )


# ---- who has learned nothing shows nothing


def test_arms_that_have_not_learned_are_not_as_good_as_each_other_but_may_differ():
    found = verdict(ends(9.0), "wu2018-gn-flat")
    assert (found.verdict, found.results[0].remarks) == (INCONCLUSIVE, ("no arm learned",))
    assert verdict(ends(60.0), "wu2018-gn-flat").verdict == SUPPORTED  # sides that are one computation
    guessing = [10.0, 10.2, 9.9, 10.1, 10.0]

    def judged(**changed):
        arms = dict.fromkeys(("bn", "lp1", "lp2", "lpinf"), guessing) | changed
        return verdict(planted(accuracies(**arms)), "santurkar2018-lp")

    assert judged().verdict == INCONCLUSIVE
    assert {result.remarks for result in judged().results} == {("no arm learned",)}
    for above_guessing, expectation in ((5.5, CONTRADICTED), (4.4, INCONCLUSIVE)):  # one has learned: others are worse
        learned = [above_guessing + x for x in (10.1, 9.9, 10.0, 10.05, 9.95)]
        assert judged(bn=learned).verdict == expectation
    assert verdict(planted(accuracies(bn=[13.0, 13.1, 13.2], none=[10.0, 10.3, 10.1]))).verdict == SUPPORTED


def test_a_folded_start_closes_no_gap_where_there_is_none():
    def judged(gap):
        generator = np.random.default_rng(0)
        means = {("bn", "default"): 60.0 + gap, ("none", "default"): 60.0, ("none", "bn_folded"): 62.0 + gap}
        return verdict(
            planted(
                Planted({"norm.name": norm, "init.name": init}, s, {"test_accuracy": mean + 0.3 * generator.normal()})
                for (norm, init), mean in means.items()
                for s in range(5)
            ),
            "peerthum2023-initialization",
        )

    assert judged(0.0).verdict == CONTRADICTED
    assert judged(5.0).verdict == SUPPORTED
    assert judged(-5.0).verdict == CONTRADICTED
    assert judged(5.0).results[0].label == "bn (init=default) - none (init=default)"


@pytest.mark.parametrize(
    ("bn", "none", "expectation"),
    [(60.0, 10.0, SUPPORTED), (60.0, 50.0, CONTRADICTED), (16.0, 10.0, CONTRADICTED)],
)
def test_to_survive_is_to_learn_where_the_other_does_not(bn, none, expectation):
    runs = [
        Planted({"norm.name": arm, "optimizer.lr": 0.5}, seed, {"train_accuracy": mean + 0.1 * seed * (arm == "bn")})
        for arm, mean in (("bn", bn), ("none", none))
        for seed in range(8)
    ]
    assert verdict(planted(runs), "santurkar2018-survival").verdict == expectation


# ---- divergence is a result


def test_a_diverged_runs_accuracy_is_chance():
    found = verdict(planted(accuracies(bn=[60.0, 61.0, 62.0, 63.0], none=[None, 10.0, None, 11.0])))
    assert list(found.results[0].contrasts.values()) == pytest.approx([50.0, 51.0, 52.0, 52.0])
    assert found.verdict == SUPPORTED
    assert "2 of 4 runs of none diverged and count as 10 %" in found.results[0].remarks
    [result] = verdict(planted(accuracies(bn=[60.0, 61.0, 62.5], none=[None, 10.0, 11.0]))).results
    assert "1 of 3 runs of none diverged and count as 10 %" in result.remarks


def test_chance_is_one_in_the_number_of_classes_that_a_run_recorded():
    study = planted(accuracies(bn=[60.0, 61.0, 62.0], none=[None, None, None]))
    study.runs["classes"] = 5.0
    assert list(verdict(study).results[0].contrasts.values()) == pytest.approx([40.0, 41.0, 42.0])


@pytest.mark.parametrize("claim", [BEATS, "ioffe2017-equal-at-32"])
def test_where_everything_diverged_there_is_nothing_to_compare(claim):
    other = "none" if claim == BEATS else "renorm"
    elsewhere = Planted({"norm.name": "gn"}, 0, {"test_accuracy": 50.0})
    found = verdict(planted([*accuracies(**{"bn": [None] * 5, other: [None] * 5}), elsewhere]), claim)
    assert found.verdict == INCONCLUSIVE
    assert "nothing to compare" in found.results[0].remarks


def losses(**arms):
    return [
        Planted(
            {"norm.name": arm, "model.name": "deep_linear"}, seed, {"train_loss": math.log(loss or 1)}, state_of(loss)
        )
        for arm, found in arms.items()
        for seed, loss in enumerate(found)
    ]


@pytest.mark.parametrize(("seeds", "expectation"), [(5, INCONCLUSIVE), (8, CONTRADICTED)])
def test_infinite_losses_are_judged_by_the_sign_test_which_needs_seeds(seeds, expectation):
    found = verdict(
        planted(losses(lpinf=[None] * seeds, none=[5.0 + seed for seed in range(seeds)])), "santurkar2018-deep-linear"
    )
    first = found.results[0]
    assert first.p == pytest.approx(stats.binomtest(0, seeds).pvalue)
    assert found.verdict == expectation
    assert format_effect(first) == "infinite"
    assert f"sign test: higher in 0 of {seeds} seeds" in first.remarks
    assert f"{seeds} of {seeds} runs of lpinf diverged and count as infinitely large" in first.remarks


def test_cells_that_are_infinite_on_opposite_sides_are_a_tie():
    runs = [
        run._replace(settings={**run.settings, "depth": depth})
        for depth, lost in ((18, "none"), (34, "lpinf"))
        for run in losses(**{arm: [None if arm == lost else 5.0] * 3 for arm in ("none", "lpinf")})
    ]
    result = verdict(planted(runs), "santurkar2018-deep-linear").results[0]
    assert list(result.contrasts.values()) == [0.0] * 3
    assert "cells from 0 to 1.01e+304" in result.remarks
    both = verdict(planted(losses(none=[None, 5.0, 5.0], lpinf=[None, 4.0, 4.5])), "santurkar2018-deep-linear")
    assert both.results[0].contrasts[0] == 0.0  # a tie, too


def test_diverged_runs_have_no_accuracy_where_none_is_measured():
    found = judge(planted(losses(bn=[None] * 3, lp1=[None] * 3, lp2=[None] * 3, none=[5.0, 6.0, 7.0])))
    assert {judgement.claim.id for judgement in found} == {"santurkar2018-deep-linear"}


def test_a_diverged_run_without_a_probe_is_no_evidence_about_it():
    runs = [Planted({"norm.name": "bn"}, seed, {"beta": 1.0 + 0.1 * seed}) for seed in range(3)]
    runs += [Planted({"norm.name": "none"}, seed, {}, "diverged") for seed in range(3)]
    assert not judge(planted(runs))


def test_runs_without_the_measurement_that_they_were_to_have_are_told():
    def judged(diverged, unmeasured=0, seeds=5):
        generator, runs = np.random.default_rng(0), []
        for arm, ics, cosine in (("bn", 1, 0.5), ("none", 0, 0.6)):
            for seed in range(seeds):
                lost = arm == "none" and seed < diverged
                values = {"ics": generator.normal(ics, 0.1), "ics_cosine": cosine - (arm == "bn") * seed / 99}
                if arm == "none" and seed < diverged + unmeasured:
                    values = {}
                runs.append(
                    Planted({"norm.name": arm, "probe.ics.every": 5}, seed, values, "diverged" if lost else "done")
                )
        return verdict(planted(runs), "santurkar2018-ics")

    some, every = judged(2), judged(5)
    assert judged(0, unmeasured=2).verdict == SUPPORTED
    assert some.verdict == INCONCLUSIVE
    assert "no test: it would be of the runs that survived alone" in some.results[0].remarks
    assert "2 runs of none diverged, without such a value" in some.results[0].remarks
    assert "seeds 0, 1 are not in all cells and are left out" in some.results[0].remarks
    assert every.verdict == INCONCLUSIVE
    lost, nothing = every.results[0].remarks
    assert (lost, nothing) == ("5 runs of none diverged, without such a value", "no seed has all of its runs")
    told = judged(2, unmeasured=3, seeds=8).results[0].remarks
    assert "2 runs of none diverged, without such a value" in told
    assert "3 runs of none without such a value" in told


def test_a_run_that_diverged_is_compared_by_the_steps_before_with_others_up_to_the_same_step():
    shifts = {seed: {"bn": (4.0, 4.0 + seed, 0.01), "none": (1.0, 1.0, 0.0025)} for seed in range(3)}
    shifts |= {seed: {"bn": (4.0, 4.0 + seed, 0.01), "none": (8.0, 9.0)} for seed in (3, 4)}
    runs, rows = [], []
    for seed, arms in shifts.items():
        for arm, l2 in arms.items():
            rows += [{"run": f"run{len(runs)}", "step": step, "l2": x, "cosine": 0.5} for step, x in enumerate(l2)]
            state = "done" if len(l2) == 3 else "diverged"
            runs.append(Planted({"norm.name": arm, "probe.ics.every": 1}, seed, {}, state))
    study = planted(runs)
    study.probes["ics"] = pd.DataFrame(rows)
    result = verdict(study, "santurkar2018-ics").results[0]
    expected = [(math.log(4) + math.log(4 + seed) + math.log(4)) / 3 for seed in range(3)]
    expected += [(math.log(4 / 8) + math.log((4 + seed) / 9)) / 2 for seed in (3, 4)]
    assert list(result.contrasts.values()) == pytest.approx(expected)
    assert result.verdict == INCONCLUSIVE  # the three seeds that survived would have supported it
    assert (
        "2 of 5 runs of none diverged and count up to their last measured step, as do the runs that they are compared"
        " with"
    ) in result.remarks


PROBED = {claim.id: claim for claim in claims() if not claim.tuning and any(c.measure.probe for c in claim.comparisons)}


@pytest.mark.parametrize("claim", PROBED.values(), ids=PROBED)
def test_no_claim_about_a_probe_is_supported_by_the_runs_that_survived_alone(claim):
    study = study_for(claim, "for", range(8))
    assert verdict(study, claim.id).verdict == SUPPORTED
    arm = claim.comparisons[0].sides[0].where["norm.name"]
    of_lost = (study.runs["arm"] == arm) & (study.runs["seed"] < 4)
    study.runs.loc[of_lost, "state"] = "diverged"
    for comparison in claim.comparisons:
        probe, before = comparison.measure.probe, comparison.measure.diverged == "before"
        rows = study.probes[probe]
        study.probes[probe] = rows[~rows["run"].isin(study.runs["run"][of_lost])] if before else rows
        for config in study.configs.values():
            config.setdefault("probe", {})[probe] = {"every": 5}
    found = verdict(study, claim.id)
    assert found.verdict == INCONCLUSIVE
    for result in found.results:
        assert re.search(rf"4 (of 8 )?runs of {arm} diverged", " ".join(result.remarks))


@pytest.mark.parametrize(
    ("differences", "expectation", "remark"),
    [
        ([1.0, 1.1, 0.9, 1.05, -9.0], INCONCLUSIVE, "rests on seed 4: without it supported"),
        ([-9.0, 1.0, 1.1, 0.9, 1.05], INCONCLUSIVE, "rests on seed 0: without it supported"),
        ([-1.0, -1.1, -0.9, 9.0, -1.05], INCONCLUSIVE, "rests on seed 3: without it contradicted"),
        ([4.0, 0.0, 3.0, 9.0, 1.0, 6.0], SUPPORTED, "rests on seed 3: without it inconclusive"),
        ([1.0, 1.1, 0.9, 1.05, 0.95], SUPPORTED, None),
        ([1.0, -1.1, 0.9, -1.05, 0.1], INCONCLUSIVE, None),
        ([1.0, 1.1, -9.0], INCONCLUSIVE, None),  # of two seeds there is no verdict
    ],
)
def test_a_verdict_that_rests_on_one_outlying_seed_says_so(differences, expectation, remark):
    none = [50.0 + 3 * seed for seed in range(len(differences))]
    bn = [value + difference for value, difference in zip(none, differences, strict=True)]
    found = verdict(planted(accuracies(bn=bn, none=none)))
    assert found.verdict == expectation
    assert [text for text in found.results[0].remarks if "rests" in text] == ([remark] if remark else [])


def test_what_rests_on_a_seed_is_the_verdict_after_holms_correction():
    """The p-value without seed 4 is below 0.05, and four times it is not."""
    none = [50.0, 53.0, 51.0, 58.0, 54.0]
    others = [value + x for value, x in zip(none, (-1.0, 1.2, -0.9, 1.1, 0.1), strict=True)]
    differences = (1.0, 2.2, 0.9, 1.7, -9.0)
    bn = [value + difference for value, difference in zip(none, differences, strict=True)]
    alone = stats.ttest_1samp(differences[:4], 0).pvalue
    assert 0.05 / 4 < alone < 0.05
    assert "rests on seed 4" in " ".join(verdict(planted(accuracies(bn=bn, none=none))).results[0].remarks)
    more = accuracies(bn=bn, none=none, affine=others, bnminus=others, renorm=others)
    assert "rests" not in " ".join(verdict(planted(more)).results[0].remarks)


# ---- which runs are compared


def test_a_chain_needs_all_of_its_links():
    order = {"none": 1700.0, "lpinf": 1000.0, "bn": 500.0, "lp2": 510.0, "lp1": 100.0}

    def judged(**changed):
        generator = np.random.default_rng(0)
        found = {
            arm: [loss * math.exp(0.01 * generator.normal()) for _ in range(5)]
            for arm, loss in (order | changed).items()
        }
        return verdict(planted(losses(**found)), "santurkar2018-deep-linear")

    assert judged().verdict == SUPPORTED
    assert judged(lp1=600.0).verdict == CONTRADICTED
    assert judged(lp2=5000.0).verdict == CONTRADICTED
    assert judged(lp1=500.0).verdict == CONTRADICTED  # a link of arms that are equal does not hold


def test_a_chain_with_a_missing_link_is_inconclusive_and_says_so():
    found = verdict(planted(losses(none=[1700.0, 1701, 1702], lpinf=[10.0, 11, 12])), "santurkar2018-deep-linear")
    assert found.verdict == INCONCLUSIVE
    assert [result.verdict for result in found.results] == [SUPPORTED] + 3 * ["not run"]


def test_one_of_several_is_enough_where_a_claim_says_so():
    def judged(**found):
        return verdict(
            planted(
                run._replace(settings={**run.settings, "model.name": "gitman_cifar"}) for run in accuracies(**found)
            ),
            "gitman2017-cifar",
        ).verdict

    bn = [60.0, 61.0, 62.0, 61.0]
    better, worse = [65.0, 66.1, 67.2, 66.0], [55.0, 56.1, 57.2, 56.0]
    assert judged(bn=bn, wn=worse, wn_trelu=better, normprop=worse) == SUPPORTED
    assert judged(bn=bn, wn=worse, wn_trelu=worse, normprop=worse) == CONTRADICTED
    near = [x + y for x, y in zip(bn, (0.1, -0.1, 0.05, 0.0), strict=True)]
    assert judged(bn=bn, wn=near, wn_trelu=worse, normprop=worse) == CONTRADICTED
    assert judged(bn=bn, wn=near, wn_trelu=near, normprop=near) == EQUAL
    assert judged(bn=bn, wn=near, wn_trelu=better, normprop=near) == SUPPORTED
    assert judged(bn=bn, wn=worse) == INCONCLUSIVE


def test_an_interaction_is_the_difference_of_differences():
    values = {("bn", 16): 60.0, ("bn", 2): 40.0, ("gn", 16): 58.0, ("gn", 2): 50.0}
    runs = [
        Planted({"norm.name": norm, "norm_batch": size}, seed, {"test_accuracy": value + 0.1 * seed * (size == 2)})
        for (norm, size), value in values.items()
        for seed in range(4)
    ]
    found = verdict(planted(runs), "wu2018-bn-falls")
    assert list(found.results[1].contrasts.values()) == pytest.approx([12.0] * 4)
    assert found.results[1].label == ("bn (norm_batch=16) - bn (norm_batch=2) - gn (norm_batch=16) + gn (norm_batch=2)")


def test_what_is_not_named_is_equal_on_both_sides_and_averaged_over():
    runs = [
        run._replace(
            settings={**run.settings, "depth": depth}, values={"test_accuracy": run.values["test_accuracy"] + more}
        )
        for run in accuracies(bn=[60.0, 61.0, 62.0], none=[50.0, 52.0, 51.0])
        for depth, more in ((18, 0.0), (34, 2.0 if run.settings["norm.name"] == "bn" else 0.0))
    ]
    lonely = Planted({"norm.name": "bn", "depth": 50}, 0, {"test_accuracy": 0.0})
    [result] = verdict(planted([*runs, lonely])).results
    assert list(result.contrasts.values()) == pytest.approx([11.0, 10.0, 12.0])
    assert "mean over 2 cells" in result.remarks


def test_seeds_that_are_not_in_all_cells_are_left_out_and_told():
    runs = accuracies(bn=[60.0, 61.0, 62.0, 63.0], none=[50.0, 52.0, 51.0, 50.0])
    runs += [run._replace(settings={**run.settings, "depth": 34}) for run in runs if run.seed != 3]
    [result] = verdict(planted(runs)).results
    assert list(result.contrasts) == [0, 1, 2]
    assert "seeds 3 are not in all cells and are left out" in result.remarks


def test_data_sets_and_networks_have_verdicts_of_their_own():
    runs = accuracies(bn=[60.0, 61.0, 62.5], none=[10.0, 12.0, 11.0])
    runs += [run._replace(settings={**run.settings, "dataset.name": "mine"}) for run in runs]
    runs += [run._replace(settings={**run.settings, "model.name": "cifar_resnet"}) for run in runs]
    found = [judgement for judgement in judge(planted(runs)) if judgement.claim.id == BEATS]
    assert [(judgement.dataset, judgement.model) for judgement in found] == [
        *(("digits", "cifar_resnet"), ("digits", "resnet")),
        *(("mine", "cifar_resnet"), ("mine", "resnet")),
    ]
    assert found[0].place == "digits, cifar_resnet, budget smoke (answers nothing)"


@pytest.mark.parametrize("name", ["bn_scaled", "bn"])  # the same layer by its own name, and by its options
def test_values_of_a_list_are_cells_and_not_one_pool(name):
    effects = {"dataset": 30.0, "none": 0.0, "bn": -3.0}
    layer = {"norm._target_": "normlab.norms.BatchNorm"}
    options = [(1.0, 1.0), (0.1, 100.0)]
    runs = [
        Planted(
            {"norm.name": name if i else "bn", "input_norm": how, **layer}
            | {"norm.scale_init": options[i][0], "norm.scale_lr_divisor": options[i][1]},
            seed,
            {"test_accuracy": 50.0 + seed + (effect if i else 0.0)},
        )
        for how, effect in effects.items()
        for i in range(2)
        for seed in range(3)
    ]
    [result] = verdict(planted(runs), "davis2021-small-slow-gamma").results
    assert list(result.contrasts.values()) == pytest.approx([9.0] * 3)
    assert result.remarks[:2] == ("mean over 3 cells", "cells from -3 to +30")


def test_a_list_that_is_not_on_every_side_is_refused():
    entry = {"measure": "beta", "comparisons": [{"sides": [{"depth": [1, 2]}, {"depth": 3}], "expect": "less"}]}
    words = dict.fromkeys(("id", "sentence", "paper", "place", "number"), "x") | {"experiments": ["x"]}
    with pytest.raises(ValueError, match="depth"):
        parse(words | entry)


def test_values_of_a_free_setting_are_cells_too():
    runs = [
        Planted(
            {"norm.name": "bn", "sampler.name": "paired", "eval_stats": stats_, "eval_batch": size},
            *(seed, {"test_accuracy": accuracy + 0.1 * seed * (size == 50)}),
        )
        for stats_, size, accuracy in (("running", 1000, 60.0), ("batch", 10, 70.0), ("batch", 50, 76.0))
        for seed in range(3)
    ]
    first = verdict(planted(runs), "ioffe2017-discrepancy").results[0]
    assert list(first.contrasts.values()) == pytest.approx([13.0, 13.05, 13.1])


def test_no_run_is_left_out_without_a_word():
    runs = accuracies(bn=[60.0, 61.0, 62.5], none=[10.0, 12.0, 11.0])
    again = [
        run._replace(settings={**run.settings, "norm_batch": 32}) for run in runs if run.settings["norm.name"] == "bn"
    ]
    [result] = verdict(planted([*runs, *again])).results
    assert result.remarks == ("left out: 3 runs repeating another",)


def test_weight_normalization_is_judged_at_scale_and_beside_plain_bn():
    runs = accuracies(bn=[60.0, 61.0, 62.5], wn=[50.0, 52.0, 51.0])
    assert "gitman2017-generalization" not in {judgement.claim.id for judgement in judge(planted(runs))}
    plain = {"model.stem": "imagenet", "model.dropout": 0.0, "optimizer.weight_decay": 1e-4}
    runs = [run._replace(settings={**run.settings, **plain}) for run in runs]
    for odd, value in (({"model.dropout": 0.5}, 45.0), ({"optimizer.weight_decay": 5e-4}, 70.0)):
        more = [run for run in runs if run.settings["norm.name"] == "wn" and len(run.settings) == 4][:3]
        runs += [
            run._replace(settings={**run.settings, **odd}, values={"test_accuracy": value + run.seed}) for run in more
        ]
    assert list(verdict(planted(runs), "gitman2017-generalization").results[0].contrasts.values()) == [-10, -9, -11.5]
    both = verdict(planted(runs), "gitman2017-regularization").results
    assert [list(result.contrasts.values()) for result in both] == [[-15.0, -15.0, -15.5], [10.0, 10.0, 9.5]]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("sampler.name", "paired"), ("eval_stats", "batch"), ("input_norm", "bn")),
        *(("norm_batch", 4), ("init.name", "bn_folded"), ("norm.scale_init", 0.1)),
    ],
)
def test_oddities_of_a_study_do_not_speak_to_a_claim_about_plain_bn(setting, value):
    plain = accuracies(bn=[60.0, 61.0, 62.0], none=[50.0, 52.0, 51.0])
    strange = [
        run._replace(settings={**run.settings, setting: value}, values={"test_accuracy": 1.0})
        for run in plain
        if run.settings["norm.name"] == "bn" or not setting.startswith("norm.")
    ]
    assert judge(planted([*strange, *plain]))[0].results[0].contrasts == {0: 10.0, 1: 9.0, 2: 11.0}
    assert not judge(planted(strange))


@pytest.mark.parametrize(
    ("of_bn", "of_none", "found"),
    [
        ({"probe.ics.every": 5}, {}, [SUPPORTED]),  # probes do not keep runs apart
        ({"norm_batch": 32}, {"norm_batch": None}, [SUPPORTED]),  # groups as large as the batch are none
        ({"optimizer.lr": 0.1}, {"optimizer.lr": 0.01}, []),  # no comparison
    ],
)
def test_what_may_differ_between_the_arms_of_a_comparison(of_bn, of_none, found):
    settings = {"bn": of_bn, "none": of_none}
    runs = [
        run._replace(settings={**run.settings, **settings[run.settings["norm.name"]]})
        for run in accuracies(bn=[60.0, 61.0, 62.5], none=[10.0, 12.0, 11.0])
    ]
    assert [judgement.verdict for judgement in judge(planted(runs))] == found


def test_settings_that_belong_to_an_arm_may_differ_between_norms_but_not_within_one():
    runs = [
        Planted({"norm.name": "gn", "norm.groups": groups, "norm_batch": size}, seed, {"test_accuracy": value + seed})
        for groups, size, value in ((8, 2, 50.0), (8, 16, 51.0), (4, 2, 30.0), (4, 16, 33.0))
        for seed in range(3)
    ]
    [result] = verdict(planted(runs), "wu2018-gn-flat").results
    assert list(result.contrasts.values()) == [-2.0] * 3  # the mean of -1 and -3
    assert "mean over 2 cells" in result.remarks  # and not of the four pairs


def test_a_study_without_either_arm_says_nothing():
    assert not judge(planted(accuracies(bn=[60.0, 61.0, 62.0])))
    assert not judge(planted([Planted({"norm.name": arm}, 0, {}) for arm in ("bn", "none")]))


# ---- for a reader


def test_the_table_has_a_row_per_comparison_and_its_texts_name_data_set_and_budget():
    found = verdict_table(judge(study_for(CLAIMS["santurkar2018-ics"], "for")), 0.95)
    rows = found.tidy[found.tidy["claim"] == "santurkar2018-ics"]
    assert list(rows["comparison"]) == ["bn / none", "bn - none"]
    assert list(rows["verdict"]) == [SUPPORTED] * 2
    [place] = found.rows
    assert place == "digits, resnet, budget smoke (answers nothing)"
    first, second = ({heading: cell.text for heading, cell in row.items()} for row in found.rows[place])
    assert (first["verdict"], second["verdict"], first["n"], first["paper says"]) == (SUPPORTED, "", "5", "n/a")
    assert first["expected"] == "above a factor of 0.9"
    assert re.fullmatch(r"factor 2\.[45]\d* \(2\.\d+ to 2\.\d+\)", first["effect"])  # 0.9 e


LABELS = [  # of settings that both arms have, none is named
    ("peerthum2023-initialization", 1, "none (init=bn_folded) - 0.5 none (init=default) - 0.5 bn (init=default)"),
    ("gitman2017-regularization", 0, "wn (model.dropout=0.5) - bn (model.dropout=0.0)"),
    ("santurkar2018-noise-stability", 0, "noisy_bn / none"),
    ("santurkar2018-survival", 1, "none"),
]


@pytest.mark.parametrize(("claim", "number", "label"), LABELS)
def test_a_contrast_in_words_names_the_settings_in_which_its_arms_differ(claim, number, label):
    assert ComparisonResult(CLAIMS[claim].comparisons[number], 0.05).label == label


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"expect": "greater"}, "above 0"),
        ({"expect": "less", "than": -2}, "below -2"),
        ({"expect": "less", "than": 15, "sides": [{"norm.name": "bn"}]}, "below 15 %"),
        ({"expect": "equal", "within": 2, "to": 6}, "within 2 of 6"),
        ({"expect": "less", "measure": "beta"}, "below a factor of 1"),
        ({"expect": "equal", "within": 1.5, "measure": "beta"}, "within a factor of 1.5 of 1"),
    ],
)
def test_expectations_in_words(entry, words):
    words_of = dict.fromkeys(("id", "sentence", "paper", "place", "number"), "x") | {"experiments": ["x"]}
    side = {"norm.name": "bn"}
    claim = parse({**words_of, "measure": "test_accuracy", "comparisons": [{"sides": [side, side], **entry}]})
    assert format_expectation(claim.comparisons[0]) == words


def test_the_page_of_all_claims_has_each_claim_once_and_commands_of_those_not_run():
    text = claims_page(judge(study_for(CLAIMS["santurkar2018-lp"], "for")))
    for claim in claims():
        assert text.count(claim.sentence) == 1
    assert "`python train.py -m experiment=ioffe2017_small budget=laptop`" in text
    assert "-m experiment=santurkar2018_lp" not in text
    assert f"{len(claims())} claims not run" in claims_page([])


def test_studies_that_may_share_runs_are_no_independent_evidence():
    one = judge(study_for(CLAIMS[BEATS], "for"))
    other = [dataclasses.replace(judgement, study="other") for judgement in one]
    assert "independent evidence" not in claims_page(one)
    assert claims_page([*one, *other]).count("independent evidence") == 1


def test_a_share_of_one_side_is_told_in_per_cent():
    [result] = verdict(study_for(CLAIMS["davis2021-large-values"], "for"), "davis2021-large-values").results
    assert re.fullmatch(r"\d+\.\d\d ± \d\.\d\d %", format_effect(result))
