import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from normlab.report.analysis.metrics import ACCURACY, LOSS, metric_of
from normlab.report.analysis.tables import build_tables, probe_tables
from normlab.report.render.layout import filled
from normlab.report.study import load
from normlab.report.study.provenance import provenance_of


@pytest.fixture
def probe_tables_of(study):
    return lambda: {table.name: table for table in probe_tables(load(study), 0.95)}


@pytest.fixture
def tables(study):
    def build(baseline="bn", thresholds=(0.8, 0.95)):
        found = load(study)
        built = build_tables(found, metric_of(found.evaluations), baseline, thresholds, 0.95)
        return {table.name: table for table in built}

    return build


def row(table, **where):
    frame = table.tidy
    for key, value in where.items():
        frame = frame[frame[key] == value]
    [found] = frame.to_dict("records")
    return found


def texts_of(table):
    """The rows for a reader, one frame per setting; dashes where a row lacks a cell."""
    return {
        setting: pd.DataFrame([{heading: cell.text for heading, cell in row.items()} for row in filled(rows)])
        for setting, rows in table.rows.items()
    }


def cell(table, arm, batch, setting="digits, resnet18"):
    return texts_of(table)[setting].set_index("arm").loc[arm, f"batch {batch}"]


def test_accuracy_is_the_mean_of_the_last_epoch_with_scipys_interval(add_run, tables):
    finals = [0.80, 0.82, 0.87]
    for seed, final in enumerate(finals):
        add_run(seed=seed, accuracies=(0.1, 0.99, final))
    found = row(tables()["accuracy"], arm="bn")
    sample = 100 * np.array(finals)
    low, high = stats.t.interval(0.95, 2, sample.mean(), stats.sem(sample))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((83.0, low, high))
    assert cell(tables()["accuracy"], "bn", 8) == f"83.0 ± {high - 83:.1f} (n=3)"


def test_intervals_are_cut_at_what_is_possible_and_shown_by_their_ends(add_run, tables):
    for seed, final in enumerate((0.90, 0.92, 0.97)):
        add_run(seed=seed, accuracies=(0.1, 0.99, final))
        add_run("none", seed=seed, accuracies=(0.1, 0.2, 0.5 * (seed - 1) ** 2))
    found = tables(baseline="bn")
    bn = row(found["accuracy"], arm="bn")
    half = stats.t.ppf(0.975, 2) * stats.sem([90, 92, 97])
    assert (bn["low"], bn["high"]) == pytest.approx((93 - half, 100))
    assert cell(found["accuracy"], "bn", 8) == f"93.0 [{93 - half:.1f}, 100.0] (n=3)"
    assert (row(found["accuracy"], arm="none")["low"]) == 0
    assert row(found["difference"], arm="none")["low"] == -100
    assert "cut at 0 and 100 %" in found["accuracy"].caption
    assert "cut at -100 and 100 points" in found["difference"].caption


def test_a_caption_explains_what_its_table_has_and_nothing_else(add_run, tables):
    for arm in ("bn", "none"):
        for seed in (0, 1):
            add_run(arm, seed=seed)
    plain = tables()["accuracy"]
    assert plain.caption.endswith("mean over seeds, ± half of the 95 % t-interval.")
    assert plain.rule == " Bold: at each batch size the best mean."
    add_run("gn", seed=0)
    assert "Missing: not started" in tables()["accuracy"].caption  # its seed 1
    add_run("gn", seed=1, accuracies=(0.1,), state="diverged")
    lost = tables()["accuracy"]
    assert "over the n seeds whose run is done" in lost.caption
    assert "Diverged runs have no final value" in lost.caption
    assert "No ± where n = 1" in lost.caption
    assert "Missing" not in lost.caption
    assert lost.rule.endswith("best mean, among arms of whose finished runs none diverged or lacks the value.")


