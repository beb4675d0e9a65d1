"""Each cell at its best value: planted studies whose best is known, by what validation and test images say."""

import dataclasses
import json
import math

import numpy as np
import pytest
from planted import Planted, planted
from scipy import stats

from normlab import report
from normlab.common.errors import UserError
from normlab.report import figures
from normlab.report.analysis.metrics import ACCURACY, METRICS, metric_of
from normlab.report.analysis.tables import build_tables
from normlab.report.analysis.tuning import best_of, rate_curves, tune, tuning_warnings
from normlab.report.claims.judge import CONTRADICTED, NOT_RUN, SUPPORTED, judge
from normlab.report.options import options
from normlab.report.render.description import facts, run_counts
from normlab.report.study.provenance import provenance_of
from normlab.report.tables import judged_tables, read_table_options, table_options
from normlab.report.write import render

RATES = (0.001, 0.01, 0.1, 1.0)


def study_of(accuracies, validation=None, **settings):
    """A study of arms by learning rate: `{"bn": {0.1: [90, 91, None]}}`, test accuracies by seed.

    None: diverged; the name of a state: a run in that state; of seeds that are not 0, 1, ... a mapping.
    """
    validation = accuracies if validation is None else validation
    runs, chosen_by = [], []
    for arm, rates in accuracies.items():
        for rate, values in rates.items():
            for seed, value in values.items() if isinstance(values, dict) else enumerate(values):
                where = {"norm.name": arm, "optimizer.lr": rate, **settings}
                state = "diverged" if value is None else value if isinstance(value, str) else "done"
                runs.append(Planted(where, seed, {"test_accuracy": value} if state == "done" else {}, state))
                chosen_by.append(validation[arm][rate][seed])
    return validated(runs, chosen_by)


def validated(runs, chosen_by):
    """The study of these runs, which have these accuracies on validation images at their ends."""
    study = planted(runs)
    places = study.runs[["run", "setting", "arm", "batch", "seed", "state"]]
    evaluations = study.evaluations.merge(places, on="run")
    of_runs = {f"run{i}": value for i, value in enumerate(chosen_by) if not isinstance(value, str)}
    values = evaluations["run"].map(of_runs).astype(float) / 100
    evaluations["val_accuracy"] = values.where(evaluations["epoch"] == 3, 0.99)  # earlier ones mislead
    unknown = dict.fromkeys(("wall_seconds", "peak_memory_bytes", "parameters"), math.nan)
    return dataclasses.replace(study, runs=study.runs.assign(**unknown), evaluations=evaluations)


def tuned(study, given="optimizer.lr"):
    return tune(study, study, given)


def chosen(study):
    return {choice.arm: choice.chosen.values[0] for choice in study.tuning.choices}


def noisy(mean, seeds=4, seed=0):
    return list(mean + np.random.default_rng(seed).normal(0, 0.3, seeds))


PEAKS = {
    "bn": {0.001: noisy(70, seed=1), 0.01: noisy(80, seed=2), 0.1: noisy(95, seed=3), 1.0: noisy(60, seed=4)},
    "none": {0.001: noisy(70, seed=5), 0.01: noisy(85, seed=6), 0.1: [None] * 4, 1.0: [None] * 4},
}


def test_each_arm_gets_the_value_that_is_best_for_it_and_everything_is_of_those_runs():
    study = tuned(study_of(PEAKS))
    assert chosen(study) == {"bn": 0.1, "none": 0.01}
    assert {study.configs[run]["optimizer"]["lr"] for run in study.runs["run"]} == {0.1, 0.01}
    assert set(study.runs["setting"]) == {"digits, resnet18"}
    assert set(study.evaluations["run"]) == set(study.runs["run"])
    assert not any(choice.edges or choice.ties or choice.fewer for choice in study.tuning.choices)
    assert "diverged at 0.1 (4 of 4), 1 (4 of 4)" in " ".join(tuning_warnings(study))


