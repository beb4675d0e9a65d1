"""Tables of probes: numbers per arm from planted measurements."""

import math

import pytest

from normlab.report.analysis.tables import probe_tables
from normlab.report.study import load
from normlab.report.study.provenance import provenance_of


@pytest.fixture
def tables(study):
    return lambda: {table.name: table for table in probe_tables(load(study), 0.95)}


def means(table):
    return table.tidy.pivot(index="arm", columns="quantity", values="mean")


def test_without_probes_there_is_no_table(add_run, tables):
    add_run()
    assert tables() == {}


def test_covariate_shift_is_a_geometric_mean_over_layers_that_have_a_shift_and_over_seeds(add_run, add_probe, tables):
    for seed, l2 in enumerate((1.0, 100.0)):
        rows = [
            {"step": 0, "layer": "a", "position": 0, "l2": 0.0, "cosine": 1.0, "gradient_norm": 2.0},
            {"step": 0, "layer": "b", "position": 1, "l2": l2, "cosine": 0.25, "gradient_norm": 2.0},
        ]
        add_probe(add_run(seed=seed), "ics", rows)
    table = tables()["probe_ics"]
    found = means(table).loc["bn"]
    assert (found["ics"], found["relative_ics"], found["ics_cosine"]) == pytest.approx((10, 5, 0.25))
    [text] = table.texts["digits, resnet18"]["‖G - G'‖"]
    half = 12.7062047364 * math.log(10)  # of the t-interval over two logarithms, ln 1 and ln 100
    assert text == f"10 [{10 * math.exp(-half):.3g}, {10 * math.exp(half):.3g}]"


def test_drift_is_that_of_the_last_measurement(add_run, add_probe, tables):
    rows = [
        {
            **{"step": step, "layer": "bn1", "position": 0, "scale_mean": 0.1, "scale_start": 0.1},
            **{"scale_drift": 0.01 * step, "shift_mean": 0.0, "shift_drift": 0.5 * step},
        }
        for step in (0, 4)
    ]
    add_probe(add_run(), "affine", rows)
    found = means(tables()["probe_affine"]).loc["bn"]
    assert (found["scale_drift"], found["shift_drift"], found["scale_mean"]) == pytest.approx((0.4, 2.0, 0.1))


def test_activations_change_from_a_step_to_the_next_and_grow_from_the_first_site_to_the_last(
    add_run, add_probe, tables
):
    rows = [
        {
            **{
                "step": step,
                "layer": f"bn{i}",
                "position": i,
                "skewness": 0.5,
                "large": 0.01,
                "large_normalised": 0.02,
            },
            **{"mean": 0.3 * (step % 2), "variance": 1.0 - 0.5 * (step % 2), "output_norm": 2.0 * 3.0 ** (i * step)},
        }
        for step in (0, 1, 8, 9)
        for i in (2, 0, 1)
    ]
    add_probe(add_run(), "activations", rows)
    table = tables()["probe_activations"]
    found = means(table).loc["bn"]
    assert (found["mean_change"], found["variance_change"]) == pytest.approx((0.3, 0.5))
    assert found["output_growth"] == pytest.approx(3.0**18)
    assert (found["large"], found["large_share"], found["skewness"]) == pytest.approx((1, 2, 0.5))
    assert table.texts["digits, resnet18"]["change of mean"].tolist() == ["0.3"]


def test_only_done_runs_count_and_only_cells_with_measurements_have_a_row(add_run, add_probe, tables):
    row = {"step": 5, "eigenvalue": 4.0, "converged": True, "weight_norm": 7.0}
    add_probe(add_run(seed=0), "sharpness", [row])
    add_probe(add_run(seed=1, state="diverged", accuracies=()), "sharpness", [row | {"eigenvalue": 1e9}])
    add_run("none")
    table = tables()["probe_sharpness"]
    assert means(table)["sharpness"].to_dict() == {"bn": pytest.approx(4.0)}
    assert table.texts["digits, resnet18"]["runs"].tolist() == ["1 of 2, 1 diverged"]


def test_runs_of_a_cell_without_the_probe_are_no_part_of_its_table(add_run, add_probe, tables, study):
    measured = add_run(seed=0)
    add_probe(measured, "sharpness", [{"step": 5, "eigenvalue": 4.0, "converged": True, "weight_norm": 7.0}])
    add_run(seed=1)
    table = tables()["probe_sharpness"]
    assert table.texts["digits, resnet18"]["runs"].tolist() == ["1"]
    assert provenance_of(load(study), table.origin).runs == [measured.name]
    diverged = add_run(seed=2, state="diverged", accuracies=())  # the table counts it
    table = tables()["probe_sharpness"]
    assert table.texts["digits, resnet18"]["runs"].tolist() == ["1 of 2, 1 diverged"]
    assert set(provenance_of(load(study), table.origin).runs) == {measured.name, diverged.name}


def test_what_was_not_measured_is_dashes(add_run, add_probe, tables):
    row = {"step": 5, "layer": "bn1", "position": 0, "shift_mean": 0.0, "shift_drift": 0.2}
    add_probe(add_run(), "affine", [row | {"scale_mean": None, "scale_start": None, "scale_drift": None}])
    texts = tables()["probe_affine"].texts["digits, resnet18"]
    assert (texts["gamma"].item(), texts["drift of beta"].item()) == ("--", "0.200")