def test_a_cell_without_finished_runs_says_why(add_run, tables):
    add_run("bn", 8)
    add_run("bn", 32, accuracies=(), state="diverged")
    add_run("none", 8, accuracies=(0.5,), state="running")
    texts = tables()["accuracy"]
    assert cell(texts, "bn", 32) == "-- 1 of 1 diverged"
    assert cell(texts, "none", 8) == "-- missing"
    assert cell(texts, "none", 32) == "-- missing"  # it has no folder


def test_every_planned_run_is_counted_exactly_once(add_run, tables):
    for seed, state in enumerate(["done", "diverged", "failed", "interrupted", "running", None]):
        add_run(seed=seed, state=state)
    found = row(tables()["accuracy"], arm="bn")
    assert (found["done"], found["diverged"], found["missing"]) == (1, 1, 4)
    assert cell(tables()["accuracy"], "bn", 8) == "90.0 (n=1, 1 of 6 diverged, 4 of 6 missing)"


def test_settings_are_never_mixed_in_a_cell(add_run, tables):
    add_run(depth=18, accuracies=(0.1, 0.1, 0.9))
    add_run(depth=101, accuracies=(0.1, 0.1, 0.5))
    add_run(depth=34, accuracies=(0.1, 0.1, 0.7))
    texts = tables()["accuracy"]
    assert list(texts_of(texts)) == ["digits, resnet18", "digits, resnet34", "digits, resnet101"]
    assert cell(texts, "bn", 8, "digits, resnet101") == "50.0 (n=1)"


def test_known_arms_come_first_and_batches_by_number(add_run, tables):
    for norm in ("zeta", "none", "bn", "alpha"):
        for batch in (128, 8, 32):
            add_run(norm, batch)
    texts = texts_of(tables()["accuracy"])["digits, resnet18"]
    assert list(texts["arm"]) == ["bn", "none", "alpha", "zeta"]
    assert list(texts.columns) == ["arm", "batch 8", "batch 32", "batch 128"]


def test_differences_are_paired_by_seed(add_run, tables):
    # The seeds differ by far more than the arms do: unpaired, this difference would be lost.
    for seed, level in ((0, 0.2), (1, 0.5), (2, 0.8)):
        add_run("bn", seed=seed, accuracies=(0, 0, level))
        add_run("none", seed=seed, accuracies=(0, 0, level - 0.01 * (seed + 1)))
    add_run("none", seed=9, accuracies=(0, 0, 0.99))  # has no partner
    found = row(tables()["difference"], arm="none")
    expected = stats.t.interval(0.95, 2, -2.0, 1 / np.sqrt(3))
    assert found["mean"] == pytest.approx(-2.0)
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert (found["n"], found["done"], found["missing"]) == (3, 3, 1)


def test_a_pair_is_diverged_if_either_run_is(add_run, tables):
    for seed in (0, 1, 2):
        add_run("bn", seed=seed, state="diverged" if seed == 0 else "done")
        add_run("none", seed=seed, state="diverged" if seed == 1 else "done")
    found = row(tables()["difference"], arm="none")
    assert (found["n"], found["diverged"], found["missing"]) == (1, 2, 0)
    assert cell(tables()["difference"], "none", 8) == "+0.00 (n=1, 2 of 3 diverged)"


def test_a_test_of_the_pairs_that_survived_says_so_beside_its_p_and_below_the_table(add_run, tables):
    plant(add_run, bn={8: [0.9, 0.91, 0.93, 0.9]}, none={8: [0.8, 0.83, None, 0.79]}, gn={8: [0.9, 0.8, 0.85, 0.7]})
    difference = tables()["difference"]
    assert "(n=3, 1 of 4 diverged, survivors' p = " in cell(difference, "none", 8)
    assert "(n=4, p = " in cell(difference, "gn", 8)
    assert "Survivors' p and d_z" in difference.caption
    assert "Survivors" not in tables(baseline="none")["accuracy"].caption


def test_a_mean_of_some_of_the_done_runs_says_of_how_many(add_run, add_probe, tables, probe_tables_of):
    for seed, converged in ((0, True), (1, False), (2, True)):
        row = {"step": 5, "eigenvalue": 4.0, "converged": converged, "weight_norm": 7.0}
        add_probe(add_run(seed=seed), "sharpness", [row])
    [texts] = texts_of(probe_tables_of()["probe_sharpness"]).values()
    assert (texts["largest eigenvalue"].item(), texts["‖weights‖"].item()) == ("4 [4, 4] (2 of 3)", "7.000 ± 0.000")


