import math

import pandas as pd
import pytest
from planted import PLANTABLE, Planted, evaluations_of, probes_of

from normlab.report.analysis.metrics import METRICS, chance, ends_of_tasks, task_metrics


@pytest.mark.parametrize("name", PLANTABLE)
@pytest.mark.parametrize("planted", [0.25, -1.5])
def test_a_metric_comes_to_what_was_planted(name, planted):
    run = Planted({}, 0, {name: planted} if name != "setbacks" else {name: abs(planted)})
    metric = METRICS[name]
    rows = probes_of(run)[metric.probe] if metric.probe else evaluations_of(run)
    assert metric.read(pd.DataFrame(rows)) == pytest.approx(run.values[name])


def test_a_change_of_mean_is_that_of_a_layer_between_successive_steps_only():
    rows = [(0, "a", 1.0), (1, "a", 1.5), (0, "b", 7.0), (1, "b", 5.0), (9, "a", 99.0)]
    frame = pd.DataFrame(rows, columns=["step", "layer", "mean"]).assign(variance=1.0)
    assert METRICS["mean_change"].read(frame) == pytest.approx((math.log(0.5) + math.log(2.0)) / 2)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.probe != "landscape"])
def test_what_was_not_measured_is_nan(name):
    assert math.isnan(METRICS[name].read(pd.DataFrame({"step": [0, 1], "epoch": [1, 2]})))


def test_a_landscape_that_overflows_at_most_steps_is_infinite():
    rows = pd.DataFrame({"step": [0, 1, 2], "loss_low": [1.0] * 3, "loss_high": [2.0, math.nan, math.nan]})
    assert METRICS["loss_band"].read(rows) == math.inf


def test_accuracy_and_forgetting_over_tasks_by_hand():
    """Four tasks of two evaluations, of which the second counts."""
    ends = [(0.9,), (0.7, 0.8), (0.75, 0.5, 0.6), (0.2, 0.6, 0.1, 1.0)]
    rows = []
    for task, accuracies in enumerate(ends, start=1):
        of_each = {f"task_{n}_accuracy": x for n, x in enumerate(accuracies, start=1)}
        end = {"task": task, "test_accuracy": sum(accuracies) / task, **of_each}
        rows += [{**end, **dict.fromkeys(of_each, 1.0), "test_accuracy": 1.0}, end]
    frame = pd.DataFrame(rows).assign(epoch=range(1, 9), run="one")
    expected = (90 + 75 + 185 / 3 + 47.5) / 4
    assert METRICS["incremental_accuracy"].read(frame) == pytest.approx(expected)
    assert METRICS["forgetting"].read(frame) == pytest.approx(((90 - 20) + (80 - 60) + (60 - 10)) / 3)
    assert [metric.name for metric in task_metrics(frame)[2:]] == [f"task_{n}_accuracy" for n in range(1, 5)]
    assert [metric.read(frame) for metric in task_metrics(frame)[2:]] == pytest.approx([20, 60, 10, 100])
    both = pd.concat([frame, frame.assign(run="other")])
    assert list(ends_of_tasks(both)["epoch"]) == [2, 4, 6, 8] * 2


@pytest.mark.parametrize("name", ["scale_drift", "shift_drift", "sharpness"])
def test_what_is_about_the_end_is_not_measured_at_the_start(name):
    row = {"step": 0, "scale_start": 1.0, "scale_drift": 0.0, "shift_drift": 0.0, "eigenvalue": 3.0}
    assert math.isnan(METRICS[name].read(pd.DataFrame([row])))


@pytest.mark.parametrize("converged", [False, None])
def test_an_eigenvalue_whose_iteration_did_not_converge_is_not_measured(converged):
    rows = [{"step": 9, "eigenvalue": 3.0, "converged": True}, {"step": 9, "eigenvalue": 3.0, "converged": converged}]
    assert METRICS["sharpness"].read(pd.DataFrame(rows[:1])) == pytest.approx(math.log(3))
    assert math.isnan(METRICS["sharpness"].read(pd.DataFrame(rows[1:])))


def test_gamma_that_starts_at_0_has_no_relative_drift():
    rows = pd.DataFrame({"step": [1, 1], "scale_start": [0.0, 2.0], "scale_drift": [0.5, 0.5]})
    assert METRICS["scale_drift"].read(rows) == 0.25


@pytest.mark.parametrize(
    ("kind", "classes", "percent"),
    [("digits", math.nan, 10), ("cifar100", math.nan, 1), ("image_folder", 4.0, 25), ("image_folder", math.nan, 0)],
)
def test_chance_is_one_in_the_number_of_classes(kind, classes, percent):
    assert chance({"dataset": {"kind": kind}}, classes) == percent