def test_test_images_have_no_part_in_the_choice():
    best_on_test = {"bn": {0.01: [90.0, 90.5, 91.0], 0.1: [99.0, 99.5, 98.0], 1.0: [10.0, 11.0, 12.0]}}
    on_validation = {"bn": {0.01: [99.0, 99.5, 100.0], 0.1: [80.0, 81.0, 82.0], 1.0: [10.0, 11.0, 12.0]}}
    study = tuned(study_of(best_on_test, on_validation))
    assert chosen(study) == {"bn": 0.01}
    tables, _ = judged_tables(study, metric_of(study.evaluations), options())
    assert tables[0].tidy["mean"].item() == pytest.approx(90.5)
    [selected] = [table for table in tables if table.name == "tuned"]
    assert selected.rows["digits, resnet18"][0]["validation (%)"].text == "99.5 [98.3, 100.0]"
    assert "cut at 0 and 100 %" in selected.caption
    shuffled = study_of({"bn": dict(zip(best_on_test["bn"], [[1.0] * 3] * 3, strict=True))}, on_validation)
    assert chosen(tuned(shuffled)) == chosen(study)


def test_choices_from_noise_alone_are_no_better_on_test_images_than_any_value():
    generator = np.random.default_rng(0)
    ends, best = [], []
    for _ in range(60):
        test, val = generator.normal(50, 2, (2, 8, 3))
        accuracies, validation = (
            {"bn": {2.0**-i: list(each) for i, each in enumerate(values)}} for values in (test, val)
        )
        study = tuned(study_of(accuracies, validation))
        ends.append(study.evaluations[study.evaluations["epoch"] == 3]["test_accuracy"].mean() * 100)
        best.append(test.mean(axis=1).max())
    assert np.mean(ends) == pytest.approx(50, abs=4 * 2 / math.sqrt(3 * 60))
    assert np.mean(best) > 51  # what a choice on test images would have reported


@pytest.mark.parametrize(("peak", "edge"), [(0, "smallest"), (1, ""), (2, ""), (3, "largest")])
def test_a_choice_at_the_edge_of_the_grid_says_so(peak, edge):
    rates = {rate: noisy(90 if i == peak else 50, seed=i) for i, rate in enumerate(RATES)}
    study = tuned(study_of({"bn": rates}))
    [choice] = study.tuning.choices
    assert [f"is the {edge} optimizer.lr tried" in text for text in choice.edges] == ([True] if edge else [])
    assert ("edge of those that were tried" in " ".join(tuning_warnings(study))) is bool(edge)


def test_no_weight_decay_at_all_is_no_edge():
    runs = [
        Planted({"optimizer.weight_decay": decay}, seed, {"test_accuracy": 80.0})
        for decay in (0.0, 0.01, 0.1)
        for seed in range(3)
    ]
    study = planted(runs)
    by_run = dict(zip(study.configs, [90.0] * 3 + [50.0] * 6, strict=True))
    study.evaluations["val_accuracy"] = study.evaluations["run"].map(by_run) / 100
    [choice] = tuned(study, "optimizer.weight_decay").tuning.choices
    assert choice.chosen.values == (0.0,)
    assert not choice.edges


def test_ties_are_those_of_the_paired_t_test():
    generator = np.random.default_rng(5)
    for _ in range(30):
        scores = [dict(enumerate(generator.normal(50 + mean, 1, 5))) for mean in (0, 0.5, 1, 2)]
        found = best_of(scores)
        means = [np.mean(list(each.values())) for each in scores]
        assert found.chosen == int(np.argmax(means))
        expected = [
            i
            for i, each in enumerate(scores)
            if i != found.chosen
            and stats.ttest_rel(list(scores[found.chosen].values()), list(each.values())).pvalue >= 0.05
        ]
        assert found.ties == expected


def test_among_equal_values_the_middle_is_chosen():
    same = {0: 50.0, 1: 60.0}
    assert best_of([same] * 5)[:2] == (2, [0, 1, 3, 4])
    assert best_of([{}, {}]) is None


def test_a_value_at_which_all_runs_diverged_is_chosen_only_where_there_is_no_other():
    guessing = {0: 9.7, 1: 9.8}  # finished, and below chance, as which divergence counts
    [choice] = tuned(study_of({"bn": {0.1: [9.7, 9.8], 0.2: [None, None], 0.3: [None, None]}})).tuning.choices
    assert (choice.chosen.values, choice.chosen.scores) == ((0.1,), guessing)
    assert best_of([{0: 10.0}] * 3, lost=range(3)).chosen == 1