def test_an_arm_whose_measured_runs_all_diverged_has_a_row_that_says_so(add_run, add_probe, probe_tables_of):
    add_probe(add_run(), "sharpness", [{"step": 5, "eigenvalue": 4.0, "converged": True, "weight_norm": 7.0}])
    add_run("none", accuracies=(), state="diverged", probe={"sharpness": {"times": 3}})
    [texts] = texts_of(probe_tables_of()["probe_sharpness"]).values()
    assert texts.set_index("arm").loc["none"].tolist() == ["8", "0 of 1, 1 diverged", "--", "--", "--"]


def test_convergence_and_cost_are_of_the_done_runs(add_run, tables):
    add_run(seed=0, accuracies=(0.5, 0.9, 0.8))
    add_run(seed=1, accuracies=(0.1,), state="diverged")
    built = tables()
    [place] = texts_of(built["cost"])["digits, resnet18"].to_dict("records")
    cost = {"seconds": "6", "images/s": "100", "peak MiB": "1", "parameters": "7"}
    assert place == {"arm": "bn", "batch": "8", "runs": "1 of 2, 1 diverged", **cost}
    [texts] = texts_of(built["convergence"])["digits, resnet18"].to_dict("records")
    assert {**texts, **cost} == place | {
        **{"final (%)": "80.0", "best (%)": "90.0", "train (%)": "85.0", "train-test gap": "+5.0"}
    }


def test_an_accuracy_is_reached_at_the_first_evaluation_that_shows_it(add_run, tables):
    add_run(seed=0, accuracies=(0.5, 0.8, 0.7))
    add_run(seed=1, accuracies=(0.8, 0.9, 0.96))
    built = tables(thresholds=(0.8, 0.95, 0.99))
    assert row(built["epochs_to_accuracy"], quantity="epochs_to_0.8")["mean"] == 1.5
    assert row(built["seconds_to_accuracy"], quantity="seconds_to_0.8")["mean"] == 3.0
    [texts] = texts_of(built["epochs_to_accuracy"])["digits, resnet18"].to_dict("records")
    assert (texts["95 %"], texts["99 %"]) == ("3.0 (1 of 2)", "not reached")


def test_thresholds_that_are_near_each_other_have_columns_of_their_own(add_run, tables):
    add_run(accuracies=(0.9999997, 0.9, 1.0))
    texts = texts_of(tables(thresholds=(0.07, 0.9999995, 0.9999999))["epochs_to_accuracy"])["digits, resnet18"]
    assert texts[["7 %", "99.99995 %", "99.99999 %"]].iloc[0].tolist() == ["1.0", "1.0", "3.0"]


def test_runs_without_accuracies_are_compared_by_their_loss(add_run, add_losses, study, tables):
    add_losses("none", (1.0, 1 / 2, 1 / 3))
    assert metric_of(load(study).evaluations) == LOSS
    built = tables()
    assert cell(built["loss"], "none", 8, "linear_regression, deep_linear18") == "0.333 (n=1)"
    assert "epochs_to_accuracy" not in built
    add_run()
    assert metric_of(load(study).evaluations) == ACCURACY


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ((0.00123456,), "0.00123 (n=1)"),
        ((0.98765,), "0.988 (n=1)"),
        ((17.123,), "17.12 (n=1)"),
        ((1712.3456,), "1,712 (n=1)"),
        ((21_333_002_240.0,), "2.13e+10 (n=1)"),
        ((1700.0, 1710.0), "1,705 ± 64 (n=2)"),  # t = 12.706, s / sqrt(2) = 5
        ((1.0, 1001.0), "501 ± 6,353 (n=2)"),
        ((0.0,), "0.000 (n=1)"),
    ],
)
def test_losses_of_any_size_show_three_or_four_digits(add_losses, tables, losses, shown):
    for seed, loss in enumerate(losses):
        add_losses("bn", (2 * loss, loss), seed=seed)
    assert cell(tables()["loss"], "bn", 8, "linear_regression, deep_linear18") == shown


