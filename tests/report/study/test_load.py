import json
import math
from datetime import timedelta
from pathlib import Path

import pytest

from normlab.common.errors import UserError
from normlab.report.study import load
from normlab.report.study.load import MOST_COLUMNS


def labels(study):
    runs = load(study).runs
    return sorted(zip(runs["setting"], runs["arm"], runs["batch"], strict=True))


def test_one_row_per_run_and_one_per_evaluation(add_run, study):
    add_run("bn")
    add_run("none", accuracies=(0.1, 0.2, None), state="diverged", probe={"ics": {"times": 20}})
    found = load(study)
    assert len(found.runs) == 2
    assert found.evaluations["test_accuracy"].isna().sum() == 1
    assert found.evaluations.groupby("arm")["test_accuracy"].agg(["size", "max"]).to_numpy().tolist() == [
        *([3, 0.9], [3, 0.2])
    ]
    assert set(found.runs["setting"]) == {"digits, resnet18"}  # with a probe and without
    assert (found.probes, found.warnings) == ({}, [])


def test_options_that_vary_within_a_norm_are_part_of_the_arms_name(add_run, study):
    add_run("bn", norm__eps=1e-3)
    add_run("bn", norm__eps=1e-5)
    add_run("none")  # which has no eps
    add_run("gn")
    add_run("gn", norm_batch=4)
    assert {arm for _, arm, _ in labels(study)} == {
        *("bn (eps=0.001)", "bn (eps=1e-05)", "none", "gn", "gn (norm_batch=4)")
    }


@pytest.mark.parametrize(
    ("setting", "value", "title"),
    [
        ("depth", 34, "digits, resnet34"),
        ("dataset__name", "cifar10", "cifar10, resnet18"),
        ("optimizer__lr", 0.01, "digits, resnet18, optimizer.lr=0.01"),
        ("epochs", 2, "digits, resnet18, epochs=2"),
        ("dataset__train_size", 100, "digits, resnet18, dataset.train_size=100"),
    ],
)
def test_any_other_setting_that_varies_is_another_table(add_run, study, setting, value, title):
    add_run()
    add_run(**{setting: value}, accuracies=(0.5, 0.6))
    settings = [found for found, _, _ in labels(study)]
    assert title in settings
    assert len(set(settings)) == 2


@pytest.mark.parametrize(
    ("setting", "values", "ends"),
    [
        ("optimizer__momentum", (0.9999999, 0.9999995), ("momentum=0.9999995", "momentum=0.9999999")),
        ("optimizer__lr", (0.1, 0.1 + 1e-9), ("lr=0.1", "lr=0.100000001")),
        ("norm__eps", (1e-5, 1.0000001e-5), ("(eps=1.0000001e-05)", "(eps=1e-05)")),
        ("norm__window", (1234567, 1234568), ("(window=1234567)", "(window=1234568)")),
        ("model__kwargs", ({"a": True}, {"a": 1}), ("kwargs.a=1", "kwargs.a=true")),
        ("model__kwargs", ({"a": None}, {"a": "null"}), ("kwargs.a='null'", "kwargs.a=null")),
        ("model__kwargs", ({"a": "", "b": 0}, {"b": 0}), ("kwargs.a=''", "kwargs.a=")),
    ],
)
def test_runs_of_different_settings_are_never_one_cell_however_near_these_are(add_run, study, setting, values, ends):
    for value in values:
        add_run("bn", **{setting: value})
    found = load(study)
    assert found.states()["done"] == 2
    assert found.warnings == []
    assert len({*labels(study)}) == 2
    assert all(
        any(f"{where}, {arm}".endswith(f"{end}, bn") or arm.endswith(end) for where, arm, _ in labels(study))
        for end in ends
    )


def test_an_imported_arm_that_is_called_like_a_label_stays_an_arm_of_its_own(add_run, study):
    add_run("bn", norm__eps=1e-3)
    add_run("bn", norm__eps=1e-5)
    add_run("bn (eps=0.001)", norm__imported=True)
    assert [arm for _, arm, _ in labels(study)] == ["bn (eps=0.001)", "bn (eps=0.001) (imported)", "bn (eps=1e-05)"]