def test_runs_that_are_added_to_a_value_do_not_change_the_choice():
    even = [{0: 50.0, 1: 60.0}, {0: 54.0, 1: 64.1}, {0: 10.0, 1: 20.0}]
    more = {**even[2], 2: 10.0, 3: 99.0}
    assert best_of([*even[:2], more]) == best_of(even) == (1, [], [0, 1], [0, 1, 2])
    assert best_of([even[0], {**even[1], 2: 0.0}]) == best_of(even[:2])


def test_a_value_that_lacks_seeds_is_not_chosen_and_values_without_any_in_common_are_compared_as_far_as_they_have():
    same = {0: 50.0, 1: 60.0}
    assert best_of([{0: 99.0}, same, same]) == (1, [2], [0, 1], [1, 2])
    # Each seed is had by most values, and both by one alone: seed 1, which more of them share, chooses.
    assert best_of([{0: 50.0, 1: 50.0}, {0: 60.0}, {1: 60.0}, {1: 55.0}]) == (2, [0, 3], [1], [0, 2, 3])


@pytest.mark.parametrize("swapped", [False, True])
def test_values_that_share_no_seed_are_not_compared_in_either_order(swapped):
    low, high = {0: 60.0, 1: 61.0}, {2: 90.0, 3: 91.0}
    rates = {0.01: high if swapped else low, 0.1: low if swapped else high}
    assert best_of(list(rates.values())) is None
    assert best_of([{0: 50.0, 1: 60.0}, {0: 60.0}, {1: 60.0}]) is None  # each seed has as many
    with pytest.raises(UserError, match=r"(?s)nothing can be chosen.*0\.01: .*Train the values with the same seeds"):
        tuned(study_of({"bn": rates}))
    study = tuned(study_of({"bn": rates, "none": {0.01: [50.0] * 4}}))
    of_arms = {choice.arm: choice for choice in study.tuning.choices}
    assert of_arms["bn"].chosen is None
    assert "nothing is chosen, and no run is shown: bn" in " ".join(tuning_warnings(study))
    assert set(study.runs[study.runs["arm"] == "bn"]["run"]) == {""}
    tables, _ = judged_tables(study, metric_of(study.evaluations), options())
    assert [row["arm"].text for row in tables[0].rows["digits, resnet18"]] == ["bn", "none"]


def test_runs_of_values_that_are_not_chosen_are_counted_and_what_ended_them_is_told():
    ended = ["failed", "interrupted", "running"]
    whole = study_of({"bn": {0.01: [60.0] * 3, 0.1: [80.0] * 3, 1.0: ended, 10.0: [99.0]}})
    whole.runs.loc[whole.runs["state"] == "failed", "note"] = "out of memory"
    study = tuned(whole)
    [choice] = study.tuning.choices
    assert choice.chosen.values == (0.1,)
    assert not choice.edges
    assert choice.fewer == [
        "not tried with these seeds, and not chosen from: 10",
        "not finished with these seeds, and not chosen from: 1 (1 failed, 1 interrupted, 1 running)",
    ]
    assert study.counted() == "7 done, 1 running, 1 failed, 1 interrupted"
    [told] = study.noted()
    assert (told.note, study.called(told.run)) == ("out of memory", f"bn lr=1 seed=0 ({told.run})")
    assert run_counts(study).startswith("10 runs: 7 done")
    assert "3 of 10 runs are shown" in " ".join(tuning_warnings(study))


def test_while_nothing_has_finished_the_runs_that_were_evaluated_are_shown():
    whole = study_of({"bn": {0.01: ["planned"], 0.1: ["running"]}})
    whole = dataclasses.replace(whole, evaluations=whole.evaluations[whole.evaluations["run"] == "run1"])
    assert list(tuned(whole).runs["run"]) == ["run1"]


def test_the_number_that_chose_is_shown():
    accuracies = {0.01: noisy(80, 3), 0.1: [*noisy(90, 3, seed=1), 20.0, 20.0]}
    study = tuned(study_of({"bn": accuracies}))
    [choice] = study.tuning.choices
    assert choice.fewer == ["chosen on the seeds 0, 1, 2, which all values have"]
    tables, _ = judged_tables(study, metric_of(study.evaluations), options())
    [row] = next(table for table in tables if table.name == "tuned").rows["digits, resnet18"]
    assert row["validation (%)"].value == pytest.approx(np.mean(accuracies[0.1][:3]))
    assert row["seeds"].text == "3"