def test_the_best_loss_is_the_lowest_and_a_gap_above_0_is_worse_on_test_images(add_losses, tables):
    add_losses("bn", (3000.0, 1000.0, 2000.0))
    add_losses("none", (3000.0, 2000.0, 2500.0))
    built = tables()
    first = texts_of(built["convergence"])["linear_regression, deep_linear18"].iloc[0]
    assert (first["final"], first["best"], first["train"]) == ("2,000", "1,000", "1,800")
    assert first["test-train gap"] == "+200.0"
    assert cell(built["difference"], "none", 8, "linear_regression, deep_linear18") == "+500.0 (n=1)"


def test_a_study_of_which_all_runs_diverged_has_its_tables(add_run, tables):
    add_run("bn", accuracies=(), state="diverged")
    add_run("none", accuracies=(0.1,), state="diverged")
    built = tables()
    assert cell(built["accuracy"], "none", 8) == "-- 1 of 1 diverged"
    assert texts_of(built["epochs_to_accuracy"])["digits, resnet18"]["80 %"].tolist() == ["--", "--"]


def plant(add_run, **arms):
    """One run per arm, batch size and seed: `arm={batch: [final accuracy of seed 0, ...]}`; None: diverged."""
    for arm, batches in arms.items():
        for batch, finals in batches.items():
            for seed, final in enumerate(finals):
                done = final is not None
                add_run(arm, batch, seed, (0.1, 0.2, final) if done else (0.1,), state="done" if done else "diverged")


def test_differences_have_a_p_value_corrected_over_the_table_and_an_effect_size(add_run, tables):
    bn = [0.90, 0.92, 0.91, 0.93]
    none, affine = [0.85, 0.90, 0.86, 0.89], [0.80, 0.81, 0.82, 0.84]
    plant(add_run, bn={8: bn}, none={8: none}, affine={8: affine})
    found = {arm: row(tables()["difference"], arm=arm) for arm in ("none", "affine")}
    p_values = {arm: stats.ttest_rel(values, bn).pvalue for arm, values in (("none", none), ("affine", affine))}
    assert {arm: found[arm]["p"] for arm in found} == pytest.approx(p_values)
    assert found["affine"]["p_holm"] == pytest.approx(2 * p_values["affine"])  # the smaller of two
    assert found["none"]["p_holm"] == pytest.approx(max(p_values["none"], 2 * p_values["affine"]))
    t = stats.ttest_rel(none, bn).statistic
    assert found["none"]["d_z"] == pytest.approx(t / 2)
    text = cell(tables()["difference"], "none", 8)
    assert text.endswith(f"(n=4, p = {found['none']['p_holm']:.3f}, d_z = {t / 2:.1f})")


def test_fewer_than_3_pairs_have_words_in_place_of_a_p_value(add_run, tables):
    plant(add_run, bn={8: [0.9, 0.91]}, none={8: [0.5, 0.52]})
    difference = tables()["difference"]
    assert np.isnan(row(difference, arm="none")["p"])
    assert "n = 2: no interval worth the name; a difference cannot be told from chance." in difference.caption
    assert "p = " not in cell(difference, "none", 8)


def test_overall_is_the_mean_over_batch_sizes_whatever_their_number_of_seeds(add_run, tables):
    plant(add_run, bn={8: [0.9, 0.8, 0.7], 32: [0.6] * 5}, none={8: [0.5, 0.6, 0.9], 32: [0.5] * 5})
    overall = tables()["overall"]
    found = {(r["arm"], r["quantity"]): r for r in overall.tidy.to_dict("records")}
    assert found["bn", "mean"]["mean"] == pytest.approx(70)
    assert found["none", "minus_baseline"]["mean"] == pytest.approx((-40 / 3 - 10) / 2)
    by_scipy = (stats.mannwhitneyu([0.5, 0.6, 0.9], [0.9, 0.8, 0.7]).statistic / 9 + 0) / 2
    assert found["none", "beats_baseline"]["mean"] == pytest.approx(by_scipy)
    assert all(r["low"] <= r["mean"] <= r["high"] and r["n"] == 3 for r in found.values())
    [texts] = texts_of(overall).values()
    assert list(texts.columns) == ["arm", "cells", "seeds", "mean (%)", "minus bn", "P(beats bn)"]
    assert texts.iloc[0].tolist()[:3] == ["bn", "2 of 2", "3"]
    assert texts.iloc[0].tolist()[-1] == "--"