def test_where_a_run_was_carried_out_is_no_setting(add_run, study):
    add_run("bn", dataset__path="/a", output_dir="outputs")
    add_run("none", dataset__path="/b", output_dir="elsewhere")
    assert {setting for setting, _, _ in labels(study)} == {"digits, resnet18"}


def test_a_learning_rate_scaled_with_the_batch_does_not_split_the_table(add_run, study):
    for norm in ("bn", "none"):
        add_run(norm, 8, optimizer__lr=0.01)
        add_run(norm, 32, optimizer__lr=0.04)
    found = load(study)
    assert set(found.runs["setting"]) == {"digits, resnet18"}
    assert found.remarks == {"digits, resnet18": "optimizer.lr follows the batch size: 0.01 at 8, 0.04 at 32."}


def test_a_folder_without_status_and_a_gap_of_the_grid_are_missing(add_run, study):
    add_run("bn", 8)
    add_run("bn", 32)
    add_run("none", 8, state=None)  # and none at batch 32 has no folder at all
    found = load(study)
    assert found.states()["missing"] == 2
    assert len(found.runs) == 4


def test_a_running_run_that_is_silent_is_noted(add_run, study, now):
    add_run("bn", state="running", accuracies=())
    add_run("none", state="running", accuracies=(), status={"heartbeat": (now - timedelta(minutes=7)).isoformat()})
    notes = load(study, now=now + timedelta(seconds=60)).runs.set_index("arm")["note"]
    assert notes["bn"] == ""
    assert notes["none"] == "no sign of life for 8 min"


def test_a_failed_runs_note_is_its_error_on_a_line(add_run, study):
    add_run(state="failed", status={"error": "ValueError: wrong\nTraceback ..."})
    assert load(study).runs["note"].item() == "ValueError: wrong Traceback ..."


@pytest.mark.parametrize(
    ("file", "content"),
    [("status.json", '{"state": "do'), ("status.json", "[]"), ("config.yaml", "norm: ["), ("config.yaml", "study: x")],
)
def test_a_damaged_file_costs_only_its_own_run(add_run, study, file, content):
    add_run("bn")
    damaged = add_run("none")
    (damaged / file).write_text(content)
    found = load(study)
    assert found.states()["unreadable"] == 1
    assert found.states()["done"] == 1
    [warning] = found.warnings
    assert str(damaged / file) in warning


def test_columns_of_one_run_cost_no_other_run(add_run, study):
    for seed in range(3):
        add_run("bn", seed=seed)
    whole = load(study).evaluations
    for seed in range(3):
        folder = add_run("affine", seed=seed)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        odd = {f"odd{seed}_{number}": 1.0 for number in range(80)}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(odd | row) + "\n" for row in rows))
    found = load(study)
    assert found.states()["done"] == 6
    assert set(whole.columns) <= set(found.evaluations.columns)
    assert len(found.evaluations.columns) <= MOST_COLUMNS + 10
    assert any("left out, as the study's files have more than" in warning for warning in found.warnings)


def test_an_unreadable_line_is_left_out_with_a_warning(add_run, study):
    folder = add_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "{bad", lines[2]]))
    found = load(study)
    assert list(found.evaluations["epoch"]) == [1, 3]
    assert any("metrics.jsonl, line 2" in warning for warning in found.warnings)
    assert found.states()["done"] == 1


def test_without_its_last_evaluation_a_done_run_has_no_final_accuracy(add_run, study):
    folder = add_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:2]))
    found = load(study)
    assert found.states()["unreadable"] == 1
    assert any("lacks the evaluation after epoch 3" in warning for warning in found.warnings)