def test_the_facts_of_a_study_do_not_list_the_values_that_were_chosen():
    study = study_of({"bn": {0.01: [80.0, 81.0], 0.1: [90.0, 91.0]}, "none": {0.01: [80.0, 81.0], 0.1: [70.0, 71.0]}})
    assert "Optimizer: sgd (lr=tuned)" in facts(tuned(study))
    assert "Optimizer: sgd (lr=0.01) or sgd (lr=0.1)" in facts(study)


def test_where_no_cell_has_several_values_nothing_is_said_to_be_chosen_on_validation_images():
    study = study_of({"bn": {0.1: noisy(90, 3)}, "none": {0.01: noisy(80, 3)}})
    study.evaluations.pop("val_accuracy")
    found = tuned(study)
    [warning] = tuning_warnings(found)
    assert warning == "No cell has more than one value of optimizer.lr, so nothing was chosen."
    assert "validation" not in found.tuning.sentence
    assert found.tuning.selection()["chosen_on"] is None
    assert [choice.chosen.values for choice in found.tuning.choices] == [(0.1,), (0.01,)]
    single = tuned(study_of({"bn": {0.1: noisy(90, 3), 0.01: noisy(80, 3)}, "none": {0.01: ["running"] * 3}}))
    assert "6 of 9 runs are shown" in " ".join(tuning_warnings(single))
    assert not any("seeds" in text for choice in single.tuning.choices for text in choice.fewer)


def test_a_batch_size_that_an_arm_lacks_has_no_cost_of_trials():
    runs = [
        Planted({"norm.name": arm, "batch": batch, "optimizer.lr": rate}, seed, {"test_accuracy": 90.0})
        for arm, batch in (("bn", 8), ("bn", 32), ("none", 8))
        for rate in (0.01, 0.1)
        for seed in range(3)
    ]
    study = tuned(validated(runs, [90.0] * len(runs)))
    tables, _ = judged_tables(study, metric_of(study.evaluations), options())
    [cost] = [table for table in tables if table.name == "cost"]
    [lacking] = [row for row in cost.rows["digits, resnet18"] if (row["arm"].text, row["batch"].value) == ("none", 32)]
    assert lacking["all tried"].text == "0"
    assert best_of([{0: 50.0}, {0: 40.0, 1: 99.0}, {2: 99.0}]) == (0, [1], [0], [0, 1])  # one pair leaves no interval


def test_fewer_values_or_seeds_than_other_cells_are_told():
    accuracies = {
        "bn": {0.001: noisy(50), 0.01: noisy(80), 0.1: noisy(60), 1.0: [99.0]},
        "none": {0.01: noisy(80, 3), 0.1: noisy(70, 3)},
    }
    study = tuned(study_of(accuracies))
    of_arms = {choice.arm: choice for choice in study.tuning.choices}
    assert chosen(study)["bn"] == 0.01
    assert of_arms["bn"].fewer == ["not tried with these seeds, and not chosen from: 1"]
    assert of_arms["none"].fewer == ["2 of 4 values", "3 of 4 seeds"]
    assert "each arm at its best of 2 to 4 values of optimizer.lr (bn: 4, none: 2)" in study.tuning.sentence


def test_no_table_verdict_or_file_is_without_the_number_of_values():
    study = tuned(study_of(PEAKS))
    sentence = "each arm at its best of 4 values of optimizer.lr, chosen on validation images"
    tables, judgements = judged_tables(study, metric_of(study.evaluations), options())
    assert {"accuracy", "difference", "tuned", "rates", "cost", "verdicts"} <= {table.name for table in tables}
    assert judgements
    for table in tables:
        texts = render(table, "planted", provenance_of(study, table.origin))
        assert all(sentence[1:] in texts[kind].replace("\n", " ") for kind in ("md", "csv", "tex"))
        assert json.loads(texts["sources.json"])["selection"]["settings"] == ["optimizer.lr"]
    assert all(sentence in judgement.place for judgement in judgements)
    [cost] = [table for table in tables if table.name == "cost"]
    assert [row["all tried"].text for row in cost.rows["digits, resnet18"]] == ["16", "16"]
    assert len(provenance_of(study, cost.origin).runs) == 32
    assert len(provenance_of(study, tables[0].origin).runs) == 8