def test_overall_counts_a_diverged_run_as_chance(add_run, tables):
    plant(add_run, bn={8: [0.9], 32: [0.9]}, none={8: [0.5], 32: [None]})
    found = row(tables()["overall"], arm="none", quantity="mean")
    assert found["mean"] == pytest.approx((50 + 10) / 2)
    assert np.isnan(found["low"])  # of one seed


def test_overall_says_how_many_cells_an_arm_has(add_run, tables):
    plant(add_run, bn={8: [0.9], 32: [0.9]}, none={8: [0.5]})
    [texts] = texts_of(tables()["overall"]).values()
    assert texts.set_index("arm")["cells"].to_dict() == {"bn": "2 of 2", "none": "1 of 2"}


def test_overall_is_per_setting_and_over_all_settings(add_run, tables):
    for depth in (18, 34):
        for batch in (8, 32):
            add_run("bn", batch, depth=depth, accuracies=(0.1, 0.1, depth / 100))
    texts = texts_of(tables()["overall"])
    assert [(setting, frame["mean (%)"].item()) for setting, frame in texts.items()] == [
        ("digits, resnet18", "18.0"),
        ("digits, resnet34", "34.0"),
        ("all settings", "26.0"),
    ]


def test_without_a_baseline_overall_has_means_only_and_of_one_cell_there_is_none(add_run, tables, probe_tables_of):
    add_run("bn")
    assert not {"overall", "difference"} & set(tables(baseline=None))
    assert probe_tables_of() == {}
    plant(add_run, none={8: [0.9], 32: [0.8]})
    assert "difference" not in tables(baseline="gn")
    overall = tables(baseline=None)["overall"]
    assert set(overall.tidy["quantity"]) == {"mean"}
    assert "None" not in overall.caption


def means_by_arm(table):
    return table.tidy.pivot(index="arm", columns="quantity", values="mean")


def test_covariate_shift_is_a_geometric_mean_over_layers_that_have_a_shift_and_over_seeds(
    add_run, add_probe, probe_tables_of
):
    for seed, l2 in enumerate((1.0, 100.0)):
        rows = [
            {"step": 0, "layer": "a", "position": 0, "l2": 0.0, "cosine": 1.0, "gradient_norm": 2.0},
            {"step": 0, "layer": "b", "position": 1, "l2": l2, "cosine": 0.25, "gradient_norm": 2.0},
        ]
        add_probe(add_run(seed=seed), "ics", rows)
    table = probe_tables_of()["probe_ics"]
    found = means_by_arm(table).loc["bn"]
    assert (found["ics"], found["relative_ics"], found["ics_cosine"]) == pytest.approx((10, 5, 0.25))
    [text] = texts_of(table)["digits, resnet18"]["‖G - G'‖"]
    half = 12.7062047364 * math.log(10)  # of the t-interval over two logarithms, ln 1 and ln 100
    assert text == f"10 [{10 * math.exp(-half):.3g}, {10 * math.exp(half):.3g}]"


def test_drift_is_that_of_the_last_measurement(add_run, add_probe, probe_tables_of):
    start = {"layer": "bn1", "position": 0, "scale_mean": 0.1, "scale_start": 0.1, "shift_mean": 0.0}
    rows = [start | {"step": step, "scale_drift": 0.01 * step, "shift_drift": 0.5 * step} for step in (0, 4)]
    add_probe(add_run(), "affine", rows)
    found = means_by_arm(probe_tables_of()["probe_affine"]).loc["bn"]
    assert (found["scale_drift"], found["shift_drift"], found["scale_mean"]) == pytest.approx((0.4, 2.0, 0.1))