def test_a_copy_of_a_run_does_not_count_twice(add_run, study):
    folder = add_run()
    copy = folder.with_name("a-copy")
    copy.mkdir()
    (copy / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    found = load(study)
    assert list(found.runs["run"]) == [folder.name]  # the finished one, though the copy comes first
    assert "a-copy is the same run" in found.warnings[0]


def test_faults_of_one_kind_are_one_warning_with_their_number_and_the_first_names(add_run, study):
    norms = ("bn", "none", "gn", "ln", "in")
    folders = {norm: add_run(norm) for norm in norms} | {f"{norm} again": add_run(norm, seed=1) for norm in norms}
    whole = add_run("bn", seed=2)
    for norm in norms:
        (folders[norm] / "status.json").write_text("{")
        rows = (folders[f"{norm} again"] / "metrics.jsonl").read_text().splitlines()
        (folders[f"{norm} again"] / "metrics.jsonl").write_text("\n".join([*rows[:2], "{bad", "{worse"]))
        (whole.with_name(f"copy-{norm}")).mkdir()
        (whole.with_name(f"copy-{norm}") / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    told = load(study).warnings
    counted = {
        "5 runs cannot be read": [folders[norm].name for norm in norms],
        "10 lines of records cannot be read": [f"{folders[f'{norm} again'].name}/metrics.jsonl" for norm in norms],
        "5 runs lack the evaluation": [folders[f"{norm} again"].name for norm in norms],
        "5 folders hold the same runs": [f"copy-{norm}" for norm in norms],
    }
    assert len(told) == len(counted)
    for begins, names in counted.items():
        [sentence] = [each for each in told if each.startswith(begins)]
        assert f"{', '.join(sorted(names)[:3])} and 2 more." in sentence
        assert "\n" not in sentence


def test_measurements_have_their_runs_place_and_numbers_where_there_are_numbers(add_run, add_probe, study):
    rows = [
        {"step": 3, "layer": "conv1", "position": 0, "norm": 0.5, "edges": [0.0, 1.0]},
        {"step": 3, "layer": "fc", "position": 1, "norm": None, "edges": None},
    ]
    add_probe(add_run("bn", 32, 7), "gradients", rows)
    add_probe(add_run("none", state="diverged", accuracies=()), "gradients", rows[:1])
    found = load(study).probes["gradients"]
    place = found.loc[found["layer"] == "fc", ["setting", "arm", "batch", "seed", "state"]]
    assert place.to_numpy().tolist() == [["digits, resnet18", "bn", 32, 7, "done"]]
    assert sorted(found["state"]) == ["diverged", "done", "done"]
    assert found["norm"].dtype == float
    assert found.set_index("layer").loc["fc", "norm"] != found.set_index("layer").loc["fc", "norm"]  # nan
    assert found.loc[found["layer"] == "conv1", "edges"].tolist() == [[0.0, 1.0]] * 2


def test_a_measurement_that_cannot_be_read_costs_itself_and_leaves_a_warning(add_run, add_probe, study):
    run = add_run()
    add_probe(run, "ics", [{"step": 0, "layer": "fc", "l2": 1.0}, {"layer": "fc", "l2": 2.0}])
    with (run / "probes" / "ics.jsonl").open("a") as file:
        file.write('{"step": 1, "layer"\n')
    add_probe(run, "ics", [{"step": 2, "layer": "fc", "l2": 3.0}])
    found = load(study)
    assert found.probes["ics"]["l2"].tolist() == [1.0, 3.0]
    [warning] = found.warnings
    assert warning.startswith(f"2 lines of records cannot be read and are left out, of {run.name}/probes/ics.jsonl.")
    assert "ics.jsonl, line 2 cannot be read" in warning
    assert found.states()["done"] == 1


def test_a_moment_that_was_measured_twice_counts_as_measured_last(add_run, add_probe, study):
    run = add_run()
    add_probe(
        run, "ics", [{"step": step, "layer": "fc", "l2": value} for step, value in ((0, 1.0), (1, 2.0), (1, 5.0))]
    )
    assert load(study).probes["ics"]["l2"].tolist() == [1.0, 5.0]


def test_of_a_run_with_and_without_probes_the_one_with_probes_is_kept(add_run, add_probe, tmp_path, now) -> None:
    for seed in range(4):  # names have a hash, so that neither is always first
        add_run("bn", seed=seed)
        run = add_run("bn", seed=seed, probe={"sharpness": {"name": "sharpness", "times": 5}})
        add_probe(
            run, "sharpness", [{"step": 0, "eigenvalue": 1.0, "iterations": 3, "converged": True, "weight_norm": 1.0}]
        )
    study = load(tmp_path / "outputs" / "study", now=now)
    assert len(study.runs) == 4
    assert sorted(study.probes["sharpness"]["seed"]) == [0, 1, 2, 3]


def test_a_study_is_found_by_its_name_and_by_its_folder(add_run, tmp_path, monkeypatch) -> None:
    add_run(study="mine")
    add_run(study="papers/mine", seed=3)
    monkeypatch.chdir(tmp_path)
    of_a_paper = load("papers/mine")
    assert (of_a_paper.name, of_a_paper.runs["seed"].tolist()) == ("papers/mine", [3])
    found = load("mine"), load("mine", tmp_path / "outputs"), load("outputs/mine"), load(tmp_path / "outputs" / "mine")
    assert [(study.name, study.runs["seed"].tolist()) for study in found] == [("mine", [0])] * 4


@pytest.mark.parametrize("asked", ["min", "outputs/min", Path("outputs/min"), "elsewhere"])
def test_a_study_that_does_not_exist_is_a_sentence(add_run, tmp_path, monkeypatch, asked) -> None:
    add_run(study="mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(asked)
    assert "holds no runs" in str(error.value) or "Studies there: mine." in str(error.value)
    assert asked != "min" or "Did you mean study=mine?" in str(error.value)


def test_results_say_of_each_run_what_varied_and_what_came_out(add_run, study) -> None:
    add_run("bn", seed=0, accuracies=(0.5, 0.9, 0.8), status={"wall_seconds": 7.5})
    add_run("bn", seed=1, optimizer__lr=0.2)
    add_run("none", batch=32, state="diverged", accuracies=(0.4, None), status={"diverged_step": 13})
    add_run("none", batch=32, seed=1, state=None)
    results = load(study).results().set_index(["arm", "batch", "seed"])
    assert len(results) == 4  # no gaps
    first = results.loc[("bn", 8, 0)]
    assert first[["optimizer.lr", "norm.name", "norm.eps"]].tolist() == [0.1, "bn", 1e-5]
    assert (first["epoch"], first["test_accuracy"], first["best_test_accuracy"]) == (3, 0.8, 0.9)
    assert (first["test_loss"], first["best_test_loss"]) == pytest.approx((0.2, 0.1))
    assert first[["epochs", "wall_seconds", "peak_memory_bytes", "parameters"]].tolist() == [3, 7.5, 2**20, 7]
    assert results.loc[("bn", 8, 1), "optimizer.lr"] == 0.2
    diverged = results.loc[("none", 32, 0)]
    assert (diverged["state"], diverged["epoch"], diverged["best_test_accuracy"]) == ("diverged", 2, 0.4)
    assert diverged["note"] == "at step 13"
    assert math.isnan(diverged["test_accuracy"])
    assert results.loc[("none", 32, 1), ["state"]].item() == "missing"
    assert math.isnan(results.loc[("none", 32, 1), "epoch"])
    elsewhere = {"dataset.path", "output_dir", "depth", "study", "batch", "seed", "norm._target_"}
    assert not elsewhere & set(results.columns)


def test_results_of_a_damaged_run_and_of_a_regression_have_what_there_is(add_run, add_losses, study) -> None:
    (add_losses("bn", (300.0, 20.0, 40.0)) / "provenance.json").unlink()
    (add_run("none") / "config.yaml").write_text("{")
    results = load(study).results().set_index("state")
    assert results.loc["done", ["train_loss", "test_loss", "best_test_loss"]].tolist() == [36.0, 40.0, 20.0]
    assert "test_accuracy" not in results
    assert math.isnan(results.loc["unreadable", "test_loss"])


def test_settings_that_vary_stand_under_their_own_names(add_run, study) -> None:
    add_run(epochs=3)
    add_run(epochs=2, accuracies=(0.5, 0.6), probe={"ics": {"times": 20}})
    results = load(study).results()
    assert len(set(results.columns)) == len(results.columns)
    assert sorted(results["epochs"]) == [2, 3]
    assert not [column for column in results if column.startswith("probe")]


def test_a_study_shows_its_name_and_its_runs_by_state(add_run, study) -> None:
    add_run("bn", seed=0)
    add_run("bn", seed=1, state="failed", status={"error": "Wrong."})
    add_run("none", seed=1)
    assert repr(load(study)) == "Study study: 2 done, 1 failed, 1 missing"