def test_without_validation_images_it_is_refused_with_the_way_to_get_some():
    study = study_of(PEAKS)
    study.evaluations.pop("val_accuracy")
    with pytest.raises(UserError, match=r"(?s)chosen on validation images, and 24 runs.*\+tuning=lr.*dataset.val_size"):
        tuned(study)
    assert tune(study, study, []) is study
    assert tune(study, study, None) is study  # whose runs name nothing


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("optimizer.lrr", "no run of this study has such a setting.\nDid you mean tuned=optimizer.lr?"),
        ("seed", "do not choose between them"),
        ("norm.name", "do not choose between them"),
        ("dataset.name", "do not choose between them"),
        ("model.name", "of another arm or network"),
        ("depth", "of another arm or network"),
        ("optimizer.name", "do not choose between them"),
        (list("abcdef"), "at most 5"),
    ],
)
def test_settings_that_cannot_be_tuned_are_refused(given, sentence):
    with pytest.raises(UserError) as error:
        tuned(study_of(PEAKS), given)
    assert sentence in str(error.value)


def test_runs_can_name_what_is_tuned_and_several_settings_are_chosen_at_once():
    runs, scores = [], []
    for rate in (0.01, 0.1, 1.0):
        for decay in (0.0, 0.1):
            for seed in range(3):
                where = {"optimizer.lr": rate, "optimizer.weight_decay": decay}
                runs.append(Planted(where, seed, {"test_accuracy": 70.0}))
                scores.append(90.0 if (rate, decay) == (0.1, 0.1) else 40.0 + seed)
    study = validated(runs, scores)
    for config in study.configs.values():
        config["tuned"] = ["optimizer.lr", "optimizer.weight_decay"]
    study.configs["run0"]["tuned"] = ["x" * 10**6, {"a": 1}, 3]  # a strange configuration
    [choice] = tune(study, study, None).tuning.choices
    assert choice.chosen.values == (0.1, 0.1)
    assert choice.edges == ["edge: 0.1 is the largest optimizer.weight_decay tried"]
    assert set(rate_curves(tune(study, study, None))) == {"run9", "run10", "run11"}  # along the rates, at that decay
    found = tune(study, study, None)
    found.evaluations["step"] = found.evaluations["epoch"]
    [main, *_] = build_tables(found, ACCURACY, None, (), 0.95)
    drawn = [each for each in figures.draw(found, main, ACCURACY, 0.95) if each.name.startswith("sensitivity")]
    assert [each.name for each in drawn] == ["sensitivity", "sensitivity_2"]  # of the rates, and of the decays
    assert [each.figure.axes[0].get_xscale() for each in drawn] == ["log", "linear"]


# ---- the range of learning rates


def rates_study(wide, narrow, lost=0):
    """Two arms whose accuracies at each of RATES are these, but for one seed, which is far worse at one rate."""
    accuracies = {}
    for arm, means in (("bn", wide), ("none", narrow)):
        accuracies[arm] = {
            rate: [None if mean is None else mean - 0.3 * seed - 20.0 * (seed == 4 and i == lost) for seed in range(5)]
            for i, (rate, mean) in enumerate(zip(RATES, means, strict=True))
        }
    return tuned(study_of(accuracies))


def test_width_and_largest_rate_are_those_within_5_points_of_the_best_of_each_seed():
    study = rates_study([88.0, 90.0, 92.0, 60.0], [90.0, 80.0, None, None])
    curves = rate_curves(study)
    widths = {run: METRICS["lr_width"].read(rows) for run, rows in curves.items()}
    arms = dict(zip(study.runs["run"], study.runs["arm"], strict=True))
    seeds = dict(zip(study.runs["run"], study.runs["seed"], strict=True))
    # Of bn 0.001 to 0.1, in seed 4 from 0.01; of none 0.001 alone, in seed 4 0.01 alone.
    assert {(arms[run], seeds[run]): pytest.approx(width) for run, width in widths.items()} == {
        **{("bn", seed): 2.0 for seed in range(4)},
        ("bn", 4): 1.0,
        **{("none", seed): 0.0 for seed in range(5)},
    }
    largest = [math.exp(METRICS["lr_highest"].read(rows)) for rows in curves.values()]
    assert sorted(largest) == pytest.approx([0.001] * 4 + [0.01] + [0.1] * 5)