def test_activations_change_from_a_step_to_the_next_and_grow_from_the_first_site_to_the_last(
    add_run, add_probe, probe_tables_of
):
    same = {"skewness": 0.5, "large": 0.01, "large_normalised": 0.02}
    rows = [
        {"step": step, "layer": f"bn{i}", "position": i, "mean": 0.3 * (step % 2), "variance": 1.0 - 0.5 * (step % 2)}
        | {"output_norm": 2.0 * 3.0 ** (i * step), "sample_cosine": 0.1 * i, "stable_rank": 2.0**i, **same}
        for step in (0, 1, 8, 9)
        for i in (2, 0, 1)
    ]
    add_probe(add_run(), "activations", rows)
    table = probe_tables_of()["probe_activations"]
    found = means_by_arm(table).loc["bn"]
    assert (found["mean_change"], found["variance_change"]) == pytest.approx((0.3, 0.5))
    assert found["output_growth"] == pytest.approx(3.0**18)
    assert (found["sample_cosine"], found["stable_rank"]) == pytest.approx((0.1, 2.0))  # the latter's mean is geometric
    assert (found["large"], found["large_share"], found["skewness"]) == pytest.approx((1, 2, 0.5))
    assert texts_of(table)["digits, resnet18"]["change of mean"].tolist() == ["0.3"]


def test_only_done_runs_count_and_only_cells_with_measurements_have_a_row(add_run, add_probe, probe_tables_of):
    row = {"step": 5, "eigenvalue": 4.0, "converged": True, "weight_norm": 7.0}
    add_probe(add_run(seed=0), "sharpness", [row])
    add_probe(add_run(seed=1, state="diverged", accuracies=()), "sharpness", [row | {"eigenvalue": 1e9}])
    add_run("none")
    table = probe_tables_of()["probe_sharpness"]
    assert means_by_arm(table)["sharpness"].to_dict() == {"bn": pytest.approx(4.0)}
    assert texts_of(table)["digits, resnet18"]["runs"].tolist() == ["1 of 2, 1 diverged"]


def test_runs_of_a_cell_without_the_probe_are_no_part_of_its_table(add_run, add_probe, probe_tables_of, study):
    measured = add_run(seed=0)
    add_probe(measured, "sharpness", [{"step": 5, "eigenvalue": 4.0, "converged": True, "weight_norm": 7.0}])
    add_run(seed=1)
    table = probe_tables_of()["probe_sharpness"]
    assert texts_of(table)["digits, resnet18"]["runs"].tolist() == ["1"]
    assert provenance_of(load(study), table.origin).runs == [measured.name]
    diverged = add_run(seed=2, state="diverged", accuracies=())  # the table counts it
    table = probe_tables_of()["probe_sharpness"]
    assert texts_of(table)["digits, resnet18"]["runs"].tolist() == ["1 of 2, 1 diverged"]
    assert set(provenance_of(load(study), table.origin).runs) == {measured.name, diverged.name}


def test_what_a_run_did_not_measure_is_dashes_and_what_none_did_is_no_column(add_run, add_probe, probe_tables_of):
    row = {"step": 5, "layer": "bn1", "position": 0, "shift_mean": 0.0, "shift_drift": 0.2}
    unscaled = row | {"scale_mean": None, "scale_start": None, "scale_drift": None}
    add_probe(add_run("ln"), "affine", [unscaled])
    texts = texts_of(probe_tables_of()["probe_affine"])["digits, resnet18"]
    assert "gamma" not in texts
    add_probe(add_run("bn"), "affine", [unscaled | {"scale_mean": 0.5}])
    texts = texts_of(probe_tables_of()["probe_affine"])["digits, resnet18"].set_index("arm")
    assert texts["gamma"].to_dict() == {"bn": "0.500", "ln": "--"}
    assert texts["drift of beta"].to_dict() == {"bn": "0.200", "ln": "0.200"}
