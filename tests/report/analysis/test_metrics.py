import math

import pandas as pd
import pytest
from planted import Planted, evaluations_of, probes_of

from normlab.report.analysis.measures import MEASURES, chance


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("planted", [0.25, -1.5])
def test_a_measure_comes_to_what_was_planted(name, planted):
    run = Planted({}, 0, {name: planted} if name != "setbacks" else {name: abs(planted)})
    measure = MEASURES[name]
    rows = probes_of(run)[measure.probe] if measure.probe else evaluations_of(run)
    assert measure.value(pd.DataFrame(rows)) == pytest.approx(run.values[name])


def test_a_change_of_mean_is_that_of_a_layer_between_successive_steps_only():
    rows = [(0, "a", 1.0), (1, "a", 1.5), (0, "b", 7.0), (1, "b", 5.0), (9, "a", 99.0)]
    frame = pd.DataFrame(rows, columns=["step", "layer", "mean"]).assign(variance=1.0)
    assert MEASURES["mean_change"].value(frame) == pytest.approx((math.log(0.5) + math.log(2.0)) / 2)


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.probe != "landscape"])
def test_what_was_not_measured_is_nan(name):
    assert math.isnan(MEASURES[name].value(pd.DataFrame({"step": [0, 1], "epoch": [1, 2]})))


def test_a_landscape_that_overflows_at_most_steps_is_infinite():
    rows = pd.DataFrame({"step": [0, 1, 2], "loss_low": [1.0] * 3, "loss_high": [2.0, math.nan, math.nan]})
    assert MEASURES["loss_band"].value(rows) == math.inf


@pytest.mark.parametrize("name", ["scale_drift", "shift_drift", "sharpness"])
def test_what_is_about_the_end_is_not_measured_at_the_start(name):
    row = {"step": 0, "scale_start": 1.0, "scale_drift": 0.0, "shift_drift": 0.0, "eigenvalue": 3.0}
    assert math.isnan(MEASURES[name].value(pd.DataFrame([row])))


@pytest.mark.parametrize("converged", [False, None])
def test_an_eigenvalue_whose_iteration_did_not_converge_is_not_measured(converged):
    rows = [{"step": 9, "eigenvalue": 3.0, "converged": True}, {"step": 9, "eigenvalue": 3.0, "converged": converged}]
    assert MEASURES["sharpness"].value(pd.DataFrame(rows[:1])) == pytest.approx(math.log(3))
    assert math.isnan(MEASURES["sharpness"].value(pd.DataFrame(rows[1:])))


def test_gamma_that_starts_at_0_has_no_relative_drift():
    rows = pd.DataFrame({"step": [1, 1], "scale_start": [0.0, 2.0], "scale_drift": [0.5, 0.5]})
    assert MEASURES["scale_drift"].value(rows) == 0.25


@pytest.mark.parametrize(
    ("kind", "classes", "percent"),
    [("digits", math.nan, 10), ("cifar100", math.nan, 1), ("image_folder", 4.0, 25), ("image_folder", math.nan, 0)],
)
def test_chance_is_one_in_the_number_of_classes(kind, classes, percent):
    assert chance({"dataset": {"kind": kind}}, classes) == percent