def test_a_rate_beyond_a_gap_is_not_tolerated():
    study = rates_study([90.0, 20.0, 89.0, 60.0], [90.0, 90.0, 20.0, 89.5])
    curves = rate_curves(study)
    first = {arm: next(run for run in study.runs[study.runs["arm"] == arm]["run"]) for arm in ("bn", "none")}
    assert METRICS["lr_width"].read(curves[first["bn"]]) == 0
    assert METRICS["lr_width"].read(curves[first["none"]]) == pytest.approx(1)


def test_a_seed_that_learned_at_no_rate_has_no_range():
    study = rates_study([90.0, 80.0, 12.0, None], [14.0, 12.0, None, None])
    arms = dict(zip(study.runs["run"], study.runs["arm"], strict=True))
    assert [arms[run] for run in rate_curves(study)] == ["bn"] * 5


def test_a_seed_whose_runs_go_on_has_no_range_yet():
    study = tuned(study_of({"bn": {rate: [80.0, "running"] for rate in RATES}}))
    assert len(rate_curves(study)) == 1


CLAIMED = ("santurkar2018-rates-width", "bjorck2018-rates-larger")


@pytest.mark.parametrize("swapped", [False, True])
def test_claims_on_the_range_of_rates_are_judged_on_all_that_were_tried(swapped):
    arms = ([80.0, 90.0, 92.0, 91.0], [90.0, 91.0, None, None])
    study = rates_study(*(arms[::-1] if swapped else arms), lost=3)
    verdicts = {judgement.claim.id: judgement.verdict for judgement in judge(study)}
    assert verdicts[CLAIMED[1]] == (CONTRADICTED if swapped else SUPPORTED)
    untuned = tune(study.tuning.study, study.tuning.study, [])
    assert not set(CLAIMED) & {judgement.claim.id for judgement in judge(untuned)}


def test_arms_at_different_rates_are_compared_where_the_rate_is_tuned_and_only_there():
    study = study_of(PEAKS)
    ours = "peerthum2023-bn-none"
    assert {j.verdict for j in judge(tuned(study)) if j.claim.id == ours} == {SUPPORTED}
    named = [j for j in judge(tuned(study)) if j.claim.id == "santurkar2018-speed"]
    assert not named or named[0].verdict == NOT_RUN  # it is about one rate


def test_tables_keep_the_option_and_those_made_before_there_was_one_are_not_tuned():
    kept = table_options(options(tuned="optimizer.lr"))
    assert read_table_options(kept).tuned == "optimizer.lr"
    assert read_table_options({name: value for name, value in kept.items() if name != "tuned"}).tuned == []


def test_a_report_of_records_is_tuned_packed_and_verified(add_run, tmp_path, capsys):
    for norm, rates in (("bn", (0.5, 0.9, 0.6)), ("none", (0.8, 0.3, 0.2))):
        for rate, mean in zip((0.01, 0.1, 1.0), rates, strict=True):
            for seed in range(3):
                run = add_run(norm, seed=seed, accuracies=(mean, mean, mean + 0.01 * seed), optimizer__lr=rate)
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                text = "".join(json.dumps({**row, "val_accuracy": row["test_accuracy"]}) + "\n" for row in rows)
                (run / "metrics.jsonl").write_text(text)
    outputs = tmp_path / "outputs"
    chosen_by = report.options(tuned="optimizer.lr", figures=False)
    page = report.build("study", outputs, chosen_by)
    assert "91.0 ± 2.5" in (page.parent / "accuracy.md").read_text()
    assert "81.0 ± 2.5" in (page.parent / "accuracy.md").read_text()
    assert "Chosen settings" in page.read_text()
    assert "each arm at its best of 3 values of optimizer.lr" in capsys.readouterr().out
    packed = report.pack_study("study", outputs, chosen_by)
    capsys.readouterr()
    report.verify_study(str(packed), outputs)
    assert "holds  Tables made anew with tuned=optimizer.lr are the same to the byte" in capsys.readouterr().out
    for made in (report.build_claims(outputs, chosen_by), report.build_results(outputs, outputs / "r.md", chosen_by)):
        assert "each arm at its best of 3 values of optimizer.lr" in made.read_text()
